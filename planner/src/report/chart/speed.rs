//! Chart: tokens per second, predicted and measured, plan by plan.

use super::{Chart, MARGIN, NAMES, Sign, WIDTH, begin, legend, plan_name, whisker, x_axis};
use crate::report::ink::Ink;
use crate::report::scene::{Anchor, Scene};
use crate::report::table::{Table, number};
use crate::report::text::{percent, sig3, signed_percent};
use crate::report::view::{Overview, PlanView};

/// Height of a plan's row, in pixels.
const ROW: f64 = 50.0;
/// Height of one of two bars, in pixels.
const BAR: f64 = 17.0;
/// Width of the column of deviations, in pixels.
const ERROR_COLUMN: f64 = 150.0;

pub(super) fn chart(o: &Overview<'_>) -> Chart {
    let any_measured = o.plans.iter().any(|p| p.decode.is_some());
    let any_predicted = o.plans.iter().any(|p| p.predicted_tok_s().is_some());
    let ranges = o.plans.iter().any(|p| p.decode.is_some_and(|d| d.runs > 1));
    let (mut scene, y) = begin(
        &title(o),
        "Decoding speed of each plan in tokens per second; longer is better.",
    );
    let mut signs = Vec::new();
    if any_measured {
        signs.push((Sign::Swatch(Ink::Measured), o.measured().to_string()));
    }
    if any_predicted {
        signs.push((Sign::Swatch(Ink::Predicted), o.predicted().to_string()));
    }
    if ranges {
        signs.push((Sign::Whisker, "slowest to fastest run".to_string()));
    }
    let y = legend(&mut scene, y, &signs) + 14.0;
    let (x0, x1) = (NAMES, WIDTH - MARGIN - ERROR_COLUMN - 60.0);
    if any_measured && any_predicted {
        let x = WIDTH - MARGIN;
        scene.text(
            x,
            y - 2.0,
            12.0,
            Anchor::End,
            Ink::Muted,
            "measured vs predicted",
        );
    }
    let top = y + 4.0;
    let bottom = top + 4.0 + ROW * o.plans.len() as f64;
    let largest = o
        .plans
        .iter()
        .flat_map(|p| [p.decode.map(|d| d.max), p.predicted_tok_s()])
        .flatten();
    let per_unit = x_axis(
        &mut scene,
        x0,
        x1,
        top,
        bottom,
        largest.fold(0.0, f64::max),
        6,
    );
    scene.text(
        x0,
        bottom + 36.0,
        13.0,
        Anchor::Start,
        Ink::Muted,
        "tokens per second, decoding",
    );
    for (i, plan) in o.plans.iter().enumerate() {
        let y = top + 6.0 + ROW * i as f64;
        plan_name(&mut scene, y + 0.5 * ROW, &o.label(plan), i == 0);
        row(&mut scene, plan, y, x0, per_unit);
    }
    scene.height = bottom + 52.0;
    let error = if any_measured && any_predicted {
        " The figure on the right is how far the measured speed lies above (+) or below (−) the predicted one."
    } else {
        ""
    };
    let how = format!("One row per plan, the fastest first; a longer bar is a faster plan.{error}");
    Chart {
        file: "speed",
        title: title(o),
        how,
        scene,
        data: table(o),
    }
}

/// Draws the bars of one plan in the row that begins at `y`.
fn row(scene: &mut Scene, plan: &PlanView<'_>, y: f64, x0: f64, per_unit: f64) {
    let predicted = plan.predicted_tok_s();
    let height = if plan.decode.is_some() && predicted.is_some() {
        BAR
    } else {
        2.0 * BAR
    };
    let mut bar_y = y + 2.0;
    if let Some(rate) = plan.decode {
        let end = x0 + rate.tok_s * per_unit;
        scene.rect(x0, bar_y, end - x0, height, Ink::Measured);
        let mut label = end;
        if rate.runs > 1 {
            whisker(
                scene,
                x0 + rate.min * per_unit,
                x0 + rate.max * per_unit,
                bar_y + height / 2.0,
            );
            label = label.max(x0 + rate.max * per_unit);
        }
        scene.text_on_paper(
            label + 6.0,
            bar_y + height / 2.0 + 4.5,
            13.0,
            true,
            Ink::Text,
            sig3(rate.tok_s),
        );
        bar_y += height + 2.0;
    }
    if let Some(rate) = predicted {
        scene.rect(x0, bar_y, rate * per_unit, height, Ink::Predicted);
        let x = x0 + rate * per_unit + 6.0;
        scene.text_on_paper(
            x,
            bar_y + height / 2.0 + 4.5,
            13.0,
            false,
            Ink::Muted,
            sig3(rate),
        );
    }
    if plan.decode.is_none() && predicted.is_none() {
        scene.text(
            x0 + 6.0,
            y + 0.5 * ROW,
            13.0,
            Anchor::Start,
            Ink::Muted,
            "nothing decoded, nothing predicted",
        );
    }
    if let Some(error) = plan.error {
        scene.text(
            WIDTH - MARGIN,
            y + 0.5 * ROW,
            14.0,
            Anchor::End,
            Ink::Text,
            signed_percent(error),
        );
    }
}

/// Returns the chart's numbers: one row per plan.
fn table(o: &Overview<'_>) -> Table {
    let mut data = Table::new(&[
        "plan",
        "status",
        "decode_tok_s",
        "decode_tok_s_min",
        "decode_tok_s_max",
        "runs",
        "predicted_decode_tok_s",
        "prediction_error",
        "prompt_tok_s",
        "emulated",
    ]);
    for plan in &o.plans {
        data.push([
            plan.name().to_string(),
            plan.status.clone(),
            number(plan.decode.map(|d| d.tok_s)),
            number(plan.decode.map(|d| d.min)),
            number(plan.decode.map(|d| d.max)),
            plan.decode.map_or(0, |d| d.runs).to_string(),
            number(plan.predicted_tok_s()),
            number(plan.error),
            number(plan.prompt.map(|d| d.tok_s)),
            plan.emulated.to_string(),
        ]);
    }
    data
}

fn title(o: &Overview<'_>) -> String {
    let Some((best, speed)) = o.best().and_then(|b| Some((b, b.speed()?))) else {
        return "No plan has a speed yet".into();
    };
    let how = match (best.decode.is_some(), best.emulated) {
        (true, true) => ", measured on emulated tiers",
        (true, false) => ", measured",
        (false, true) => ", predicted from emulated rates",
        (false, false) => ", predicted",
    };
    let base = format!("{} decodes {} tokens/s{how}", best.name(), sig3(speed));
    match o.rival().and_then(|r| Some((r, speed / r.speed()? - 1.0))) {
        Some((rival, lead)) if lead >= 1.0 => {
            format!("{base}: {} × {}", sig3(lead + 1.0), rival.name())
        }
        Some((rival, lead)) if lead < 0.005 => format!("{base}: no faster than {}", rival.name()),
        Some((rival, lead)) => format!("{base}: {} faster than {}", percent(lead), rival.name()),
        None => base,
    }
}
