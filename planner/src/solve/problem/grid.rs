//! The grid: the counts of pins and slots that columns are listed for, as fine as there is time
//! for.

use super::capacity::Capacity;
use super::columns::Config;
use crate::profile::{Evidence, Judged, LayerEvidence};
use std::collections::BTreeSet;
use tier_plan_runtime::model::shape::ExpertShape;

/// Replay events that a grid may cost per second there is: about a sixth of it on one core.
const MAX_EVENTS_PER_S: f64 = 5e7;

/// Columns over all layers that a grid may have per second there is.
const MAX_COLUMNS_PER_S: f64 = 1.5e5;

/// Points per axis that every grid has, where a layer has as many counts.
const MIN_POINTS: usize = 8;

/// Points per axis of the coarse grid at most and at least.
const COARSE_POINTS: [usize; 2] = [8, 4];

/// Replay events that one layer's columns on the coarse grid may cost: some milliseconds.
const MAX_COARSE_EVENTS: f64 = 2e6;

/// Steps to each side of a column around which the grid is refined. A few rounds come down to steps
/// of one, and each round stays cheap.
const STEPS_PER_SIDE: u16 = 3;

/// The counts that columns are listed for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// Points per axis at most.
    points: usize,
    /// Whether it has every count of every layer.
    pub is_full: bool,
}

/// Work that a grid makes.
struct Work {
    events: f64,
    columns: f64,
}

impl Grid {
    /// Makes the finest grid whose columns take a part of `seconds` to price.
    pub fn new(evidence: &Evidence, capacity: &Capacity, seconds: f64) -> Self {
        let all = evidence
            .layers
            .iter()
            .map(|l| l.shape.n_expert as usize + 1)
            .max()
            .unwrap_or(1);
        let mut points = all;
        let is_too_fine = |points: usize| {
            let Work { events, columns } = work(evidence, capacity, points);
            events > MAX_EVENTS_PER_S * seconds || columns > MAX_COLUMNS_PER_S * seconds
        };
        while points > MIN_POINTS && is_too_fine(points) {
            points -= points.div_ceil(16);
        }
        Grid {
            points,
            is_full: points == all,
        }
    }

    /// Makes a grid of few points, from which pricing finds the way to the others.
    pub fn coarse(evidence: &Evidence, capacity: &Capacity) -> Self {
        let [mut points, least] = COARSE_POINTS;
        let ways = (1 + capacity.slot_tiers().len()) as f64;
        let events = |layer: &LayerEvidence| match &layer.judged {
            Judged::Recorded(trace) => (trace.tokens() * trace.n_used()) as f64,
            Judged::Uniform => {
                let used = layer.shape.n_used as usize;
                sequences(used + 1, capacity.fast()) * used as f64
            }
        };
        let most = evidence.layers.iter().map(events).fold(0.0, f64::max);
        while points > least && sequences(points, capacity.fast()) * ways * most > MAX_COARSE_EVENTS
        {
            points -= 1;
        }
        Grid {
            points,
            is_full: false,
        }
    }

    /// Returns counts between `from` and `to`, both included.
    ///
    /// They are all counts, or half of the points evenly and half growing by a factor.
    pub fn axis(&self, from: u16, to: u16) -> Vec<u16> {
        let span = usize::from(to.saturating_sub(from));
        if span < self.points {
            return (from..=to).collect();
        }
        let half = (self.points / 2).max(2);
        let even = (0..half).map(|i| span * i / (half - 1));
        let grown = (0..half).map(|i| {
            let exponent = i as f64 / (half - 1) as f64;
            (span as f64).powf(exponent).round() as usize
        });
        let mut axis: Vec<u16> = even
            .chain(grown)
            .map(|n| from + n.min(span) as u16)
            .collect();
        axis.sort_unstable();
        axis.dedup();
        axis
    }

    /// Returns axes around a column: as far as the grid's next points, then ever closer by `round`.
    pub fn axes_around(
        &self,
        center: &Config,
        shape: &ExpertShape,
        max_cut: u16,
        fast: usize,
        round: u32,
    ) -> Axes {
        let span = |from: u16, to: u16, center: u16| self.axis_around(from, to, center, round);
        let last = center.cuts[fast.saturating_sub(1)];
        let upper = center.cuts[..fast.saturating_sub(1)].iter();
        let mut cuts: Vec<u16> = upper.flat_map(|&cut| span(0, max_cut, cut)).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let pooled = shape.n_expert as u16 - last;
        let least = (shape.n_used as u16).min(pooled);
        let slots = if center.slots == 0 {
            vec![least]
        } else {
            span(least, pooled, center.slots)
        };
        let last_cuts = if fast == 0 {
            vec![0]
        } else {
            span(0, max_cut, last)
        };
        Axes {
            cuts,
            last_cuts,
            slots: Some(slots),
        }
    }

    fn axis_around(&self, from: u16, to: u16, center: u16, round: u32) -> Vec<u16> {
        let points = self.axis(from, to);
        let below = center
            - points
                .iter()
                .rev()
                .find(|&&p| p < center)
                .copied()
                .unwrap_or(center);
        let next = points
            .iter()
            .find(|&&p| p > center)
            .copied()
            .unwrap_or(center);
        let above = next.saturating_sub(center);
        let reach = (below.max(above) / STEPS_PER_SIDE.pow(round)).max(1);
        let step = reach.div_ceil(STEPS_PER_SIDE).max(1);
        let steps = (0..=reach).step_by(step.into());
        let mut axis: Vec<u16> = steps
            .flat_map(|d| [center.checked_sub(d), center.checked_add(d)])
            .flatten()
            .filter(|p| (from..=to).contains(p))
            .collect();
        axis.sort_unstable();
        axis.dedup();
        axis
    }
}

/// Returns the non-decreasing sequences of `fast` cuts among some points.
fn sequences(points: usize, fast: usize) -> f64 {
    (0..fast).fold(1.0, |n, at| n * (points + at) as f64 / (at as f64 + 1.0))
}

fn work(evidence: &Evidence, capacity: &Capacity, points: usize) -> Work {
    let fast = capacity.fast();
    let no_slots = capacity.slot_tiers().len() == 0;
    let slot_tiers = capacity.slot_tiers().len().max(1) as f64;
    let mut work = Work {
        events: 0.0,
        columns: 0.0,
    };
    let mut seen = BTreeSet::new();
    for layer in &evidence.layers {
        let key = (
            layer.shape.n_expert,
            layer.shape.n_used,
            layer.shape.expert_bytes,
        );
        // Alike layers share their columns, which are made once.
        if layer.class.is_some_and(|class| !seen.insert((class, key))) {
            continue;
        }
        let axis = points.min(layer.shape.n_expert as usize + 1) as f64;
        let cuts = sequences(axis as usize, fast);
        if let Judged::Recorded(trace) = &layer.judged {
            work.events +=
                cuts * slot_tiers * trace.tokens() as f64 * f64::from(layer.shape.n_used);
        }
        work.columns += cuts * if no_slots { 1.0 } else { slot_tiers * axis };
    }
    work
}

/// The axes of one layer's columns.
#[derive(Debug, Clone)]
pub struct Axes {
    /// Values of every cut, ascending.
    pub cuts: Vec<u16>,
    /// Values of the last cut, ascending.
    pub last_cuts: Vec<u16>,
    /// Numbers of slots; those of the grid if `None`.
    pub slots: Option<Vec<u16>>,
}
