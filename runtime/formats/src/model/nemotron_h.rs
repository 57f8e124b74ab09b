//! `nemotron_h_moe`: every layer has one block only: Mamba-2, attention without positions, or routed
//! experts with squared ReLU and no gates, which may compute in a smaller space.

use super::ModelError;
use super::blocks::{Common, Heads, gqa_spec};
use super::source::Source;
use super::spec::{
    Activation, Ffn, GateUp, GatedFfn, Gating, GqaSpec, Latent, LayerSpec, MambaSpec, Mixer,
    ModelSpec, MoeSpec, Residual, RopeKind, RouterInput, SharedSpec, TensorId,
};
use tier_plan_kernels::MAX_CONV_TAPS;

/// Bounds on heads and their widths, far above any real ones: a layer's state is their product, and
/// nothing in the file is of that size.
const MAX_HEADS: usize = 4096;
const MAX_HEAD_DIM: usize = 1024;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let rms = "attention.layer_norm_rms_epsilon";
    let eps = if s.has(rms) {
        s.epsilon(rms)?
    } else {
        s.epsilon("attention.layer_norm_epsilon")?
    };
    let common = Common::with_norm_eps(s, eps)?;
    let (hidden, n_layer) = (common.hidden, common.n_layer);
    let kinds = Kinds::read(s, n_layer)?;
    let layers = (0..n_layer)
        .map(|i| {
            let norm = s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?;
            let (mixer, ffn) = if kinds.ffn[i] > 0 {
                (Mixer::None, Ffn::Moe(experts(s, i, hidden, &kinds)?))
            } else if kinds.n_head_kv[i] > 0 {
                let attention = attention(s, i, hidden, &kinds)?;
                (Mixer::Gqa(attention), Ffn::None)
            } else {
                (Mixer::Mamba(mamba(s, i, hidden)?), Ffn::None)
            };
            Ok(LayerSpec {
                residual: Residual::default(),
                mixer_norm: norm,
                mixer,
                ffn_norm: norm,
                ffn,
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}

/// What the layers are.
struct Kinds {
    /// Above 0 in layers with experts.
    ffn: Vec<u32>,
    n_head: Vec<u32>,
    /// Above 0 in layers with attention.
    n_head_kv: Vec<u32>,
    /// Experts per token.
    n_used: Vec<u32>,
    /// Widths of experts, where the file has them.
    expert_ffn: Option<Vec<u32>>,
}

impl Kinds {
    fn read(s: &Source<'_>, n_layer: usize) -> Result<Self, ModelError> {
        let counts = |name| s.counts_per_layer(name, n_layer);
        let width = "expert_feed_forward_length";
        let n_head = counts("attention.head_count")?;
        let kv = "attention.head_count_kv";
        let n_head_kv = if s.has(kv) {
            counts(kv)?
        } else {
            n_head.clone()
        };
        Ok(Self {
            ffn: counts("feed_forward_length")?,
            n_head,
            n_head_kv,
            n_used: counts("expert_used_count")?,
            expert_ffn: s.has(width).then(|| counts(width)).transpose()?,
        })
    }

    /// Returns the experts per token of a layer, and their width.
    fn expert_sizes(&self, s: &Source<'_>, layer: usize) -> Result<(usize, usize), ModelError> {
        let used = self.n_used[layer] as usize;
        let used = s.in_bounds("expert_used_count", used, u16::MAX.into())?;
        let (name, width) = match &self.expert_ffn {
            Some(widths) => ("expert_feed_forward_length", widths[layer] as usize),
            None => ("feed_forward_length", self.ffn[layer] as usize / used),
        };
        Ok((used, s.in_bounds(name, width, 1 << 24)?))
    }
}

fn attention(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    kinds: &Kinds,
) -> Result<GqaSpec, ModelError> {
    let count = |name, n: u32| s.in_bounds(name, n as usize, MAX_HEADS);
    let heads = Heads {
        first: 0,
        n_head: count("attention.head_count", kinds.n_head[layer])?,
        n_head_kv: count("attention.head_count_kv", kinds.n_head_kv[layer])?,
    };
    let mut spec = gqa_spec(s, layer, hidden, heads, RopeKind::Halves, None)?;
    spec.rope = None;
    Ok(spec)
}

fn mamba(s: &Source<'_>, layer: usize, hidden: usize) -> Result<MambaSpec, ModelError> {
    let size = |key, max| s.in_bounds(key, s.dim(key)?, max);
    let n_head = size("ssm.time_step_rank", MAX_HEADS)?;
    let n_group = size("ssm.group_count", MAX_HEADS)?;
    let state_dim = size("ssm.state_size", MAX_HEAD_DIM)?;
    let conv_taps = size("ssm.conv_kernel", MAX_CONV_TAPS)?;
    let inner = s.dim("ssm.inner_size")?;
    if !inner.is_multiple_of(n_head) || inner / n_head > MAX_HEAD_DIM {
        let what = format!(
            "{inner}; expected {n_head} heads (ssm.time_step_rank) of up to {MAX_HEAD_DIM} values"
        );
        return Err(s.bad("ssm.inner_size", what));
    }
    if !n_head.is_multiple_of(n_group) {
        let what = format!("{n_group} does not divide the {n_head} heads (ssm.time_step_rank)");
        return Err(s.bad("ssm.group_count", what));
    }
    let channels = inner + 2 * n_group * state_dim;
    let p = format!("blk.{layer}");
    // One value per head, in a row or in a column.
    let per_head = |name: &str| -> Result<TensorId, ModelError> {
        let name = format!("{p}.{name}");
        s.parameters(&name, &[1, n_head])
            .or_else(|error| s.vector(&name, n_head).map_err(|_| error))
    };
    Ok(MambaSpec {
        n_head,
        head_dim: inner / n_head,
        n_group,
        state_dim,
        conv_taps,
        input: s.linear(&format!("{p}.ssm_in"), hidden, inner + channels + n_head)?,
        conv: s.parameters(&format!("{p}.ssm_conv1d.weight"), &[conv_taps, channels])?,
        conv_bias: s.opt_vector(&format!("{p}.ssm_conv1d.bias"), channels)?,
        dt_bias: s.vector(&format!("{p}.ssm_dt.bias"), n_head)?,
        decay: per_head("ssm_a")?,
        skip: per_head("ssm_d")?,
        norm: s.parameters(&format!("{p}.ssm_norm.weight"), &[inner / n_group, n_group])?,
        out: s.linear(&format!("{p}.ssm_out"), inner, hidden)?,
    })
}

fn experts(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    kinds: &Kinds,
) -> Result<MoeSpec, ModelError> {
    let n_expert = s.in_bounds("expert_count", s.dim("expert_count")?, u16::MAX.into())?;
    let (n_used, width) = kinds.expert_sizes(s, layer)?;
    if n_used > n_expert {
        let what = format!("{n_used} of {n_expert} experts");
        return Err(s.bad("expert_used_count", what));
    }
    if s.opt_count("expert_group_count")? > 1 {
        return Err(s.bad("expert_group_count", "groups; supported: none"));
    }
    let p = format!("blk.{layer}");
    let latent = latent(s, &p, hidden)?;
    let space = latent.map_or(hidden, |latent| latent.down.n_out);
    let stacked =
        |name: &str, n_in, n_out| s.expert_linear(&format!("{p}.{name}"), n_in, n_out, n_expert);
    let up = stacked("ffn_up_exps", space, width)?;
    let scale = Some(s.f32_or("expert_weights_scale", 0.0)?).filter(|scale| *scale != 0.0);
    Ok(MoeSpec {
        router: s.linear(&format!("{p}.ffn_gate_inp"), hidden, n_expert)?,
        router_input: RouterInput::Normed,
        input_norm: None,
        output_norm: None,
        weigh_input: false,
        expert_scale: None,
        sum_scale: 1.0,
        selection_bias: Some(s.vector(&format!("{p}.exp_probs_b.bias"), n_expert)?),
        by_token: None,
        latent,
        gating: Gating::Sigmoid,
        n_expert,
        n_used,
        groups: None,
        normalize: s.bool_or("expert_weights_norm", false)?,
        scale: scale.unwrap_or(1.0),
        expert_ffn: width,
        activation: Activation::SquaredRelu,
        gate_up: GateUp::Up(up),
        down: stacked("ffn_down_exps", width, space)?,
        shared: shared(s, &p, hidden)?,
    })
}

/// Finds the matrices to and from the space of latent experts, where a file has them.
fn latent(s: &Source<'_>, prefix: &str, hidden: usize) -> Result<Option<Latent>, ModelError> {
    let names = ["down", "up"].map(|name| format!("{prefix}.ffn_latent_{name}"));
    if !names
        .iter()
        .any(|name| s.has_tensor(&format!("{name}.weight")))
    {
        return Ok(None);
    }
    let width = s.dim("moe_latent_size")?;
    let [down, up] = names;
    Ok(Some(Latent {
        down: s.linear(&down, hidden, width)?,
        norm: None,
        up: s.linear(&up, width, hidden)?,
    }))
}

fn shared(s: &Source<'_>, prefix: &str, hidden: usize) -> Result<Option<SharedSpec>, ModelError> {
    let up = format!("{prefix}.ffn_up_shexp");
    if !s.has_tensor(&format!("{up}.weight")) {
        return Ok(None);
    }
    let width = s.dim("expert_shared_feed_forward_length")?;
    Ok(Some(SharedSpec {
        ffn: GatedFfn {
            gate: None,
            up: s.linear(&up, hidden, width)?,
            down: s.linear(&format!("{prefix}.ffn_down_shexp"), width, hidden)?,
            activation: Activation::SquaredRelu,
        },
        gate: None,
        norm: None,
    }))
}
