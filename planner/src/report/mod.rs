//! The comparison report: a folder with one self-contained HTML page, its charts as SVG and PNG,
//! their numbers as CSV, and a summary for programs.
//!
//! Everything here turns plans, run records and a profile into pages. It runs nothing and solves
//! nothing.

mod chart;
mod clean;
mod facts;
mod group;
mod headline;
pub mod history;
mod html;
mod ink;
#[cfg(test)]
mod sample;
mod scene;
#[cfg(test)]
mod shared_tests;
mod table;
#[cfg(test)]
mod tests;
mod text;
mod view;

pub use group::{Group, from_records, groups};

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::formats::record::RunRecord;
use tier_plan_runtime::formats::safely::{self, NewFolders, TemporaryFolder};

/// One plan and its runs.
#[derive(Debug, Clone, Default)]
pub struct PlanEntry {
    /// Name in tables and charts.
    pub name: String,
    /// The plan. Without it, the report shows less about what fills which tier.
    pub placement: Option<Placement>,
    /// One record per prompt and repetition; none for a plan that is only predicted.
    pub records: Vec<RunRecord>,
}

impl PlanEntry {
    /// Returns the decode rate that is predicted with the rates of the runs, all their tokens by all
    /// their seconds; `None` where no run had other rates than planned.
    pub fn observed_tok_s(&self) -> Option<f64> {
        let has_own = |r: &RunRecord| r.conditions.as_ref().is_some_and(|c| c.predicted.is_some());
        self.records.iter().find(|r| has_own(r))?;
        let times = self.records.iter().filter_map(|r| {
            let tok_s = r.observed_tok_s().filter(|tok_s| *tok_s > 0.0)?;
            let tokens = r.decode_tokens as f64;
            Some((tokens, tokens / tok_s))
        });
        let (tokens, seconds) = times.fold((0.0, 0.0), |(a, b), (c, d)| (a + c, b + d));
        (seconds > 0.0).then(|| tokens / seconds)
    }
}

/// Hit rate of one layer by its number of slots.
#[derive(Debug, Clone, PartialEq)]
pub struct HitCurve {
    /// Policy and prompts of the replay, such as `LRU, held-out prompts`. Curves of one label share
    /// a panel.
    pub label: String,
    /// Layer index.
    pub layer: u32,
    /// Slot counts, ascending.
    pub slots: Vec<u32>,
    /// Share of expert accesses found in a slot, 0 to 1; one per entry of `slots`.
    pub hit_rate: Vec<f64>,
}

/// Everything that a report is made from.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Title of the page.
    pub title: String,
    /// Creation time in UTC, `2026-11-22T17:00:00Z`.
    pub generated: String,
    /// CPU that the plans ran on.
    pub host: String,
    /// Plans in any order; charts sort them by speed.
    pub plans: Vec<PlanEntry>,
    /// Profile for the map of experts.
    pub profile: Option<Profile>,
    /// Hit curves for the chart of slots.
    pub curves: Vec<HitCurve>,
    /// Runs that earlier reports kept, for the chart of predictions.
    /// [`add_own_runs`](Self::add_own_runs) adds this report's own.
    pub history: Vec<PastRun>,
    /// Remarks for the end of the page: conditions and warnings.
    pub notes: Vec<String>,
}

/// A past run and its prediction.
#[derive(Debug, Clone, PartialEq)]
pub struct PastRun {
    /// Folder of the report that kept it.
    pub report: String,
    /// Name of the plan.
    pub plan: String,
    /// Name of the model.
    pub model: String,
    /// Name of the machine that the plan was made for.
    pub machine: String,
    /// UTC time of the run.
    pub when: String,
    /// Whether it ran on emulated tiers.
    pub emulated: bool,
    /// Whether it belongs to the report that is being written.
    pub is_new: bool,
    /// Predicted decode rate, in tokens per second.
    pub predicted_tok_s: f64,
    /// Measured decode rate, in tokens per second.
    pub measured_tok_s: f64,
    /// Decode rate that is predicted with the rates of the run, where those were not as planned.
    pub observed_tok_s: Option<f64>,
}

impl PastRun {
    /// Returns measured / predicted − 1.
    pub fn error(&self) -> f64 {
        self.measured_tok_s / self.predicted_tok_s - 1.0
    }

    /// Returns measured / predicted with the rates of the run − 1; those are the planned ones where no
    /// others were recorded.
    pub fn observed_error(&self) -> f64 {
        self.measured_tok_s / self.observed_tok_s.unwrap_or(self.predicted_tok_s) - 1.0
    }

    /// Whether both speeds are positive numbers.
    pub fn is_sound(&self) -> bool {
        [self.predicted_tok_s, self.measured_tok_s]
            .iter()
            .all(|v| v.is_finite() && *v > 0.0)
    }
}

impl Report {
    /// Adds the runs of this report to those that earlier reports kept.
    pub fn add_own_runs(&mut self) {
        let own = self
            .plans
            .iter()
            .flat_map(|p| &p.records)
            .flat_map(|r| history::past(r, "", true));
        let own: Vec<PastRun> = own.collect();
        // Records given as files may be ones that a report kept.
        let same = |a: &PastRun, b: &PastRun| {
            (&a.when, &a.plan, a.measured_tok_s.to_bits())
                == (&b.when, &b.plan, b.measured_tok_s.to_bits())
        };
        self.history
            .retain(|old| !own.iter().any(|new| same(old, new)));
        self.history.extend(own);
    }
}

/// Predicted speed by the size of one tier.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Name of the model.
    pub model: String,
    /// Name of the machine.
    pub machine: String,
    /// Name of the tier.
    pub tier: String,
    /// Whether the machine has emulated tiers.
    pub emulated: bool,
    /// Points by rising size in bytes: expected, lowest, and highest tokens per second; `None`
    /// where nothing fits.
    pub points: Vec<(u64, Option<[f64; 3]>)>,
    /// Index of the point where the curve bends.
    pub knee: Option<usize>,
}

/// A chart as files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drawn {
    /// SVG document.
    pub svg: String,
    /// CSV with the chart's numbers.
    pub csv: String,
}

/// Draws a curve.
///
/// # Errors
/// When the bundled fonts cannot be read or the picture cannot be drawn.
pub fn draw_curve(curve: &Curve) -> Result<Drawn> {
    scene::check_fonts()?;
    let chart = chart::sweep::chart(curve);
    let svg = chart.scene.svg(&chart.title)?;
    Ok(Drawn {
        svg: html::standalone_svg(&svg),
        csv: chart.data.to_csv(),
    })
}

/// Summarizes the finding in sentences: which plan is fastest, by how much at which bytes, and how
/// accurate the prediction was.
pub fn headline(report: &Report) -> Vec<String> {
    view::Overview::new(report).headline()
}

/// Summarizes how accurate the predictions of all kept runs were. `None` for fewer than two runs.
pub fn history_line(report: &Report) -> Option<String> {
    let runs = report.history.iter().filter(|r| r.is_sound()).count();
    let within = report
        .history
        .iter()
        .filter(|r| r.is_sound() && r.error().abs() <= 0.1)
        .count();
    let emulated = report.history.iter().any(|r| r.emulated);
    let how = if emulated {
        " (some on emulated tiers)"
    } else {
        ""
    };
    let known = report.history.iter().filter(|r| r.is_sound());
    let observed = known.clone().any(|r| r.observed_tok_s.is_some()).then(|| {
        let within = known.filter(|r| r.observed_error().abs() <= 0.1).count();
        format!(" with the rates of their plans, and {within} with the rates that each run had")
    });
    (runs > 1).then(|| {
        format!(
            "Of all {runs} runs that reports here have kept{how}, {within} were predicted to 10 % or better{}.",
            observed.unwrap_or_default()
        )
    })
}

/// Encodes the report's `summary.json`.
///
/// # Errors
/// When a value has no JSON form.
pub fn summary_json(report: &Report) -> Result<String> {
    table::summary(report, &groups(report))
}

/// Checks that [`write()`] could create its folder, before the runs that fill the report.
///
/// # Errors
/// When `dir` names no folder, or nothing can be written beside it.
pub fn check(dir: &Path) -> Result<()> {
    if dir.file_name().is_none() {
        bail!(
            "'{}' does not name a folder for the report: give one, like reports/today",
            dir.display()
        );
    }
    let above = dir.ancestors().skip(1).find(|p| p.exists());
    match above {
        Some(above) if !above.is_dir() => {
            bail!(
                "{}: {} is not a folder; choose another --output",
                dir.display(),
                above.display()
            )
        }
        _ => safely::check_folder(parent(dir))
            .with_context(|| format!("making the report {}", dir.display())),
    }
}

fn parent(dir: &Path) -> &Path {
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Writes a report and returns its `index.html`.
///
/// Nothing is overwritten: where `dir` exists, `dir-2`, `dir-3` and so on are tried. The folder
/// appears under its name only when it is whole. Fails when the file system refuses, or when no
/// free name is found.
pub fn write(dir: &Path, report: &Report) -> Result<PathBuf> {
    scene::check_fonts()?;
    Ok(write_folder(dir, |folder| fill(folder, report))?.join("index.html"))
}

/// Creates a folder with what `fill` writes into it, by the rules of [`write()`], and returns it.
pub fn write_folder(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    check(dir)?;
    let parent = parent(dir);
    let _made = NewFolders::make(parent)?;
    let mut temporary = TemporaryFolder::create(parent)
        .with_context(|| format!("making a folder in {}", parent.display()))?;
    fill(temporary.path()).with_context(|| dir.display().to_string())?;
    publish(&mut temporary, dir)
}

/// Saves a file into a folder that [`write_folder()`] is filling. Errors name it without the
/// folder, which has a temporary name.
pub fn save(folder: &Path, name: &str, content: impl AsRef<[u8]>) -> Result<()> {
    let save = || {
        let mut file = File::create_new(folder.join(name))?;
        file.write_all(content.as_ref())?;
        file.sync_all()
    };
    save().with_context(|| format!("writing {name}"))
}

/// Most groups whose charts are drawn.
const MAX_DRAWN_GROUPS: usize = 24;

/// What is drawn of a report, and the page of it.
struct Picture<'a> {
    group: &'a Group,
    overview: view::Overview<'a>,
    charts: Vec<chart::Chart>,
    drawn: Vec<String>,
    prefix: String,
}

impl Picture<'_> {
    fn section(&self) -> html::Section<'_> {
        html::Section {
            group: self.group,
            overview: &self.overview,
            charts: &self.charts,
            drawn: &self.drawn,
            prefix: self.prefix.clone(),
        }
    }
}

/// Draws the charts of a group; files of several groups begin with the group's number.
fn picture(group: &Group, prefix: String, has_charts: bool) -> Result<Picture<'_>> {
    let overview = view::Overview::new(&group.report);
    let charts = match has_charts {
        true => chart::all(&overview),
        false => Vec::new(),
    };
    let drawn = charts.iter().map(|chart| chart.scene.svg(&chart.title));
    let drawn = drawn.collect::<Result<_>>()?;
    Ok(Picture {
        group,
        overview,
        charts,
        drawn,
        prefix,
    })
}

/// Draws a report and hands over its pictures, the last of which concerns all groups.
fn draw<T>(
    report: &Report,
    kind: html::Kind,
    done: impl FnOnce(&[Picture<'_>], String) -> Result<T>,
) -> Result<T> {
    let groups = groups(report);
    let is_only = groups.len() == 1;
    let all = Group {
        report: Report {
            history: report.history.clone(),
            ..Report::default()
        },
        ..Group::default()
    };
    let mut pictures = Vec::with_capacity(groups.len() + 1);
    for (at, group) in groups.iter().enumerate() {
        let prefix = match is_only {
            true => String::new(),
            false => format!("{}-", at + 1),
        };
        pictures.push(picture(group, prefix, at < MAX_DRAWN_GROUPS)?);
    }
    if !is_only {
        pictures.push(picture(&all, String::new(), true)?);
    }
    let sections: Vec<html::Section<'_>> = pictures.iter().map(Picture::section).collect();
    let (sections, rest) = sections.split_at(groups.len());
    let page = html::page(report, sections, rest.first(), kind);
    done(&pictures, page)
}

fn fill(dir: &Path, report: &Report) -> Result<()> {
    draw(report, html::Kind::Folder, |pictures, page| {
        for picture in pictures {
            for (chart, svg) in picture.charts.iter().zip(&picture.drawn) {
                let file = format!("{}{}", picture.prefix, chart.file);
                save(dir, &format!("{file}.svg"), html::standalone_svg(svg))?;
                save(dir, &format!("{file}.png"), chart.scene.png()?)?;
                save(dir, &format!("{file}.csv"), chart.data.to_csv())?;
            }
        }
        history::keep(dir, report)?;
        save(dir, "summary.json", summary_json(report)?)?;
        save(dir, "index.html", page)
    })
}

/// Returns the report as one page that needs no other file, of at most 4 MiB. Only runs of the report
/// itself are in it.
///
/// # Errors
/// When a chart cannot be drawn.
pub fn shared_page(report: &Report) -> Result<String> {
    scene::check_fonts()?;
    let mut own = report.clone();
    own.history.retain(|run| run.is_new);
    draw(&own, html::Kind::Shared, |_, page| Ok(page))
}

/// Takes what is private out of a report that is to be written: paths in names.
///
/// # Errors
/// When a record cannot be encoded.
pub fn clean(report: &mut Report) -> Result<()> {
    clean::report(report)
}

/// Returns the title of a report by its models and machines.
pub fn title(report: &Report) -> String {
    group::title(&groups(report))
}

/// Renames the finished folder to the first free name.
fn publish(temporary: &mut TemporaryFolder, dir: &Path) -> Result<PathBuf> {
    let numbered = |number: u32| {
        let mut name = dir.file_name().unwrap_or_default().to_os_string();
        name.push(format!("-{number}"));
        dir.with_file_name(name)
    };
    for target in std::iter::once(dir.to_path_buf()).chain((2..10_000).map(numbered)) {
        let published = temporary.publish(&target);
        if published.with_context(|| format!("naming the report {}", target.display()))? {
            return Ok(target);
        }
    }
    bail!(
        "no free name for the report: {} and 9998 numbered ones exist",
        dir.display()
    )
}
