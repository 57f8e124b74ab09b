//! Where the numbers of a page come from: files, machine, settings, and dates.

use super::{Kind, Page, escape};
use crate::report::text::sig3;
use crate::report::view::Overview;
use std::fmt::Write as _;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::units::show_bytes;

/// Writes the section on the sources of the numbers.
pub(super) fn write(page: &mut Page, o: &Overview<'_>, level: &str) {
    let mut facts: Vec<(&str, String)> = Vec::new();
    let mut add = |what: &'static str, values: Vec<String>| {
        let mut seen: Vec<String> = Vec::new();
        for value in values {
            if !value.is_empty() && !seen.contains(&value) {
                seen.push(value);
            }
        }
        if !seen.is_empty() {
            facts.push((what, seen.join("<br>")));
        }
    };
    let id = |s: &SourceId| format!("{} <code>{}</code>", escape(&s.name), escape(&s.hash));
    let records = || o.plans.iter().flat_map(|p| &p.entry.records);
    let placements = || o.plans.iter().filter_map(|p| p.entry.placement.as_ref());
    let models = records()
        .filter_map(|r| r.model.as_ref())
        .chain(placements().map(|p| &p.model));
    add("Model", models.map(id).collect());
    let profiles = placements()
        .filter_map(|p| p.profile.as_ref())
        .chain(o.report.profile.as_ref().map(|p| &p.id));
    add("Profile", profiles.map(id).collect());
    add(
        "Profile made with",
        o.report.profile.iter().map(|p| escape(&p.made)).collect(),
    );
    let machines = records()
        .filter_map(|r| r.machine.as_ref())
        .chain(placements().map(|p| &p.machine));
    add("Machine file", machines.map(id).collect());
    let tiers = placements().flat_map(|p| &p.tiers).map(|t| {
        let how = if t.tier.emulated { "emulated" } else { "real" };
        escape(&format!(
            "{}: {} GB/s, {} µs, {how} ({})",
            t.tier.name,
            sig3(t.tier.read_gbps),
            sig3(t.tier.latency_us),
            t.tier.source
        ))
    });
    let setups = || records().filter_map(|r| r.setup.as_ref());
    // A plan says more of its tiers than its records do.
    let has_plan = placements().next().is_some();
    let recorded = setups()
        .filter(|_| !has_plan)
        .flat_map(|s| &s.tiers)
        .map(|t| {
            let rate = t.read_gbps.map(sig3);
            let rate = rate.map_or("not measured".to_string(), |r| format!("{r} GB/s"));
            let kind = match t.name == t.kind {
                true => String::new(),
                false => format!(" ({})", t.kind),
            };
            escape(&format!("{}{kind}: {rate}", t.name))
        });
    add("Tiers", tiers.chain(recorded).collect());
    let hosts = records()
        .map(|r| r.host.as_str())
        .chain([o.report.host.as_str()]);
    add("Ran on", hosts.map(escape).collect());
    let room = setups().map(|s| {
        let texts = match s.sequences {
            0 | 1 => "one text".to_string(),
            n => format!("{n} texts"),
        };
        escape(&format!(
            "{texts} of {} tokens, keys and values as {}",
            s.context, s.kv_type
        ))
    });
    add("Room for", room.collect());
    let weights = o.plans.iter().filter_map(|p| p.model_bytes());
    add("Weights", weights.map(show_bytes).collect());
    add(
        "Threads and kernels",
        records()
            .map(|r| escape(&format!("{} threads, {}", r.threads, r.isa)))
            .collect(),
    );
    let mut dates: Vec<&str> = records()
        .map(|r| r.when.as_str())
        .filter(|w| !w.is_empty())
        .collect();
    dates.sort_unstable();
    if let (Some(first), Some(last)) = (dates.first(), dates.last()) {
        let runs = dates.len();
        let span = if first == last {
            (*first).to_string()
        } else {
            format!("{first} to {last}")
        };
        add("Runs", vec![escape(&format!("{runs}, {span}"))]);
    }
    let same = o.same_output().map(|same| match same {
        true => "all plans produced the same tokens".to_string(),
        false => "the plans did not all produce the same tokens: their runs differ in prompt, length or sampling, or \
                  a placement changed the output, which it must not"
            .to_string(),
    });
    add("Output", same.into_iter().collect());
    let programs = setups().map(|s| escape(&format!("tier-plan {}", s.program)));
    add("Program", programs.collect());
    let mut html = format!("<{level}>Where the numbers come from</{level}>\n<dl>\n");
    for (what, value) in facts {
        let _ = writeln!(html, "<dt>{what}</dt><dd>{value}</dd>");
    }
    if page.kind == Kind::Folder {
        html.push_str(
            "<dt>Numbers</dt><dd><a href=\"summary.json\">summary.json</a>, and a CSV file beside each chart</dd>\n",
        );
    }
    html.push_str("</dl>\n");
    page.put(&html);
}
