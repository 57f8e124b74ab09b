//! `*.slots.json`: which experts a run's slots held when it ended, so that the next one need not
//! begin with empty ones.

use super::framed::WireSource;
use super::kind::SLOTS;
use crate::source_id::SourceId;
use crate::{FormatError, safely};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Exclusive bound on layer numbers.
const LAYER_LIMIT: u32 = 4096;
/// Exclusive bound on expert numbers.
const EXPERT_LIMIT: u32 = 65536;
/// Most experts in one file.
const EXPERTS_LIMIT: usize = 4_194_304;

/// The experts in one layer's slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSlots {
    /// Number of the layer in the model.
    pub layer: u32,
    /// Experts, the most recently used first.
    pub experts: Vec<u32>,
}

/// What the slots of a model held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots {
    /// The model whose experts they are.
    pub model: SourceId,
    /// UTC moment, see [`crate::units::show_utc`].
    pub when: String,
    /// Layers, ascending.
    pub layers: Vec<LayerSlots>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    format: String,
    version: u64,
    model: WireSource,
    when: String,
    layers: Vec<WireLayer>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireLayer {
    layer: u32,
    experts: Vec<u32>,
}

impl Slots {
    /// Encodes the file: JSON with one layer per line.
    pub fn encode(&self) -> String {
        let json = |text: &str| serde_json::Value::from(text).to_string();
        let layer = |l: &LayerSlots| {
            let experts: Vec<String> = l.experts.iter().map(u32::to_string).collect();
            format!(
                "    {{\"layer\": {}, \"experts\": [{}]}}",
                l.layer,
                experts.join(", ")
            )
        };
        let layers: Vec<String> = self.layers.iter().map(layer).collect();
        format!(
            "{{\n  \"format\": {},\n  \"version\": 1,\n  \"model\": {{\"name\": {}, \"hash\": {}}},\n  \"when\": {},\n  \
             \"layers\": [\n{}\n  ]\n}}\n",
            json(SLOTS.format),
            json(&self.model.name),
            json(&self.model.hash),
            json(&self.when),
            layers.join(",\n")
        )
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When the system refuses, or the file could not be read back.
    pub fn write(&self, path: &Path) -> Result<(), FormatError> {
        let text = self.encode();
        decode(text.as_bytes(), path)?;
        safely::write(path, text.as_bytes())
    }

    /// Refuses the slots of another model.
    ///
    /// # Errors
    /// When the hashes differ; the message has both names.
    pub fn check_model(&self, given: &SourceId, path: &Path) -> Result<(), FormatError> {
        super::check_model(
            &self.model,
            given,
            "file of slots",
            "use the slots of this model",
            path,
        )
    }
}

/// Reads a file of slots.
///
/// # Errors
/// When it can't be read, is another kind of file, is newer than this program, or makes no sense.
pub fn read(path: &Path) -> Result<Slots, FormatError> {
    decode(&SLOTS.read(path)?, path)
}

/// Decodes a file's bytes; `path` is for messages.
///
/// # Errors
/// As [`read`].
pub fn decode(bytes: &[u8], path: &Path) -> Result<Slots, FormatError> {
    let text = SLOTS.open_json(bytes, path)?;
    let wire: Wire =
        serde_json::from_str(text).map_err(|e| FormatError::invalid(path, e.to_string()))?;
    let mut before = None;
    for WireLayer { layer, experts } in &wire.layers {
        if *layer >= LAYER_LIMIT || before.is_some_and(|b| b >= *layer) {
            let what = format!(
                "layer {layer}: layers must ascend and be at most {}",
                LAYER_LIMIT - 1
            );
            return Err(FormatError::invalid(path, what));
        }
        before = Some(*layer);
        if let Some(expert) = experts.iter().find(|e| **e >= EXPERT_LIMIT) {
            let what = format!(
                "layer {layer}: expert {expert}, but they are numbered to {}",
                EXPERT_LIMIT - 1
            );
            return Err(FormatError::invalid(path, what));
        }
    }
    let n: usize = wire.layers.iter().map(|l| l.experts.len()).sum();
    if n > EXPERTS_LIMIT {
        return Err(FormatError::invalid(
            path,
            format!("{n} experts; at most {EXPERTS_LIMIT} fit"),
        ));
    }
    let layer = |l: WireLayer| LayerSlots {
        layer: l.layer,
        experts: l.experts,
    };
    Ok(Slots {
        model: wire.model.into(),
        when: wire.when,
        layers: wire.layers.into_iter().map(layer).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots() -> Slots {
        Slots {
            model: SourceId {
                name: "a \"demo\"".into(),
                hash: "0123456789abcdef0123456789abcdef".into(),
            },
            when: "2026-11-22T17:00:00Z".into(),
            layers: vec![
                LayerSlots {
                    layer: 0,
                    experts: vec![5, 0, 31],
                },
                LayerSlots {
                    layer: 2,
                    experts: vec![],
                },
                LayerSlots {
                    layer: 3,
                    experts: vec![7],
                },
            ],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("demo.slots.json");
        slots().write(&path).unwrap();
        assert_eq!(read(&path).unwrap(), slots());
        let none = Slots {
            layers: Vec::new(),
            ..slots()
        };
        assert_eq!(decode(none.encode().as_bytes(), &path).unwrap(), none);
        let other = SourceId {
            name: "other".into(),
            hash: "f".repeat(32),
        };
        assert!(
            slots()
                .check_model(&other, &path)
                .unwrap_err()
                .to_string()
                .contains("'other'")
        );
    }

    #[test]
    fn the_committed_file_is_read() {
        let text = include_bytes!("../../../tests/data/formats/slots.v1.json");
        assert_eq!(decode(text, Path::new("slots.v1.json")).unwrap(), slots());
    }

    #[test]
    fn nonsense_is_named() {
        let says = |from: &str, to: &str, words: &str| {
            let text = slots().encode().replacen(from, to, 1);
            assert_ne!(text, slots().encode());
            let error = decode(text.as_bytes(), Path::new("a.json"))
                .unwrap_err()
                .to_string();
            assert!(error.contains(words), "{error}");
        };
        says(
            "\"version\": 1",
            "\"version\": 2",
            "version 2, but this program reads up to version 1",
        );
        says(
            "\"layer\": 2",
            "\"layer\": 0",
            "layer 0: layers must ascend",
        );
        says(
            "31",
            "65536",
            "expert 65536, but they are numbered to 65535",
        );
        says("\"when\"", "\"wenn\"", "unknown field `wenn`");
        says("tier-plan slots", "tier-plan slats", "not a file of slots");
    }
}
