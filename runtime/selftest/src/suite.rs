//! The complete self-test of a device: first its results, then its speed. A step that fails is a
//! result; the other steps go on.

use super::golden::{self, Golden, GoldenErrors};
use super::gpu_kernels;
use super::launches::{self, Launches};
use super::speed::{Effort, Setup, Timed, time};
use crate::gpu_rates::{Rates, Subject, copy_gbps, matvec_gbps, measure_rates};
use crate::outcome::Outcome;
use crate::whole_model::{self, GpuShare, TextMatch};
use crate::{SelftestError, Stop};
use std::path::Path;
use std::sync::Arc;
use tier_plan_cuda::Device;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::describe;
use tier_plan_kernels::quant::TensorType;

/// Callbacks of a self-test that is running.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Whether to stop early.
    pub stop: Stop<'a>,
    /// Receives the name of the next step.
    pub step: &'a dyn Fn(&str),
}

/// References that results are compared with.
#[derive(Debug, Clone, Copy)]
pub struct References<'a> {
    /// Folder with golden values in `arch` and `quant`.
    pub golden: Option<&'a Path>,
    /// Model for comparisons with the CPU, and the tokens of a prompt.
    pub text: Option<(&'a Arc<Gguf>, &'a [u32])>,
    /// Tokens by which the prompt is continued.
    pub tokens: usize,
    /// Folder for small temporary files.
    pub scratch: &'a Path,
}

/// The result of a step, or why it has none.
pub type Step<T> = Result<T, SelftestError>;

/// Comparison with golden values.
#[derive(Debug)]
pub struct GoldenStep {
    /// Whether the model is not quantized, so that its tolerance is smaller.
    pub exact: bool,
    /// Name of the golden values.
    pub name: String,
    /// Errors of the logits.
    pub errors: Step<GoldenErrors>,
}

/// Results of a device beside the references.
#[derive(Debug, Default)]
pub struct Results {
    /// Each kernel against the CPU's, by name.
    pub kernels: Vec<(String, Step<Outcome>)>,
    /// Logits of a whole model against the CPU's.
    pub logits: Vec<(GpuShare, Step<Outcome>)>,
    /// Greedy text of a whole model against the CPU's.
    pub texts: Vec<(GpuShare, Step<TextMatch>)>,
    /// Comparisons with golden values.
    pub golden: Vec<GoldenStep>,
    /// Launches per layer of a decoded token.
    pub launches: Option<Step<Launches>>,
}

impl Results {
    /// Whether every kernel passed. Otherwise nothing else was compared.
    pub fn kernels_passed(&self) -> bool {
        self.kernels
            .iter()
            .all(|(_, outcome)| outcome.as_ref().is_ok_and(Outcome::passed))
    }
}

/// Compares a device's results with the references.
pub fn results(device: &Arc<dyn Device>, references: References<'_>, watch: Watch<'_>) -> Results {
    let mut results = Results::default();
    let goes_on = || !(watch.stop)();
    for check in gpu_kernels::all().into_iter().take_while(|_| goes_on()) {
        (watch.step)(&check.name);
        let outcome = check.run(device).map_err(SelftestError::from);
        results.kernels.push((check.name, outcome));
    }
    // Whole models prove nothing more about kernels that are wrong.
    if !results.kernels_passed() || !goes_on() {
        return results;
    }
    for (set, exact) in [("arch", true), ("quant", false)] {
        let Some(folder) = references.golden.map(|golden| golden.join(set)) else {
            continue;
        };
        let names = match golden::names(&folder) {
            Ok(names) => names,
            Err(error) => {
                let errors = Err(SelftestError::Golden {
                    path: folder,
                    what: error.to_string(),
                });
                results.golden.push(GoldenStep {
                    exact,
                    name: set.into(),
                    errors,
                });
                continue;
            }
        };
        for name in names.into_iter().take_while(|_| goes_on()) {
            (watch.step)(&format!("golden values, {name}"));
            let errors =
                Golden::read(&folder, &name).and_then(|golden| golden.compare(device, watch.stop));
            results.golden.push(GoldenStep {
                exact,
                name,
                errors,
            });
        }
    }
    let give = |_: usize| Ok(Arc::clone(device));
    for share in [GpuShare::All, GpuShare::AllButExperts] {
        let Some((gguf, prompt)) = references.text.filter(|_| goes_on()) else {
            continue;
        };
        (watch.step)("a whole model");
        results
            .logits
            .push((share, whole_model::compare(gguf, share, Some(&give))));
        let text = whole_model::greedy(gguf, share, Some(&give), prompt, references.tokens);
        results.texts.push((share, text));
    }
    if goes_on() {
        (watch.step)("launches");
        results.launches = Some(launches::count(device, references.scratch, watch.stop));
    }
    results
}

/// Rates of a device, independent of any model.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceRates {
    /// Fixed times, memory and link.
    pub rates: Rates,
    /// Copies within its memory in GB/s, bytes read and written together.
    pub copy_gbps: f64,
    /// Matvecs of one token by format, in GB/s of weights.
    pub products: Vec<(TensorType, f64)>,
}

/// Measures the rates of a device.
///
/// # Errors
/// When the device fails, or [`Watch::stop`] returns true.
pub fn device_rates(subject: &mut Subject, watch: Watch<'_>) -> Step<DeviceRates> {
    (watch.step)("memory and link");
    let rates = measure_rates(subject)?;
    let copy_gbps = copy_gbps(&subject.device, subject.effort)?;
    let product = |ty: TensorType| {
        if (watch.stop)() {
            return Err(SelftestError::Stopped);
        }
        (watch.step)(&format!("products, {ty}"));
        Ok((ty, matvec_gbps(subject, ty)?))
    };
    let products = TensorType::ALL
        .into_iter()
        .map(product)
        .collect::<Step<_>>()?;
    Ok(DeviceRates {
        rates,
        copy_gbps,
        products,
    })
}

/// Speeds of a model in three setups.
#[derive(Debug)]
pub struct Speeds {
    /// Fully on the device.
    pub fully_on_gpu: Step<Timed>,
    /// With its experts in main memory; `None` if it has no routed experts.
    pub hybrid: Option<Step<Timed>>,
    /// With everything on the CPU.
    pub processor: Step<Timed>,
}

/// Measures the speeds of a model.
pub fn speeds(
    gguf: &Arc<Gguf>,
    device: &Arc<dyn Device>,
    effort: Effort,
    watch: Watch<'_>,
) -> Speeds {
    let timed = |name: &str, setup: Setup<'_>| {
        (watch.step)(name);
        time(gguf, setup, effort, watch.stop)
    };
    let fully_on_gpu = timed("the model, all on the GPU", Setup::FullyOnGpu(device));
    let has_experts = describe(gguf).is_ok_and(|spec| spec.moe_layers().next().is_some());
    let hybrid = has_experts.then(|| {
        timed(
            "the model, experts in main memory",
            Setup::ExpertsInMemory(device),
        )
    });
    let processor = timed("the model, all on the processor", Setup::Cpu);
    Speeds {
        fully_on_gpu,
        hybrid,
        processor,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu_rates::{self, HostMemory};
    use crate::synth::{self, Shape};
    use std::cell::RefCell;
    use std::path::PathBuf;
    use tier_plan_cuda::{CudaError, View, shim};

    struct Host(Vec<u8>);

    impl HostMemory for Host {
        fn len(&self) -> usize {
            self.0.len()
        }

        fn send(&mut self, to: View<'_>) -> Result<(), CudaError> {
            to.write(&self.0)
        }

        fn receive(&mut self, from: View<'_>) -> Result<(), CudaError> {
            from.read(&mut self.0)
        }
    }

    fn data(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../..")
            .join(name)
    }

    /// Copies the golden values of one architecture, so that the run is short.
    fn copy_some_golden(folder: &Path) {
        std::fs::create_dir(folder.join("arch")).unwrap();
        for extension in ["gguf", "json", "logits"] {
            let name = format!("arch/qwen3moe.{extension}");
            std::fs::copy(data("tests/data").join(&name), folder.join(&name)).unwrap();
        }
    }

    #[test]
    fn the_whole_suite_runs_on_the_gpu_emulator() {
        let folder = tempfile::tempdir().unwrap();
        copy_some_golden(folder.path());
        let demo = Arc::new(Gguf::open(&data("profiles/demo/demo.gguf")).unwrap());
        let device: Arc<dyn Device> = shim::shared();
        let steps = RefCell::new(Vec::new());
        let step = |name: &str| steps.borrow_mut().push(name.to_string());
        let watch = Watch {
            stop: &|| false,
            step: &step,
        };
        let prompt = [5, 77, 1033, 9];
        let references = References {
            golden: Some(folder.path()),
            text: Some((&demo, &prompt)),
            tokens: 4,
            scratch: folder.path(),
        };
        let outcome = results(&device, references, watch);
        assert!(outcome.kernels_passed() && outcome.kernels.len() == gpu_kernels::all().len());
        assert!(
            outcome
                .logits
                .iter()
                .all(|(_, o)| o.as_ref().unwrap().passed()),
            "{:?}",
            outcome.logits
        );
        let same = TextMatch {
            same: 4,
            total: 4,
            margin: None,
        };
        assert!(
            outcome
                .texts
                .iter()
                .all(|(_, t)| *t.as_ref().unwrap() == same),
            "{:?}",
            outcome.texts
        );
        assert_eq!((outcome.logits.len(), outcome.texts.len()), (2, 2));
        let [golden, missing] = &outcome.golden[..] else {
            panic!("{:?}", outcome.golden)
        };
        assert!(
            golden.exact
                && golden.name == "qwen3moe"
                && golden.errors.as_ref().unwrap().worst(true) < 1e-4
        );
        assert!(
            !missing.exact
                && missing
                    .errors
                    .as_ref()
                    .is_err_and(|e| e.to_string().contains("quant"))
        );
        assert!(outcome.launches.unwrap().unwrap().layer > 0);

        let effort = gpu_rates::Effort {
            bytes: 4096,
            passes: 1,
            launches: 2,
            stages: 1,
        };
        let pinned = Box::new(Host(vec![3; effort.bytes]));
        let mut subject = Subject {
            device: Arc::clone(&device),
            multiprocessors: 1,
            pinned,
            effort,
        };
        let rates = device_rates(&mut subject, watch).unwrap();
        assert!(rates.copy_gbps > 0.0 && rates.products.len() == TensorType::ALL.len());

        let file = synth::write(&Shape::TINY, folder.path(), &|| false, &mut |_, _| {}).unwrap();
        let gguf = Arc::new(Gguf::open(file.path()).unwrap());
        let effort = Effort {
            prompt: 16,
            decode: 4,
            ..Effort::LITTLE
        };
        let speeds = speeds(&gguf, &device, effort, watch);
        let timed = [
            speeds.fully_on_gpu.unwrap(),
            speeds.hybrid.unwrap().unwrap(),
            speeds.processor.unwrap(),
        ];
        assert!(
            timed
                .iter()
                .all(|t| t.tok_s() > 0.0 && t.prompt_tok_s() > 0.0),
            "{timed:?}"
        );
        let steps = steps.into_inner();
        for name in [
            "golden values, qwen3moe",
            "launches",
            "memory and link",
            "the model, all on the processor",
        ] {
            assert!(steps.iter().any(|s| s == name), "{name}");
        }
    }

    /// Speeds of a model without routed experts.
    fn speeds_of_dense_model(device: &Arc<dyn Device>, watch: Watch<'_>) -> Speeds {
        let gguf = Arc::new(Gguf::open(&data("tests/data/arch/llama-dense.gguf")).unwrap());
        speeds(&gguf, device, Effort::LITTLE, watch)
    }

    #[test]
    fn the_suite_can_be_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let device: Arc<dyn Device> = shim::shared();
        let watch = Watch {
            stop: &|| true,
            step: &|_| {},
        };
        let references = References {
            golden: Some(folder.path()),
            text: None,
            tokens: 4,
            scratch: folder.path(),
        };
        let outcome = results(&device, references, watch);
        assert!(
            outcome.kernels.is_empty() && outcome.golden.is_empty() && outcome.launches.is_none()
        );
        let stopped = speeds_of_dense_model(&device, watch);
        assert!(
            matches!(stopped.fully_on_gpu, Err(SelftestError::Stopped)) && stopped.hybrid.is_none()
        );
    }
}
