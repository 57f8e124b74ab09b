//! The finding of a report in sentences.

use super::text::{percent, sig3};
use super::view::{Budgets, Overview, PlanView};
use crate::conditions::busy_line;
use tier_plan_runtime::formats::record::RunRecord;
use tier_plan_runtime::units::show_bytes;

impl Overview<'_> {
    /// Summarizes the finding in sentences: the winner, its lead at which bytes, and the accuracy
    /// of the prediction.
    pub(super) fn headline(&self) -> Vec<String> {
        let Some(best) = self.best() else {
            return vec![if self.plans.is_empty() {
                "There are no plans in this report.".into()
            } else {
                "None of these plans has a measured or a predicted speed.".into()
            }];
        };
        let speed = sig3(best.speed().unwrap_or(0.0));
        let how = match (best.decode.is_some(), best.emulated) {
            (true, true) => "measured on emulated tiers",
            (true, false) => "measured",
            (false, true) => "predicted from emulated rates, not measured",
            (false, false) => "predicted, not measured",
        };
        let mut lines = Vec::new();
        match self
            .rival()
            .and_then(|r| Some((r, best.speed()? / r.speed()? - 1.0)))
        {
            None => lines.push(format!("{} decodes {speed} tokens/s ({how}).", best.name())),
            Some((rival, lead)) => {
                let bytes = match &self.budgets {
                    Budgets::Equal => " under the same budgets".to_string(),
                    Budgets::Differ(what) => {
                        format!("; but {what}, so part of the difference may be bytes")
                    }
                    Budgets::Unknown => match (best.faster_bytes(), rival.faster_bytes()) {
                        (Some(a), Some(b)) => format!(
                            "; their budgets are not known, but they put {} and {} into the faster tiers",
                            show_bytes(a),
                            show_bytes(b)
                        ),
                        _ => "; their budgets are not known".to_string(),
                    },
                };
                let whom = match (best.is_baseline(), rival.is_baseline()) {
                    (false, true) => format!("{}, the best baseline", rival.name()),
                    _ => format!("{}, the next best plan", rival.name()),
                };
                let much = if lead >= 1.0 {
                    format!("{} times as fast as", sig3(lead + 1.0))
                } else if lead < 0.005 {
                    "as fast as".into()
                } else {
                    format!("{} faster than", percent(lead))
                };
                lines.push(format!(
                    "{} is the fastest plan: it decodes {speed} tokens/s ({how}), {much} {whom}{bytes}.",
                    best.name()
                ));
            }
        }
        if best.is_baseline()
            && let Some(own) = self
                .plans
                .iter()
                .find(|p| !p.is_baseline() && p.speed().is_some())
        {
            lines.push(format!(
                "The winner is a baseline: {}, the best plan that a solver made, reaches {} tokens/s.",
                own.name(),
                sig3(own.speed().unwrap_or(0.0))
            ));
        }
        let errors: Vec<f64> = self.plans.iter().filter_map(|p| p.error).collect();
        if let (Some(error), Some(predicted)) = (best.error, best.predicted_tok_s()) {
            let worst = errors.iter().fold(0f64, |w, e| w.max(e.abs()));
            let over = if errors.len() > 1 {
                format!(" Over all plans it was off by at most {}.", percent(worst))
            } else {
                String::new()
            };
            let side = if error >= 0.0 { "above" } else { "below" };
            lines.push(format!(
                "The prediction was {} tokens/s, and the measured speed is {} {side} it.{over}",
                sig3(predicted),
                percent(error.abs())
            ));
        } else if best.decode.is_some() {
            lines.push("There is no prediction to hold against that.".into());
        }
        lines.extend(self.with_rates_of_runs());
        lines.extend(self.busy());
        lines
    }

    /// Says how accurate the prediction was with the rates that the runs had, where these were others than
    /// planned.
    fn with_rates_of_runs(&self) -> Option<String> {
        let error = |plan: &PlanView<'_>| {
            let measured = plan.decode?.tok_s;
            Some((measured / plan.observed_tok_s()? - 1.0).abs())
        };
        let errors: Vec<f64> = self.plans.iter().filter_map(error).collect();
        let worst = errors.iter().copied().reduce(f64::max)?;
        let most = if errors.len() > 1 { "at most " } else { "" };
        Some(format!(
            "With the rates that memory and drive had during the runs, it was off by {most}{}.",
            percent(worst)
        ))
    }

    /// Says that the machine was busy, if runs were disturbed whose predictions do not know of it.
    fn busy(&self) -> Option<String> {
        let records = self.plans.iter().flat_map(|plan| &plan.entry.records);
        let unknown = |r: &&RunRecord| r.conditions.as_ref().is_some_and(|c| c.predicted.is_none());
        busy_line(records.filter(unknown))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;
    use tier_plan_runtime::formats::placement::Prediction;
    use tier_plan_runtime::formats::record::{Conditions, Processors};

    #[test]
    fn a_busy_machine_and_its_rates_are_told() {
        let mut report = sample::report(2, 8, 2, 2, 1, false);
        let told = |report: &crate::report::Report| Overview::new(report).headline().join("\n");
        for record in &mut report.plans[0].records {
            record.conditions = None;
        }
        let quiet = told(&report);
        assert!(
            !quiet.contains("busy") && !quiet.contains("during the runs"),
            "{quiet}"
        );

        let conditions = Conditions {
            processors: Processors {
                share: Some(0.5),
                others: Some(1.0),
                count: Some(2.0),
                ..Processors::default()
            },
            ..Conditions::default()
        };
        let measured = report.plans[0].records[0].decode_tok_s();
        for record in &mut report.plans[0].records {
            record.conditions = Some(conditions.clone());
        }
        let busy = told(&report);
        let line = "\nThis machine was busy: its threads got 50 % of the processors' time";
        assert!(busy.contains(line), "{busy}");
        assert!(busy.ends_with("run again on a quiet machine."), "{busy}");

        // Where the prediction knows of it, that is what counts.
        report.plans[0].records.truncate(1);
        report.plans[0].records[0].conditions = Some(Conditions {
            predicted: Some(Prediction {
                decode_tok_s: measured / 1.25,
                ..Prediction::default()
            }),
            ..conditions
        });
        let known = told(&report);
        let line =
            "With the rates that memory and drive had during the runs, it was off by 25\u{a0}%.";
        assert!(known.ends_with(line), "{known}");
    }
}
