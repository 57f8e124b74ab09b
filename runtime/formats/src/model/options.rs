//! Options that several architectures share: kinds of rotary scaling, windows, caps.

use super::ModelError;
use super::source::Source;
use super::spec::{
    GqaSpec, HeadOptions, OutputGate, QkNorm, RopeKind, RopeScaling, RopeSpec, Temperature,
};

/// Which keys of YaRN an architecture reads. Files may have the others, which mean nothing then.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum YarnKeys {
    /// None but the factor and the original context.
    Fixed,
    /// The two bounds of the ramp too.
    Betas,
    /// The bounds, of which the fast one is this without a key, and the share of the ramp.
    All {
        /// `yarn_beta_fast`.
        beta_fast: f32,
    },
}

/// Reads the rotary embedding of a head of `head_dim` values.
pub(super) fn rope(
    s: &Source<'_>,
    kind: RopeKind,
    head_dim: usize,
    keys: YarnKeys,
) -> Result<RopeSpec, ModelError> {
    let mut rope = s.rope(kind, head_dim)?;
    if let YarnKeys::All { .. } = keys {
        yarn_by_share(s, &mut rope)?;
    }
    let RopeScaling::Yarn {
        beta_fast,
        beta_slow,
        ..
    } = &mut rope.scaling
    else {
        return Ok(rope);
    };
    match keys {
        YarnKeys::Fixed => (*beta_fast, *beta_slow) = (32.0, 1.0),
        YarnKeys::Betas => {}
        YarnKeys::All { beta_fast: default } => {
            *beta_fast = s.f32_or("rope.scaling.yarn_beta_fast", default)?;
        }
    }
    Ok(rope)
}

/// Reads the share of YaRN's ramp. One that is not 0 means YaRN, whatever the type is called; with
/// 0 all frequencies are divided alike, and magnitudes stay.
fn yarn_by_share(s: &Source<'_>, rope: &mut RopeSpec) -> Result<(), ModelError> {
    let is_yarn = matches!(rope.scaling, RopeScaling::Yarn { .. });
    let share = s.f32_or(
        "rope.scaling.yarn_ext_factor",
        if is_yarn { 1.0 } else { 0.0 },
    )?;
    let attn_factor = s.f32_or("rope.scaling.attn_factor", 1.0)?;
    match &mut rope.scaling {
        RopeScaling::Yarn { ext, .. } => *ext = share,
        RopeScaling::Linear(factor) if share != 0.0 => {
            let factor = *factor;
            rope.scaling = RopeScaling::Yarn {
                factor,
                original_context: original_context(s)? as f32,
                beta_fast: 32.0,
                beta_slow: s.f32_or("rope.scaling.yarn_beta_slow", 1.0)?,
                ext: share,
            };
            rope.magnitude = attn_factor * yarn_magnitude(factor, 1.0);
        }
        RopeScaling::Linear(_) | RopeScaling::None => {}
    }
    if is_yarn && share == 0.0 {
        rope.magnitude = attn_factor;
    }
    Ok(())
}

/// Returns YaRN's factor on what rotates, `1 + multiplier · 0.1 · ln(factor)`; 1 where nothing is
/// extended.
pub(super) fn yarn_magnitude(factor: f32, multiplier: f32) -> f32 {
    1.0 + 0.1 * multiplier * factor.max(1.0).ln()
}

/// Reads the context before extension, in tokens.
pub(super) fn original_context(s: &Source<'_>) -> Result<usize, ModelError> {
    match s.opt_dim("rope.scaling.original_context_length")? {
        Some(context) => Ok(context),
        None => s.dim("context_length"),
    }
}

/// Turns the rotary embedding of a model into that of its windowed layers: not scaled, with the
/// base of `rope.freq_base_swa`, or `base` without it.
pub(super) fn windowed_rope(
    s: &Source<'_>,
    rope: &RopeSpec,
    base: f32,
) -> Result<RopeSpec, ModelError> {
    Ok(RopeSpec {
        base: s.rope_base("rope.freq_base_swa", base)?,
        scaling: RopeScaling::None,
        magnitude: s.f32_or("rope.scaling.attn_factor", 1.0)?,
        ..rope.clone()
    })
}

/// Reads which layers have a window: one flag per layer, or a period whose first layer has none.
pub(super) fn windowed_but_first(
    s: &Source<'_>,
    n_layer: usize,
    period: usize,
) -> Result<Vec<bool>, ModelError> {
    let name = "attention.sliding_window_pattern";
    if s.is_array(name) {
        return s.windowed_layers(n_layer, 0);
    }
    let period = s.opt_dim(name)?.unwrap_or(period);
    Ok((0..n_layer).map(|i| !i.is_multiple_of(period)).collect())
}

/// Reads a soft cap, where 0 stands for none.
pub(super) fn softcap(s: &Source<'_>, name: &str, default: f32) -> Result<Option<f32>, ModelError> {
    Ok(Some(s.f32_or(name, default)?).filter(|cap| *cap != 0.0))
}

/// Reads the cap on a head's logits, `default` without a key.
pub(super) fn capped_head(s: &Source<'_>, default: f32) -> Result<HeadOptions, ModelError> {
    Ok(HeadOptions {
        softcap: softcap(s, "final_logit_softcapping", default)?,
        ..HeadOptions::default()
    })
}

/// Reads the growth of attention scores over multiples of a length, where the file has one.
pub(super) fn temperature(
    s: &Source<'_>,
    length: impl FnOnce() -> Result<usize, ModelError>,
) -> Result<Option<Temperature>, ModelError> {
    let scale = s.f32_or("attention.temperature_scale", 0.0)?;
    if scale == 0.0 {
        return Ok(None);
    }
    Ok(Some(Temperature {
        scale,
        length: length()?,
        offset: 0,
    }))
}

/// Returns norms of queries and keys per head without weights, after rotation.
pub(super) fn unweighted_after_rope() -> QkNorm {
    QkNorm {
        q: None,
        k: None,
        span: super::spec::NormSpan::Head,
        after_rope: true,
    }
}

/// Finds the matrix of an attention's output gates: `[n_head, hidden]` or `[n_head * value_dim,
/// hidden]`.
pub(super) fn output_gate(
    s: &Source<'_>,
    layer: usize,
    attention: &GqaSpec,
    function: super::spec::GateFunction,
) -> Result<OutputGate, ModelError> {
    let name = format!("blk.{layer}.attn_gate");
    let per_value = attention.o.n_in;
    let rows = s.rows_of(&format!("{name}.weight"));
    let n_out = match rows {
        Some(rows) if rows == attention.n_head as u64 => attention.n_head,
        _ => per_value,
    };
    Ok(OutputGate::Separate {
        linear: s.linear(&name, attention.q.n_in, n_out)?,
        function,
    })
}
