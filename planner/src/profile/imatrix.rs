//! Reads expert counts from an importance matrix.
//!
//! llama.cpp's `llama-imatrix` runs a calibration text through a model to find what matters for
//! quantization, and counts how often each expert was chosen. Such files are published beside most
//! community quantizations, so they profile a model without running it again. They say less than a
//! recorded profile: no order in time, and only prompts.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::Read;
use std::path::Path;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::gguf::{ArrayValue, Gguf, TensorInfo, Value};
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_runtime::quant::TensorType;

/// Stacked matrices of routed experts. Each sees the same choices, so the first one present is
/// read.
const STACKED: [&str; 4] = [
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_gate_up_exps",
    "ffn_down_exps",
];

/// Matrices that every token goes through once, so that their count is the number of tokens.
const EVERY_TOKEN: [&str; 6] = [
    "ffn_gate_inp",
    "attn_output",
    "attn_q",
    "attn_q_a",
    "attn_qkv",
    "ffn_gate_shexp",
];

/// Counts are 32-bit floats, exact up to here. Beyond, sums may be off by this share.
const ROUNDING: f64 = 1e-6;

/// Reads the counts of an importance matrix. With a model they are checked against its layers and
/// experts.
///
/// # Errors
/// Fails if the file is no importance matrix in GGUF, has no counts of experts, or does not fit the
/// model.
pub fn read(path: &Path, model: Option<&ModelShape>) -> Result<Profile> {
    let file = path.display();
    refuse_legacy(path)?;
    let gguf = Gguf::open(path)?;
    match gguf.get("general.type").and_then(Value::as_str) {
        Some("imatrix") => {}
        Some(other) => {
            bail!("{file}: general.type is '{other}'; expected 'imatrix', as llama-imatrix writes")
        }
        None => bail!(
            "{file}: no importance matrix: general.type is missing; give a file that llama-imatrix wrote"
        ),
    }
    let found = counts(&gguf)?;
    let (layers, counted) = match model {
        Some(model) => of_model(&found, model, path)?,
        None => {
            ensure!(
                !found.is_empty(),
                "{file}: no counts of routed experts (tensors blk.N.ffn_*_exps.weight.counts); the model has none, or \
                 the matrix was made without them"
            );
            let ahead = gguf
                .get("imatrix.n_layer_nextn")
                .and_then(Value::as_i128)
                .unwrap_or(0);
            let keep = found
                .len()
                .saturating_sub(usize::try_from(ahead).unwrap_or(0));
            found
                .iter()
                .take(keep)
                .map(|(layer, found)| (*layer, found.counts.clone()))
                .unzip()
        }
    };
    let n_expert = counted.first().map_or(0, Vec::len);
    for (layer, counts) in layers.iter().zip(&counted) {
        ensure!(
            counts.len() == n_expert,
            "{file}: layer {layer} has counts of {} experts, layer {} of {n_expert}; expected as many in every layer",
            counts.len(),
            layers[0]
        );
        ensure!(
            counts.iter().any(|c| *c > 0),
            "{file}: layer {layer} counts no use of any expert; the matrix was made without running that layer"
        );
    }
    let n_used = match model.and_then(|m| m.experts.first()) {
        Some(of) => of.n_used,
        None => used(&gguf, &layers, &counted).with_context(|| {
            format!(
                "{file}: how many experts a token uses does not follow from it; give the model too"
            )
        })?,
    };
    for (layer, counts) in layers.iter().zip(&counted) {
        let sum: u64 = counts.iter().sum();
        let tokens = sum as f64 / f64::from(n_used);
        let most = counts.iter().max().copied().unwrap_or(0);
        ensure!(
            most as f64 <= tokens * (1.0 + ROUNDING) + 1.0,
            "{file}: layer {layer} has an expert with {most} uses, but {sum} uses of {n_used} a token are {tokens:.0} \
             tokens; the counts are of another model, or damaged"
        );
    }
    let name = model.map_or_else(|| gguf.id().name, |m| m.id.name.clone());
    let id = SourceId {
        name: name.clone(),
        hash: String::new(),
    };
    let profile = Profile {
        model: id.clone(),
        layers,
        n_expert: n_expert as u32,
        n_used,
        made: made(&gguf),
        prompts: Vec::new(),
        counted: Some(counted),
        guesses: None,
        id,
    };
    Ok(profile.identified())
}

/// Expert counts of one layer.
struct Found {
    tensor: String,
    counts: Vec<u64>,
}

/// Reads the counts of routed experts by layer, checked one by one.
fn counts(gguf: &Gguf) -> Result<BTreeMap<u32, Found>> {
    let mut found = BTreeMap::new();
    for stacked in STACKED {
        for tensor in gguf.tensors() {
            let Some(layer) = layer_of(&tensor.name, stacked) else {
                continue;
            };
            if let Entry::Vacant(place) = found.entry(layer) {
                place.insert(Found {
                    tensor: tensor.name.clone(),
                    counts: whole(gguf, tensor)?,
                });
            }
        }
    }
    Ok(found)
}

/// Returns the layer whose counts of a matrix this tensor holds.
fn layer_of(tensor: &str, matrix: &str) -> Option<u32> {
    let (layer, rest) = tensor.strip_prefix("blk.")?.split_once('.')?;
    (rest.strip_prefix(matrix)? == ".weight.counts").then(|| layer.parse().ok())?
}

/// Reads a tensor of counts as whole numbers.
fn whole(gguf: &Gguf, tensor: &TensorInfo) -> Result<Vec<u64>> {
    let (file, name) = (gguf.path().display(), &tensor.name);
    let lengths = tensor.dims.iter().filter(|d| **d != 1).count();
    ensure!(
        tensor.ty == TensorType::F32 && lengths <= 1,
        "{file}: tensor '{name}' is {} of shape {:?}; expected one F32 count for each expert",
        tensor.ty,
        tensor.dims
    );
    let (floats, _) = gguf.bytes(tensor).as_chunks();
    floats
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .enumerate()
        .map(|(expert, count)| {
            // What is below 2⁵³ is a whole number of 64 bits.
            let sound = count >= 0.0 && count.fract() == 0.0 && f64::from(count) <= (1u64 << 53) as f64;
            ensure!(sound, "{file}: tensor '{name}' counts {count} uses of expert {expert}; expected 0, 1, 2, …");
            Ok(count as u64)
        })
        .collect()
}

/// Returns the counts of a model's layers, in the model's order.
fn of_model(
    found: &BTreeMap<u32, Found>,
    model: &ModelShape,
    path: &Path,
) -> Result<(Vec<u32>, Vec<Vec<u64>>)> {
    let (file, name) = (path.display(), &model.id.name);
    ensure!(
        !model.experts.is_empty(),
        "{name} has no routed experts, so there is nothing to count"
    );
    let missing: Vec<u32> = model
        .experts
        .iter()
        .map(|e| e.layer)
        .filter(|l| !found.contains_key(l))
        .collect();
    ensure!(
        missing.is_empty(),
        "{file}: no counts of {} of the {} layers with experts of '{name}' (the first is layer {}: tensor \
         blk.{}.ffn_gate_exps.weight.counts); the matrix is of another model, or was cut short",
        missing.len(),
        model.experts.len(),
        missing[0],
        missing[0]
    );
    let mut layers = Vec::with_capacity(model.experts.len());
    let mut counted = Vec::with_capacity(model.experts.len());
    for of in &model.experts {
        let Some(found) = found.get(&of.layer) else {
            continue;
        };
        ensure!(
            !(found.counts.len() == 1 && of.n_expert > 1),
            "{file}: tensor '{}' has one count for all {} experts: the matrix was converted from the old .dat format, \
             which does not hold how often each was chosen; get one that llama-imatrix wrote as GGUF",
            found.tensor,
            of.n_expert
        );
        ensure!(
            found.counts.len() == of.n_expert as usize,
            "{file}: tensor '{}' counts {} experts, but layer {} of '{name}' has {}; the matrix is of another model",
            found.tensor,
            found.counts.len(),
            of.layer,
            of.n_expert
        );
        layers.push(of.layer);
        counted.push(found.counts.clone());
    }
    Ok((layers, counted))
}

/// Returns the experts that a token uses: the uses of a layer divided by the tokens that went
/// through it.
fn used(gguf: &Gguf, layers: &[u32], counted: &[Vec<u64>]) -> Option<u32> {
    let (layer, counts) = layers.iter().zip(counted).next()?;
    let tokens = EVERY_TOKEN.iter().find_map(|matrix| {
        let tensor = gguf.tensor(&format!("blk.{layer}.{matrix}.weight.counts"))?;
        whole(gguf, tensor)
            .ok()?
            .first()
            .copied()
            .filter(|tokens| *tokens > 0)
    })?;
    let used = counts.iter().sum::<u64>() as f64 / tokens as f64;
    let rounded = used.round();
    let sound = rounded >= 1.0
        && rounded <= counts.len() as f64
        && (used - rounded).abs() <= rounded * 1e-3;
    sound.then_some(rounded as u32)
}

/// Describes where the counts came from.
fn made(gguf: &Gguf) -> String {
    let number = |key: &str| gguf.get(key).and_then(Value::as_i128);
    let mut words =
        "marginal counts, prompt processing only: from an importance matrix".to_string();
    if let (Some(chunks), Some(size)) =
        (number("imatrix.chunk_count"), number("imatrix.chunk_size"))
    {
        words += &format!(" over {chunks} chunks of {size} tokens");
    }
    if let Some(Value::Array(ArrayValue::Str(sets))) = gguf.get("imatrix.datasets")
        && let Some(set) = sets.first()
    {
        // Another machine's paths say nothing, except maybe their last part.
        let short: String = set
            .rsplit(['/', '\\'])
            .next()
            .unwrap_or(set)
            .chars()
            .take(80)
            .collect();
        words += &format!(" of {short}");
    }
    words
}

/// Whether this is the old format, which has no magic: a number of entries, then for each the
/// length of a name and the name.
fn refuse_legacy(path: &Path) -> Result<()> {
    let mut head = Vec::new();
    let Ok(file) = std::fs::File::open(path) else {
        return Ok(());
    };
    if file.take(512).read_to_end(&mut head).is_err() || head.starts_with(b"GGUF") {
        return Ok(());
    }
    let number = |at: usize| {
        head.get(at..at + 4)?
            .try_into()
            .ok()
            .map(i32::from_le_bytes)
    };
    let (Some(entries), Some(length)) = (number(0), number(4)) else {
        return Ok(());
    };
    let length = usize::try_from(length).unwrap_or(0);
    let is_name = |name: &[u8]| !name.is_empty() && name.iter().all(|b| b.is_ascii_graphic());
    ensure!(
        !(1..1 << 20).contains(&entries) || !head.get(8..8 + length).is_some_and(is_name),
        "{}: this is an importance matrix in the old .dat format, which does not hold how often each expert was chosen; \
         make one with `llama-imatrix -o FILE.gguf`, or get one published as GGUF",
        path.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use tier_plan_runtime::model::shape_of_file;

    fn data(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
    }

    fn fixture() -> PathBuf {
        data("tests/data/imatrix/demo.imatrix.gguf")
    }

    /// The rule of `make.py` beside the fixture.
    fn rule(layer: usize) -> Vec<u64> {
        let sum: f64 = (0..32).map(|r| 1.0 / (f64::from(r) + 2.0)).sum();
        let mut by_rank: Vec<u64> = (0..32)
            .map(|r| (4.0 * 4096.0 / (f64::from(r) + 2.0) / sum).floor() as u64)
            .collect();
        by_rank[31] += 4 * 4096 - by_rank.iter().sum::<u64>();
        let mut out = vec![0; 32];
        by_rank
            .into_iter()
            .enumerate()
            .for_each(|(rank, count)| out[(7 * rank + 5 * layer) % 32] = count);
        out
    }

    #[test]
    fn counts_are_those_of_the_file_with_a_model_and_without() -> Result<()> {
        let demo = shape_of_file(&data("profiles/demo/demo.gguf"))?;
        let with = read(&fixture(), Some(&demo))?;
        assert_eq!((with.layers.len(), with.n_expert, with.n_used), (6, 32, 4));
        assert_eq!(with.counted, Some((0..6).map(rule).collect()));
        assert!(
            with.made
                .ends_with("over 8 chunks of 512 tokens of calibration.txt"),
            "{}",
            with.made
        );
        assert!(with.is_unbound());
        let without = read(&fixture(), None)?;
        assert_eq!((without.n_used, &without.counted), (4, &with.counted));
        let folder = tempfile::tempdir()?;
        with.write(&folder.path().join("a.profile"))?;
        let again = tier_plan_runtime::formats::profile::read(&folder.path().join("a.profile"))?;
        assert_eq!(again, with);
        Ok(())
    }

    #[test]
    fn evidence_of_counts_has_their_shares() -> Result<()> {
        let demo = shape_of_file(&data("profiles/demo/demo.gguf"))?;
        let evidence = super::super::Evidence::new(&demo, Some(&read(&fixture(), Some(&demo))?))?;
        assert!(
            evidence.drawn
                && evidence.notes[0].contains("only marginal counts of prompt processing")
        );
        for (layer, found) in evidence.layers.iter().enumerate() {
            let counts = rule(layer);
            assert_eq!(
                found.share,
                counts
                    .iter()
                    .map(|c| *c as f64 / 4096.0)
                    .collect::<Vec<f64>>()
            );
            assert_eq!(found.prompt_share, found.share);
            assert!(
                found
                    .order
                    .windows(2)
                    .all(|w| counts[w[0] as usize] >= counts[w[1] as usize])
            );
        }
        let mut other = demo.clone();
        other.experts[2].n_used = 5;
        let error = super::super::Evidence::new(&other, Some(&read(&fixture(), None)?))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("layer 2 has 32 experts with 5 used, the profile says 32 with 4"),
            "{error}"
        );
        Ok(())
    }

    /// The fixture with a float of a tensor changed, or a name.
    fn broken(tensor: &str, expert: usize, count: f32) -> Vec<u8> {
        let gguf = Gguf::open(&fixture()).unwrap();
        let at = gguf.tensor(tensor).unwrap().offset as usize + 4 * expert;
        let mut bytes = std::fs::read(fixture()).unwrap();
        bytes[at..at + 4].copy_from_slice(&count.to_le_bytes());
        bytes
    }

    fn renamed(from: &str, to: &str) -> Vec<u8> {
        assert_eq!(from.len(), to.len());
        let mut bytes = std::fs::read(fixture()).unwrap();
        let (from, to) = (from.as_bytes(), to.as_bytes());
        let places: Vec<usize> = (0..bytes.len() - from.len())
            .filter(|&at| bytes[at..].starts_with(from))
            .collect();
        assert!(!places.is_empty());
        places
            .into_iter()
            .for_each(|at| bytes[at..at + to.len()].copy_from_slice(to));
        bytes
    }

    #[test]
    fn what_is_wrong_is_named() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("m.gguf");
        let demo = shape_of_file(&data("profiles/demo/demo.gguf"))?;
        let gate = "blk.3.ffn_gate_exps.weight.counts";
        let legacy = [
            &2i32.to_le_bytes()[..],
            &20i32.to_le_bytes(),
            b"blk.0.ffn_up.weights",
            &[0; 40],
        ]
        .concat();
        let cases: Vec<(Vec<u8>, bool, &str)> = vec![
            (
                broken(gate, 5, f32::NAN),
                true,
                "'blk.3.ffn_gate_exps.weight.counts' counts NaN uses of expert 5",
            ),
            (
                broken(gate, 5, -1.0),
                false,
                "counts -1 uses of expert 5; expected 0, 1, 2",
            ),
            (broken(gate, 5, f32::INFINITY), true, "counts inf uses"),
            (broken(gate, 5, 0.5), true, "counts 0.5 uses"),
            (
                broken(gate, 5, 1e6),
                true,
                "layer 3 has an expert with 1000000 uses",
            ),
            (
                broken("blk.0.ffn_gate_inp.weight.counts", 0, 3000.0),
                false,
                "give the model too",
            ),
            (
                renamed("blk.3.ffn", "blk.7.ffn"),
                true,
                "no counts of 1 of the 6 layers with experts of 'tier-plan demo'",
            ),
            (
                renamed("_exps.weight.counts", "_exps.weight.Counts"),
                false,
                "no counts of routed experts",
            ),
            (
                renamed("\x07\0\0\0\0\0\0\0imatrix", "\x07\0\0\0\0\0\0\0adapter"),
                true,
                "general.type is 'adapter'",
            ),
            (
                std::fs::read(data("profiles/demo/demo.gguf"))?,
                true,
                "no importance matrix: general.type is missing",
            ),
            (
                legacy,
                true,
                "the old .dat format, which does not hold how often each expert was chosen",
            ),
            (b"GGUF\x03\0\0\0".to_vec(), false, "m.gguf"),
            (b"no matrix at all".to_vec(), false, "m.gguf"),
            (Vec::new(), false, "m.gguf"),
        ];
        for (bytes, with_model, words) in cases {
            std::fs::write(&path, bytes)?;
            let error = read(&path, with_model.then_some(&demo))
                .err()
                .map(|e| format!("{e:#}"))
                .unwrap_or_default();
            assert!(error.contains(words), "{words}: {error}");
        }
        let mut other = demo.clone();
        other.experts[1].n_expert = 64;
        let error = read(&fixture(), Some(&other)).unwrap_err().to_string();
        assert!(
            error.contains("counts 32 experts, but layer 1 of 'tier-plan demo' has 64"),
            "{error}"
        );
        other.experts.clear();
        assert!(
            read(&fixture(), Some(&other))
                .unwrap_err()
                .to_string()
                .contains("has no routed experts")
        );
        Ok(())
    }
}
