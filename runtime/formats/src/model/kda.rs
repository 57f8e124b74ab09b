//! Kimi delta attention, in the keys and tensors that its models share.

use super::ModelError;
use super::blocks::qkv;
use super::source::Source;
use super::spec::{DecayGate, KdaSpec, Projection};
use tier_plan_kernels::MAX_CONV_TAPS;

/// Bound on the width of a head, far above any real one: a head's state is its square, and nothing
/// in the file is of that size.
const MAX_HEAD_DIM: usize = 1024;

/// Which layers are KDA, and the heads of all.
pub(super) struct HybridHeads {
    /// By layer.
    pub heads: Vec<usize>,
    /// By layer.
    pub is_kda: Vec<bool>,
}

impl HybridHeads {
    /// Reads the heads. A layer without key and value heads is KDA.
    pub(super) fn read(s: &Source<'_>, n_layer: usize) -> Result<Self, ModelError> {
        let name = "attention.head_count_kv";
        let is_kda = if s.has(name) {
            let found = s.counts_per_layer(name, n_layer)?;
            found.into_iter().map(|n| n == 0).collect()
        } else {
            vec![false; n_layer]
        };
        Ok(Self {
            heads: s.dim_per_layer("attention.head_count", n_layer)?,
            is_kda,
        })
    }
}

/// How a file has the projections to the inputs of the decays and to the output gates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KdaForm {
    /// `ssm_f_a`, `ssm_f_b` and `ssm_g_a`, `ssm_g_b`: of a low rank, a head's width.
    LowRank,
    /// `ssm_f_a`, `ssm_f_b`, and `ssm_g` of full rank.
    FullGate,
    /// `ssm_f_a` and `ssm_g_a` of full rank; `ssm_a` has its own sign.
    Full,
}

/// Describes a KDA layer of `n_head` heads.
pub(super) fn kda_spec(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    n_head: usize,
    form: KdaForm,
    length_eps: f32,
) -> Result<KdaSpec, ModelError> {
    let bounded = |key, max| s.in_bounds(key, s.dim(key)?, max);
    let head_dim = bounded("kda.head_dim", MAX_HEAD_DIM)?;
    let conv_taps = bounded("ssm.conv_kernel", MAX_CONV_TAPS)?;
    let width = n_head * head_dim;
    let p = format!("blk.{layer}");
    let full = |name: &str| {
        Ok::<_, ModelError>(Projection {
            first: s.linear(&format!("{p}.{name}"), hidden, width)?,
            second: None,
        })
    };
    let low_rank = |a: &str, b: &str| {
        Ok::<_, ModelError>(Projection {
            first: s.linear(&format!("{p}.{a}"), hidden, head_dim)?,
            second: Some(s.linear(&format!("{p}.{b}"), head_dim, width)?),
        })
    };
    let conv = |name: &str| {
        let shapes = [&[conv_taps, 1, width][..], &[conv_taps, width]];
        s.parameters_of(&format!("{p}.ssm_conv1d_{name}.weight"), &shapes)
    };
    Ok(KdaSpec {
        n_head,
        head_dim,
        conv_taps,
        qkv: qkv(s, &p, hidden, [width; 3])?,
        conv: [conv("q")?, conv("k")?, conv("v")?],
        length_eps,
        decay: match form {
            KdaForm::LowRank | KdaForm::FullGate => low_rank("ssm_f_a", "ssm_f_b")?,
            KdaForm::Full => full("ssm_f_a")?,
        },
        decay_bias: s.vector(&format!("{p}.ssm_dt.bias"), width)?,
        decay_gate: decay_gate(s)?,
        steepness: s.parameters_of(&format!("{p}.ssm_a"), &[&[1, n_head], &[n_head]])?,
        steepness_negated: form != KdaForm::Full,
        beta: s.linear(&format!("{p}.ssm_beta"), hidden, n_head)?,
        gate: match form {
            KdaForm::LowRank => low_rank("ssm_g_a", "ssm_g_b")?,
            KdaForm::FullGate => full("ssm_g")?,
            KdaForm::Full => full("ssm_g_a")?,
        },
        norm: s.vector(&format!("{p}.ssm_norm.weight"), head_dim)?,
        out: s.linear(&format!("{p}.attn_output"), width, hidden)?,
    })
}

/// Reads what makes decays: bounded from below where the file has a bound.
fn decay_gate(s: &Source<'_>) -> Result<DecayGate, ModelError> {
    let name = "kda.gate_lower_bound";
    if !s.has(name) {
        return Ok(DecayGate::Softplus);
    }
    match s.f32_or(name, 0.0)? {
        bound if bound < 0.0 => Ok(DecayGate::Bounded { bound }),
        bound => Err(s.bad(name, format!("{bound}; expected a negative number"))),
    }
}
