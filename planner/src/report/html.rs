//! The page: one self-contained file, for light and dark screens.

use super::chart::Chart;
use super::ink::dark_css;
use super::text::{percent, sig3, signed_percent};
use super::view::{Budgets, Overview, PlanView};
use crate::printable::is_control;
use std::fmt::Write as _;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::units::show_bytes;

const CSS: &str = "\
:root { color-scheme: light dark; --page: #f4f5f7; --card: #ffffff; --text: #1b1f24; --muted: #59616b; --line: #dfe3e8; \
--mark: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --page: #0d1013; --card: #15191e; --text: #e9ecef; --muted: #a5aeb8; \
--line: #2b3139; --mark: #3d9bdc } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1150px; margin: 0 auto; padding: 28px 24px 60px }
h1 { font-size: 1.5rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
.when, figcaption, .small { color: var(--muted) } .small { font-size: .87rem }
.headline { font-size: 1.15rem; border-left: 4px solid var(--mark); padding: .1rem 0 .1rem 1rem; margin: 1.2rem 0 }
.headline p { margin: .3rem 0 }
figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0 0 1.6rem; padding: 8px; \
overflow-x: auto }
figure svg { display: block; width: 100%; min-width: 720px; height: auto; font-family: sans-serif }
figcaption { padding: .3rem 16px .6rem; max-width: 62rem }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .45rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child, .left { text-align: left } tr:last-child td { border-bottom: 0 }
th { color: var(--muted); font-weight: 500; font-size: .87rem; vertical-align: bottom } tr.best td { font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0 } dt { color: var(--muted) }
dd { margin: 0; overflow-wrap: anywhere } code { font: .87em ui-monospace, monospace } a { color: var(--mark) }
@media print { figure, tr { break-inside: avoid } }
";

/// Escapes text for HTML, XML, and quoted attributes. Characters that XML forbids become `�`.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\t' | '\n' | '\r' => safe.push(' '),
            c if is_control(c) || matches!(c, '\u{fffe}' | '\u{ffff}') => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// Returns a chart as a file of its own, with the style sheet for dark pages.
pub(super) fn standalone_svg(svg: &str) -> String {
    match svg.find('>') {
        Some(end) => format!(
            "{}<style>{}</style>{}",
            &svg[..=end],
            dark_css(),
            &svg[end + 1..]
        ),
        None => svg.to_string(),
    }
}

/// Writes the page. `drawn` are the charts' SVG documents, in the order of `charts`.
pub(super) fn page(o: &Overview<'_>, charts: &[Chart], drawn: &[String]) -> String {
    let mut html = String::with_capacity(64 * 1024 + drawn.iter().map(String::len).sum::<usize>());
    let title = if o.report.title.is_empty() {
        "Plans side by side"
    } else {
        &o.report.title
    };
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{}</title>\n\
         <style>\n{CSS}{}</style>\n</head>\n<body>\n<main>\n<h1>{}</h1>\n",
        escape(title),
        dark_css(),
        escape(title)
    );
    let _ = writeln!(html, "<p class=\"when\">{}</p>", escape(&when(o)));
    html.push_str("<section class=\"headline\">\n");
    for sentence in o.headline() {
        let _ = writeln!(html, "<p>{}</p>", escape(&sentence));
    }
    html.push_str("</section>\n");
    if !o.plans.is_empty() {
        plan_table(&mut html, o);
    }
    html.push_str("<h2>Charts</h2>\n");
    for (chart, svg) in charts.iter().zip(drawn) {
        let _ = writeln!(
            html,
            "<figure id=\"{0}\">\n{1}<figcaption>{2} <span class=\"small\">Files: <a href=\"{0}.svg\">SVG</a>, \
             <a href=\"{0}.png\">PNG</a>, <a href=\"{0}.csv\">numbers</a>.</span></figcaption>\n</figure>",
            chart.file,
            svg,
            escape(&chart.how)
        );
    }
    if charts.is_empty() {
        html.push_str("<p>There was nothing to draw.</p>\n");
    }
    provenance(&mut html, o);
    html.push_str("</main>\n</body>\n</html>\n");
    html
}

fn when(o: &Overview<'_>) -> String {
    let parts: Vec<&str> = [o.report.generated.as_str(), o.report.host.as_str()]
        .into_iter()
        .filter(|s| !s.is_empty())
        .collect();
    parts.join(" · ")
}

fn plan_table(html: &mut String, o: &Overview<'_>) {
    let faster: Vec<&str> = match o.tiers.split_last() {
        Some((_, faster)) => faster.iter().map(|(n, _)| n.as_str()).collect(),
        None => Vec::new(),
    };
    let (measured, predicted) = if o.emulated {
        (
            "measured on<br>emulated tiers",
            "predicted from<br>emulated rates",
        )
    } else {
        ("measured", "predicted")
    };
    let _ = write!(
        html,
        "<h2>Plans</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>plan</th><th class=\"left\">status</th>\
         <th>proven<br>gap</th><th>decode tok/s,<br>{measured}</th><th>decode tok/s,<br>{predicted}</th>\
         <th>measured vs<br>predicted</th><th>prompt tok/s,<br>{measured}</th><th>hit<br>rate</th>"
    );
    for tier in &faster {
        let _ = write!(html, "<th>bytes in<br>{}</th>", escape(tier));
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for (i, plan) in o.plans.iter().enumerate() {
        row(html, o, plan, &faster, i == 0 && plan.speed().is_some());
    }
    html.push_str("</tbody></table></div>\n");
    let same = match &o.budgets {
        Budgets::Equal => "All plans were made for the same budgets.".to_string(),
        Budgets::Differ(what) => format!("The budgets differ: {what}."),
        Budgets::Unknown => "The budgets of some plans are not known here.".to_string(),
    };
    let mut small = format!(
        "{same} The hit rate is the share of expert accesses served from pins or slots. A plan's proven gap says how \
         much faster than its pins and slots, at most, any others under the same budgets and cost model could be, \
         with slots refilled by LRU."
    );
    if o.emulated && o.plans.iter().any(|p| !p.emulated) {
        small.push_str(
            " † Some of this plan's tiers are emulated: real memory slowed to a declared speed.",
        );
    } else if o.emulated {
        small.push_str(" Emulated tiers are real memory slowed to a declared speed.");
    }
    let _ = writeln!(html, "<p class=\"small\">{}</p>", escape(&small));
}

fn row(html: &mut String, o: &Overview<'_>, p: &PlanView<'_>, faster: &[&str], best: bool) {
    let dash = || "–".to_string();
    let _ = write!(
        html,
        "<tr{}><td>{}</td><td class=\"left\">{}</td>",
        if best { " class=\"best\"" } else { "" },
        escape(&o.label(p)),
        escape(if p.status.is_empty() {
            "–"
        } else {
            &p.status
        })
    );
    let mut cells = vec![
        p.gap.map_or_else(dash, |g| {
            if g.abs() < 5e-5 {
                "0 %".into()
            } else {
                format!("{:.2} %", g * 100.0)
            }
        }),
        p.decode.map_or_else(dash, |d| sig3(d.tok_s)),
        p.predicted_tok_s().map_or_else(dash, sig3),
        p.error.map_or_else(dash, signed_percent),
        p.prompt.map_or_else(dash, |d| sig3(d.tok_s)),
        p.hit_rate.map_or_else(dash, percent),
    ];
    for tier in faster {
        let found = p.tiers.iter().find(|t| t.name == *tier);
        cells.push(found.map_or_else(dash, |t| show_bytes(t.used_bytes())));
    }
    for cell in cells {
        let _ = write!(html, "<td>{}</td>", escape(&cell));
    }
    html.push_str("</tr>\n");
}

/// Writes the section on the sources of the numbers.
fn provenance(html: &mut String, o: &Overview<'_>) {
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
    add("Tiers", tiers.collect());
    add(
        "Ran on",
        records()
            .map(|r| escape(&r.host))
            .chain([escape(&o.report.host)])
            .collect(),
    );
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
    add("Report made", vec![escape(&o.report.generated)]);
    html.push_str("<h2>Where the numbers come from</h2>\n<dl>\n");
    for (what, value) in facts {
        let _ = writeln!(html, "<dt>{what}</dt><dd>{value}</dd>");
    }
    html.push_str(
        "<dt>Numbers</dt><dd><a href=\"summary.json\">summary.json</a>, and a CSV file beside each chart</dd>\n</dl>\n",
    );
    if !o.report.notes.is_empty() {
        html.push_str("<h2>Notes</h2>\n<ul>\n");
        for note in &o.report.notes {
            let _ = writeln!(html, "<li>{}</li>", escape(note));
        }
        html.push_str("</ul>\n");
    }
}
