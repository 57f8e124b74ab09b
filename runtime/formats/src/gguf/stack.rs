//! Experts as tensors apart: the first files of mixture-of-experts models have one tensor per expert
//! and matrix (`blk.0.ffn_gate.3.weight`) where later ones have one per matrix
//! (`blk.0.ffn_gate_exps.weight`). They are taken as slices of the latter, wherever each lies.

use super::error::GgufError;
use super::tensor::{SlicePlace, TensorInfo};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// Experts that a layer may have.
const MAX_EXPERTS: usize = 65_535;

/// Returns the tensors with those of single experts replaced by one per matrix, which is where the
/// first of them was.
///
/// # Errors
/// When an expert is missing, or differs from the others in shape or type.
pub(super) fn stack(tensors: Vec<TensorInfo>, path: &Path) -> Result<Vec<TensorInfo>, GgufError> {
    let mut groups: BTreeMap<String, BTreeMap<usize, usize>> = BTreeMap::new();
    for (at, tensor) in tensors.iter().enumerate() {
        if let Some((stacked, expert)) = parse(&tensor.name) {
            groups.entry(stacked).or_default().insert(expert, at);
        }
    }
    if groups.is_empty() {
        return Ok(tensors);
    }
    let names: HashSet<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    groups.retain(|stacked, _| !names.contains(stacked.as_str()));
    let mut joined = BTreeMap::new();
    let mut gone = HashSet::new();
    for (stacked, experts) in groups {
        let members: Vec<usize> = experts.values().copied().collect();
        if let Some(missing) = (0..experts.len()).find(|expert| !experts.contains_key(expert)) {
            let one = &tensors[members[0]].name;
            return Err(GgufError::damaged(
                path,
                format!("expert {missing} is missing beside '{one}'"),
            ));
        }
        let first = members.iter().min().copied().unwrap_or_default();
        let info = join(stacked, &members, &tensors, path)?;
        gone.extend(members);
        joined.insert(first, info);
    }
    let one = |(at, tensor): (usize, TensorInfo)| match joined.remove(&at) {
        Some(info) => Some(info),
        None => (!gone.contains(&at)).then_some(tensor),
    };
    Ok(tensors.into_iter().enumerate().filter_map(one).collect())
}

/// Returns the name that a single expert's tensor has among later files, and the expert.
fn parse(name: &str) -> Option<(String, usize)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (matrix, rest) = rest.split_once('.')?;
    let expert = rest.strip_suffix(".weight")?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let known = ["ffn_gate", "ffn_up", "ffn_down"].contains(&matrix);
    if !known || !is_number(layer) || !is_number(expert) {
        return None;
    }
    let expert = expert.parse().ok().filter(|e| *e < MAX_EXPERTS)?;
    Some((format!("blk.{layer}.{matrix}_exps.weight"), expert))
}

/// Joins the tensors of the experts of one matrix, in order.
fn join(
    name: String,
    members: &[usize],
    tensors: &[TensorInfo],
    path: &Path,
) -> Result<TensorInfo, GgufError> {
    let first = &tensors[members[0]];
    let differs = |at: &&usize| (&tensors[**at].dims, tensors[**at].ty) != (&first.dims, first.ty);
    if let Some(other) = members.iter().find(differs) {
        let (a, b) = (first, &tensors[*other]);
        let what = format!(
            "'{}' is {} of {:?} and '{}' is {} of {:?}, but the experts of a matrix must be alike: choose another file of this model",
            a.name, a.ty, a.dims, b.name, b.ty, b.dims
        );
        return Err(GgufError::split(path, what));
    }
    let matrix: Vec<u64> = match first.dims.as_slice() {
        [] | [_, _, _, ..] => {
            let (name, dims) = (&first.name, &first.dims);
            return Err(GgufError::damaged(
                path,
                format!("tensor '{name}' has dimensions {dims:?}; expected a matrix"),
            ));
        }
        [cols] => vec![*cols, 1],
        dims => dims.to_vec(),
    };
    let slices: Vec<SlicePlace> = members.iter().map(|at| tensors[*at].slice(0, 1)).collect();
    Ok(TensorInfo {
        name,
        dims: [matrix, vec![members.len() as u64]].concat(),
        ty: first.ty,
        part: first.part,
        offset: first.offset,
        // Cannot overflow: all of them lie in files.
        n_bytes: slices.iter().map(|slice| slice.n_bytes).sum(),
        slices,
    })
}

#[cfg(test)]
mod tests {
    use super::super::Gguf;
    use super::super::testing::{Writer, WriterTensor};
    use tier_plan_kernels::quant::TensorType;

    fn writer(names: &[&str]) -> Writer {
        let mut writer = Writer::default();
        for (i, name) in names.iter().enumerate() {
            writer.tensors.push(WriterTensor {
                name: name.to_string(),
                dims: vec![2, 3],
                type_id: TensorType::F32 as u32,
                data: vec![i as u8; 24],
            });
        }
        writer
    }

    fn open(writer: &Writer) -> Result<Gguf, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, writer.finish()).unwrap();
        Gguf::open(&path).map_err(|e| e.to_string())
    }

    #[test]
    fn experts_apart_are_slices_of_one_tensor() {
        let gguf = open(&writer(&[
            "blk.0.ffn_up.1.weight",
            "a",
            "blk.0.ffn_down.weight",
            "blk.0.ffn_up.0.weight",
            "blk.0.ffn_up.2.weight",
        ]))
        .unwrap();
        let names: Vec<&str> = gguf.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(
            names,
            ["blk.0.ffn_up_exps.weight", "a", "blk.0.ffn_down.weight"]
        );
        let stacked = gguf.tensor("blk.0.ffn_up_exps.weight").unwrap();
        assert_eq!((&stacked.dims[..], stacked.n_bytes), (&[2, 3, 3][..], 72));
        for (expert, written) in [3u8, 0, 4].into_iter().enumerate() {
            assert_eq!(gguf.slice(stacked, expert, 3), [written; 24]);
        }
        let whole = gguf.tensor("a").unwrap();
        assert_eq!(gguf.slice(whole, 1, 3), [1; 8]);
    }

    #[test]
    fn experts_that_make_no_tensor_are_named() {
        let missing = open(&writer(&["blk.0.ffn_up.0.weight", "blk.0.ffn_up.2.weight"]));
        assert!(missing.unwrap_err().contains("expert 1 is missing"));
        let mut other = writer(&["blk.0.ffn_up.0.weight", "blk.0.ffn_up.1.weight"]);
        other.tensors[1].dims = vec![3, 2];
        assert!(open(&other).unwrap_err().contains("must be alike"));
        let both = writer(&["blk.0.ffn_up.0.weight", "blk.0.ffn_up_exps.weight"]);
        assert_eq!(open(&both).unwrap().tensors().len(), 2);
    }
}
