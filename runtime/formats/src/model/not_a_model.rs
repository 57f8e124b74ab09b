//! GGUF files that hold something else than a model that writes text.

use crate::gguf::Gguf;

/// What such a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAModel {
    /// A low-rank adapter (LoRA) of a model.
    Adapter,
    /// The part of a model that turns pictures or sound into its input.
    Projector,
    /// Mean squares of activations, which quantization weighs errors with.
    ImportanceMatrix,
    /// Directions that are added to a model's hidden states.
    ControlVector,
    /// A tokenizer alone.
    Vocabulary,
    /// A model that turns text into vectors or classes.
    Encoder,
    /// A model that fills in a text in many steps instead of continuing it.
    TextDiffusion,
    /// A model that makes pictures or films.
    ImageDiffusion,
    /// A model that makes or reads sound.
    Speech,
}

/// Architectures that turn text into vectors, or read it for another part.
const ENCODERS: &[&str] = &[
    "bert",
    "eurobert",
    "gemma-embedding",
    "jina-bert-v2",
    "jina-bert-v3",
    "llama-embed",
    "modern-bert",
    "neo-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "t5encoder",
];
const TEXT_DIFFUSION: &[&str] = &["dream", "llada", "llada-moe", "rnd1"];
const IMAGE_DIFFUSION: &[&str] = &[
    "aura",
    "cosmos",
    "flux",
    "hidream",
    "hyvid",
    "ltxv",
    "lumina2",
    "pig",
    "qwen_image",
    "sd1",
    "sd3",
    "sdxl",
    "wan",
];
const SPEECH: &[&str] = &["wavtokenizer-dec", "whisper"];

impl NotAModel {
    /// Returns what the file is, as a noun phrase.
    pub fn what(self) -> &'static str {
        match self {
            Self::Adapter => "a LoRA adapter, which only changes the weights of a model",
            Self::Projector => {
                "a multimodal projector (mmproj), which only turns pictures or sound into a model's input"
            }
            Self::ImportanceMatrix => "an importance matrix, which holds statistics of a model",
            Self::ControlVector => {
                "a control vector, which only changes the hidden states of a model"
            }
            Self::Vocabulary => "a vocabulary without weights",
            Self::Encoder => "an embedding model (an encoder), which reads text but writes none",
            Self::TextDiffusion => "a text diffusion model, which does not write token by token",
            Self::ImageDiffusion => "an image diffusion model, which writes no text",
            Self::Speech => "an audio model, which writes no text",
        }
    }

    /// Returns what a file holds if that is no model that writes text.
    pub(super) fn of(gguf: &Gguf) -> Option<Self> {
        let text = |key: &str| gguf.get(key).and_then(|value| value.as_str());
        let arch = text("general.architecture").unwrap_or_default();
        let by_type = match text("general.type") {
            Some("adapter") => Some(Self::Adapter),
            Some("mmproj") => Some(Self::Projector),
            Some("imatrix") => Some(Self::ImportanceMatrix),
            Some("vocab") => Some(Self::Vocabulary),
            _ => None,
        };
        let by_arch = || {
            let architectures = [
                (Self::Encoder, ENCODERS),
                (Self::TextDiffusion, TEXT_DIFFUSION),
                (Self::ImageDiffusion, IMAGE_DIFFUSION),
                (Self::Speech, SPEECH),
                (Self::Projector, &["clip"]),
                (Self::ControlVector, &["controlvector"]),
                (Self::ImportanceMatrix, &["imatrix"]),
            ];
            let found = architectures
                .iter()
                .find(|(_, names)| names.contains(&arch));
            found.map(|(kind, _)| *kind)
        };
        by_type.or_else(by_arch).or_else(|| Self::by_content(gguf))
    }

    /// Returns what a file holds by its keys and tensors, which older files have instead of a type.
    fn by_content(gguf: &Gguf) -> Option<Self> {
        let tensors = gguf.tensors();
        let all_end = |ends: &[&str]| {
            let ends_so = |name: &str| ends.iter().any(|end| name.ends_with(end));
            !tensors.is_empty() && tensors.iter().all(|t| ends_so(&t.name))
        };
        let has = |key: &str| gguf.get(key).is_some();
        if has("adapter.type") || all_end(&[".lora_a", ".lora_b", ".loraA", ".loraB"]) {
            Some(Self::Adapter)
        } else if has("imatrix.chunk_count") || all_end(&[".in_sum2", ".counts"]) {
            Some(Self::ImportanceMatrix)
        } else if !tensors.is_empty() && tensors.iter().all(|t| t.name.starts_with("direction.")) {
            Some(Self::ControlVector)
        } else if tensors.is_empty() && has("tokenizer.ggml.tokens") {
            Some(Self::Vocabulary)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ModelError, describe};
    use super::*;
    use crate::gguf::testing::Writer;
    use crate::gguf::{ArrayValue, Value};
    use tier_plan_kernels::quant::TensorType;

    fn found(writer: Writer) -> Option<NotAModel> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, writer.finish()).unwrap();
        match describe(&Gguf::open(&path).unwrap()) {
            Err(ModelError::NotAModel(other)) => Some(other),
            Err(_) => None,
            Ok(_) => panic!("described"),
        }
    }

    fn text(key: &str, value: &str) -> Writer {
        Writer::default().key(key, Value::Str(value.into())).tensor(
            "t",
            TensorType::F32,
            &[1],
            vec![0; 4],
        )
    }

    fn tensors(names: &[&str]) -> Writer {
        names.iter().fold(Writer::default(), |writer, name| {
            writer.tensor(name, TensorType::F32, &[1], vec![0; 4])
        })
    }

    #[test]
    fn files_are_known_by_type_architecture_or_content() {
        for (kind, other) in [
            ("adapter", NotAModel::Adapter),
            ("mmproj", NotAModel::Projector),
            ("imatrix", NotAModel::ImportanceMatrix),
        ] {
            let writer = text("general.type", kind);
            let named = writer.key("general.architecture", Value::Str("llama".into()));
            assert_eq!(found(named), Some(other));
        }
        for (arch, other) in [
            ("clip", NotAModel::Projector),
            ("controlvector", NotAModel::ControlVector),
            ("bert", NotAModel::Encoder),
            ("llada", NotAModel::TextDiffusion),
            ("flux", NotAModel::ImageDiffusion),
            ("wavtokenizer-dec", NotAModel::Speech),
        ] {
            assert_eq!(found(text("general.architecture", arch)), Some(other));
        }
        let adapter = tensors(&["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]);
        assert_eq!(found(adapter), Some(NotAModel::Adapter));
        let matrix = tensors(&["output.weight.in_sum2", "output.weight.counts"]);
        assert_eq!(found(matrix), Some(NotAModel::ImportanceMatrix));
        assert_eq!(
            found(tensors(&["direction.1"])),
            Some(NotAModel::ControlVector)
        );
        let tokens = Value::Array(ArrayValue::Str(vec!["a".into()]));
        let vocabulary = Writer::default().key("tokenizer.ggml.tokens", tokens);
        assert_eq!(found(vocabulary), Some(NotAModel::Vocabulary));
        assert_eq!(found(text("general.architecture", "llama")), None);
        assert_eq!(found(text("general.architecture", "no-such")), None);
    }
}
