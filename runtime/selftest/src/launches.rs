//! Kernels that a device runs for a layer of a decoded token, counted by the device itself.

use super::synth::{Shape, write};
use crate::counting::Counting;
use crate::{Stop, TargetError, Temporary};
use std::path::Path;
use std::sync::Arc;
use tier_plan_cuda::Device;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::shape_of;
use tier_plan_runtime::engine::{Engine, LogitsMode};
use tier_plan_runtime::options::LoadOptions;
use tier_plan_runtime::plans::in_memory::all_on_gpu;

/// Tokens before the one that is counted: launched, recorded, replayed.
const BEFORE: u32 = 4;

/// Kernels of a decoded token of a model that is all on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launches {
    /// Of a layer of grouped-query attention and routed experts.
    pub layer: u64,
    /// Of all else: embedding, last norm, head.
    pub outside: u64,
}

/// Counts them: what a model of three layers needs more than one of two is a layer's. The models are small and lie in
/// `folder` meanwhile.
///
/// # Errors
/// When a model can't be written or loaded, a pass fails, or `stop` says so.
pub fn count(device: &Arc<dyn Device>, folder: &Path, stop: Stop<'_>) -> Result<Launches, TargetError> {
    let of = |layers: u32| of_a_token(device, folder, Shape { layers, ..Shape::TINY }, stop);
    let (two, three) = (of(2)?, of(3)?);
    let layer = three.saturating_sub(two);
    Ok(Launches { layer, outside: two.saturating_sub(2 * layer) })
}

fn of_a_token(device: &Arc<dyn Device>, folder: &Path, shape: Shape, stop: Stop<'_>) -> Result<u64, TargetError> {
    let file = Temporary::new(folder, "launches");
    write(&shape, file.path(), stop, &mut |_, _| {})?;
    let gguf = Arc::new(Gguf::open(file.path())?);
    let plan = all_on_gpu(&shape_of(&gguf, &describe(&gguf)?), BEFORE + 2, KvType::F16);
    let counting = Arc::new(Counting::new(Arc::clone(device)));
    let give = |_: usize| Ok(Arc::clone(&counting) as Arc<dyn Device>);
    let mut engine = Engine::load_on(gguf, &plan, &LoadOptions::default(), Some(&give), &mut |_, _| {})?;
    for token in 0..=BEFORE {
        engine.forward(&[token], LogitsMode::Last)?;
    }
    let before = counting.launches();
    engine.forward(&[BEFORE], LogitsMode::Last)?;
    Ok(counting.launches() - before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_cuda::shim;

    #[test]
    fn a_layers_launches_are_counted_by_the_device() {
        let folder = tempfile::tempdir().unwrap();
        let device: Arc<dyn Device> = shim::shared();
        let found = count(&device, folder.path(), &|| false).unwrap();
        // The embedding, the last norm and the head are outside; a layer has attention's kernels and its experts'.
        assert_eq!(found.outside, 3);
        assert!((5..=17).contains(&found.layer), "{found:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
        assert!(matches!(count(&device, folder.path(), &|| true), Err(TargetError::Stopped)));
    }
}
