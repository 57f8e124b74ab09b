//! Rotary position embedding (RoPE), with linear and YaRN scaling.

use super::weights::DenseWeights;
use std::ops::Range;
use tier_plan_formats::model::spec::{ModelSpec, RopeKind, RopeScaling, RopeSpec};

/// Rotations for some positions, ready to apply.
pub struct RopeTable {
    spec: RopeSpec,
    /// Radians per position, `[dims / 2]`.
    frequencies: Vec<f32>,
    /// `[positions, dims / 2]` of (cos, sin).
    rotations: Vec<(f32, f32)>,
    /// The prepared positions, in this order.
    prepared: Vec<Range<usize>>,
}

impl RopeTable {
    /// Makes a table with no positions prepared; `factors`, `[dims / 2]`, divide the frequencies.
    pub fn new(spec: &RopeSpec, factors: Option<&[f32]>) -> Self {
        let mut frequencies = frequencies(spec, factors);
        if let Some(sections) = &spec.sections {
            for (pair, frequency) in frequencies.iter_mut().enumerate() {
                if !rotates_in_text(sections, pair) {
                    *frequency = 0.0;
                }
            }
        }
        Self {
            spec: spec.clone(),
            frequencies,
            rotations: Vec::new(),
            prepared: Vec::new(),
        }
    }

    /// Prepares positions, in this order.
    pub fn prepare(&mut self, positions: impl Iterator<Item = Range<usize>> + Clone) {
        if positions.clone().eq(self.prepared.iter().cloned()) {
            return;
        }
        self.prepared.clear();
        self.prepared.extend(positions.clone());
        self.rotations.clear();
        for position in positions.flatten() {
            let magnitude = self.spec.magnitude;
            self.rotations
                .extend(rotations_at(&self.frequencies, magnitude, position));
        }
    }

    /// Returns the prepared rotations, `[positions, dims / 2, 2]`: cosine and sine.
    pub fn turns(&self) -> Vec<f32> {
        self.rotations
            .iter()
            .flat_map(|(cos, sin)| [*cos, *sin])
            .collect()
    }

    /// Returns the radians per position, `[dims / 2]`.
    pub(crate) fn frequencies(&self) -> &[f32] {
        &self.frequencies
    }

    /// Returns the factor on what rotates.
    pub(crate) fn magnitude(&self) -> f32 {
        self.spec.magnitude
    }

    /// Rotates every head of the prepared position of this number; `row` is `[heads, head_dim]`.
    pub fn apply(&self, row: &mut [f32], head_dim: usize, index: usize) {
        let half = self.spec.dims / 2;
        let rotations = &self.rotations[index * half..(index + 1) * half];
        self.turn::<false>(row, head_dim, rotations);
    }

    /// Rotates every head back by the angles of the prepared position of this number.
    pub(crate) fn undo(&self, row: &mut [f32], head_dim: usize, index: usize) {
        let half = self.spec.dims / 2;
        let rotations = &self.rotations[index * half..(index + 1) * half];
        self.turn::<true>(row, head_dim, rotations);
    }

    /// Rotates every head as at a position, which need not be prepared.
    pub(crate) fn apply_at(&self, row: &mut [f32], head_dim: usize, position: usize) {
        let rotations = rotations_at(&self.frequencies, self.spec.magnitude, position);
        let rotations: Vec<(f32, f32)> = rotations.collect();
        self.turn::<false>(row, head_dim, &rotations);
    }

    fn turn<const BACK: bool>(&self, row: &mut [f32], head_dim: usize, rotations: &[(f32, f32)]) {
        let half = self.spec.dims / 2;
        let signed = |sin: f32| if BACK { -sin } else { sin };
        for head in row.chunks_exact_mut(head_dim) {
            match self.spec.kind {
                RopeKind::Adjacent => {
                    for (pair, (cos, sin)) in head.chunks_exact_mut(2).zip(rotations) {
                        let (a, b, sin) = (pair[0], pair[1], signed(*sin));
                        pair[0] = a * cos - b * sin;
                        pair[1] = a * sin + b * cos;
                    }
                }
                RopeKind::Halves => {
                    let (low, high) = head[..2 * half].split_at_mut(half);
                    for ((x, y), (cos, sin)) in low.iter_mut().zip(high).zip(rotations) {
                        let (a, b, sin) = (*x, *y, signed(*sin));
                        *x = a * cos - b * sin;
                        *y = a * sin + b * cos;
                    }
                }
            }
        }
    }
}

/// Returns cosines and sines of a position, `[dims / 2]`.
fn rotations_at(
    frequencies: &[f32],
    magnitude: f32,
    position: usize,
) -> impl Iterator<Item = (f32, f32)> + '_ {
    frequencies.iter().map(move |f| {
        let (sin, cos) = (position as f32 * f).sin_cos();
        (cos * magnitude, sin * magnitude)
    })
}

/// The rope tables of a layer, as indices among those of the model.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LayerRopes {
    /// Of the layer's attention.
    pub(crate) mixer: Option<usize>,
    /// Of the layer's indexer.
    pub(crate) indexer: Option<usize>,
}

/// Returns the different ways in which layers rotate, and by layer which of them are its own.
pub(crate) fn tables(spec: &ModelSpec) -> (Vec<&RopeSpec>, Vec<LayerRopes>) {
    let mut tables = Vec::new();
    let ropes = spec.layers.iter().map(|layer| layer.mixer.rope());
    let of_mixers = number(ropes, &mut tables);
    let ropes = spec.layers.iter().map(|layer| layer.mixer.indexer_rope());
    let of_indexers = number(ropes, &mut tables);
    let by_layer = of_mixers.into_iter().zip(of_indexers);
    let by_layer = by_layer.map(|(mixer, indexer)| LayerRopes { mixer, indexer });
    (tables, by_layer.collect())
}

/// Numbers ropes, equal ones alike; adds those that `tables` lacks.
fn number<'a>(
    ropes: impl Iterator<Item = Option<&'a RopeSpec>>,
    tables: &mut Vec<&'a RopeSpec>,
) -> Vec<Option<usize>> {
    let mut number = |rope| {
        let found = tables.iter().position(|table| *table == rope);
        found.unwrap_or_else(|| {
            tables.push(rope);
            tables.len() - 1
        })
    };
    ropes.map(|rope| rope.map(&mut number)).collect()
}

/// The rotations of all layers.
pub(crate) struct Rotations {
    /// One per way in which layers rotate.
    pub(crate) tables: Vec<RopeTable>,
    /// By layer: indices into `tables`.
    pub(crate) of_layer: Vec<LayerRopes>,
}

impl Rotations {
    /// Makes the tables of a model for contexts of up to `context` tokens.
    pub(crate) fn new(spec: &ModelSpec, weights: &DenseWeights, context: usize) -> Self {
        let (tables, of_layer) = tables(spec);
        let table =
            |rope: &&RopeSpec| RopeTable::new(rope, weights.opt_vector(rope.factors_for(context)));
        Self {
            tables: tables.iter().map(table).collect(),
            of_layer,
        }
    }

    /// Prepares positions in all tables.
    pub(crate) fn prepare(&mut self, positions: impl Iterator<Item = Range<usize>> + Clone) {
        for table in &mut self.tables {
            table.prepare(positions.clone());
        }
    }

    /// Returns the table of a layer that rotates.
    pub(crate) fn of(&self, layer: usize) -> Option<&RopeTable> {
        self.of_layer[layer].mixer.map(|table| &self.tables[table])
    }

    /// Returns the table of a layer's indexer that rotates.
    pub(crate) fn of_indexer(&self, layer: usize) -> Option<&RopeTable> {
        self.of_layer[layer]
            .indexer
            .map(|table| &self.tables[table])
    }
}

/// Returns whether a pair belongs to one of the three axes that text moves along.
///
/// The axes take turns pair by pair until they have their pairs; the rest is the fourth's. All
/// sections repeat when there are more pairs.
fn rotates_in_text(sections: &[u32; 4], pair: usize) -> bool {
    let total: u64 = sections.iter().map(|s| u64::from(*s)).sum();
    let at = if total == 0 {
        pair as u64
    } else {
        pair as u64 % total
    };
    at < 3 * u64::from(sections[(at % 3) as usize])
}

/// Returns the frequencies `base^(-2i/dims)` after scaling.
fn frequencies(spec: &RopeSpec, factors: Option<&[f32]>) -> Vec<f32> {
    let half = spec.dims / 2;
    let plain = (0..half).map(|i| {
        let frequency = spec.base.powf(-2.0 * i as f32 / spec.dims as f32);
        factors.map_or(frequency, |f| frequency / f[i])
    });
    match spec.scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear(factor) => plain.map(|f| f / factor).collect(),
        RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            ext,
        } => {
            // The pair whose wavelength makes `rotations` turns over the original context.
            let pair_of = |rotations: f32| {
                spec.dims as f32 * (original_context / (rotations * std::f32::consts::TAU)).ln()
                    / (2.0 * spec.base.ln())
            };
            let low = pair_of(beta_fast).floor().max(0.0);
            let high = pair_of(beta_slow).ceil().min(spec.dims as f32 - 1.0);
            let scaled = plain.enumerate().map(|(i, f)| {
                let ramp = ((i as f32 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                let kept = (1.0 - ramp) * ext;
                f / factor * (1.0 - kept) + f * kept
            });
            scaled.collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: RopeKind, dims: usize, scaling: RopeScaling) -> RopeSpec {
        RopeSpec {
            kind,
            dims,
            base: 10_000.0,
            scaling,
            magnitude: 1.0,
            freq_factors: None,
            long_factors: None,
            sections: None,
        }
    }

    #[test]
    fn position_zero_changes_nothing_and_length_is_kept() {
        for kind in [RopeKind::Adjacent, RopeKind::Halves] {
            let mut table = RopeTable::new(&spec(kind, 6, RopeScaling::None), None);
            table.prepare(std::iter::once(0..3));
            let row: Vec<f32> = (0..16).map(|i| i as f32 - 5.0).collect();
            let mut at0 = row.clone();
            table.apply(&mut at0, 8, 0);
            assert_eq!(at0, row);
            let mut at2 = row.clone();
            table.apply(&mut at2, 8, 2);
            assert_ne!(at2, row);
            // The last two values of each head of 8 do not rotate.
            assert_eq!((at2[6], at2[7], at2[15]), (row[6], row[7], row[15]));
            let norm = |r: &[f32]| r.iter().map(|v| v * v).sum::<f32>();
            assert!((norm(&at2) - norm(&row)).abs() < 1e-3);
        }
    }

    #[test]
    fn pairs_of_the_fourth_axis_rest_in_text() {
        let rotating = |sections: [u32; 4], pairs| {
            (0..pairs)
                .map(|p| rotates_in_text(&sections, p))
                .collect::<Vec<_>>()
        };
        assert_eq!(rotating([2, 1, 1, 0], 4), [true; 4]);
        assert_eq!(rotating([11, 11, 10, 0], 32), [true; 32]);
        // Five pairs in turn; the heights and widths are used up when their turn comes again.
        assert_eq!(rotating([3, 1, 1, 0], 5), [true, true, true, true, false]);
        assert_eq!(
            rotating([1, 1, 1, 1], 6),
            [true, true, true, false, true, true]
        );
    }

    #[test]
    fn the_first_pair_turns_one_radian_per_position() {
        let mut table = RopeTable::new(&spec(RopeKind::Adjacent, 4, RopeScaling::None), None);
        table.prepare(std::iter::once(1..2));
        let mut row = [1.0, 0.0, 1.0, 0.0];
        table.apply(&mut row, 4, 0);
        assert!((row[0] - 1f32.cos()).abs() < 1e-6 && (row[1] - 1f32.sin()).abs() < 1e-6);
        assert!((row[2] - 0.01f32.cos()).abs() < 1e-6 && (row[3] - 0.01f32.sin()).abs() < 1e-6);
    }

    #[test]
    fn the_magnitude_scales_what_rotates_and_nothing_else() {
        let spec = RopeSpec {
            magnitude: 2.0,
            ..spec(RopeKind::Adjacent, 2, RopeScaling::None)
        };
        let mut table = RopeTable::new(&spec, None);
        table.prepare(std::iter::once(0..1));
        let mut row = [1.0, 3.0, 5.0];
        table.apply(&mut row, 3, 0);
        assert_eq!(row, [2.0, 6.0, 5.0]);
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
        let scaling = RopeScaling::Yarn {
            factor: 8.0,
            original_context: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            ext: 1.0,
        };
        let plain = frequencies(&spec(RopeKind::Adjacent, 64, RopeScaling::None), None);
        let yarn = frequencies(&spec(RopeKind::Adjacent, 64, scaling), None);
        assert_eq!(yarn[0], plain[0]);
        assert!((yarn[31] - plain[31] / 8.0).abs() < 1e-9);
        assert!(yarn.windows(2).all(|w| w[1] < w[0]));
    }
}
