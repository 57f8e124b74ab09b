use super::*;
use crate::layers::pages::mixed_pages;
use tier_plan_formats::model::kv::KvType;
use tier_plan_kernels::threads::ThreadPool;
use tier_plan_testing::{Random, nmse};

/// Numbers within -1 to 1, the same ones for a seed.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    Random(seed).noise(len)
}

/// A layer: queries `[tokens, heads, key width]`, keys and values `[tokens, kv heads, width]`.
#[derive(Clone, Copy, Debug)]
struct Layer {
    n_head_kv: usize,
    group: usize,
    key_width: usize,
    /// Values are the beginnings of the keys.
    shared: bool,
    value_width: usize,
    window: Option<usize>,
    sinks: bool,
    tokens: usize,
}

const PLAIN: Layer = Layer {
    n_head_kv: 2,
    group: 4,
    key_width: 16,
    shared: false,
    value_width: 16,
    window: None,
    sinks: false,
    tokens: 19,
};

/// Every trait of a layer at least once; 19 tokens are five chunks in tests.
const LAYERS: [Layer; 8] = [
    PLAIN,
    Layer {
        n_head_kv: 3,
        group: 1,
        key_width: 24,
        value_width: 40,
        ..PLAIN
    },
    Layer {
        n_head_kv: 1,
        group: 13,
        key_width: 40,
        value_width: 7,
        ..PLAIN
    },
    Layer {
        n_head_kv: 1,
        group: 8,
        key_width: 48,
        value_width: 33,
        shared: true,
        ..PLAIN
    },
    Layer {
        window: Some(5),
        ..PLAIN
    },
    Layer {
        window: Some(1),
        sinks: true,
        ..PLAIN
    },
    Layer {
        window: Some(4),
        n_head_kv: 1,
        group: 2,
        sinks: true,
        ..PLAIN
    },
    Layer { tokens: 1, ..PLAIN },
];

impl Layer {
    fn n_head(self) -> usize {
        self.n_head_kv * self.group
    }

    fn queries(self) -> Vec<f32> {
        // Large enough for some scores to stand out, and for the largest to be in any chunk.
        noise(1, self.tokens * self.n_head() * self.key_width)
            .into_iter()
            .map(|q| 2.0 * q)
            .collect()
    }

    fn keys(self) -> Vec<f32> {
        noise(2, self.tokens * self.n_head_kv * self.key_width)
    }

    fn values(self) -> Vec<f32> {
        noise(3, self.tokens * self.n_head_kv * self.value_width)
    }

    fn sink(self, head: usize) -> Option<f32> {
        self.sinks.then_some(head as f32 - 2.0)
    }

    /// Results `[tokens, heads, value_width]`, in batches of the given sizes.
    fn run(self, kernels: Kernels, kv_type: KvType, threads: usize, batches: &[usize]) -> Vec<f32> {
        let (context, n_head) = (self.tokens, self.n_head());
        let pool = ThreadPool::new(threads);
        let c = CpuContext {
            pool: &pool,
            kernels,
        };
        let mut key_store = RowStore::new(kv_type, self.n_head_kv, context, self.key_width);
        let mut value_store = RowStore::new(kv_type, self.n_head_kv, context, self.value_width);
        let pages = mixed_pages(context);
        let (queries, keys, values) = (self.queries(), self.keys(), self.values());
        let mut parts = AttentionParts::default();
        let mut out = vec![f32::NAN; self.tokens * n_head * self.value_width];
        let mut past = 0;
        for &tokens in batches {
            for position in past..past + tokens {
                let row = |rows: &[f32], width: usize| {
                    rows[position * self.n_head_kv * width..][..self.n_head_kv * width].to_vec()
                };
                key_store.store(kernels, &pages, position, &row(&keys, self.key_width));
                value_store.store(kernels, &pages, position, &row(&values, self.value_width));
            }
            let attention = Attention {
                keys: &key_store,
                values: if self.shared {
                    &key_store
                } else {
                    &value_store
                },
                pages: &pages,
                value_width: self.value_width,
                n_head_kv: self.n_head_kv,
                group: self.group,
                tokens,
                past,
                window: self.window,
                window_kind: Default::default(),
                softcap: None,
            };
            let query = |head: usize, token: usize, to: &mut [f32]| {
                to.copy_from_slice(
                    &queries[((past + token) * n_head + head) * self.key_width..][..self.key_width],
                );
            };
            attend(c, &attention, query, &mut parts);
            for token in 0..tokens {
                for head in 0..n_head {
                    let at = ((past + token) * n_head + head) * self.value_width;
                    parts.result(
                        kernels,
                        head,
                        token,
                        self.sink(head),
                        &mut out[at..at + self.value_width],
                    );
                }
            }
            past += tokens;
        }
        assert_eq!(past, self.tokens);
        out
    }

    /// The formula in double precision.
    fn expected(self) -> Vec<f64> {
        let (queries, keys, values) = (self.queries(), self.keys(), self.values());
        let mut out = Vec::new();
        for token in 0..self.tokens {
            let first = self.window.map_or(0, |w| (token + 1).saturating_sub(w));
            for head in 0..self.n_head() {
                let kv = head / self.group;
                let query =
                    &queries[(token * self.n_head() + head) * self.key_width..][..self.key_width];
                let key = |p: usize| {
                    &keys[(p * self.n_head_kv + kv) * self.key_width..][..self.key_width]
                };
                let value = |p: usize| {
                    if self.shared {
                        key(p)
                    } else {
                        &values[(p * self.n_head_kv + kv) * self.value_width..]
                    }
                };
                let dot = |p| {
                    query
                        .iter()
                        .zip(key(p))
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum::<f64>()
                };
                let mut weights: Vec<f64> = (first..=token).map(|p| dot(p).exp()).collect();
                let sum = weights.iter().sum::<f64>()
                    + self.sink(head).map_or(0.0, |s| f64::from(s).exp());
                weights.iter_mut().for_each(|w| *w /= sum);
                out.extend((0..self.value_width).map(|i| {
                    weights
                        .iter()
                        .zip(first..)
                        .map(|(w, p)| w * f64::from(value(p)[i]))
                        .sum::<f64>()
                }));
            }
        }
        out
    }
}

#[test]
fn attention_is_the_formula() {
    for layer in LAYERS {
        let expected = layer.expected();
        for kernels in Kernels::available() {
            for (kv_type, bound) in [
                (KvType::F32, 1e-12),
                (KvType::F16, 1e-6),
                (KvType::Q8_0, 1e-4),
            ] {
                let off = nmse(&layer.run(kernels, kv_type, 2, &[layer.tokens]), &expected);
                assert!(off <= bound, "{layer:?} {kernels:?} {kv_type}: {off:e}");
                assert!(kv_type == KvType::F32 || off > 0.0, "{kv_type} rounds");
            }
        }
    }
}

#[test]
fn neither_batches_nor_threads_change_a_bit() {
    for layer in LAYERS {
        let ones = vec![1; layer.tokens];
        let (some, rest) = (
            layer.tokens.div_ceil(3),
            layer.tokens - layer.tokens.div_ceil(3),
        );
        for kernels in Kernels::available() {
            for kv_type in KvType::ALL {
                let expected: Vec<u32> = layer
                    .run(kernels, kv_type, 1, &ones)
                    .into_iter()
                    .map(f32::to_bits)
                    .collect();
                for threads in [1, 2, 3, 8] {
                    for batches in [&ones[..], &[layer.tokens], &[some, rest]] {
                        if batches.contains(&0) {
                            continue;
                        }
                        let found = layer.run(kernels, kv_type, threads, batches);
                        let same = found
                            .iter()
                            .map(|v| v.to_bits())
                            .eq(expected.iter().copied());
                        assert!(
                            same,
                            "{layer:?} {kernels:?} {kv_type} {threads} threads, batches {batches:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn the_next_rows_are_prefetched() {
    let kernels = Kernels::best();
    let positions = 2 * PAGE + 3;
    let pages = mixed_pages(positions);
    for (key_width, value_width) in [(64, 32), (1024, 2048)] {
        let keys = RowStore::new(KvType::F16, 2, positions, key_width);
        let values = RowStore::new(KvType::F16, 2, positions, value_width);
        let attention = Attention {
            keys: &keys,
            values: &values,
            pages: &pages,
            value_width,
            n_head_kv: 2,
            group: 1,
            tokens: 1,
            past: positions - 1,
            window: None,
            window_kind: Default::default(),
            softcap: None,
        };
        let block = Block {
            a: &attention,
            kv_head: 1,
            heads: 1,
            tokens: 0..1,
            queries: &[],
        };
        let mut expected = block.tile_bytes(&keys, 0).as_ptr_range();
        for chunk in 0..positions.div_ceil(CHUNK) {
            let seen = block.positions(chunk);
            for (store, then) in [(&keys, (&values, seen.start)), (&values, (&keys, seen.end))] {
                let pass = Pass { store, chunk, then };
                let mut rows_read = 0;
                block.for_each_run(kernels, &pass, &mut Vec::new(), |rows, _, at| {
                    assert_eq!(at, rows_read);
                    rows_read += rows.rows.count(rows.width);
                    let bytes = rows.rows.bytes().as_ptr_range();
                    assert_eq!(bytes.start, expected.start, "chunk {chunk}, row {at}");
                    assert!(bytes.end <= expected.end, "chunk {chunk}, row {at}");
                    expected = rows.next.as_ptr_range();
                });
                assert_eq!(rows_read, seen.len());
            }
        }
        assert!(expected.is_empty(), "nothing follows the last position");
        // Many queries read widened rows, which are not prefetched.
        let many = Block {
            heads: MAX_QUERIES_AS_STORED + 1,
            ..block
        };
        let pass = Pass {
            store: &keys,
            chunk: 0,
            then: (&values, 0),
        };
        many.for_each_run(kernels, &pass, &mut Vec::new(), |rows, _, _| {
            assert!(rows.next.is_empty());
        });
    }
}

#[test]
fn every_query_has_one_place() {
    let store = |n_head, width| RowStore::new(KvType::F32, n_head, 40, width);
    for (n_head_kv, group, tokens, past) in [
        (1, 1, 1, 0),
        (2, 13, 5, 30),
        (3, 4, 7, 0),
        (1, 8, 1, 39),
        (4, 1, 20, 11),
    ] {
        for threads in [1, 2, 5, 64] {
            let (keys, values) = (store(n_head_kv, 4), store(n_head_kv, 4));
            let a = Attention {
                keys: &keys,
                values: &values,
                pages: &[],
                value_width: 4,
                n_head_kv,
                group,
                tokens,
                past,
                window: None,
                window_kind: Default::default(),
                softcap: None,
            };
            let blocks = Blocks::new(&a, threads);
            let mut count = std::collections::HashMap::new();
            for job in 0..blocks.jobs(n_head_kv) {
                let Job {
                    kv_head,
                    heads,
                    tokens,
                    chunk,
                } = blocks.job(job);
                assert!(
                    heads.len() * tokens.len() <= blocks.queries()
                        && !heads.is_empty()
                        && !tokens.is_empty()
                );
                for (i, token) in tokens.clone().enumerate() {
                    for (h, head) in heads.clone().enumerate() {
                        let head = kv_head * group + head;
                        *count.entry((head, token)).or_insert(0) += 1;
                        let (first, query) = blocks.place(head, token);
                        let chunk = chunk.map_or(0, |chunk| chunk - blocks.first);
                        assert_eq!(
                            (first + chunk, query),
                            (job, i * heads.len() + h),
                            "{blocks:?}"
                        );
                    }
                }
            }
            assert_eq!(count.len(), n_head_kv * group * tokens, "{blocks:?}");
            assert!(count.values().all(|n| *n == blocks.chunks), "{blocks:?}");
        }
    }
}

#[test]
fn what_is_no_number_is_not_hidden() {
    let pool = ThreadPool::new(1);
    let c = CpuContext {
        pool: &pool,
        kernels: Kernels::best(),
    };
    let mut keys = RowStore::new(KvType::F32, 1, 6, 4);
    let mut values = RowStore::new(KvType::F32, 1, 6, 4);
    for position in 0..6 {
        keys.store(c.kernels, &[0], position, &[0.5; 4]);
        values.store(
            c.kernels,
            &[0],
            position,
            &if position == 3 {
                [1.0, f32::NAN, 1.0, 1.0]
            } else {
                [1.0; 4]
            },
        );
    }
    let a = Attention {
        keys: &keys,
        values: &values,
        pages: &[0],
        value_width: 4,
        n_head_kv: 1,
        group: 1,
        tokens: 6,
        past: 0,
        window: None,
        window_kind: Default::default(),
        softcap: None,
    };
    let mut parts = AttentionParts::default();
    attend(c, &a, |_, _, to| to.fill(1.0), &mut parts);
    for token in 0..6 {
        let mut out = [0.0; 4];
        parts.result(c.kernels, 0, token, None, &mut out);
        assert_eq!(
            out[1].is_nan(),
            token >= 3,
            "a later token's value concerns no earlier one: {token}"
        );
        assert!((out[0] - 1.0).abs() < 1e-6);
    }
}
