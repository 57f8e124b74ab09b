//! The routed experts of a single token: those that are resident compute while the others are read.

use super::MoeRun;
use super::ffn::{activate, result_weight, weigh};
use crate::error::RunError;
use crate::experts::store::Step;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::pooled::{MatJob, matmul_all};

/// Computes a token's experts into `run.out`, `[hidden]`.
pub(super) fn run(run: MoeRun<'_>) -> Result<Step, RunError> {
    let layer = run.layer.index.get();
    let used: Vec<u32> = run.routing.experts.iter().map(|e| u32::from(*e)).collect();
    run.store.note(layer, run.routing.experts);
    let step = run.store.begin(layer, &used, used.clone());
    let mut token = TokenRun { run, step };
    token.compute()?;
    let TokenRun { run, step } = token;
    // Summed in ascending order, as in a batch, whatever the order of arrival: neither the plan nor
    // what is computed beside a token may change its result.
    let hidden = run.out.len();
    run.out.fill(0.0);
    let mut order: Vec<usize> = (0..used.len()).collect();
    order.sort_unstable_by_key(|at| used[*at]);
    for at in order {
        let result = &run.scratch.results[at * hidden..][..hidden];
        let weight = result_weight(run.layer.spec, run.routing.weights[at]);
        run.cpu.kernels.axpy(weight, result, run.out);
    }
    Ok(step)
}

struct TokenRun<'a> {
    run: MoeRun<'a>,
    step: Step,
}

impl TokenRun<'_> {
    /// Computes every expert into its row of `scratch.results`, `[n_used, hidden]`.
    fn compute(&mut self) -> Result<(), RunError> {
        let n = self.step.experts().len();
        let ready = (0..n).filter(|at| self.step.is_ready(*at));
        let (on_gpu, mut ready): (Vec<usize>, Vec<usize>) =
            ready.partition(|at| self.run.store.gpu_slot(&self.step, *at).is_some());
        // The CPU computes the others meanwhile.
        let streamed = self.run.store.choose_streamed(&self.step, &ready);
        ready.retain(|at| !streamed.contains(at));
        self.send_to_gpus(&on_gpu)?;
        self.stream(&streamed)?;
        let mut left = n - on_gpu.len() - streamed.len();
        loop {
            if !ready.is_empty() {
                self.on_cpu(&ready);
                for at in &ready {
                    self.run.store.release(&mut self.step, *at);
                }
                left -= ready.len();
            }
            if left == 0 {
                break;
            }
            ready.clear();
            let arrived = self.run.store.wait(&mut self.step)?;
            if self.run.store.gpu_slot(&self.step, arrived).is_some() {
                self.send_to_gpus(&[arrived])?;
                left -= 1;
            } else {
                ready.push(arrived);
            }
        }
        self.fetch_from_gpus()?;
        self.run.store.finish(&mut self.step)?;
        Ok(self.run.store.check_gpus()?)
    }

    /// Has GPUs compute the experts at these positions of the step, which lie there.
    fn send_to_gpus(&mut self, positions: &[usize]) -> Result<(), RunError> {
        if positions.is_empty() {
            return Ok(());
        }
        for at in positions {
            if let Some(spot) = self.run.store.gpu_slot(&self.step, *at) {
                self.run.count(spot.tier);
            }
        }
        let MoeRun {
            store, x, routing, ..
        } = &mut self.run;
        store.ask_token(&mut self.step, positions, x.values(), routing.weights)?;
        // What comes to their slots now comes after them on the GPU.
        positions
            .iter()
            .for_each(|at| self.run.store.release(&mut self.step, *at));
        Ok(())
    }

    /// Streams the experts at these positions of the step to a GPU, which computes them after its own.
    fn stream(&mut self, positions: &[usize]) -> Result<(), RunError> {
        if let Some(tier) = self.run.store.streams_to() {
            positions.iter().for_each(|_| self.run.count(tier));
        }
        let MoeRun {
            store, x, routing, ..
        } = &mut self.run;
        Ok(store.stream_to_gpu(&mut self.step, positions, x.values(), routing.weights)?)
    }

    /// Waits for what GPUs compute.
    fn fetch_from_gpus(&mut self) -> Result<(), RunError> {
        let MoeRun {
            store,
            scratch,
            gpu_rows,
            out,
            ..
        } = &mut self.run;
        let hidden = out.len();
        for gpu in 0..store.n_gpus() {
            let positions = store.fetch_gpu(&mut self.step, gpu, hidden, &mut gpu_rows.fetched)?;
            for (at, result) in positions.iter().zip(gpu_rows.fetched.chunks_exact(hidden)) {
                scratch.results[at * hidden..][..hidden].copy_from_slice(result);
            }
        }
        Ok(())
    }

    /// Computes the experts at positions `ready` of the step, all together.
    fn on_cpu(&mut self, ready: &[usize]) {
        let MoeRun {
            cpu,
            store,
            layer,
            x,
            scratch: s,
            out,
            computed,
            routing,
            ..
        } = &mut self.run;
        let (cpu, x, n) = (*cpu, *x, ready.len());
        let (width, hidden) = (layer.spec.expert_ffn, out.len());
        let views: Vec<_> = ready.iter().map(|at| store.view(&self.step, *at)).collect();
        for (_, tier) in &views {
            computed.add(*tier, store.expert_bytes(layer.index.get()));
        }
        let mut jobs = Vec::with_capacity(2 * n);
        let rows = s
            .gate
            .chunks_exact_mut(width)
            .zip(s.up.chunks_exact_mut(width));
        for ((view, _), (gate, up)) in views.iter().zip(rows) {
            if view.is_gated {
                jobs.push(MatJob::new(view.gate.weights, x, gate));
            }
            jobs.push(MatJob::new(view.up.weights, x, up));
        }
        matmul_all(cpu.pool, cpu.kernels, &jobs);
        drop(jobs);
        if layer.spec.weigh_input {
            let weights = ready.iter().map(|at| routing.weights[*at]);
            let (gate, up) = (&mut s.gate[..n * width], &mut s.up[..n * width]);
            weigh(gate, up, width, weights);
        }
        let rows = s
            .gate
            .chunks_exact_mut(width)
            .zip(s.up.chunks_exact_mut(width));
        for ((view, _), (gate, up)) in views.iter().zip(rows) {
            if view.is_gated {
                view.gate.add_bias(gate, &mut s.bias);
            }
            view.up.add_bias(up, &mut s.bias);
        }
        activate(
            cpu.kernels,
            layer.spec.activation,
            &mut s.gate[..n * width],
            &s.up[..n * width],
        );
        let quantize = views.iter().any(|(v, _)| needs_quants(v.down.weights.ty()));
        s.inner
            .fill(cpu.kernels, n, width, &s.gate[..n * width], quantize);
        let inner = s.inner.view();
        let mut rows: Vec<Option<&mut [f32]>> =
            s.results.chunks_exact_mut(hidden).map(Some).collect();
        let mut jobs = Vec::with_capacity(n);
        for (i, (at, (view, _))) in ready.iter().zip(&views).enumerate() {
            if let Some(row) = rows[*at].take() {
                jobs.push(MatJob::new(
                    view.down.weights,
                    inner.rows_range(i..i + 1),
                    row,
                ));
            }
        }
        matmul_all(cpu.pool, cpu.kernels, &jobs);
        drop(jobs);
        for (at, (view, _)) in ready.iter().zip(&views) {
            view.down
                .add_bias(&mut s.results[at * hidden..(at + 1) * hidden], &mut s.bias);
        }
    }
}
