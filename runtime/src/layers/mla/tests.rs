mod options;

use super::*;
use crate::gpu::mixer_alone;
use crate::layers::mixer::Segment;
use crate::layers::pages::mixed_pages;
use crate::layers::rope::RopeTable;
use crate::layers::weights::WeightStorage;
use std::collections::HashMap;
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::{
    Linear, LowRank, Mixer, Reach, RopeKind, RopeScaling, RopeSpec, Temperature,
};
use tier_plan_formats::placement::TierIdx;
use tier_plan_kernels::Kernels;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::threads::ThreadPool;
use tier_plan_testing::Random;

const HIDDEN: usize = 24;
const N_HEAD: usize = 3;
const NOPE: usize = 32;
const ROPE: usize = 4;
const VALUE: usize = 6;
const RANK: usize = 64;
const Q_RANK: usize = 10;
const EPS: f32 = 1e-6;
const MAGNITUDE: f32 = 1.25;
const SCALE: f32 = 0.3;
const TEMPERATURE: Temperature = Temperature {
    scale: 0.2,
    length: 3,
    offset: 0,
};

/// Numbers within -1 to 1, the same ones for a seed.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    Random(seed).noise(len)
}

/// Encodes to a type and returns what the bytes decode to beside them.
fn encode(ty: TensorType, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let bytes: Vec<u8> = match ty {
        TensorType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        TensorType::F16 => values
            .iter()
            .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
            .collect(),
        TensorType::Q8_0 => {
            let block = |block: &[f32]| {
                let scale = half::f16::from_f32(1.0 / 127.0);
                let codes = block.iter().map(|v| (v * 127.0).round() as i8 as u8);
                scale
                    .to_le_bytes()
                    .into_iter()
                    .chain(codes.collect::<Vec<_>>())
                    .collect::<Vec<u8>>()
            };
            values.chunks_exact(32).flat_map(block).collect()
        }
        other => panic!("no encoder for {other}"),
    };
    let mut decoded = vec![0.0; values.len()];
    dequantize_row(ty, &bytes, &mut decoded);
    (bytes, decoded)
}

/// Options of a layer under test.
#[derive(Clone, Copy)]
struct Case {
    low_rank_queries: bool,
    fused: bool,
    /// Type of the matrices between latent and heads.
    ty: TensorType,
    kv_type: KvType,
}

const PLAIN: Case = Case {
    low_rank_queries: true,
    fused: false,
    ty: TensorType::F32,
    kv_type: KvType::F32,
};

/// A layer on disk, and its matrices as the reference reads them.
struct Layer {
    weights: DenseWeights,
    spec: MlaSpec,
    decoded: HashMap<&'static str, Vec<f32>>,
    /// `[n_head, nope_dim, kv_rank]`.
    keys: Vec<f32>,
    /// `[n_head, value_dim, kv_rank]`.
    values: Vec<f32>,
}

fn layer(case: Case) -> Layer {
    let key_dim = NOPE + ROPE;
    let q_in = if case.low_rank_queries {
        Q_RANK
    } else {
        HIDDEN
    };
    let mut tensors: Vec<(&'static str, TensorType, Vec<usize>, Vec<f32>)> = vec![
        (
            "q_down",
            TensorType::F32,
            vec![HIDDEN, Q_RANK],
            noise(1, HIDDEN * Q_RANK),
        ),
        ("q_norm", TensorType::F32, vec![Q_RANK], noise(2, Q_RANK)),
        (
            "q",
            TensorType::F32,
            vec![q_in, N_HEAD * key_dim],
            noise(3, q_in * N_HEAD * key_dim),
        ),
        (
            "kv_down",
            TensorType::F32,
            vec![HIDDEN, RANK + ROPE],
            noise(4, HIDDEN * (RANK + ROPE)),
        ),
        ("kv_norm", TensorType::F32, vec![RANK], noise(5, RANK)),
        (
            "o",
            TensorType::F32,
            vec![N_HEAD * VALUE, HIDDEN],
            noise(6, N_HEAD * VALUE * HIDDEN),
        ),
    ];
    let mut keys = noise(7, N_HEAD * NOPE * RANK);
    let mut values = noise(8, N_HEAD * VALUE * RANK);
    // From [n_head, a, b] to [n_head, b, a].
    let turned = |m: &[f32], a: usize, b: usize| -> Vec<f32> {
        m.chunks_exact(a * b)
            .flat_map(|head| (0..a * b).map(|i| head[i % a * b + i / a]))
            .collect()
    };
    if case.fused {
        let both: Vec<f32> = keys
            .chunks_exact(NOPE * RANK)
            .zip(values.chunks_exact(VALUE * RANK))
            .flat_map(|(k, v)| [k, v].concat())
            .collect();
        tensors.push(("kv_up", case.ty, vec![RANK, N_HEAD * (NOPE + VALUE)], both));
    } else {
        tensors.push((
            "k_up",
            case.ty,
            vec![NOPE, RANK, N_HEAD],
            turned(&keys, NOPE, RANK),
        ));
        tensors.push(("v_up", case.ty, vec![RANK, VALUE, N_HEAD], values.clone()));
    }
    let mut writer = Writer::default();
    let mut decoded = HashMap::new();
    for (name, ty, dims, content) in &tensors {
        let (bytes, back) = encode(*ty, content);
        let dims: Vec<u64> = dims.iter().map(|d| *d as u64).collect();
        writer = writer.tensor(name, *ty, &dims, bytes);
        decoded.insert(*name, back);
    }
    if case.fused {
        let heads = || decoded["kv_up"].chunks_exact((NOPE + VALUE) * RANK);
        keys = heads().flat_map(|h| h[..NOPE * RANK].to_vec()).collect();
        values = heads().flat_map(|h| h[NOPE * RANK..].to_vec()).collect();
    } else {
        keys = turned(&decoded["k_up"], RANK, NOPE);
        values = decoded["v_up"].clone();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.gguf");
    std::fs::write(&path, writer.finish()).unwrap();
    let gguf = Arc::new(Gguf::open(&path).unwrap());
    let id = |name: &str| gguf.tensors().iter().position(|t| t.name == name).unwrap();
    let linear = |name, n_in, n_out| Linear {
        weight: id(name),
        bias: None,
        n_out,
        n_in,
        first_row: 0,
    };
    let spec = MlaSpec {
        n_head: N_HEAD,
        nope_dim: NOPE,
        value_dim: VALUE,
        kv_rank: RANK,
        scale: SCALE,
        temperature: Some(TEMPERATURE),
        shared_dim: ROPE,
        rope: Some(RopeSpec {
            kind: RopeKind::Adjacent,
            dims: ROPE,
            base: 100.0,
            scaling: RopeScaling::None,
            magnitude: MAGNITUDE,
            freq_factors: None,
            long_factors: None,
            sections: None,
        }),
        q_down: case.low_rank_queries.then(|| LowRank {
            down: linear("q_down", HIDDEN, Q_RANK),
            norm: id("q_norm"),
        }),
        q: linear("q", q_in, N_HEAD * key_dim),
        kv_down: linear("kv_down", HIDDEN, RANK + ROPE),
        kv_norm: id("kv_norm"),
        shared_norm: None,
        reach: Reach::All,
        sinks: None,
        gate: None,
        kv_up: if case.fused {
            KvUp::Fused(id("kv_up"))
        } else {
            KvUp::Split {
                k: id("k_up"),
                v: id("v_up"),
            }
        },
        o: linear("o", N_HEAD * VALUE, HIDDEN),
    };
    let mut weights = DenseWeights::new(Arc::clone(&gguf));
    let read = Mixer::Mla(spec.clone()).tensors();
    read.matrices
        .iter()
        .for_each(|id| weights.hold(*id, TierIdx::FIRST, WeightStorage::Mapped));
    for id in read.vectors {
        let values = decoded[gguf.tensors()[id].name.as_str()].clone();
        weights.hold(
            id,
            TierIdx::FIRST,
            WeightStorage::Vector(values.into_boxed_slice()),
        );
    }
    Layer {
        weights,
        spec,
        decoded,
        keys,
        values,
    }
}

/// Runs the tokens of `x`, `[tokens, HIDDEN]`, in batches of the given sizes.
fn absorbed(layer: &Layer, kv_type: KvType, x: &[f32], batches: &[usize]) -> Vec<f32> {
    let pool = ThreadPool::new(2);
    let c = CpuContext {
        pool: &pool,
        kernels: Kernels::best(),
    };
    let mut cache = LatentRows {
        latents: RowStore::new(kv_type, 1, x.len() / HIDDEN, RANK + ROPE),
        index_keys: None,
        open: Vec::new(),
    };
    let pages = mixed_pages(x.len() / HIDDEN);
    let mut scratch = MlaScratch::default();
    scratch.reserve(batches.iter().copied().max().unwrap(), &layer.spec);
    let mut rope = RopeTable::new(layer.spec.rope.as_ref().unwrap(), None);
    let mut chosen = Chosen::default();
    let mut acts = Activations::default();
    let mut out = vec![f32::NAN; x.len()];
    let mut past = 0;
    for n in batches {
        let range = past * HIDDEN..(past + n) * HIDDEN;
        rope.prepare(std::iter::once(past..past + n));
        acts.fill(c.kernels, *n, HIDDEN, &x[range.clone()], false);
        let input = MixerInput {
            x: acts.view(),
            segments: &[Segment {
                rows: 0..*n,
                past,
                pages: &pages,
                state: 0,
                checkpoints: Vec::new(),
            }],
            first_row: 0,
            rope: Some(&rope),
            indexer_rope: None,
            norm_eps: EPS,
        };
        run(
            c,
            &layer.weights,
            &layer.spec,
            &input,
            &mut cache,
            (&mut scratch, &mut chosen),
            &mut out[range],
        );
        past += n;
    }
    out
}

/// Attention with every head's keys and values written out, in double precision.
fn expanded(layer: &Layer, x: &[f32]) -> Vec<f64> {
    let product = |m: &[f32], x: &[f64]| -> Vec<f64> {
        m.chunks_exact(x.len())
            .map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
            .collect()
    };
    let norm = |x: &[f64], w: &[f32]| -> Vec<f64> {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        x.iter()
            .zip(w)
            .map(|(v, w)| v / (mean + f64::from(EPS)).sqrt() * f64::from(*w))
            .collect()
    };
    let rotate = |x: &[f64], position: usize| -> Vec<f64> {
        (0..ROPE / 2)
            .flat_map(|pair| {
                let angle = position as f64 * 100f64.powf(-2.0 * pair as f64 / ROPE as f64);
                let (sin, cos) = angle.sin_cos();
                let (a, b) = (x[2 * pair], x[2 * pair + 1]);
                [a * cos - b * sin, a * sin + b * cos].map(|v| v * f64::from(MAGNITUDE))
            })
            .collect()
    };
    let d = &layer.decoded;
    let (mut keys, mut values, mut out) = (Vec::new(), Vec::new(), Vec::new());
    for (t, x) in x.chunks_exact(HIDDEN).enumerate() {
        let x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
        let q = match layer.spec.q_down {
            Some(_) => product(&d["q"], &norm(&product(&d["q_down"], &x), &d["q_norm"])),
            None => product(&d["q"], &x),
        };
        let kv = product(&d["kv_down"], &x);
        let latent = norm(&kv[..RANK], &d["kv_norm"]);
        let shared = rotate(&kv[RANK..], t);
        keys.push(
            product(&layer.keys, &latent)
                .chunks_exact(NOPE)
                .map(|k| [k, &shared].concat())
                .collect::<Vec<_>>(),
        );
        values.push(product(&layer.values, &latent));
        let scale = f64::from(SCALE) * (1.0 + 0.2f32 as f64 * ((t / 3 + 1) as f64).ln());
        let mut mixed = Vec::new();
        for (h, q) in q.chunks_exact(NOPE + ROPE).enumerate() {
            let q = [&q[..NOPE], &rotate(&q[NOPE..], t)].concat();
            let scores = keys
                .iter()
                .map(|k| scale * k[h].iter().zip(&q).map(|(k, q)| k * q).sum::<f64>());
            let scores: Vec<f64> = scores.collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            mixed.extend((0..VALUE).map(|i| {
                weights
                    .iter()
                    .zip(&values)
                    .map(|(w, v): (_, &Vec<f64>)| w / sum * v[h * VALUE + i])
                    .sum::<f64>()
            }));
        }
        out.extend(product(&d["o"], &mixed));
    }
    out
}

fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let off: f64 = got
        .iter()
        .zip(want)
        .map(|(g, w)| (f64::from(*g) - w).powi(2))
        .sum();
    off / want.iter().map(|w| w * w).sum::<f64>()
}

#[test]
fn absorbed_attention_equals_the_expanded_one() {
    let x = noise(20, 11 * HIDDEN);
    for low_rank_queries in [false, true] {
        for fused in [false, true] {
            for ty in [TensorType::F32, TensorType::F16] {
                let case = Case {
                    low_rank_queries,
                    fused,
                    ty,
                    ..PLAIN
                };
                let layer = layer(case);
                let want = expanded(&layer, &x);
                // Batches that are taken in several parts, and single tokens.
                let off = error(&absorbed(&layer, KvType::F32, &x, &[7, 3, 1]), &want);
                assert!(
                    off < 1e-10,
                    "low-rank queries {low_rank_queries}, fused {fused}, {ty}: {off:e}"
                );
            }
        }
    }
}

#[test]
fn the_fused_tensor_equals_the_two() {
    let x = noise(21, 6 * HIDDEN);
    let split = absorbed(&layer(PLAIN), KvType::F32, &x, &[6]);
    let fused = absorbed(
        &layer(Case {
            fused: true,
            ..PLAIN
        }),
        KvType::F32,
        &x,
        &[6],
    );
    let split: Vec<f64> = split.iter().map(|v| f64::from(*v)).collect();
    let off = error(&fused, &split);
    assert!(off < 1e-11, "{off:e}");
}

#[test]
fn quantized_projections_differ_by_the_rounding_of_activations() {
    let x = noise(22, 5 * HIDDEN);
    for fused in [false, true] {
        let layer = layer(Case {
            fused,
            ty: TensorType::Q8_0,
            ..PLAIN
        });
        let off = error(
            &absorbed(&layer, KvType::F32, &x, &[4, 1]),
            &expanded(&layer, &x),
        );
        assert!(off > 0.0 && off < 1e-3, "fused {fused}: {off:e}");
    }
}

#[test]
fn sixteen_bit_latents_are_close() {
    let x = noise(23, 9 * HIDDEN);
    let layer = layer(PLAIN);
    let off = error(
        &absorbed(&layer, KvType::F16, &x, &[8, 1]),
        &expanded(&layer, &x),
    );
    assert!(off > 1e-12 && off < 1e-5, "{off:e}");
}

#[test]
fn batches_do_not_change_a_bit() {
    let x = noise(24, 9 * HIDDEN);
    for case in [
        PLAIN,
        Case {
            fused: true,
            kv_type: KvType::F16,
            ..PLAIN
        },
    ] {
        let layer = layer(case);
        let whole = absorbed(&layer, case.kv_type, &x, &[9]);
        assert_eq!(absorbed(&layer, case.kv_type, &x, &[1; 9]), whole);
        assert_eq!(absorbed(&layer, case.kv_type, &x, &[2, 5, 2]), whole);
    }
}

#[test]
fn a_gpu_attends_to_latents_as_the_processor_does() {
    let x = noise(25, 9 * HIDDEN);
    for low_rank_queries in [false, true] {
        for fused in [false, true] {
            for ty in [TensorType::F32, TensorType::F16] {
                let case = Case {
                    low_rank_queries,
                    fused,
                    ty,
                    ..PLAIN
                };
                let Layer { weights, spec, .. } = layer(case);
                let norm = spec.kv_norm;
                let mixer = Mixer::Mla(spec);
                let got = mixer_alone(
                    &mixer,
                    norm,
                    EPS,
                    weights,
                    KvType::F32,
                    (&x, HIDDEN),
                    &[5, 3, 1],
                );
                let off = error(&got, &expanded(&layer(case), &x));
                assert!(
                    off < 1e-10,
                    "low-rank queries {low_rank_queries}, fused {fused}, {ty}: {off:e}"
                );
            }
        }
    }
}
