//! The counts of pins and slots that configurations are made of, as fine as there is time for.

use super::room::Room;
use crate::profile::{Evidence, Judged};
use std::collections::BTreeSet;

/// Replay events that building a grid may take for each second that there is: a sixth of it or so on one core.
const EVENTS_A_SECOND: f64 = 5e7;

/// Configurations over all layers for each second that there is.
const COLUMNS_A_SECOND: f64 = 1.5e5;

/// The counts that configurations are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// Points an axis, at most.
    points: usize,
    /// Every count of every layer is there.
    pub full: bool,
}

impl Grid {
    /// The finest grid that takes a fraction of so many seconds.
    pub fn new(evidence: &Evidence, room: &Room, seconds: f64) -> Self {
        // Small models are searched whole, however short the time.
        let seconds = seconds.clamp(2.0, 60.0);
        let fast = room.home();
        let slot_tiers = room.slot_tiers().len().max(1) as f64;
        let work = |points: usize| {
            let (mut events, mut columns) = (0.0, 0.0);
            let mut seen = BTreeSet::new();
            for layer in &evidence.layers {
                let key = (layer.shape.n_expert, layer.shape.n_used, layer.shape.expert_bytes);
                // Alike layers share their configurations, which are made once.
                if layer.class.is_some_and(|class| !seen.insert((class, key))) {
                    continue;
                }
                let axis = points.min(layer.shape.n_expert as usize + 1) as f64;
                // Non-decreasing sequences of `fast` cuts.
                let cuts = (0..fast).fold(1.0, |n, at| n * (axis + at as f64) / (at as f64 + 1.0));
                if let Judged::Recorded(trace) = &layer.judged {
                    events += cuts * slot_tiers * trace.tokens() as f64 * f64::from(layer.shape.n_used);
                }
                columns += cuts * if room.slot_tiers().is_empty() { 1.0 } else { slot_tiers * axis };
            }
            (events, columns)
        };
        let most = evidence.layers.iter().map(|l| l.shape.n_expert as usize + 1).max().unwrap_or(1);
        let mut points = most;
        while points > 8 && (work(points).0 > EVENTS_A_SECOND * seconds || work(points).1 > COLUMNS_A_SECOND * seconds)
        {
            points -= points.div_ceil(16);
        }
        Grid { points, full: points == most }
    }

    /// Counts between `from` and `to`, both included: all, or half of the points evenly and half growing by a factor.
    pub fn axis(&self, from: u16, to: u16) -> Vec<u16> {
        let span = usize::from(to.saturating_sub(from));
        if span < self.points {
            return (from..=to).collect();
        }
        let half = (self.points / 2).max(2);
        let even = (0..half).map(|i| span * i / (half - 1));
        let grown = (0..half).map(|i| (span as f64).powf(i as f64 / (half - 1) as f64).round() as usize);
        let mut axis: Vec<u16> = even.chain(grown).map(|n| from + n.min(span) as u16).collect();
        axis.sort_unstable();
        axis.dedup();
        axis
    }
}

/// The axes of one layer's configurations.
#[derive(Debug, Clone)]
pub struct Axes {
    /// Values of every cut, ascending.
    pub cuts: Vec<u16>,
    /// Values of the last cut, ascending.
    pub last_cuts: Vec<u16>,
    /// Slot counts, or all that the grid has.
    pub slots: Option<Vec<u16>>,
}
