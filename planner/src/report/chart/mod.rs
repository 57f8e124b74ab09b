//! The charts: each file lays one out and keeps its numbers for the CSV beside it.

mod bytes;
mod experts;
mod history;
mod hits;
mod layers;
mod parallel;
mod parts;
mod speed;
pub(super) mod sweep;

use super::ink::Ink;
use super::scene::{Anchor, Scene, fit, text_width, wrap};
use super::table::Table;
use super::text::{steps, tick};
use super::view::Overview;

/// Width of every chart, in pixels.
const WIDTH: f64 = 1100.0;
/// Free space at the sides, in pixels.
const MARGIN: f64 = 24.0;
/// Where bars begin when plan names stand to their left, in pixels.
const NAMES: f64 = 190.0;

/// A chart with its numbers.
pub(super) struct Chart {
    /// Stem of its file names.
    pub file: &'static str,
    /// The finding that it shows.
    pub title: String,
    /// How to read it, in a sentence or two.
    pub how: String,
    pub scene: Scene,
    pub data: Table,
}

/// Lists every chart that the report has data for.
pub(super) fn all(overview: &Overview<'_>) -> Vec<Chart> {
    let speed = (!overview.plans.is_empty()).then(|| speed::chart(overview));
    [
        speed,
        parallel::chart(overview),
        bytes::chart(overview),
        experts::chart(overview),
        parts::chart(overview),
        layers::chart(overview),
        hits::chart(overview),
        history::chart(overview),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Begins a chart with its title and subtitle; returns the y below them.
fn begin(title: &str, subtitle: &str) -> (Scene, f64) {
    let mut scene = Scene::new(WIDTH);
    let mut y = 14.0;
    for line in wrap(title, 20.0, true, WIDTH - 2.0 * MARGIN) {
        y += 24.0;
        scene.bold(MARGIN, y, 20.0, Anchor::Start, Ink::Text, line);
    }
    y += 4.0;
    for line in wrap(subtitle, 14.0, false, WIDTH - 2.0 * MARGIN) {
        y += 20.0;
        scene.text(MARGIN, y, 14.0, Anchor::Start, Ink::Muted, line);
    }
    (scene, y + 12.0)
}

/// The symbol of a legend entry.
#[derive(Clone, Copy)]
enum Sign {
    Swatch(Ink),
    /// A budget.
    Mark,
    /// A chosen point.
    Ring,
    /// A run; hollow where its tiers were emulated.
    Dot(Ink, bool),
    /// Slowest to fastest run.
    Whisker,
    /// No symbol: words that introduce the entries after it.
    Words,
}

/// Draws legend entries in rows; returns the y below them.
fn legend(scene: &mut Scene, y: f64, entries: &[(Sign, String)]) -> f64 {
    let (mut x, mut y) = (MARGIN, y);
    for (sign, words) in entries {
        let words = fit(words, 13.0, false, WIDTH - 2.0 * MARGIN - 30.0);
        let indent = if matches!(sign, Sign::Words) {
            0.0
        } else {
            22.0
        };
        let width = indent + text_width(&words, 13.0, false) + 16.0;
        if x > MARGIN && x + width - 16.0 > WIDTH - MARGIN {
            x = MARGIN;
            y += 22.0;
        }
        match sign {
            Sign::Swatch(ink) => {
                scene.rect(x, y, 14.0, 14.0, Ink::Axis);
                scene.rect(x + 0.5, y + 0.5, 13.0, 13.0, *ink);
            }
            Sign::Mark => scene.rect(x + 6.0, y - 1.0, 2.5, 16.0, Ink::Text),
            Sign::Ring => ring(scene, x + 7.0, y + 7.0, Ink::Paper),
            Sign::Dot(ink, hollow) => {
                scene.dot(x + 7.0, y + 7.0, 4.0, *ink);
                if *hollow {
                    scene.dot(x + 7.0, y + 7.0, 2.2, Ink::Paper);
                }
            }
            Sign::Whisker => whisker(scene, x, x + 14.0, y + 7.0),
            Sign::Words => {}
        }
        scene.text(x + indent, y + 11.5, 13.0, Anchor::Start, Ink::Text, words);
        x += width;
    }
    y + 28.0
}

fn ring(scene: &mut Scene, x: f64, y: f64, ink: Ink) {
    scene.dot(x, y, 6.0, Ink::Paper);
    scene.dot(x, y, 5.0, Ink::Text);
    scene.dot(x, y, 3.0, ink);
}

fn whisker(scene: &mut Scene, x0: f64, x1: f64, y: f64) {
    // A rim of paper, so that it shows on a dark bar too.
    scene.rect(x0 - 1.0, y - 2.0, x1 - x0 + 2.0, 4.0, Ink::Paper);
    scene.rect(x0 - 1.0, y - 4.5, 3.5, 9.0, Ink::Paper);
    scene.rect(x1 - 2.5, y - 4.5, 3.5, 9.0, Ink::Paper);
    scene.rect(x0, y - 0.75, x1 - x0, 1.5, Ink::Text);
    scene.rect(x0, y - 3.5, 1.5, 7.0, Ink::Text);
    scene.rect(x1 - 1.5, y - 3.5, 1.5, 7.0, Ink::Text);
}

/// Draws a horizontal axis from 0: grid lines between `top` and `bottom`, numbers below. Returns
/// pixels per unit.
fn x_axis(
    scene: &mut Scene,
    x0: f64,
    x1: f64,
    top: f64,
    bottom: f64,
    largest: f64,
    about: usize,
) -> f64 {
    let (step, last) = steps(largest, about);
    let per_unit = (x1 - x0) / last;
    let count = (last / step).round() as usize;
    for i in 0..=count {
        let value = i as f64 * step;
        let x = x0 + value * per_unit;
        let ink = if i == 0 { Ink::Axis } else { Ink::Grid };
        scene.line(x, top, x, bottom, 1.0, ink);
        scene.text(
            x,
            bottom + 16.0,
            12.0,
            Anchor::Middle,
            Ink::Muted,
            tick(value, step),
        );
    }
    per_unit
}

/// Draws a vertical axis from 0 at `bottom`: grid lines from `x0` to `x1`, numbers to the left, the
/// topmost with its unit. Returns pixels per unit.
fn y_axis(
    scene: &mut Scene,
    x0: f64,
    x1: f64,
    top: f64,
    bottom: f64,
    (step, last): (f64, f64),
    unit: &str,
) -> f64 {
    let per_unit = (bottom - top) / last;
    let count = (last / step).round() as usize;
    for i in 0..=count {
        let value = i as f64 * step;
        let y = bottom - value * per_unit;
        scene.line(
            x0,
            y,
            x1,
            y,
            1.0,
            if i == 0 { Ink::Axis } else { Ink::Grid },
        );
        let unit = if i == count {
            format!(" {unit}")
        } else {
            String::new()
        };
        let number = format!("{}{unit}", tick(value, step));
        scene.text(x0 - 6.0, y + 4.0, 12.0, Anchor::End, Ink::Muted, number);
    }
    per_unit
}

/// Draws a plan's name to the left of its bars.
fn plan_name(scene: &mut Scene, y: f64, name: &str, bold: bool) {
    let name = fit(name, 14.0, bold, NAMES - MARGIN - 10.0);
    if bold {
        scene.bold(NAMES - 10.0, y, 14.0, Anchor::End, Ink::Text, name);
    } else {
        scene.text(NAMES - 10.0, y, 14.0, Anchor::End, Ink::Text, name);
    }
}

/// Returns the step of layer numbers on an axis that keeps labels at least `room` apart.
fn label_every(spacing: f64, room: f64) -> u32 {
    [1, 2, 5, 10, 20, 50, 100]
        .into_iter()
        .find(|n| f64::from(*n) * spacing >= room)
        .unwrap_or(200)
}
