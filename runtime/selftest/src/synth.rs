//! Writes models with the shapes of real ones and random weights, for measurements. Their bytes and
//! their routing are realistic, their text is noise. Weights are as large as trained ones, so that
//! nothing overflows, and routers favor some experts.

use crate::{SelftestError, Stop};
use half::f16;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use tier_plan_formats::gguf::{BadTensor, Draft, DraftTensor, Value};
use tier_plan_formats::safely::Temporary;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::random::Random;

/// Bytes that are generated at once.
const PIECE_BYTES: usize = 1 << 20;

/// Most layers of a model: half of Qwen3-30B-A3B's.
const MAX_LAYERS: u32 = 24;

/// Fewest layers of a model whose speed is representative.
const MIN_LAYERS: u32 = 2;

/// Bytes of a device's memory that are left for the KV cache, buffers, the driver and other
/// programs.
const DEVICE_RESERVE_BYTES: u64 = 1 << 30;

/// Standard deviation of a Q4_K value with random bits, if the factors of scales and minimums are 1
/// and 7.5: codes of 0 to 15, scales and minimums of 0 to 63. The mean is 0 then.
const SPREAD_Q4_K: f32 = 250.0;

/// Standard deviation of a Q6_K value with random bits, if the factor is 1: codes of -32 to 31,
/// scales of -128 to 127.
const SPREAD_Q6_K: f32 = 1370.0;

/// Sizes of a model with routed experts in every layer and grouped-query attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Layers of the model.
    pub layers: u32,
    /// Experts per layer.
    pub experts: u32,
    /// Experts per token.
    pub used: u32,
    /// Width of the hidden state, a multiple of 256.
    pub hidden: u32,
    /// Width between an expert's matrices, a multiple of 256.
    pub ffn: u32,
    /// Number of query heads.
    pub heads: u32,
    /// Heads of keys and values.
    pub kv_heads: u32,
    /// Width of a head; all heads together are a multiple of 256.
    pub head: u32,
    /// Tokens in the vocabulary.
    pub vocab: u32,
}

/// Bytes that a model may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FreeBytes {
    /// Free bytes of the device.
    pub device: u64,
    /// Bytes of main memory.
    pub memory: u64,
    /// Free bytes of the file system.
    pub disk: u64,
}

impl Shape {
    /// Sizes of Qwen3-30B-A3B except depth and vocabulary.
    pub const REAL: Shape = Shape {
        layers: MAX_LAYERS,
        experts: 128,
        used: 8,
        hidden: 2048,
        ffn: 768,
        heads: 32,
        kv_heads: 4,
        head: 128,
        vocab: 32_768,
    };

    /// Sizes that fit anywhere, whose speed is not representative.
    pub const TINY: Shape = Shape {
        layers: 2,
        experts: 8,
        used: 2,
        hidden: 256,
        ffn: 256,
        heads: 4,
        kv_heads: 2,
        head: 64,
        vocab: 512,
    };

    /// Returns the deepest realistic shape that fits, or else the tiny one.
    pub fn fitting(free: FreeBytes) -> Self {
        // The file stays in the page cache, and is copied to huge pages.
        let limit = free
            .device
            .saturating_sub(DEVICE_RESERVE_BYTES)
            .min(free.memory / 5 * 2)
            .min(free.disk / 10 * 9);
        let depths = (MIN_LAYERS..=MAX_LAYERS).rev().map(|layers| Shape {
            layers,
            ..Shape::REAL
        });
        let mut fitting =
            depths.filter(|shape| shape.file_bytes().is_some_and(|bytes| bytes <= limit));
        fitting.next().unwrap_or(Shape::TINY)
    }

    /// Whether the speed is representative of real models.
    pub fn is_real(&self) -> bool {
        Shape {
            layers: MAX_LAYERS,
            ..*self
        } == Shape::REAL
            && self.layers >= MIN_LAYERS
    }

    /// Returns the bytes of the file; `None` for unsupported sizes.
    pub fn file_bytes(&self) -> Option<u64> {
        self.draft().ok().map(|draft| draft.file_bytes())
    }

    fn draft(&self) -> Result<Draft, BadTensor> {
        use TensorType::{F32, Q4_K, Q6_K};
        let number = |key: &str, value: u32| (format!("qwen3moe.{key}"), Value::U32(value));
        let mut draft = Draft::default()
            .key("general.architecture", Value::Str("qwen3moe".into()))
            .key(
                "general.name",
                Value::Str(format!("synthetic, {} layers", self.layers)),
            )
            .key("tokenizer.ggml.model", Value::Str("none".into()))
            .key(
                "qwen3moe.attention.layer_norm_rms_epsilon",
                Value::F32(1e-6),
            )
            .key("qwen3moe.rope.freq_base", Value::F32(1e6));
        let numbers = [
            number("block_count", self.layers),
            number("context_length", 8192),
            number("embedding_length", self.hidden),
            number("feed_forward_length", self.ffn),
            number("expert_feed_forward_length", self.ffn),
            number("attention.head_count", self.heads),
            number("attention.head_count_kv", self.kv_heads),
            number("attention.key_length", self.head),
            number("attention.value_length", self.head),
            number("expert_count", self.experts),
            number("expert_used_count", self.used),
            number("vocab_size", self.vocab),
        ];
        for (key, value) in numbers {
            draft = draft.key(key, value);
        }
        let [hidden, ffn, experts, vocab, head] =
            [self.hidden, self.ffn, self.experts, self.vocab, self.head].map(u64::from);
        let [q, kv] = [self.heads, self.kv_heads].map(|heads| u64::from(heads) * head);
        draft.tensor("token_embd.weight", Q4_K, &[hidden, vocab])?;
        draft.tensor("output_norm.weight", F32, &[hidden])?;
        draft.tensor("output.weight", Q6_K, &[hidden, vocab])?;
        for layer in 0..self.layers {
            let mut add = |name: &str, ty, dims: &[u64]| {
                draft.tensor(format!("blk.{layer}.{name}.weight"), ty, dims)
            };
            add("attn_norm", F32, &[hidden])?;
            add("attn_q", Q4_K, &[hidden, q])?;
            add("attn_k", Q4_K, &[hidden, kv])?;
            add("attn_v", Q6_K, &[hidden, kv])?;
            add("attn_output", Q4_K, &[q, hidden])?;
            add("attn_q_norm", F32, &[head])?;
            add("attn_k_norm", F32, &[head])?;
            add("ffn_norm", F32, &[hidden])?;
            add("ffn_gate_inp", F32, &[hidden, experts])?;
            add("ffn_gate_exps", Q4_K, &[hidden, ffn, experts])?;
            add("ffn_up_exps", Q4_K, &[hidden, ffn, experts])?;
            // As in common quantizations, some layers have more bits here.
            add(
                "ffn_down_exps",
                if layer % 2 == 1 { Q6_K } else { Q4_K },
                &[ffn, hidden, experts],
            )?;
        }
        Ok(draft)
    }
}

/// Writes a model into a temporary file in a folder. `progress` receives the bytes written and the
/// total.
///
/// # Errors
/// When the sizes are unsupported, writing fails, or `stop` returns true.
pub fn write(
    shape: &Shape,
    folder: &Path,
    stop: Stop<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Temporary, SelftestError> {
    let failed = |source| SelftestError::Write {
        path: folder.into(),
        source,
    };
    let temporary = Temporary::create(folder).map_err(failed)?;
    let draft = shape.draft().map_err(|bad| failed(io::Error::other(bad)))?;
    let (mut done, total) = (0, draft.file_bytes());
    let mut fill = |tensor: &DraftTensor, out: &mut dyn Write| {
        let mut random = Random::new(&tensor.name);
        let mut tell = |bytes: usize| {
            done += bytes as u64;
            progress(done, total);
            if stop() {
                Err(io::Error::other("stopped"))
            } else {
                Ok(())
            }
        };
        match tensor.ty {
            TensorType::F32 if tensor.dims.len() == 1 => {
                out.write_all(&1f32.to_le_bytes().repeat(tensor.dims[0] as usize))?;
                tell(tensor.n_bytes as usize)
            }
            TensorType::F32 => router(&mut random, tensor, out, &mut tell),
            _ => blocks(&mut random, tensor, out, &mut tell),
        }
    };
    let mut file = BufWriter::new(temporary.file());
    let written = draft.write(&mut file, &mut fill);
    let written = written.and_then(|_| file.flush());
    drop(file);
    written.map_err(|error| {
        if stop() {
            SelftestError::Stopped
        } else {
            failed(error)
        }
    })?;
    Ok(temporary)
}

/// Writes random blocks whose values are about as large as those of a trained matrix of this width.
fn blocks(
    random: &mut Random,
    tensor: &DraftTensor,
    out: &mut dyn Write,
    tell: &mut dyn FnMut(usize) -> io::Result<()>,
) -> io::Result<()> {
    let width = tensor.dims.first().copied().unwrap_or(1) as f32;
    // Embeddings are about 1, and logits far enough apart that some tokens are more likely than
    // others.
    let spread = match tensor.name.as_str() {
        "token_embd.weight" => 1.0,
        "output.weight" => 20.0 / width.sqrt(),
        _ => 1.0 / width.sqrt(),
    };
    let halves: &[(usize, f32)] = match tensor.ty {
        TensorType::Q4_K => &[(0, 1.0 / SPREAD_Q4_K), (2, 7.5 / SPREAD_Q4_K)],
        _ => &[(208, 1.0 / SPREAD_Q6_K)],
    };
    let block_bytes = tensor.ty.block_bytes();
    let piece_bytes = (PIECE_BYTES / block_bytes).max(1) * block_bytes;
    let mut piece = vec![0u8; piece_bytes];
    let mut left = tensor.n_bytes as usize;
    while left > 0 {
        let piece = &mut piece[..left.min(piece_bytes)];
        for bytes in piece.chunks_mut(8) {
            bytes.copy_from_slice(&random.next_u64().to_le_bytes()[..bytes.len()]);
        }
        for block in piece.chunks_exact_mut(block_bytes) {
            for (offset, factor) in halves {
                block[*offset..*offset + 2]
                    .copy_from_slice(&f16::from_f32(spread * factor).to_le_bytes());
            }
        }
        out.write_all(piece)?;
        left -= piece.len();
        tell(piece.len())?;
    }
    Ok(())
}

/// Writes a router that favors some experts: rows of different norms.
fn router(
    random: &mut Random,
    tensor: &DraftTensor,
    out: &mut dyn Write,
    tell: &mut dyn FnMut(usize) -> io::Result<()>,
) -> io::Result<()> {
    let (width, rows) = (
        tensor.dims[0] as usize,
        tensor.dims[1..].iter().product::<u64>(),
    );
    // The sum of three uniform numbers is nearly normal, of variance 1.
    let normal = |random: &mut Random| random.float() + random.float() + random.float();
    for _ in 0..rows {
        let favor = (0.6 * normal(random)).exp();
        let scale = 2.0 * favor / (width as f32).sqrt();
        let row: Vec<u8> = (0..width)
            .flat_map(|_| (scale * normal(random)).to_le_bytes())
            .collect();
        out.write_all(&row)?;
        tell(row.len())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tier_plan_formats::gguf::Gguf;
    use tier_plan_formats::model::kv::KvType;
    use tier_plan_formats::model::{describe, shape::shape_of};
    use tier_plan_kernels::quant::dequantize_row;
    use tier_plan_runtime::engine::{Engine, LogitsMode};
    use tier_plan_runtime::options::LoadOptions;
    use tier_plan_runtime::plans::in_memory::all_in_memory;

    #[test]
    fn a_model_opens_and_its_passes_are_finite() {
        let folder = tempfile::tempdir().unwrap();
        let mut told = (0, 0);
        let file = write(
            &Shape::TINY,
            folder.path(),
            &|| false,
            &mut |done, total| told = (done, total),
        )
        .unwrap();
        let bytes = std::fs::metadata(file.path()).unwrap().len();
        assert_eq!(Some(bytes), Shape::TINY.file_bytes());
        assert!(
            told.1 == bytes && told.0 <= bytes && told.0 > bytes / 2,
            "{told:?} of {bytes}"
        );
        let gguf = Arc::new(Gguf::open(file.path()).unwrap());
        // The standard deviations are those that the factors are for.
        for (name, expected) in [
            ("token_embd.weight", 1.0),
            ("blk.0.attn_v.weight", 1.0 / 16.0),
        ] {
            let tensor = gguf.tensor(name).unwrap();
            let row = gguf.bytes(tensor).len() / tensor.dims[1] as usize;
            let (mut sum, mut squares, mut n) = (0f64, 0f64, 0f64);
            for bytes in gguf.bytes(tensor).chunks_exact(row) {
                let mut values = vec![0.0; tensor.dims[0] as usize];
                dequantize_row(tensor.ty, bytes, &mut values);
                sum += values.iter().map(|v| f64::from(*v)).sum::<f64>();
                squares += values
                    .iter()
                    .map(|v| f64::from(*v) * f64::from(*v))
                    .sum::<f64>();
                n += values.len() as f64;
            }
            let (mean, spread) = (sum / n, (squares / n).sqrt());
            assert!(mean.abs() < 0.05 * expected, "{name}: {mean}");
            assert!((spread / expected - 1.0).abs() < 0.1, "{name}: {spread}");
        }
        let shape = shape_of(&gguf, &describe(&gguf).unwrap());
        assert_eq!(
            (
                shape.n_layer,
                shape.experts[0].n_expert,
                shape.experts[0].n_used
            ),
            (2, 8, 2)
        );
        let plan = all_in_memory(&shape, 40, KvType::F16);
        let options = LoadOptions {
            threads: Some(1),
            ..LoadOptions::default()
        };
        let mut engine = Engine::load(Arc::clone(&gguf), &plan, &options, &mut |_, _| {}).unwrap();
        let tokens: Vec<u32> = (0..32).map(|i| i * 13 % 512).collect();
        let logits = engine.forward(&tokens, LogitsMode::Last).unwrap();
        assert!(logits.iter().all(|l| l.is_finite()) && logits.iter().any(|l| l.abs() > 1e-3));
        // Experts differ from token to token, and some are used more than others.
        let chosen = &engine.routing().experts;
        let counts: Vec<usize> = (0..8)
            .map(|e| chosen.iter().filter(|c| **c == e).count())
            .collect();
        assert!(counts.iter().filter(|n| **n > 0).count() > 2, "{counts:?}");
        let path = file.path().to_path_buf();
        drop((engine, gguf, file));
        assert!(!path.exists());
    }

    #[test]
    fn depth_follows_what_is_free() {
        let gib = |n: u64| n << 30;
        let free = |device, memory, disk| {
            Shape::fitting(FreeBytes {
                device,
                memory,
                disk,
            })
        };
        let whole = free(gib(80), gib(64), gib(100));
        assert_eq!(whole, Shape::REAL);
        let bytes = whole.file_bytes().unwrap();
        assert!((gib(8)..gib(9)).contains(&bytes), "{bytes}");
        // Each of the three limits the depth.
        for shape in [
            free(gib(5), gib(64), gib(100)),
            free(gib(80), gib(10), gib(100)),
            free(gib(80), gib(64), gib(4)),
        ] {
            assert!(
                shape.is_real() && (MIN_LAYERS..MAX_LAYERS).contains(&shape.layers),
                "{shape:?}"
            );
            assert!(shape.file_bytes().unwrap() <= gib(4));
        }
        for shape in [
            free(gib(1), gib(64), gib(100)),
            free(gib(80), 1 << 20, gib(100)),
            free(gib(80), gib(64), 0),
        ] {
            assert_eq!(shape, Shape::TINY);
            assert!(!shape.is_real());
        }
    }

    #[test]
    fn writing_can_be_stopped_and_unsupported_sizes_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let stopped = write(&Shape::TINY, folder.path(), &|| true, &mut |_, _| {});
        assert!(matches!(stopped, Err(SelftestError::Stopped)));
        let unsupported = Shape {
            hidden: 100,
            ..Shape::TINY
        };
        let why = write(&unsupported, folder.path(), &|| false, &mut |_, _| {})
            .unwrap_err()
            .to_string();
        assert!(
            why.contains("token_embd.weight") && unsupported.file_bytes().is_none(),
            "{why}"
        );
        let nowhere = folder.path().join("none").join("a.gguf");
        let why = write(&Shape::TINY, &nowhere, &|| false, &mut |_, _| {})
            .unwrap_err()
            .to_string();
        assert!(why.contains("none"), "{why}");
    }
}
