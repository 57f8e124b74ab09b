//! Numbers for other programs: a CSV per chart, and one JSON summary.

use super::view::{Overview, PARTS, PlanView, TierView};
use super::{Group, Report};
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tier_plan_runtime::formats::SourceId;

/// Rows under a header.
#[derive(Debug, Clone)]
pub(super) struct Table {
    pub head: Vec<&'static str>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(head: &[&'static str]) -> Self {
        Table {
            head: head.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, row: impl Into<Vec<String>>) {
        self.rows.push(row.into());
    }

    /// Encodes the table as RFC 4180 with line feeds as line ends.
    pub(super) fn to_csv(&self) -> String {
        let mut csv = self.head.join(",");
        csv.push('\n');
        for row in &self.rows {
            for (i, cell) in row.iter().enumerate() {
                if i > 0 {
                    csv.push(',');
                }
                if cell.contains(['"', ',', '\n', '\r']) {
                    csv.push('"');
                    csv.push_str(&cell.replace('"', "\"\""));
                    csv.push('"');
                } else {
                    csv.push_str(cell);
                }
            }
            csv.push('\n');
        }
        csv
    }
}

/// Formats a number for CSV: as short as it reads back exactly, empty when there is none.
pub(super) fn number(value: Option<f64>) -> String {
    value
        .filter(|v| v.is_finite())
        .map(|v| v.to_string())
        .unwrap_or_default()
}

fn json_number(value: Option<f64>) -> Value {
    value
        .filter(|v| v.is_finite())
        .map_or(Value::Null, |v| json!(v))
}

fn source(id: Option<&SourceId>) -> Value {
    id.map_or(
        Value::Null,
        |id| json!({ "name": id.name, "hash": id.hash }),
    )
}

/// Encodes `summary.json`: every plan with its speeds and bytes. Seconds and bytes are per decoded
/// token where so named.
pub(super) fn summary(report: &Report, groups: &[Group]) -> Result<String> {
    let overviews = groups.iter().map(|g| Overview::new(&g.report));
    let overviews: Vec<Overview<'_>> = overviews.collect();
    let headline: Vec<String> = overviews.iter().flat_map(Overview::headline).collect();
    let same: Vec<bool> = overviews.iter().filter_map(Overview::same_output).collect();
    let plans = overviews.iter().flat_map(|o| o.plans.iter().map(plan));
    let summary = json!({
        "version": 1,
        "title": report.title,
        "generated": report.generated,
        "host": report.host,
        "emulated": overviews.iter().any(|o| o.emulated),
        "headline": headline.join(" "),
        "same_output": (!same.is_empty()).then(|| same.iter().all(|same| *same)),
        "plans": plans.collect::<Vec<_>>(),
        "notes": report.notes,
    });
    let mut text = serde_json::to_string_pretty(&summary).context("writing summary.json")?;
    text.push('\n');
    Ok(text)
}

fn plan(p: &PlanView<'_>) -> Value {
    let records = &p.entry.records;
    let placement = p.entry.placement.as_ref();
    let model = records
        .iter()
        .find_map(|r| r.model.as_ref())
        .or(placement.map(|p| &p.model));
    let machine = records
        .iter()
        .find_map(|r| r.machine.as_ref())
        .or(placement.map(|p| &p.machine));
    let sum = |of: fn(&LayerSums) -> f64| of(&layer_sums(p));
    let mut value = json!({
        "plan": p.name(),
        "status": p.status,
        "gap": json_number(p.gap),
        "model": source(model),
        "machine": source(machine),
        "emulated": p.emulated,
        "runs": records.len(),
        "decode_tok_s": json_number(p.decode.map(|d| d.tok_s)),
        "decode_tok_s_min": json_number(p.decode.map(|d| d.min)),
        "decode_tok_s_max": json_number(p.decode.map(|d| d.max)),
        "predicted_decode_tok_s": json_number(p.predicted_tok_s()),
        "prediction_error": json_number(p.error),
        "prompt_tok_s": json_number(p.prompt.map(|d| d.tok_s)),
        "predicted_prompt_tok_s": json_number(p.predicted.map(|d| d.prompt_tok_s)),
        "hit_rate": json_number(p.hit_rate),
        "predicted_hit_rate": json_number(p.predicted.map(|d| d.hit_rate)),
        "first_token_s": json_number(p.first_token_s),
        "dense_s": json_number((!p.layers.is_empty()).then(|| sum(|s| s.dense))),
        "expert_s": json_number((!p.layers.is_empty()).then(|| sum(|s| s.expert))),
        "solve_s": json_number(placement.map(|p| p.solver.solve_s)),
        "objective_s": json_number(placement.map(|p| p.solver.objective_s)),
        "bound_s": json_number(placement.and_then(|p| p.solver.bound_s)),
        "tiers": p.tiers.iter().map(tier).collect::<Vec<_>>(),
    });
    value["host"] = json!(records.first().map(|r| r.host.as_str()));
    value["threads"] = json!(p.threads());
    value["context"] = json!(p.context());
    value["model_bytes"] = json!(p.model_bytes());
    let limit = p.limit();
    value["limited_by"] = json!(limit.as_ref().map(|l| l.by.as_str()));
    value["limited_by_share"] = json_number(limit.map(|l| l.share));
    if let Some(observed) = p.observed_tok_s() {
        value["observed_decode_tok_s"] = json_number(Some(observed));
    }
    value
}

struct LayerSums {
    dense: f64,
    expert: f64,
}

fn layer_sums(p: &PlanView<'_>) -> LayerSums {
    LayerSums {
        dense: p.layers.iter().map(|l| l.dense_s).sum(),
        expert: p.layers.iter().map(|l| l.expert_s).sum(),
    }
}

fn tier(t: &TierView) -> Value {
    let mut map = Map::new();
    map.insert("tier".into(), json!(t.name));
    map.insert("emulated".into(), json!(t.emulated));
    map.insert("budget_bytes".into(), json!(t.budget_bytes));
    map.insert("used_bytes".into(), json!(t.used_bytes()));
    for ((key, _, _), bytes) in PARTS.iter().zip(t.part_bytes) {
        map.insert(format!("{key}_bytes"), json!(bytes));
    }
    map.insert("read_bytes_per_token".into(), json_number(t.read_bytes));
    map.insert("busy_s_per_token".into(), json_number(t.busy_s));
    Value::Object(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_quotes_what_it_must() {
        let mut table = Table::new(&["a", "b"]);
        table.push(["x,y".to_string(), "say \"hi\"\n".to_string()]);
        table.push(["plain".to_string(), number(Some(0.1))]);
        table.push([number(Some(f64::NAN)), number(None)]);
        assert_eq!(
            table.to_csv(),
            "a,b\n\"x,y\",\"say \"\"hi\"\"\n\"\nplain,0.1\n,\n"
        );
    }
}
