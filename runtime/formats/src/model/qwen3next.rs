//! `qwen3next`, `qwen35moe` and `qwen35`: most layers are gated delta nets, the others attention with
//! an output gate; routed experts and a gated shared one in every layer, or dense blocks in the
//! third.
//!
//! The second and third differ from the first in how key heads are shared among value heads, in the matrices of the delta
//! net's rates, and in positions that have sections for images.

use super::ModelError;
use super::blocks::{Common, MoeOptions, Shared, dense, expert_widths, moe, qkv};
use super::qwen2moe::shared_widths;
use super::source::Source;
use super::spec::{
    DeltaGate, DeltaInput, DeltaRates, DeltaSpec, Ffn, GqaSpec, KeySharing, LayerSpec, Mixer,
    ModelSpec, NormSpan, OutputGate, QkNorm, Residual, RopeKind, WindowKind,
};
use tier_plan_kernels::MAX_CONV_TAPS;

/// Bound on heads and their width in a delta net, far above any real one: a layer's state is their
/// product with another width, and nothing in the file is of that size.
const MAX_DELTA: usize = 1024;

/// Period of attention layers, which end each run of this length, unless the file says otherwise.
const ATTENTION_INTERVAL: usize = 4;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (hidden, n_layer) = (common.hidden, common.n_layer);
    let recurrent = recurrent_layers(s, n_layer)?;
    let heads = Heads::read(s, n_layer)?;
    if s.arch() == "qwen35" {
        let layers = common.layers(|i| {
            layer(
                s,
                i,
                &common,
                &heads,
                recurrent[i],
                Ffn::Dense(dense(s, i, &common)?),
            )
        })?;
        return common.model(s, layers);
    }
    let widths = expert_widths(s, n_layer)?;
    let shared = shared_widths(s, n_layer)?;
    let layers = (0..n_layer)
        .map(|i| {
            let shared = Some(Shared {
                ffn: shared[i],
                gated: true,
            });
            let options = MoeOptions {
                shared,
                ..MoeOptions::softmax(widths[i], true)
            };
            let ffn = Ffn::Moe(moe(s, i, hidden, &options)?);
            layer(s, i, &common, &heads, recurrent[i], ffn)
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}

fn layer(
    s: &Source<'_>,
    i: usize,
    common: &Common,
    heads: &Heads,
    recurrent: bool,
    ffn: Ffn,
) -> Result<LayerSpec, ModelError> {
    let hidden = common.hidden;
    Ok(LayerSpec {
        residual: Residual::default(),
        mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
        mixer: if recurrent {
            Mixer::Delta(delta(s, i, hidden)?)
        } else {
            Mixer::Gqa(gated_attention(s, i, hidden, heads)?)
        },
        ffn_norm: s.vector(&format!("blk.{i}.post_attention_norm.weight"), hidden)?,
        ffn,
    })
}

/// Reads by layer whether it is a delta net.
pub(super) fn recurrent_layers(s: &Source<'_>, n_layer: usize) -> Result<Vec<bool>, ModelError> {
    if let Some(flags) = s.opt_flags("attention.recurrent_layers", n_layer)? {
        return Ok(flags);
    }
    let interval = s
        .opt_dim("full_attention_interval")?
        .unwrap_or(ATTENTION_INTERVAL);
    Ok((1..=n_layer).map(|i| !i.is_multiple_of(interval)).collect())
}

/// Heads of the attention layers. Files with a number for each layer may have 0 for the others.
pub(super) struct Heads {
    query: Vec<u32>,
    key_value: Vec<u32>,
}

impl Heads {
    pub(super) fn read(s: &Source<'_>, n_layer: usize) -> Result<Self, ModelError> {
        let query = s.counts_per_layer("attention.head_count", n_layer)?;
        let key = "attention.head_count_kv";
        let key_value = if s.has(key) {
            s.counts_per_layer(key, n_layer)?
        } else {
            query.clone()
        };
        Ok(Self { query, key_value })
    }

    /// Returns the layer's query heads, and its key and value heads.
    fn of(&self, s: &Source<'_>, layer: usize) -> Result<(usize, usize), ModelError> {
        let (query, key_value) = (self.query[layer] as usize, self.key_value[layer] as usize);
        let query = s.in_bounds("attention.head_count", query, MAX_DELTA)?;
        let key_value = s.in_bounds("attention.head_count_kv", key_value, MAX_DELTA)?;
        if query.is_multiple_of(key_value) {
            return Ok((query, key_value));
        }
        let what = format!("{key_value} does not divide the {query} query heads");
        Err(s.bad("attention.head_count_kv", what))
    }
}

pub(super) fn gated_attention(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    heads: &Heads,
) -> Result<GqaSpec, ModelError> {
    let (n_head, n_head_kv) = heads.of(s, layer)?;
    let dim = match s.opt_dim("attention.key_length")? {
        Some(dim) => dim,
        None => s.in_bounds("attention.head_count", hidden / n_head, hidden)?,
    };
    let value_dim = s.opt_dim("attention.value_length")?.unwrap_or(dim);
    if value_dim != dim {
        let what = format!(
            "{value_dim}, but the gates are as wide as keys ({dim}), so values must be too"
        );
        return Err(s.bad("attention.value_length", what));
    }
    let mut rope = s.rope(RopeKind::Halves, dim)?;
    rope.sections = s.opt_sections("rope.dimension_sections")?;
    let p = format!("blk.{layer}");
    let q_norm = s.vector(&format!("{p}.attn_q_norm.weight"), dim)?;
    let k_norm = s.vector(&format!("{p}.attn_k_norm.weight"), dim)?;
    let scale = match s.f32_or("attention.scale", 0.0)? {
        0.0 => 1.0 / (dim as f32).sqrt(),
        scale => scale,
    };
    let [q, k, v] = qkv(
        s,
        &p,
        hidden,
        [2 * n_head * dim, n_head_kv * dim, n_head_kv * dim],
    )?;
    Ok(GqaSpec {
        n_head,
        n_head_kv,
        key_dim: dim,
        value_dim,
        scale,
        softcap: None,
        temperature: None,
        rope: Some(rope),
        qk_norm: Some(QkNorm {
            q: Some(q_norm),
            k: Some(k_norm),
            span: NormSpan::Head,
            after_rope: false,
        }),
        value_norm: false,
        gate: Some(OutputGate::WithQueries),
        q,
        k,
        v,
        o: s.linear(&format!("{p}.attn_output"), n_head * dim, hidden)?,
        shared_kv: None,
        index: None,
        sinks: None,
        window: None,
        window_kind: WindowKind::Sliding,
    })
}

pub(super) fn delta(s: &Source<'_>, layer: usize, hidden: usize) -> Result<DeltaSpec, ModelError> {
    let size = |key, max| s.in_bounds(key, s.dim(key)?, max);
    let head_dim = size("ssm.state_size", MAX_DELTA)?;
    let n_key_head = size("ssm.group_count", MAX_DELTA)?;
    let n_value_head = size("ssm.time_step_rank", MAX_DELTA)?;
    let conv_taps = size("ssm.conv_kernel", MAX_CONV_TAPS)?;
    if !n_value_head.is_multiple_of(n_key_head) {
        let what = format!(
            "{n_key_head} key heads do not divide the {n_value_head} value heads (ssm.time_step_rank)"
        );
        return Err(s.bad("ssm.group_count", what));
    }
    let value_width = n_value_head * head_dim;
    let inner = s.dim("ssm.inner_size")?;
    if inner != value_width {
        let what = format!(
            "{inner}; expected {value_width}, {n_value_head} value heads of ssm.state_size {head_dim}"
        );
        return Err(s.bad("ssm.inner_size", what));
    }
    let channels = 2 * n_key_head * head_dim + value_width;
    let p = format!("blk.{layer}");
    let grouped = s.arch() == "qwen3next";
    let fused = format!("{p}.ssm_in");
    let input = if grouped && s.has_tensor(&format!("{fused}.weight")) {
        DeltaInput::ByKeyHead(s.linear(&fused, hidden, channels + value_width)?)
    } else {
        DeltaInput::Split {
            qkv: s.linear(&format!("{p}.attn_qkv"), hidden, channels)?,
            gate: s.linear(&format!("{p}.attn_gate"), hidden, value_width)?,
        }
    };
    let rates = if grouped {
        DeltaRates::ByKeyHead(s.linear(&format!("{p}.ssm_ba"), hidden, 2 * n_value_head)?)
    } else {
        DeltaRates::Split {
            beta: s.linear(&format!("{p}.ssm_beta"), hidden, n_value_head)?,
            alpha: s.linear(&format!("{p}.ssm_alpha"), hidden, n_value_head)?,
        }
    };
    Ok(DeltaSpec {
        n_key_head,
        n_value_head,
        head_dim,
        conv_taps,
        sharing: if grouped {
            KeySharing::Grouped
        } else {
            KeySharing::Cyclic
        },
        input,
        rates,
        conv: s.parameters(&format!("{p}.ssm_conv1d.weight"), &[conv_taps, channels])?,
        gate: DeltaGate::Silu,
        dt_bias: s.vector(&format!("{p}.ssm_dt.bias"), n_value_head)?,
        decay: s.vector(&format!("{p}.ssm_a"), n_value_head)?,
        norm: s.vector(&format!("{p}.ssm_norm.weight"), head_dim)?,
        out: s.linear(&format!("{p}.ssm_out"), value_width, hidden)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::testing::Writer;
    use crate::gguf::{ArrayValue, Gguf, Value};
    use std::io::Write;

    /// Returns a file of keys only.
    fn keys(arch: &str, keys: &[(&str, Value)]) -> Gguf {
        let mut writer = Writer::default();
        for (key, value) in keys {
            writer = writer.key(&format!("{arch}.{key}"), value.clone());
        }
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(&writer.finish())
            .expect("room for a small file");
        Gguf::open(file.path()).expect("the file just written")
    }

    #[test]
    fn the_kinds_of_layers_come_from_a_list_or_an_interval() {
        let of = |found: &[(&str, Value)]| {
            recurrent_layers(&Source::new(&keys("qwen3next", found), "qwen3next"), 5)
        };
        let interval = |n| ("full_attention_interval", Value::U32(n));
        assert_eq!(
            of(&[]).expect("the default"),
            [true, true, true, false, true]
        );
        assert_eq!(
            of(&[interval(2)]).expect("an interval"),
            [true, false, true, false, true]
        );
        assert_eq!(of(&[interval(1)]).expect("an interval"), [false; 5]);
        assert!(
            of(&[interval(0)])
                .expect_err("no interval")
                .to_string()
                .contains("full_attention_interval: 0")
        );
        let list = |a| ("attention.recurrent_layers", Value::Array(a));
        let mixed = [false, true, true, false, true];
        // One entry more, of a prediction block.
        let flags = ArrayValue::Bool(mixed.into_iter().chain([false]).collect());
        assert_eq!(of(&[list(flags), interval(2)]).expect("a list"), mixed);
        assert_eq!(
            of(&[list(ArrayValue::U32(vec![0, 1, 1, 0, 1]))]).expect("a list"),
            mixed
        );
        assert_eq!(
            of(&[("attention.recurrent_layers", Value::Bool(true))]).expect("one for all"),
            [true; 5]
        );
        let short = of(&[list(ArrayValue::Bool(vec![true; 4]))])
            .expect_err("a layer without")
            .to_string();
        assert!(
            short.contains("4 values; expected one for each of 5 layers"),
            "{short}"
        );
    }

    #[test]
    fn sizes_that_contradict_each_other_are_refused() {
        let right = [
            ("ssm.state_size", 16),
            ("ssm.group_count", 2),
            ("ssm.time_step_rank", 4),
            ("ssm.conv_kernel", 4),
            ("ssm.inner_size", 64),
        ];
        let error = |changed: &str, to: u32| {
            let found =
                right.map(|(key, size)| (key, Value::U32(if key == changed { to } else { size })));
            delta(&Source::new(&keys("qwen3next", &found), "qwen3next"), 0, 64)
                .expect_err("no tensors")
                .to_string()
        };
        assert!(error("", 0).contains("blk.0.attn_qkv.weight"));
        for (key, to) in [
            ("ssm.state_size", 0),
            ("ssm.state_size", 4096),
            ("ssm.group_count", 3),
            ("ssm.time_step_rank", 1 << 20),
            ("ssm.conv_kernel", 17),
            ("ssm.inner_size", 128),
        ] {
            let said = error(key, to);
            assert!(
                said.contains(&format!("qwen3next.{key}: ")),
                "{key} {to}: {said}"
            );
        }
    }

    #[test]
    fn sections_are_up_to_four_counts() {
        let of = |sections: &[i32]| {
            let value = Value::Array(ArrayValue::I32(sections.to_vec()));
            let gguf = keys("qwen35moe", &[("rope.dimension_sections", value)]);
            Source::new(&gguf, "qwen35moe").opt_sections("rope.dimension_sections")
        };
        assert_eq!(of(&[11, 11, 10, 0]).expect("four"), Some([11, 11, 10, 0]));
        assert_eq!(of(&[3, 3, 2]).expect("three"), Some([3, 3, 2, 0]));
        assert!(
            of(&[0, 0, 0, 0]).is_err()
                && of(&[1, 1, 1, 1, 1]).is_err()
                && of(&[-1, 2, 2, 0]).is_err()
        );
    }

    #[test]
    fn attention_heads_may_be_given_for_attention_layers_only() {
        let list = |a: &[u32]| Value::Array(ArrayValue::U32(a.to_vec()));
        let found = [
            ("attention.head_count", list(&[0, 8, 6])),
            ("attention.head_count_kv", list(&[0, 2, 4])),
        ];
        let gguf = keys("qwen3next", &found);
        let s = Source::new(&gguf, "qwen3next");
        let heads = Heads::read(&s, 3).expect("three layers");
        assert_eq!(heads.of(&s, 1).expect("attention"), (8, 2));
        assert!(heads.of(&s, 0).is_err() && heads.of(&s, 2).is_err());
    }
}
