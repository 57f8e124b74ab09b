//! The parts that no GPU can run, by architecture: for shapes, which have no options to look at.
//!
//! What only some published models of an architecture have counts for all of them.

use super::{CpuOnly, CpuReason, Part};
use crate::model::shape::{DenseKind, ModelShape};

const EMBEDDING: Part = Part::Dense(DenseKind::Embedding);
const TABLE: Part = Part::Dense(DenseKind::TokenTable);
const MIXER: Part = Part::Dense(DenseKind::Attention);
const ROUTER: Part = Part::Dense(DenseKind::Router);
const SHARED: Part = Part::Dense(DenseKind::SharedExpert);
const DENSE_FFN: Part = Part::Dense(DenseKind::DenseFfn);
const HEAD: Part = Part::Dense(DenseKind::Head);

const BLOCKS: [Part; 3] = [ROUTER, SHARED, DENSE_FFN];

/// Parts that no GPU can run for one reason.
type Reason = (&'static [Part], Why);

/// A reason, and whether one GPU can run all such parts together.
type Why = (&'static str, bool);

/// Returns the reasons of a shape's architecture.
fn reasons(shape: &ModelShape) -> &'static [Reason] {
    let has_table = shape.dense.iter().any(|d| d.kind == DenseKind::TokenTable);
    match shape.arch.as_str() {
        // Its larger models have neither inputs of tokens nor shared keys and values.
        "gemma4" if has_table => &[
            (&[TABLE], (super::INPUT_TABLE, false)),
            (&[EMBEDDING], (super::TOKEN_INPUTS, true)),
            (&[MIXER], (super::SHARED_KV, true)),
            (&BLOCKS, (super::TOKEN_INPUTS, true)),
        ],
        "qwen4exp" => &[(&[TABLE], (super::NGRAM_TABLE, false))],
        _ => &[],
    }
}

/// Whether an index chooses among the keys and values of an architecture's attention.
pub(crate) fn chooses_keys(arch: &str) -> bool {
    matches!(arch, "minimax-m3" | "qwen4exp")
}

/// Returns the parts of a model that no GPU can run, as far as its architecture tells.
pub(crate) fn cpu_only_of(shape: &ModelShape) -> Vec<CpuOnly> {
    let reasons = reasons(shape);
    let is_tied = !shape.dense.iter().any(|d| d.kind == DenseKind::Embedding);
    let of_part = |part: Part, layer: Option<u32>| {
        // The head of a tied model is the embedding.
        let is_part = |of: &Part| *of == part || (is_tied && part == HEAD && *of == EMBEDDING);
        let found = reasons.iter().find(|(parts, _)| parts.iter().any(is_part));
        found.map(|(_, (why, together))| CpuOnly {
            part,
            layer,
            why: if *together {
                CpuReason::Together((*why).into())
            } else {
                CpuReason::Kernel((*why).into())
            },
        })
    };
    let dense = shape.dense.iter();
    let dense = dense.filter_map(|d| of_part(Part::Dense(d.kind), d.layer));
    dense.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Gguf;
    use crate::model::describe;
    use crate::model::shape::shape_of;
    use crate::model::spec::Mixer;
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;

    /// Parts by architecture: what files lack, and what is said of their architecture.
    #[derive(Default)]
    struct Parts {
        of_files: BTreeSet<Part>,
        said: BTreeSet<Part>,
    }

    /// A part that is refused in a file is refused in a shape of its architecture, and each part that
    /// is refused in shapes is in some file.
    #[test]
    fn what_is_said_of_architectures_is_what_their_files_lack() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
        let mut found: BTreeMap<String, Parts> = BTreeMap::new();
        for folder in ["arch", "arch2"] {
            for file in std::fs::read_dir(data.join(folder)).unwrap() {
                let path = file.unwrap().path();
                if path.extension().is_none_or(|e| e != "gguf") {
                    continue;
                }
                let gguf = Gguf::open(&path).unwrap();
                let spec = describe(&gguf).unwrap();
                let shape = shape_of(&gguf, &spec);
                let mut mixers = spec.layers.iter().map(|layer| &layer.mixer);
                let has_index = mixers.any(|m| matches!(m, Mixer::Gqa(a) if a.index.is_some()));
                assert_eq!(chooses_keys(&shape.arch), has_index, "{}", path.display());
                let said = cpu_only_of(&shape);
                for only in &shape.cpu_only {
                    let place = (only.part, only.layer);
                    let said = said.iter().find(|said| (said.part, said.layer) == place);
                    let together = said.map(CpuOnly::is_together);
                    let expected = Some(only.is_together());
                    assert_eq!(together, expected, "{}: {only:?}", path.display());
                }
                let parts = found.entry(shape.arch.clone()).or_default();
                parts
                    .of_files
                    .extend(shape.cpu_only.iter().map(|only| only.part));
                parts.said.extend(said.iter().map(|only| only.part));
            }
        }
        assert!(found.len() > 40, "{} architectures", found.len());
        for (arch, parts) in found {
            assert_eq!(parts.said, parts.of_files, "{arch}");
        }
    }
}
