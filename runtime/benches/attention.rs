//! Attention alone, for one token and for a batch: 32 heads over 4 heads of keys and values, and 16
//! over 16, of 128 values each.
//!
//! `cargo bench -p tier-plan-runtime --bench attention -- decode/f16`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;
use tier_plan_runtime::KvType;
use tier_plan_runtime::kernels::Kernels;
use tier_plan_runtime::layers::probe::{AttentionProbe, AttentionSizes};
use tier_plan_runtime::threads::physical_cores;

fn attention(c: &mut Criterion) {
    for (name, tokens) in [("decode", 1), ("prompt64", 64)] {
        let mut group = c.benchmark_group(name);
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(800));
        group.throughput(Throughput::Elements(tokens as u64));
        for kv_type in KvType::ALL {
            for (n_head, n_head_kv) in [(32, 4), (16, 16)] {
                for context in [512, 4096] {
                    let sizes = AttentionSizes {
                        n_head,
                        n_head_kv,
                        dim: 128,
                        context,
                        tokens,
                    };
                    let mut probe =
                        AttentionProbe::new(kv_type, physical_cores(), Kernels::best(), sizes);
                    let label = format!("{kv_type}-{n_head}x{n_head_kv}");
                    group.bench_function(BenchmarkId::new(label, context), |b| {
                        b.iter(|| black_box(probe.run())[0])
                    });
                }
            }
        }
    }
}

criterion_group!(benches, attention);
criterion_main!(benches);
