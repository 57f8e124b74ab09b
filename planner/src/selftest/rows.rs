//! Turns measurements of a device into rows with targets.

use super::table::{Found, Row, Target};
use tier_plan_selftest::SelftestError;
use tier_plan_selftest::outcome::Outcome;
use tier_plan_selftest::speed::Timed;
use tier_plan_selftest::suite::{DeviceRates, Results, Speeds, Step};
use tier_plan_selftest::whole_model::{GpuShare, TextMatch};

/// Largest NMSE of logits: without quantized weights, and with them.
const GOLDEN_NMSE: [f64; 2] = [1e-4, 1e-2];

/// Most kernel launches per layer of a decoded token.
const LAUNCHES: f64 = 12.0;

/// Least share of the memory's read rate, in %, for a model that is fully on the GPU.
const BANDWIDTH: f64 = 70.0;

/// Least speedup of a prompt over the CPU.
const PROMPT: f64 = 50.0;

/// Most time of a hybrid token relative to the longer of its parts, without round trips.
const HYBRID: f64 = 1.15;

/// Most deviation of a measured speed from the prediction, in %.
const PREDICTED: f64 = 10.0;

const KERNELS: &str = "kernels";
const GOLDEN: &str = "golden values";
const MODEL: &str = "bundled model";
const RATES: &str = "rates";
pub(super) const SPEED: &str = "a model of real shapes";

/// A failed step; what a GPU can't run at all is no failure of this one.
fn failed(part: &'static str, what: impl Into<String>, error: &SelftestError) -> Row {
    let why = error.to_string();
    let not_run = error.is_unsupported() || matches!(error, SelftestError::Stopped);
    let found = if not_run {
        Found::NotRun(why)
    } else {
        Found::Failed(why)
    };
    // A device that never finishes is as bad as one with wrong results.
    Row {
        results: true,
        ..Row::without(part, what, found)
    }
}

fn outcome(part: &'static str, what: &str, found: &Step<Outcome>) -> Row {
    match found {
        Ok(o) => Row::figure(part, what, o.worst * 100.0, "%")
            .with(Target::AtMost(100.0))
            .compared()
            .noting(format!("of the tolerance, {} values", o.compared)),
        Err(error) => failed(part, what, error),
    }
}

fn share(share: GpuShare) -> &'static str {
    match share {
        GpuShare::All => "all of it on the GPU",
        GpuShare::AllButExperts => "experts in main memory",
    }
}

/// Returns rows on correctness. `golden` and `text` give reasons where there is nothing to compare
/// with.
pub fn results(found: &Results, golden: Option<&str>, text: Option<&str>) -> Vec<Row> {
    let mut rows: Vec<Row> = found
        .kernels
        .iter()
        .map(|(name, found)| outcome(KERNELS, name, found))
        .collect();
    if !found.kernels_passed() {
        let why = "kernels are wrong by themselves";
        rows.extend(
            [GOLDEN, MODEL]
                .map(|part| Row::without(part, "whole models", Found::NotRun(why.into()))),
        );
        return rows;
    }
    rows.extend(golden.map(|why| Row::without(GOLDEN, "small models", Found::NotRun(why.into()))));
    for step in &found.golden {
        let what = format!("{}, normalized mean squared error", step.name);
        rows.push(match &step.errors {
            Ok(found) => {
                let mut note = format!("a prompt {:.1e}, token by token {:.1e}", found.prompt_nmse, found.decode_nmse);
                if found.same_experts < found.tokens && step.exact {
                    note += &format!(
                        "; in the prompt token {} has another expert than on the processor, and from there on nothing is \
                         compared: {:.1e} before",
                        found.same_experts + 1,
                        found.same_experts_nmse
                    );
                }
                Row::figure(GOLDEN, what, found.worst(step.exact), "")
                    .with(Target::AtMost(GOLDEN_NMSE[usize::from(!step.exact)]))
                    .compared()
                    .noting(note)
            }
            Err(error) => failed(GOLDEN, what, error),
        });
    }
    rows.extend(
        text.map(|why| Row::without(MODEL, "the bundled model", Found::NotRun(why.into()))),
    );
    for (place, found) in &found.logits {
        rows.push(outcome(MODEL, &format!("logits, {}", share(*place)), found));
    }
    for (place, found) in &found.texts {
        let what = format!("greedy tokens as the processor's, {}", share(*place));
        rows.push(match found {
            Ok(found) => same_text(what, found),
            Err(error) => failed(MODEL, what, error),
        });
    }
    rows.extend(found.launches.as_ref().map(|found| match found {
        Ok(launches) => {
            let row = Row::figure(MODEL, "launches of a layer of a decoded token", launches.layer as f64, "");
            Row { how: super::table::How::Counted, ..row }.with(Target::AtMost(LAUNCHES)).noting(format!(
                "what a small model of three layers takes more than one of two, all on the GPU; {} outside the layers",
                launches.outside
            ))
        }
        Err(error) => failed(MODEL, "launches of a layer of a decoded token", error),
    }));
    rows
}

fn same_text(what: String, found: &TextMatch) -> Row {
    let row = Row::figure(MODEL, what, found.same as f64, "")
        .with(Target::AtLeast(found.total as f64))
        .compared();
    match found.margin {
        None => row,
        Some(margin) => row.noting(format!(
            "then another token; the processor's was {:.2} % of the logits' spread above the next",
            margin * 100.0
        )),
    }
}

/// What the device gives by itself.
pub fn gives(found: &Step<DeviceRates>) -> Vec<Row> {
    let DeviceRates {
        rates,
        copy_gbps,
        products,
    } = match found {
        Ok(gives) => gives,
        Err(error) => return vec![failed(RATES, "memory, link and products", error)],
    };
    let row = |what: &str, value, unit| Row::figure(RATES, what, value, unit);
    let mut rows = vec![
        row("a launch", rates.launch_us, "µs"),
        row("a launch and the way back", rates.round_trip_us, "µs"),
        row("memory of the GPU, read", rates.read_gbps, "GB/s"),
        row("memory of the GPU, copied to itself", *copy_gbps, "GB/s")
            .noting("bytes read and bytes written together"),
        row(
            "to the GPU, pinned memory",
            rates.to_device.pinned_gbps,
            "GB/s",
        ),
        row(
            "to the GPU, pageable memory",
            rates.to_device.pageable_gbps,
            "GB/s",
        ),
        row(
            "from the GPU, pinned memory",
            rates.from_device.pinned_gbps,
            "GB/s",
        ),
        row(
            "from the GPU, pageable memory",
            rates.from_device.pageable_gbps,
            "GB/s",
        ),
    ];
    let of = |(ty, gbps): &(_, f64)| {
        Row::figure(RATES, format!("products of one token, {ty}"), *gbps, "GB/s")
    };
    rows.extend(products.iter().map(of));
    rows
}

/// The model that is timed.
#[derive(Debug, Clone, Copy)]
pub struct Model<'a> {
    /// Human-readable name.
    pub name: &'a str,
    /// Whether its speeds can be held to targets.
    pub judged: bool,
}

/// How fast a model is.
pub fn speeds(found: &Speeds, gives: &DeviceRates, model: Model<'_>) -> Vec<Row> {
    let name = model.name;
    let with = |row: Row, target| if model.judged { row.with(target) } else { row };
    let mut rows = Vec::new();
    let resident = found.fully_on_gpu.as_ref();
    match resident {
        Err(error) => rows.push(failed(SPEED, format!("{name}, all on the GPU"), error)),
        Ok(timed) => {
            rows.push(
                Row::figure(SPEED, "decoding, all on the GPU", timed.tok_s(), "tok/s").noting(
                    format!(
                        "{name}; {} tokens, {:.0} launches each",
                        timed.decode_tokens, timed.launches
                    ),
                ),
            );
            let share = 100.0 * timed.gbps() / gives.rates.read_gbps.max(1e-9);
            let row = Row::figure(SPEED, "of the memory's read rate, by the weights read", share, "%").noting(format!(
                "{:.1} GB/s of {:.1}; {:.1} MB of weights a token, {:.2} MB of keys and values beside them not counted",
                timed.gbps(),
                gives.rates.read_gbps,
                timed.token_bytes / 1e6,
                timed.cache_bytes as f64 / 1e6
            ));
            rows.push(with(row, Target::AtLeast(BANDWIDTH)));
        }
    }
    match (&found.processor, resident) {
        (Err(error), _) => rows.push(failed(
            SPEED,
            format!("{name}, all on the processor"),
            error,
        )),
        (Ok(processor), Ok(resident)) => {
            let times = resident.prompt_tok_s() / processor.prompt_tok_s().max(1e-9);
            let fewer = match processor.prompt_tokens < resident.prompt_tokens {
                true => ", fewer since all would have taken too long, which favours the GPU",
                false => "",
            };
            let row = Row::figure(
                SPEED,
                "a prompt, times as fast as the processor",
                times,
                "×",
            )
            .noting(format!(
                "{} tokens at {:.0} tok/s; the processor {} at {:.1}{fewer}",
                resident.prompt_tokens,
                resident.prompt_tok_s(),
                processor.prompt_tokens,
                processor.prompt_tok_s()
            ));
            rows.push(with(row, Target::AtLeast(PROMPT)));
        }
        (Ok(_), Err(_)) => {}
    }
    match (&found.hybrid, &found.processor) {
        (None, _) => {
            let why = Found::NotRun("the model has no routed experts".into());
            rows.push(Row::without(SPEED, "decoding, experts in main memory", why));
        }
        (Some(Err(error)), _) => rows.push(failed(
            SPEED,
            format!("{name}, experts in main memory"),
            error,
        )),
        (Some(Ok(hybrid)), Ok(processor)) => {
            rows.extend(hybrid_speeds(hybrid));
            let parts = Parts::new(hybrid, processor, gives.rates.round_trip_us);
            let row = Row::figure(SPEED, "its time of a token", hybrid.token_s * 1e3, "ms")
                .noting(parts.show());
            rows.push(with(row, Target::AtMost(parts.allowed_s() * 1e3)));
        }
        (Some(Ok(hybrid)), Err(_)) => rows.extend(hybrid_speeds(hybrid)),
    }
    rows
}

fn hybrid_speeds(hybrid: &Timed) -> [Row; 2] {
    let row = |what: &str, tok_s, tokens| {
        let what = format!("{what}, experts in main memory");
        Row::figure(SPEED, what, tok_s, "tok/s").noting(format!("{tokens} tokens"))
    };
    let (prompt, decode) = (hybrid.prompt_tok_s(), hybrid.tok_s());
    [
        row("a prompt", prompt, hybrid.prompt_tokens),
        row("decoding", decode, hybrid.decode_tokens),
    ]
}

/// Time of a token whose experts are in main memory, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Parts {
    /// Expert stages of a run fully on the CPU, which read the same bytes.
    processor_s: f64,
    /// Dense stages and head on the GPU, without round trips.
    gpu_s: f64,
    /// One measured round trip per layer.
    trips_s: f64,
}

impl Parts {
    fn new(hybrid: &Timed, processor: &Timed, round_trip_us: f64) -> Self {
        let trips_s = round_trip_us * 1e-6 * f64::from(hybrid.layers);
        let gpu_s = (hybrid.dense_s + hybrid.outside_s() - trips_s).max(0.0);
        Parts {
            processor_s: processor.expert_s,
            gpu_s,
            trips_s,
        }
    }

    fn allowed_s(&self) -> f64 {
        HYBRID * self.processor_s.max(self.gpu_s) + self.trips_s
    }

    fn show(&self) -> String {
        let [processor, gpu, trips] = [self.processor_s, self.gpu_s, self.trips_s].map(|s| s * 1e3);
        format!(
            "{HYBRID} × the longer of {processor:.2} ms of experts (on the processor alone) and {gpu:.2} ms on the GPU, and \
             {trips:.2} ms of round trips"
        )
    }
}

/// Returns a row of a measured speed against the prediction from this machine's own rates.
pub fn predicted(what: &str, measured: f64, predicted: &Result<f64, String>, judged: bool) -> Row {
    let what = format!("predicted and measured, {what}");
    match predicted {
        Err(why) => Row::without(SPEED, what, Found::NotRun(why.clone())),
        Ok(predicted) => {
            let off = 100.0 * (measured / predicted.max(1e-9) - 1.0);
            let row = Row::figure(SPEED, what, off.abs(), "%").noting(format!(
                "off: predicted {predicted:.1} tok/s from this machine's probe, measured {measured:.1} ({off:+.1} %)"
            ));
            if judged {
                row.with(Target::AtMost(PREDICTED))
            } else {
                row
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
