//! The whole self-test of a device, step by step: results first, then speeds. A step that fails is an outcome; the others
//! go on.

use super::golden::{self, Found, Golden};
use super::gpu_kernels;
use super::launches::{self, Launches};
use super::speed::{Effort, Place, Timed, time};
use crate::gpu_rates::{Rates, Subject, copy_gbps_of, products_of, rates_of};
use crate::outcome::Outcome;
use crate::whole::{self, SameText};
use crate::{Stop, TargetError};
use std::path::Path;
use std::sync::Arc;
use tier_plan_cuda::Device;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::describe;
use tier_plan_kernels::quant::TensorType;

/// Who looks on.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Whether to end early.
    pub stop: Stop<'a>,
    /// Told what is done next.
    pub step: &'a dyn Fn(&str),
}

/// What results are compared with.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// A folder with golden values in `arch` and `quant`.
    pub golden: Option<&'a Path>,
    /// A model that makes text, and the beginning of one.
    pub text: Option<(&'a Arc<Gguf>, &'a [u32])>,
    /// Tokens by which the text is continued.
    pub tokens: usize,
    /// A folder for small files.
    pub scratch: &'a Path,
}

/// What a step found, or why it found nothing.
pub type Step<T> = Result<T, TargetError>;

/// Where a model is while its text is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// All of it on the device.
    All,
    /// Its experts in main memory.
    ExpertsInMemory,
}

/// Golden values of a model.
#[derive(Debug)]
pub struct GoldenStep {
    /// The model quantises nothing: its values are to be nearer.
    pub exact: bool,
    /// The name.
    pub name: String,
    /// What was found.
    pub found: Step<Found>,
}

/// How right a device computes.
#[derive(Debug, Default)]
pub struct Results {
    /// Every kernel against the processor's plain ones.
    pub kernels: Vec<(String, Step<Outcome>)>,
    /// The model that makes text against the processor, logit by logit.
    pub logits: Vec<(On, Step<Outcome>)>,
    /// The same, by the tokens of its text.
    pub texts: Vec<(On, Step<SameText>)>,
    /// Golden values.
    pub golden: Vec<GoldenStep>,
    /// Launches of a layer of a decoded token.
    pub launches: Option<Step<Launches>>,
}

impl Results {
    /// Whether every kernel computes what it should; nothing else was looked at where not.
    pub fn kernels_are_well(&self) -> bool {
        self.kernels.iter().all(|(_, found)| found.as_ref().is_ok_and(Outcome::is_well))
    }
}

/// Compares a device's results.
pub fn results(device: &Arc<dyn Device>, known: Known<'_>, watch: Watch<'_>) -> Results {
    let mut found = Results::default();
    let goes_on = || !(watch.stop)();
    for check in gpu_kernels::all().into_iter().take_while(|_| goes_on()) {
        (watch.step)(&check.name);
        let outcome = check.run(device).map_err(TargetError::from);
        found.kernels.push((check.name, outcome));
    }
    // Kernels that are wrong by themselves need no more proof.
    if !found.kernels_are_well() || !goes_on() {
        return found;
    }
    for (of, exact) in [("arch", true), ("quant", false)] {
        let Some(folder) = known.golden.map(|golden| golden.join(of)) else { continue };
        let names = match golden::names(&folder) {
            Ok(names) => names,
            Err(error) => {
                let found_none = Err(TargetError::Golden { path: folder, what: error.to_string() });
                found.golden.push(GoldenStep { exact, name: of.into(), found: found_none });
                continue;
            }
        };
        for name in names.into_iter().take_while(|_| goes_on()) {
            (watch.step)(&format!("golden values, {name}"));
            let compared = Golden::read(&folder, &name).and_then(|golden| golden.compare(device, watch.stop));
            found.golden.push(GoldenStep { exact, name, found: compared });
        }
    }
    let give = |_: usize| Ok(Arc::clone(device));
    for on in [On::All, On::ExpertsInMemory] {
        let Some((gguf, prompt)) = known.text.filter(|_| goes_on()) else { continue };
        (watch.step)("a whole model");
        let experts_too = on == On::All;
        found.logits.push((on, whole::compare(gguf, experts_too, Some(&give)).map_err(TargetError::from)));
        let text = whole::greedy(gguf, experts_too, Some(&give), prompt, known.tokens);
        found.texts.push((on, text.map_err(TargetError::from)));
    }
    if goes_on() {
        (watch.step)("launches");
        found.launches = Some(launches::count(device, known.scratch, watch.stop));
    }
    found
}

/// What a device gives by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Gives {
    /// Fixed times, memory and link.
    pub rates: Rates,
    /// Copies within its memory, bytes read and written together, 10⁹ bytes a second.
    pub copy_gbps: f64,
    /// Products of one token by format, 10⁹ weight bytes a second.
    pub products: Vec<(TensorType, f64)>,
}

/// Measures a device by itself.
///
/// # Errors
/// When it fails, has not got the memory, or `watch` says stop.
pub fn gives(subject: &mut Subject, watch: Watch<'_>) -> Step<Gives> {
    (watch.step)("memory and link");
    let rates = rates_of(subject)?;
    let copy_gbps = copy_gbps_of(&subject.device, subject.effort)?;
    let one = |ty: TensorType| {
        if (watch.stop)() {
            return Err(TargetError::Stopped);
        }
        (watch.step)(&format!("products, {ty}"));
        Ok((ty, products_of(subject, ty)?))
    };
    let products = TensorType::ALL.into_iter().map(one).collect::<Step<_>>()?;
    Ok(Gives { rates, copy_gbps, products })
}

/// How fast a model is in three places.
#[derive(Debug)]
pub struct Speeds {
    /// All on the device.
    pub resident: Step<Timed>,
    /// Its experts in main memory; none where it has no routed experts.
    pub hybrid: Option<Step<Timed>>,
    /// All on the processor.
    pub processor: Step<Timed>,
}

/// Times a model.
pub fn speeds(gguf: &Arc<Gguf>, device: &Arc<dyn Device>, effort: Effort, watch: Watch<'_>) -> Speeds {
    let timed = |what: &str, place: Place<'_>| {
        (watch.step)(what);
        time(gguf, place, effort, watch.stop)
    };
    let resident = timed("the model, all on the GPU", Place::Resident(device));
    let has_experts = describe(gguf).is_ok_and(|spec| spec.moe_layers().next().is_some());
    let hybrid = has_experts.then(|| timed("the model, experts in main memory", Place::Hybrid(device)));
    let processor = timed("the model, all on the processor", Place::Processor);
    Speeds { resident, hybrid, processor }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Temporary;
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
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name)
    }

    /// Golden values of one architecture, so that the run is short.
    fn some_golden(folder: &Path) {
        std::fs::create_dir(folder.join("arch")).unwrap();
        for extension in ["gguf", "json", "logits"] {
            let name = format!("arch/qwen3moe.{extension}");
            std::fs::copy(data("tests/data").join(&name), folder.join(&name)).unwrap();
        }
    }

    #[test]
    fn the_whole_test_runs_on_an_emulated_device() {
        let folder = tempfile::tempdir().unwrap();
        some_golden(folder.path());
        let demo = Arc::new(Gguf::open(&data("profiles/demo/demo.gguf")).unwrap());
        let device: Arc<dyn Device> = shim::shared();
        let steps = RefCell::new(Vec::new());
        let step = |name: &str| steps.borrow_mut().push(name.to_string());
        let watch = Watch { stop: &|| false, step: &step };
        let prompt = [5, 77, 1033, 9];
        let known =
            Known { golden: Some(folder.path()), text: Some((&demo, &prompt)), tokens: 4, scratch: folder.path() };
        let found = results(&device, known, watch);
        assert!(found.kernels_are_well() && found.kernels.len() == gpu_kernels::all().len());
        assert!(found.logits.iter().all(|(_, o)| o.as_ref().unwrap().is_well()), "{:?}", found.logits);
        let same = SameText { same: 4, of: 4, lead: None };
        assert!(found.texts.iter().all(|(_, t)| *t.as_ref().unwrap() == same), "{:?}", found.texts);
        assert_eq!((found.logits.len(), found.texts.len()), (2, 2));
        let [golden, missing] = &found.golden[..] else { panic!("{:?}", found.golden) };
        assert!(golden.exact && golden.name == "qwen3moe" && golden.found.as_ref().unwrap().worst(true) < 1e-4);
        assert!(!missing.exact && missing.found.as_ref().is_err_and(|e| e.to_string().contains("quant")));
        assert!(found.launches.unwrap().unwrap().layer > 0);

        let effort = gpu_rates::Effort { bytes: 4096, passes: 1, launches: 2, stages: 1 };
        let pinned = Box::new(Host(vec![3; effort.bytes]));
        let mut subject = Subject { device: Arc::clone(&device), multiprocessors: 1, pinned, effort };
        let gives = gives(&mut subject, watch).unwrap();
        assert!(gives.copy_gbps > 0.0 && gives.products.len() == TensorType::ALL.len());

        let file = Temporary::new(folder.path(), "all");
        synth::write(&Shape::TINY, file.path(), &|| false, &mut |_, _| {}).unwrap();
        let gguf = Arc::new(Gguf::open(file.path()).unwrap());
        let effort = Effort { prompt: 16, decode: 4, ..Effort::LITTLE };
        let speeds = speeds(&gguf, &device, effort, watch);
        let timed = [speeds.resident.unwrap(), speeds.hybrid.unwrap().unwrap(), speeds.processor.unwrap()];
        assert!(timed.iter().all(|t| t.tok_s() > 0.0 && t.prompt_tok_s() > 0.0), "{timed:?}");
        let steps = steps.into_inner();
        for name in ["golden values, qwen3moe", "launches", "memory and link", "the model, all on the processor"] {
            assert!(steps.iter().any(|s| s == name), "{name}");
        }
    }

    /// A model without routed experts.
    fn speeds_of_nothing(device: &Arc<dyn Device>, watch: Watch<'_>) -> Speeds {
        let gguf = Arc::new(Gguf::open(&data("tests/data/arch/llama-dense.gguf")).unwrap());
        speeds(&gguf, device, Effort::LITTLE, watch)
    }

    #[test]
    fn a_person_can_end_it() {
        let folder = tempfile::tempdir().unwrap();
        let device: Arc<dyn Device> = shim::shared();
        let watch = Watch { stop: &|| true, step: &|_| {} };
        let known = Known { golden: Some(folder.path()), text: None, tokens: 4, scratch: folder.path() };
        let found = results(&device, known, watch);
        assert!(found.kernels.is_empty() && found.golden.is_empty() && found.launches.is_none());
        let stopped = speeds_of_nothing(&device, watch);
        assert!(matches!(stopped.resident, Err(TargetError::Stopped)) && stopped.hybrid.is_none());
    }
}
