//! The mixers of layers on a GPU, one file each.

use super::buffers::GpuBuffers;
use super::compressed::Compressed;
use super::delta::Delta;
use super::gqa::Gqa;
use super::kda::Kda;
use super::mamba::Mamba;
use super::matrix::{GpuLoader, Matrix, product};
use super::mla::Mla;
use super::short_conv::ShortConv;
use crate::layers::device_cache::DeviceCache;
use crate::layers::mixer::Segment;
use crate::layers::pages::StateIdx;
use crate::layers::rope::LayerRopes;
use std::ops::Range;
use tier_plan_cuda::ops::{BatchPositions, TextRuns};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::spec::{GateFunction, Mixer as MixerSpec, OutputGate};

/// A batch of `n` tokens, which are the segments' one after the other, at `buffers.positions`. Their
/// normalized state is in `buffers.answer`, and quantized in `buffers.quants` where
/// [`Mixer::takes_quants`].
#[derive(Clone, Copy)]
pub(super) struct MixerBatch<'a> {
    pub(super) n: usize,
    /// Row of the whole batch that the first token is in; a large batch comes in parts.
    pub(super) first_row: usize,
    pub(super) eps: f32,
    pub(super) segments: &'a [Segment<'a>],
}

/// Has `step` take the rows of all texts after the mixer's states, and copies those to checkpoints.
/// Rows that a checkpoint follows end a step.
pub(super) fn after_all_states(
    positions: &BatchPositions,
    segments: &[Segment<'_>],
    states: &DeviceCache,
    step: impl FnMut(TextRuns<'_>) -> Result<(), CudaError>,
) -> Result<(), CudaError> {
    in_rounds(positions, segments, step, |from, to| {
        states.copy_mixer_state(from, to)
    })
}

/// Has `step` take the rows of all texts up to a checkpoint of each, and `copy` their states to those.
pub(super) fn in_rounds(
    positions: &BatchPositions,
    segments: &[Segment<'_>],
    mut step: impl FnMut(TextRuns<'_>) -> Result<(), CudaError>,
    copy: impl Fn(StateIdx, StateIdx) -> Result<(), CudaError>,
) -> Result<(), CudaError> {
    let n_rounds = positions.rounds().count();
    assert!(
        segments.iter().all(|s| s.checkpoints.len() < n_rounds),
        "checkpoints of another batch"
    );
    for (round, runs) in positions.rounds().enumerate() {
        step(runs)?;
        for segment in segments {
            if let Some((_, to)) = segment.checkpoints.get(round) {
                copy(segment.state, *to)?;
            }
        }
    }
    Ok(())
}

/// Has `step` take the rows of each text after the mixer's state, and copies that to checkpoints. Rows
/// that a checkpoint follows end a step.
pub(super) fn after_states(
    segments: &[Segment<'_>],
    states: &DeviceCache,
    mut step: impl FnMut(Range<usize>, StateIdx) -> Result<(), CudaError>,
) -> Result<(), CudaError> {
    for segment in segments {
        for (rows, checkpoint) in segment.parts() {
            if !rows.is_empty() {
                step(rows, segment.state)?;
            }
            if let Some(to) = checkpoint {
                states.copy_mixer_state(segment.state, to)?;
            }
        }
    }
    Ok(())
}

/// A layer's attention with its KV cache, or what it has in place of that with its state.
pub(super) enum Mixer {
    Gqa(Box<Gqa>),
    Mla(Box<Mla>),
    Delta(Box<Delta>),
    Kda(Box<Kda>),
    ShortConv(Box<ShortConv>),
    Mamba(Box<Mamba>),
    Compressed(Box<Compressed>),
}

impl Mixer {
    /// Loads a layer's mixer. `ropes` are the layer's rope tables.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        spec: &MixerSpec,
        ropes: LayerRopes,
        cache: DeviceCache,
    ) -> Result<Self, CudaError> {
        match spec {
            MixerSpec::Gqa(a) => Ok(Self::Gqa(Box::new(Gqa::new(
                loader,
                a,
                ropes.mixer,
                cache,
            )?))),
            MixerSpec::Mla(a) => Ok(Self::Mla(Box::new(Mla::new(loader, a, ropes, cache)?))),
            MixerSpec::Delta(d) => Ok(Self::Delta(Box::new(Delta::new(loader, d, cache)?))),
            MixerSpec::Kda(k) => Ok(Self::Kda(Box::new(Kda::new(loader, k, cache)?))),
            MixerSpec::ShortConv(c) => {
                Ok(Self::ShortConv(Box::new(ShortConv::new(loader, c, cache)?)))
            }
            MixerSpec::Mamba(m) => Ok(Self::Mamba(Box::new(Mamba::new(loader, m, cache)?))),
            MixerSpec::Compressed(a) => match ropes.mixer {
                Some(rope) => Ok(Self::Compressed(Box::new(Compressed::new(
                    loader, a, rope, cache,
                )?))),
                None => Err(lacks(loader, "compressed attention without a rotation")),
            },
            MixerSpec::None => Err(lacks(loader, "a layer without a mixer")),
        }
    }

    /// Returns whether any of its first products takes quantized activations.
    pub(super) fn takes_quants(&self) -> bool {
        match self {
            Self::Gqa(a) => a.takes_quants(),
            Self::Mla(a) => a.takes_quants(),
            Self::Delta(d) => d.takes_quants(),
            Self::Kda(k) => k.takes_quants(),
            Self::ShortConv(c) => c.takes_quants(),
            Self::Mamba(m) => m.takes_quants(),
            Self::Compressed(a) => a.takes_quants(),
        }
    }

    /// Computes `buffers.out = mixer(x)`, and stores the tokens' keys and values, or advances the
    /// state.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        match self {
            Self::Gqa(a) => a.run(ops, buffers, batch),
            Self::Mla(a) => a.run(ops, buffers, batch),
            Self::Delta(d) => d.run(ops, buffers, batch),
            Self::Kda(k) => k.run(ops, buffers, batch),
            Self::ShortConv(c) => c.run(ops, buffers, batch),
            Self::Mamba(m) => m.run(ops, buffers, batch),
            Self::Compressed(a) => a.run(ops, buffers, batch),
        }
    }
}

impl Mixer {
    /// Whether launches are told a text's state. Others find it in a table on the device.
    pub(super) fn launches_by_state(&self) -> bool {
        matches!(self, Self::Compressed(_))
    }
}

/// Gates on an attention's result, which a matrix of their own makes.
pub(super) struct Gate {
    pub(super) matrix: Matrix,
    pub(super) function: GateFunction,
}

impl Gate {
    /// Loads the matrix of gates that have one.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        gate: Option<&OutputGate>,
    ) -> Result<Option<Self>, CudaError> {
        match gate {
            Some(OutputGate::Separate { linear, function }) => Ok(Some(Self {
                matrix: loader.linear(linear)?,
                function: *function,
            })),
            Some(OutputGate::WithQueries) | None => Ok(None),
        }
    }

    /// Returns how many values of a result of `width` values share a gate.
    pub(super) fn share(&self, width: usize) -> usize {
        width / self.matrix.n_out
    }
}

/// Returns the error of a part that no kernel of a GPU computes.
fn lacks(loader: &GpuLoader<'_>, part: &str) -> CudaError {
    CudaError::NotThere {
        device: loader.device.name().to_string(),
        part: part.into(),
    }
}

/// The form in which a mixer leaves its rows in front of its last product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mixed {
    /// Floats in `buffers.mixed`.
    Floats,
    /// Those, and their quantized form in `buffers.inner`.
    Quantized,
}

impl Mixed {
    /// Selects the quantized form if the rows have it already.
    pub(super) fn quantized_if(is_quantized: bool) -> Self {
        if is_quantized {
            Mixed::Quantized
        } else {
            Mixed::Floats
        }
    }
}

/// Computes `buffers.out = o(buffers.mixed)`, the last product of a mixer.
pub(super) fn output(
    ops: &Ops,
    o: &Matrix,
    n: usize,
    buffers: &mut GpuBuffers,
    mixed: Mixed,
) -> Result<(), CudaError> {
    if o.takes_quants() && mixed == Mixed::Floats {
        ops.quantize(buffers.mixed.view(), n, o.n_in, &mut buffers.inner)?;
    }
    product(
        ops,
        o,
        n,
        buffers.mixed.view(),
        &buffers.inner,
        buffers.out.view(),
    )
}
