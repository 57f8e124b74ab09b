//! Counts the launches per layer of a decoded token.

use super::synth::{Shape, write};
use crate::counting::CountingDevice;
use crate::{SelftestError, Stop};
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

/// Tokens before the one that is counted, so that its launches are a replay.
const TOKENS_BEFORE: u32 = 4;

/// Launches of a decoded token of a model that is fully on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launches {
    /// Launches per layer of grouped-query attention and routed experts.
    pub layer: u64,
    /// Other launches: embedding, last norm, head.
    pub outside: u64,
}

/// Counts the launches. Those per layer are the difference between a model of three layers and one
/// of two. The models are small, and written to `folder` meanwhile.
///
/// # Errors
/// When a model can't be written or loaded, a pass fails, or `stop` returns true.
pub fn count(
    device: &Arc<dyn Device>,
    folder: &Path,
    stop: Stop<'_>,
) -> Result<Launches, SelftestError> {
    let launches = |layers: u32| {
        launches_of_a_token(
            device,
            folder,
            Shape {
                layers,
                ..Shape::TINY
            },
            stop,
        )
    };
    let (two, three) = (launches(2)?, launches(3)?);
    let layer = three.saturating_sub(two);
    Ok(Launches {
        layer,
        outside: two.saturating_sub(2 * layer),
    })
}

fn launches_of_a_token(
    device: &Arc<dyn Device>,
    folder: &Path,
    shape: Shape,
    stop: Stop<'_>,
) -> Result<u64, SelftestError> {
    let file = write(&shape, folder, stop, &mut |_, _| {})?;
    let gguf = Arc::new(Gguf::open(file.path())?);
    let plan = all_on_gpu(
        &shape_of(&gguf, &describe(&gguf)?),
        TOKENS_BEFORE + 2,
        KvType::F16,
    );
    let counting = Arc::new(CountingDevice::new(Arc::clone(device)));
    let give = |_: usize| Ok(Arc::clone(&counting) as Arc<dyn Device>);
    let mut engine = Engine::load_on(
        gguf,
        &plan,
        &LoadOptions::default(),
        Some(&give),
        &mut |_, _| {},
    )?;
    for token in 0..=TOKENS_BEFORE {
        engine.forward(&[token], LogitsMode::Last)?;
    }
    let before = counting.launches();
    engine.forward(&[TOKENS_BEFORE], LogitsMode::Last)?;
    Ok(counting.launches() - before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_cuda::shim;

    #[test]
    fn launches_per_layer_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let device: Arc<dyn Device> = shim::shared();
        let launches = count(&device, folder.path(), &|| false).unwrap();
        // Outside are the embedding, the last norm and the head.
        assert_eq!(launches.outside, 3);
        assert!((5..=17).contains(&launches.layer), "{launches:?}");
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            0,
            "nothing is left behind"
        );
        assert!(matches!(
            count(&device, folder.path(), &|| true),
            Err(SelftestError::Stopped)
        ));
    }
}
