//! The self-test of a GPU: results against the CPU's and against golden values, then speeds, all in
//! one table beside their targets. `tier-plan-selftest` measures; this module asks it and turns the
//! outcomes into rows.

pub mod peer;
pub mod predict;
pub mod rows;
pub mod table;

use crate::interrupt::interrupted;
use crate::session::tokenizer;
use crate::{bundled, host, progress};
use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use table::{Found, Row, Table};
use tier_plan_runtime::KvType;
use tier_plan_runtime::cuda::{Device, Gpu};
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::formats::safely::Temporary;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::shape::{ModelShape, shape_of_file};
use tier_plan_runtime::plans::in_memory::{all_on_gpu, experts_in_memory};
use tier_plan_runtime::threads::physical_cores;
use tier_plan_runtime::tiers::limits::{file_system_space, memory_limit};
use tier_plan_runtime::units::{show_bytes, show_utc};
use tier_plan_selftest::SelftestError;
use tier_plan_selftest::gpu_rates::Subject;
use tier_plan_selftest::speed::{Effort, KV_TYPE, Timed};
use tier_plan_selftest::suite::{self, DeviceRates, References, Results, Speeds, Watch};
use tier_plan_selftest::synth::{self, FreeBytes, Shape};

/// Tokens of greedy text to compare.
const TOKENS: usize = 64;

/// Beginning of that text.
const PROMPT: &str = "And it came to pass in those days";

/// Assumed memory where the system reports no limit, in bytes.
const UNTOLD: u64 = 8 << 30;

/// What to test.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Whether to check results only and skip speeds.
    pub quick: bool,
    /// Folder of golden values; the repository's own when `None`.
    pub golden: Option<PathBuf>,
    /// Model to time; a synthetic one when `None`.
    pub model: Option<PathBuf>,
    /// Path of llama.cpp's `llama-bench`.
    pub peer: Option<PathBuf>,
}

/// Outcome of a self-test.
pub struct Findings {
    /// All rows.
    pub table: Table,
    /// Correctness of kernels, golden values, and texts.
    pub results: Results,
    /// What it gives by itself, where that was measured.
    pub gives: Option<DeviceRates>,
}

/// Tests a GPU whose kernels are loaded. Shows progress on a terminal, and ends early when
/// interrupted.
///
/// # Errors
/// When the options name files that do not exist.
pub fn run(gpu: &Arc<Gpu>, options: &Options) -> Result<Findings> {
    let golden = golden(options.golden.as_deref())?;
    // A wrong path is reported now, not after minutes.
    options.model.as_deref().map(Gguf::open).transpose()?;
    let bar = progress::steps();
    let step = |what: &str| bar.set_message(what.to_string());
    let watch = Watch {
        stop: &interrupted,
        step: &step,
    };
    let device: Arc<dyn Device> = Arc::clone(gpu) as _;
    let text = text();
    let scratch = std::env::temp_dir();
    let known = References {
        golden: golden.as_deref().ok(),
        text: text.as_ref().ok().map(|(gguf, tokens)| (gguf, &tokens[..])),
        tokens: TOKENS,
        scratch: &scratch,
    };
    let results = suite::results(&device, known, watch);
    let why = text.as_ref().err().map(|error| format!("{error:#}"));
    let mut rows = rows::results(
        &results,
        golden.as_ref().err().map(String::as_str),
        why.as_deref(),
    );
    let mut gives = None;
    // A GPU whose kernels are wrong is not worth timing, and may have failed for good.
    if !options.quick && results.kernels_passed() && !interrupted() {
        let found = Subject::of(gpu)
            .map_err(SelftestError::from)
            .and_then(|mut subject| suite::device_rates(&mut subject, watch));
        rows.extend(rows::gives(&found));
        gives = found.ok();
        if let Some(gives) = gives.as_ref().filter(|_| !interrupted()) {
            rows.extend(timed(gpu, gives, options, &scratch, watch, &bar));
        }
    }
    bar.finish_and_clear();
    let table = Table {
        when: show_utc(SystemTime::now()),
        version: env!("CARGO_PKG_VERSION").into(),
        host: host::describe(),
        gpu: describe(gpu),
        rows,
        cut_short: interrupted(),
    };
    Ok(Findings {
        table,
        results,
        gives,
    })
}

/// Describes a GPU in words: name, architecture, memory, driver.
pub fn describe(gpu: &Gpu) -> String {
    let p = gpu.properties();
    format!(
        "GPU {}: {}, compute capability {}, {} multiprocessors, {}, driver of CUDA {}.{}",
        p.ordinal,
        p.name,
        p.capability,
        p.multiprocessors,
        show_bytes(p.total_bytes as u64),
        p.driver / 1000,
        p.driver % 1000 / 10
    )
}

/// Returns the folder of golden values, or what to do where there is none.
fn golden(given: Option<&Path>) -> Result<Result<PathBuf, String>> {
    let Some(folder) = given else {
        return Ok(bundled::golden().map_err(|error| format!("{error:#}")));
    };
    let has = |of: &str| folder.join(of).is_dir();
    ensure!(
        has("arch") && has("quant"),
        "--golden {}: expected a folder with arch and quant in it, as tests/data of the source is",
        folder.display()
    );
    Ok(Ok(folder.to_path_buf()))
}

/// Opens the bundled model and tokenizes the beginning of the text.
fn text() -> Result<(Arc<Gguf>, Vec<u32>)> {
    let gguf = Arc::new(Gguf::open(&bundled::path("demo/demo.gguf")?)?);
    let tokens = tokenizer(&gguf)?.encode(PROMPT, true)?;
    Ok((gguf, tokens))
}

/// The model that is timed.
struct Model {
    /// Removes a synthetic one when all is done.
    _made: Option<Temporary>,
    path: PathBuf,
    name: String,
    /// Whether its speeds say something about real models.
    judged: bool,
    effort: Effort,
}

/// Runs everything that takes a whole model.
fn timed(
    gpu: &Arc<Gpu>,
    gives: &DeviceRates,
    options: &Options,
    scratch: &Path,
    watch: Watch<'_>,
    bar: &ProgressBar,
) -> Vec<Row> {
    let nothing = |error: anyhow::Error| {
        let why = Found::NotRun(format!("{error:#}"));
        vec![Row::without(rows::SPEED, "a model to be timed", why)]
    };
    let model = match model(gpu, options.model.as_deref(), scratch, watch) {
        Ok(model) => model,
        Err(error) => return nothing(error),
    };
    let device: Arc<dyn Device> = Arc::clone(gpu) as _;
    let speeds = match open(&model.path) {
        // Its memory is free again afterwards.
        Ok(gguf) => suite::speeds(&gguf, &device, model.effort, watch),
        Err(error) => return nothing(error),
    };
    let mut rows = rows::speeds(
        &speeds,
        gives,
        rows::Model {
            name: &model.name,
            judged: model.judged,
        },
    );
    if interrupted() {
        return rows;
    }
    // Tiny models are faster than any prediction for them.
    if model.judged {
        // The probe has a progress bar of its own.
        rows.extend(bar.suspend(|| predictions(gpu, &model, &speeds)));
    }
    if let Some(program) = options.peer.as_deref().filter(|_| !interrupted()) {
        (watch.step)("llama-bench");
        let found = peer::measure(
            program,
            &model.path,
            gpu.properties().ordinal,
            model.effort,
            &interrupted,
        );
        rows.extend(peer::rows(
            &found,
            speeds.fully_on_gpu.as_ref().ok(),
            model.judged,
        ));
    }
    rows
}

/// Returns the user's model, or writes a synthetic one as deep as memory and disk allow.
fn model(gpu: &Gpu, given: Option<&Path>, scratch: &Path, watch: Watch<'_>) -> Result<Model> {
    if let Some(path) = given {
        let name = Gguf::open(path)?.id().name;
        return Ok(Model {
            _made: None,
            path: path.into(),
            name,
            judged: true,
            effort: Effort::FULL,
        });
    }
    let free = FreeBytes {
        device: gpu.free_bytes()? as u64,
        memory: memory_limit().map_or(UNTOLD, |limit| limit.bytes),
        disk: file_system_space(scratch).map_or(0, |space| space.free_bytes),
    };
    let shape = Shape::fitting(free);
    let percent = std::cell::Cell::new(u64::MAX);
    let file = synth::write(&shape, scratch, watch.stop, &mut |done, all| {
        let now = done * 100 / all.max(1);
        if percent.replace(now) != now {
            (watch.step)(&format!(
                "writing a synthetic model of {}: {now} %",
                show_bytes(all)
            ));
        }
    })?;
    let (judged, path) = (shape.is_real(), file.path().to_path_buf());
    let name = match judged {
        true => format!(
            "{} layers of Qwen3-30B-A3B's shape with random weights",
            shape.layers
        ),
        false => format!(
            "a tiny model, of which no speed is judged: there are {} free on the GPU, {} in main memory, {} in {}",
            show_bytes(free.device),
            show_bytes(free.memory),
            show_bytes(free.disk),
            scratch.display()
        ),
    };
    let effort = if judged { Effort::FULL } else { Effort::LITTLE };
    Ok(Model {
        _made: Some(file),
        path,
        name,
        judged,
        effort,
    })
}

/// Opens a model as `run` does: on huge pages where it fits.
fn open(path: &Path) -> Result<Arc<Gguf>> {
    let mut gguf = Gguf::open(path)?;
    let fits = memory_limit().is_none_or(|limit| gguf.file_bytes() <= limit.bytes / 10 * 8);
    if fits && let Err(error) = gguf.copy_to_memory(physical_cores(), &mut |_, _| {}) {
        eprintln!("warning: {error}; the weights stay mapped, which is slower");
    }
    Ok(Arc::new(gguf))
}

/// Predicts the measured speeds from this machine's own rates.
fn predictions(gpu: &Gpu, model: &Model, speeds: &Speeds) -> Vec<Row> {
    // A dense model has no experts that a probe could read.
    let (Ok(resident), Some(Ok(hybrid))) = (&speeds.fully_on_gpu, &speeds.hybrid) else {
        return Vec::new();
    };
    let machine = predict::machine(&model.path);
    let device = u32::try_from(gpu.properties().ordinal).unwrap_or(u32::MAX);
    let row = |what: &str, timed: &Timed, plan: fn(&ModelShape, u32, KvType) -> Placement| {
        let tok_s = || {
            let machine = machine.as_ref().map_err(|error| format!("{error:#}"))?;
            let shape = shape_of_file(&model.path).map_err(|error| error.to_string())?;
            let plan = plan(&shape, model.effort.context(), KV_TYPE);
            predict::tok_s(machine, device, &shape, plan, model.effort.middle())
                .map_err(|error| format!("{error:#}"))
        };
        rows::predicted(what, timed.tok_s(), &tok_s(), model.judged)
    };
    vec![
        row("all on the GPU", resident, all_on_gpu),
        row("experts in main memory", hybrid, experts_in_memory),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_values_come_from_the_source_or_from_where_a_person_says() {
        let own = golden(None).unwrap().unwrap();
        assert!(own.join("arch").is_dir() && own.join("quant").is_dir());
        assert_eq!(golden(Some(&own)).unwrap().unwrap(), own);
        let folder = tempfile::tempdir().unwrap();
        let why = golden(Some(folder.path())).unwrap_err().to_string();
        assert!(
            why.contains("--golden") && why.contains("arch and quant"),
            "{why}"
        );
    }

    #[test]
    fn the_text_begins_with_a_few_tokens() {
        let (gguf, tokens) = text().unwrap();
        assert!((4..40).contains(&tokens.len()), "{tokens:?}");
        assert!(gguf.file_bytes() > 0);
    }

    #[test]
    fn a_model_is_opened_in_memory() {
        let gguf = open(&bundled::path("demo/demo.gguf").unwrap()).unwrap();
        assert!(gguf.is_copied());
        assert!(open(Path::new("/nowhere.gguf")).is_err());
    }
}
