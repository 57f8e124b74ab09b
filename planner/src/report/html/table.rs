//! Tables of the page: plans of a group, and groups.
//!
//! A cell with a number carries it for sorting, so that `1,024 MiB` comes after `2 GiB` is shown.

use super::{Page, Section, escape};
use crate::report::text::{percent, sig3};
use crate::report::view::{Budgets, Overview, PlanView};
use std::fmt::Write as _;
use tier_plan_runtime::units::show_bytes;

/// Shown where there is no value.
const NONE: &str = "–";

/// What the cells of a column hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Number,
    Words,
    /// Words that need some width.
    Prose,
}

/// A heading, as markup, and how its column is sorted.
struct Column {
    heading: String,
    sort: Sort,
}

/// A cell: markup, and its number where it has one.
struct Cell {
    html: String,
    value: Option<f64>,
}

impl Cell {
    fn words(text: &str) -> Self {
        let html = if text.is_empty() {
            NONE.into()
        } else {
            escape(text)
        };
        Self { html, value: None }
    }

    fn number(value: Option<f64>, show: impl Fn(f64) -> String) -> Self {
        let value = value.filter(|v| v.is_finite());
        Self {
            html: value.map_or(NONE.into(), |v| escape(&show(v))),
            value,
        }
    }
}

/// A row; its first cell is its heading.
struct Row {
    cells: Vec<Cell>,
    is_best: bool,
}

fn column(heading: &str, sort: Sort) -> Column {
    Column {
        heading: heading.into(),
        sort,
    }
}

/// Writes a table whose columns can be sorted; rows that have no room are counted.
fn write(page: &mut Page, label: &str, columns: &[Column], rows: &[Row]) {
    let mut head = format!(
        "<div class=\"scroll table\" role=\"region\" aria-label=\"{}\" tabindex=\"0\">\n<table class=\"sortable\">\n<thead><tr>",
        escape(label)
    );
    for Column { heading, sort } in columns {
        let kind = match sort {
            Sort::Number => " data-kind=\"number\"",
            Sort::Words | Sort::Prose => " class=\"left\"",
        };
        let _ = write!(head, "<th scope=\"col\"{kind}>{heading}</th>");
    }
    head.push_str("</tr></thead>\n<tbody>\n");
    const END: &str = "</tbody>\n</table>\n</div>\n";
    if !page.has_room(head.len() + END.len()) {
        page.left_out += rows.len();
        return;
    }
    page.html.push_str(&head);
    for row in rows {
        let html = row.html(columns);
        if page.has_room(html.len() + END.len()) {
            page.html.push_str(&html);
        } else {
            page.left_out += 1;
        }
    }
    page.html.push_str(END);
}

impl Row {
    fn html(&self, columns: &[Column]) -> String {
        let class = if self.is_best { " class=\"best\"" } else { "" };
        let mut html = format!("<tr{class}>");
        for (at, (cell, column)) in self.cells.iter().zip(columns).enumerate() {
            let (tag, scope) = match at {
                0 => ("th", " scope=\"row\""),
                _ => ("td", ""),
            };
            let class = match column.sort {
                Sort::Number => "",
                Sort::Words => " class=\"left\"",
                Sort::Prose => " class=\"left wide\"",
            };
            let value = cell
                .value
                .map(|v| format!(" data-v=\"{v}\""))
                .unwrap_or_default();
            let _ = write!(html, "<{tag}{scope}{class}{value}>{}</{tag}>", cell.html);
        }
        html.push_str("</tr>\n");
        html
    }
}

/// Returns the headings of measured and of predicted numbers.
fn how(emulated: bool) -> [&'static str; 2] {
    if emulated {
        [
            "measured on<br>emulated tiers",
            "predicted from<br>emulated rates",
        ]
    } else {
        ["measured", "predicted"]
    }
}

fn gap(gap: f64) -> String {
    if gap.abs() < 5e-5 {
        "0 %".into()
    } else {
        format!("{:.2} %", gap * 100.0)
    }
}

/// Returns what limited a plan, with its part of a token's time for sorting.
fn limit(p: &PlanView<'_>) -> Cell {
    let Some(limit) = p.limit() else {
        return Cell::words("");
    };
    let how = if limit.is_measured || p.decode.is_none() {
        ""
    } else {
        ", predicted"
    };
    Cell {
        html: escape(&format!("{}, {}{how}", limit.by, percent(limit.share))),
        value: None,
    }
}

/// Returns the bytes that a plan has in a tier, beside its budget there.
fn bytes(p: &PlanView<'_>, tier: &str) -> Cell {
    let Some(tier) = p.tiers.iter().find(|t| t.name == tier) else {
        return Cell::words("");
    };
    let used = tier.used_bytes();
    let budget = tier.budget_bytes.map(show_bytes);
    let of = budget.map(|b| format!("<br><span class=\"of\">of {}</span>", escape(&b)));
    Cell {
        html: format!("{}{}", escape(&show_bytes(used)), of.unwrap_or_default()),
        value: Some(used as f64),
    }
}

/// Writes the plans of one model on one machine.
pub(super) fn plans(page: &mut Page, o: &Overview<'_>, level: &str) {
    if o.plans.is_empty() {
        return;
    }
    let [measured, predicted] = how(o.emulated);
    let number = |heading: &str| column(heading, Sort::Number);
    let mut columns = vec![
        column("plan", Sort::Words),
        column("kind", Sort::Words),
        number(&format!("decode tok/s,<br>{measured}")),
        number(&format!("decode tok/s,<br>{predicted}")),
        number("measured /<br>predicted"),
        number("hit<br>rate"),
        column("limited by", Sort::Words),
    ];
    for (tier, _) in &o.tiers {
        columns.push(number(&format!("bytes in<br>{}", escape(tier))));
    }
    columns.push(number(&format!("prompt tok/s,<br>{measured}")));
    columns.extend(["threads", "context", "proven<br>gap"].map(number));
    let rows = o.plans.iter().enumerate().map(|(i, p)| {
        let whole = |v: f64| format!("{v:.0}");
        let mut cells = vec![
            Cell::words(&o.label(p)),
            Cell::words(&p.status),
            Cell::number(p.decode.map(|d| d.tok_s), sig3),
            Cell::number(p.predicted_tok_s(), sig3),
            Cell::number(p.ratio(), sig3),
            Cell::number(p.hit_rate, percent),
            limit(p),
        ];
        cells.extend(o.tiers.iter().map(|(tier, _)| bytes(p, tier)));
        cells.extend([
            Cell::number(p.prompt.map(|d| d.tok_s), sig3),
            Cell::number(p.threads().map(f64::from), whole),
            Cell::number(p.context().map(f64::from), whole),
            Cell::number(p.gap, gap),
        ]);
        Row {
            cells,
            is_best: i == 0 && p.speed().is_some(),
        }
    });
    let rows: Vec<Row> = rows.collect();
    page.put(&format!("<{level}>Plans</{level}>\n"));
    write(page, "Plans", &columns, &rows);
    page.put(&format!("<p class=\"small\">{}</p>\n", escape(&below(o))));
}

/// Returns how to read the table of plans.
fn below(o: &Overview<'_>) -> String {
    let same = match &o.budgets {
        _ if o.plans.len() < 2 => String::new(),
        Budgets::Equal => "All plans were made for the same budgets. ".to_string(),
        Budgets::Differ(what) => format!("The budgets differ: {what}. "),
        Budgets::Unknown => "The budgets of some plans are not known here. ".to_string(),
    };
    let mut small = format!(
        "{same}The hit rate is the share of expert accesses served from pins or slots. A plan is limited by what took \
         the largest part of a token's time: waiting for a tier, or computing. A plan's proven gap says how much faster \
         than its pins and slots, at most, any others under the same budgets and cost model could be, with slots \
         refilled by LRU."
    );
    if o.emulated && o.plans.iter().any(|p| !p.emulated) {
        small.push_str(
            " † Some of this plan's tiers are emulated: real memory slowed to a declared speed.",
        );
    } else if o.emulated {
        small.push_str(" Emulated tiers are real memory slowed to a declared speed.");
    }
    small
}

/// Returns the bytes that a plan has in all tiers but the last, or in its only one.
fn memory_bytes(p: &PlanView<'_>) -> Option<f64> {
    let bytes = match &p.tiers[..] {
        [one] => Some(one.used_bytes()),
        _ => p.faster_bytes(),
    };
    bytes.map(|b| b as f64)
}

/// Writes the groups: the fastest plan of each model on each machine.
pub(super) fn groups(page: &mut Page, sections: &[Section<'_>]) {
    let columns = [
        ("model", Sort::Words),
        ("machine", Sort::Prose),
        ("weights", Sort::Number),
        ("plans", Sort::Number),
        ("fastest plan", Sort::Words),
        ("decode tok/s,<br>measured", Sort::Number),
        ("decode tok/s,<br>predicted", Sort::Number),
        ("measured /<br>predicted", Sort::Number),
        ("hit<br>rate", Sort::Number),
        ("limited by", Sort::Words),
        ("bytes in<br>memory", Sort::Number),
    ];
    let columns = columns.map(|(heading, sort)| column(heading, sort));
    let bytes = |value: f64| show_bytes(value as u64);
    let mut is_emulated = false;
    let rows = sections.iter().enumerate().map(|(at, section)| {
        let best = section.overview.best();
        let model_bytes = section
            .overview
            .plans
            .iter()
            .find_map(PlanView::model_bytes);
        let mark = if best.is_some_and(|p| p.emulated) {
            "†"
        } else {
            ""
        };
        is_emulated |= !mark.is_empty();
        let model = match section.group.model.as_str() {
            "" => "a model",
            name => name,
        };
        let cells = vec![
            Cell {
                html: format!("<a href=\"#g{}\">{}</a>", at + 1, escape(model)),
                value: None,
            },
            Cell::words(&section.group.machine),
            Cell::number(model_bytes.map(|b| b as f64), bytes),
            Cell::number(Some(section.overview.plans.len() as f64), |n| {
                format!("{n:.0}")
            }),
            Cell::words(&best.map_or(String::new(), |p| p.name().to_string())),
            Cell::number(best.and_then(|p| p.decode).map(|d| d.tok_s), |v| {
                format!("{}{mark}", sig3(v))
            }),
            Cell::number(best.and_then(PlanView::predicted_tok_s), |v| {
                format!("{}{mark}", sig3(v))
            }),
            Cell::number(best.and_then(PlanView::ratio), sig3),
            Cell::number(best.and_then(|p| p.hit_rate), percent),
            best.map_or_else(|| Cell::words(""), limit),
            Cell::number(best.and_then(memory_bytes), bytes),
        ];
        Row {
            cells,
            is_best: false,
        }
    });
    let rows: Vec<Row> = rows.collect();
    page.put("<h2>Models and machines</h2>\n");
    write(page, "Models and machines", &columns, &rows);
    let mut small = "One row per model and machine, with its fastest plan. Speeds of different models or machines say \
                     nothing of their plans; a ratio near 1 says that the prediction was right."
        .to_string();
    if is_emulated {
        small.push_str(" † On emulated tiers: real memory slowed to a declared speed.");
    }
    page.put(&format!("<p class=\"small\">{}</p>\n", escape(&small)));
}
