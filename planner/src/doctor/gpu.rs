//! GPUs: the driver, its devices, and the compiler of kernels.

use super::{Check, System};
use crate::printable::printable;
use serde_json::{Value, json};
use tier_plan_runtime::cuda::{Compiler, CudaError, Gpu, Version};
use tier_plan_runtime::units::show_bytes;

/// Vendor of PCI devices whose GPUs have kernels here, and the class of displays and accelerators.
const NVIDIA: &str = "0x10de";
const DISPLAY_CLASS: &str = "0x03";

/// A GPU that opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Number, as the driver counts.
    pub ordinal: usize,
    /// Product name.
    pub name: String,
    /// Compute capability.
    pub capability: Version,
    /// Bytes of memory.
    pub total_bytes: u64,
    /// Bytes that are free, if the driver tells.
    pub free_bytes: Option<u64>,
    /// Version of CUDA that the driver has.
    pub driver: Version,
}

/// Why there is no GPU, or why there are no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missing {
    /// There is no driver.
    NoDriver,
    /// The driver has no GPU.
    NoDevice,
    /// A GPU or the driver cannot be used.
    Unusable(String),
}

/// What the driver and the compiler tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpus {
    /// GPUs that opened.
    pub found: Vec<Device>,
    /// Why there are no more; `None` where all opened.
    pub missing: Vec<Missing>,
    /// Version of NVRTC, or why there is none.
    pub compiler: Result<Version, String>,
}

impl Gpus {
    /// Opens every GPU, and looks for the compiler.
    pub fn of_this_machine() -> Self {
        let (mut found, mut missing) = (Vec::new(), Vec::new());
        for ordinal in 0.. {
            match Gpu::open(ordinal) {
                Ok(gpu) => found.push(device(&gpu)),
                Err(CudaError::NoDevice { .. }) if ordinal > 0 => break,
                // The toolkit's stub is for linking, on machines without a GPU.
                Err(CudaError::NoDriver | CudaError::StubDriver) => {
                    missing.push(Missing::NoDriver);
                    break;
                }
                Err(CudaError::NoDevice { .. }) => {
                    missing.push(Missing::NoDevice);
                    break;
                }
                Err(error) => {
                    missing.push(Missing::Unusable(error.to_string()));
                    // Only a GPU that is too old says nothing about those after it.
                    if !matches!(error, CudaError::TooOld { .. }) {
                        break;
                    }
                }
            }
        }
        let driver = found.iter().map(|gpu: &Device| gpu.driver.major).min();
        Self {
            found,
            missing,
            compiler: Compiler::find_for(driver.unwrap_or(i32::MAX))
                .map(|compiler| compiler.version())
                .map_err(|error| error.to_string()),
        }
    }
}

fn device(gpu: &Gpu) -> Device {
    let properties = gpu.properties();
    Device {
        ordinal: properties.ordinal,
        name: properties.name.clone(),
        capability: properties.capability,
        total_bytes: properties.total_bytes as u64,
        free_bytes: gpu.free_bytes().ok().map(|bytes| bytes as u64),
        driver: Version::of_driver(properties.driver),
    }
}

pub(super) fn checks(system: &System, gpus: &Gpus) -> Vec<Check> {
    vec![devices(system, gpus), compiler(gpus)]
}

/// Counts GPUs of NVIDIA on the PCI bus, whether there is a driver or not.
fn on_bus(system: &System) -> usize {
    let devices = "sys/bus/pci/devices";
    let is_gpu = |name: &String| {
        let read = |file: &str| system.text(&format!("{devices}/{name}/{file}"));
        read("vendor").is_some_and(|vendor| vendor == NVIDIA)
            && read("class").is_some_and(|class| class.starts_with(DISPLAY_CLASS))
    };
    system
        .names(devices)
        .iter()
        .filter(|name| is_gpu(name))
        .count()
}

/// Returns the version of the driver's kernel module: `570.86.10`.
fn module(system: &System) -> Option<String> {
    let text = system.text("proc/driver/nvidia/version")?;
    let line = text
        .lines()
        .find(|line| line.starts_with("NVRM version:"))?;
    let version = line
        .split_whitespace()
        .find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))?;
    Some(version.to_string())
}

fn devices(system: &System, gpus: &Gpus) -> Check {
    let id = "gpu.devices";
    let (on_bus, module) = (on_bus(system), module(system));
    let list: Vec<Value> = gpus
        .found
        .iter()
        .map(|gpu| {
            json!({
                "ordinal": gpu.ordinal,
                "name": gpu.name,
                "capability": gpu.capability.to_string(),
                "total_bytes": gpu.total_bytes,
                "free_bytes": gpu.free_bytes,
                "cuda": gpu.driver.to_string(),
            })
        })
        .collect();
    let facts = |check: Check| {
        check
            .fact("devices", list.clone())
            .fact("on_bus", on_bus)
            .fact("driver", module.clone())
    };
    let mut words: Vec<String> = gpus.found.iter().map(shown).collect();
    let unusable = gpus.missing.iter().find_map(|missing| match missing {
        Missing::Unusable(why) => Some(why),
        Missing::NoDriver | Missing::NoDevice => None,
    });
    if let Some(why) = unusable {
        words.push(why.clone());
        let check = facts(Check::ok(id, words.join(", ")));
        return check
            .failure("nvidia-smi, which names the driver's own error; or plan without it: tier-plan solve … --vram 0");
    }
    if !gpus.found.is_empty() {
        words.extend(
            module
                .iter()
                .map(|version| format!("kernel module {version}")),
        );
        return facts(Check::ok(id, words.join(", ")));
    }
    let has_driver = gpus.missing.contains(&Missing::NoDevice);
    match (on_bus, has_driver) {
        (0, _) => facts(Check::ok(id, "none")),
        (n, false) => facts(
            Check::ok(id, format!("{n} of NVIDIA on the bus, but no driver library (libcuda.so.1)"))
                .warning("nothing computes on them: sys/bus/pci shows the devices, and no driver can be loaded"),
        )
        .mend("sudo ubuntu-drivers install, or the driver of your system; in a container: docker run --gpus all"),
        (n, true) => facts(
            Check::ok(id, format!("{n} of NVIDIA on the bus, but the driver shows none"))
                .warning("nothing computes on them: CUDA_VISIBLE_DEVICES or the container may hide them"),
        )
        .mend("unset CUDA_VISIBLE_DEVICES; in a container: docker run --gpus all"),
    }
}

fn shown(gpu: &Device) -> String {
    let free = gpu.free_bytes.map_or(String::new(), |free| {
        format!("{} free of ", show_bytes(free))
    });
    format!(
        "GPU {}: {}, compute capability {}, {free}{}, driver of CUDA {}",
        gpu.ordinal,
        printable(&gpu.name),
        gpu.capability,
        show_bytes(gpu.total_bytes),
        gpu.driver
    )
}

fn compiler(gpus: &Gpus) -> Check {
    let id = "gpu.compiler";
    let wanted = !gpus.found.is_empty();
    match &gpus.compiler {
        Ok(version) => {
            let check =
                Check::ok(id, format!("NVRTC {version}")).fact("version", version.to_string());
            let older = gpus.found.iter().find(|gpu| gpu.driver.major < version.major);
            match older {
                None => check,
                Some(gpu) => check
                    .warning(format!(
                        "kernels may not load: the driver has CUDA {}, and NVRTC is newer",
                        gpu.driver
                    ))
                    .mend(format!("pip install nvidia-cuda-nvrtc-cu{}", gpu.driver.major)),
            }
        }
        Err(why) if wanted => Check::ok(id, why.as_str()).fact("version", Value::Null).failure(
            "pip install nvidia-cuda-nvrtc-cu12, and set TIER_PLAN_NVRTC to the path of its libnvrtc.so.12",
        ),
        Err(_) => Check::ok(id, "none").fact("version", Value::Null),
    }
}
