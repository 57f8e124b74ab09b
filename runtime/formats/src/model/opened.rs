//! A model file with its description.

use super::shape::{ModelShape, shape_of};
use super::spec::ModelSpec;
use super::{ModelError, describe};
use crate::gguf::Gguf;
use std::path::Path;
use std::sync::Arc;

/// A model file, the network that it describes, and the sizes that a planner needs.
///
/// The three belong together: `spec` and `shape` are made from `gguf` when the model is opened.
///
/// ```
/// use std::path::Path;
/// use tier_plan_formats::model::Model;
///
/// let model = Model::open(Path::new("../../profiles/demo/demo.gguf"))?;
/// assert_eq!(model.spec().layers.len(), model.shape().n_layer as usize);
/// assert!(model.shape().weight_bytes() < model.gguf().file_bytes());
/// # Ok::<(), tier_plan_formats::model::ModelError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Model {
    gguf: Arc<Gguf>,
    spec: ModelSpec,
    shape: ModelShape,
}

impl Model {
    /// Opens a GGUF file and describes the network in it. Reads the header only.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, or holds a network that no architecture here
    /// describes.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::from_gguf(Arc::new(Gguf::open(path)?))
    }

    /// Describes the network in an opened file.
    ///
    /// # Errors
    /// When no architecture here describes it.
    pub fn from_gguf(gguf: Arc<Gguf>) -> Result<Self, ModelError> {
        let spec = describe(&gguf)?;
        let shape = shape_of(&gguf, &spec);
        Ok(Self { gguf, spec, shape })
    }

    /// Returns the open file.
    pub fn gguf(&self) -> &Arc<Gguf> {
        &self.gguf
    }

    /// Returns the network: layers, their tensors, and the options that change the arithmetic.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Returns the bytes and multiply-accumulates by tensor group, which is all that a planner
    /// needs.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }
}
