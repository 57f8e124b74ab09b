//! A whole small model with some keys, dimensions and types changed, its offsets right: refused
//! with a message, or opened and run for a few tokens.
//!
//! Random bytes rarely get past the header. This target starts from files of every architecture,
//! so that what reads the metadata, the tokenizer, the loader and the layers is reached too.

use arbitrary::{Arbitrary, Result, Unstructured};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use tempfile::NamedTempFile;
use tier_plan_runtime::gguf::testing::{Writer, WriterTensor};
use tier_plan_runtime::gguf::{ArrayValue, Gguf, Value};
use tier_plan_runtime::model::Model;
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::plans::in_memory::all_in_memory;
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::tokenizer::{Tokenizer, TokenizerSource};
use tier_plan_runtime::{Engine, KvType, LoadOptions, LogitsMode};

/// Most bytes of KV cache and weights of a model that is run.
const MOST_BYTES: u64 = 64 << 20;
const MOST_TENSOR_BYTES: u64 = 1 << 20;
const CONTEXT: u32 = 16;

/// Models to start from: those of the golden values and the smallest whole file.
fn seeds() -> &'static [Writer] {
    static SEEDS: OnceLock<Vec<Writer>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let mut paths: Vec<PathBuf> = ["arch", "gguf"]
            .iter()
            .flat_map(|folder| std::fs::read_dir(tier_plan_testing::data(folder)).unwrap())
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
            .collect();
        paths.sort();
        let open = |path: &PathBuf| Gguf::open(path).ok().map(|g| Writer::from_gguf(&g));
        paths.iter().filter_map(open).collect()
    })
}

/// Numbers at which sizes overflow, wrap or vanish, beside small ones.
fn number(input: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match input.int_in_range(0..=7)? {
        0 => 0,
        1 => 1,
        2 => u64::from(u32::MAX),
        3 => u64::MAX,
        4 => i64::MAX as u64,
        5 => 1 << input.int_in_range(0..=63)?,
        6 => input.int_in_range(2..=300)?,
        _ => u64::arbitrary(input)?,
    })
}

fn value(input: &mut Unstructured<'_>) -> Result<Value> {
    let n = number(input)?;
    Ok(match input.int_in_range(0..=10)? {
        0 => Value::U32(n as u32),
        1 => Value::I32(n as i32),
        2 => Value::U64(n),
        3 => Value::I64(n as i64),
        4 => Value::F32(f32::arbitrary(input)?),
        5 => Value::F64(f64::from_bits(n)),
        6 => Value::Bool(n & 1 == 1),
        7 => Value::Str(String::arbitrary(input)?),
        8 => Value::Array(ArrayValue::U32(Vec::arbitrary(input)?)),
        9 => Value::Array(ArrayValue::F32(Vec::arbitrary(input)?)),
        _ => Value::Array(ArrayValue::Str(Vec::arbitrary(input)?)),
    })
}

/// Gives a tensor as many bytes as its type and dimensions ask for, unless they are too many.
fn fit_data(tensor: &mut WriterTensor) {
    let Some((&cols, rows)) = tensor.dims.split_first() else {
        return;
    };
    let rows = rows.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
    let row = TensorType::from_id(tensor.type_id)
        .ok()
        .and_then(|ty| ty.row_bytes(cols));
    let bytes = row.and_then(|row| row.checked_mul(rows?));
    if let Some(bytes) = bytes.filter(|&bytes| bytes <= MOST_TENSOR_BYTES) {
        tensor.data.resize(bytes as usize, 1);
    }
}

/// Changes one thing of a model.
fn mutate(model: &mut Writer, input: &mut Unstructured<'_>) -> Result<()> {
    let (n_keys, n_tensors) = (model.metadata.len(), model.tensors.len());
    if n_keys == 0 || n_tensors == 0 {
        return Ok(());
    }
    let key = input.choose_index(n_keys)?;
    let tensor = input.choose_index(n_tensors)?;
    match input.int_in_range(0..=10)? {
        0 | 1 => model.metadata[key].1 = value(input)?,
        2 => drop(model.metadata.remove(key)),
        3 => drop(model.tensors.remove(tensor)),
        4 => {
            let dims = &mut model.tensors[tensor].dims;
            if !dims.is_empty() {
                let axis = input.choose_index(dims.len())?;
                dims[axis] = number(input)?;
                fit_data(&mut model.tensors[tensor]);
            }
        }
        5 => {
            model.tensors[tensor].type_id = input.int_in_range(0..=41)?;
            fit_data(&mut model.tensors[tensor]);
        }
        6 => {
            // The writer puts every tensor at a multiple of it.
            model.alignment = 1 << input.int_in_range(0..=14)?;
            model.set("general.alignment", Value::U32(model.alignment as u32));
        }
        7 => model.version = input.int_in_range(1..=4)?,
        8 => {
            let other = input.choose_index(n_tensors)?;
            model.tensors.swap(tensor, other);
        }
        9 => {
            let name = model.tensors[input.choose_index(n_tensors)?].name.clone();
            model.tensors[tensor].name = name;
        }
        _ => {
            let data = &mut model.tensors[tensor].data;
            let len = input.int_in_range(0..=data.len().min(64))?;
            let bytes = input.bytes(len)?;
            data[..len].copy_from_slice(bytes);
        }
    }
    Ok(())
}

/// Puts bytes into a file, in memory where the system has a folder for that.
fn file(bytes: &[u8]) -> NamedTempFile {
    let folder = Path::new("/dev/shm");
    let file = if folder.is_dir() {
        NamedTempFile::new_in(folder)
    } else {
        NamedTempFile::new()
    };
    let mut file = file.expect("a file");
    file.write_all(bytes).expect("a written file");
    file
}

/// Opens a model and runs it. Any error is fine if it says something.
fn open_and_run(path: &Path) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let model = Model::open(path)?;
    if let Ok(source) = TokenizerSource::from_gguf(model.gguf()) {
        let tokenizer = Tokenizer::new(source)?;
        let tokens = tokenizer.encode("In the beginning <|im_start|>", true)?;
        let _ = tokenizer.decode(&tokens);
    }
    let shape = model.shape();
    let cache = KvType::F32.cache_bytes(shape, CacheRoom::of_one(CONTEXT));
    let bytes = shape
        .weight_bytes()
        .saturating_add(cache)
        .saturating_add(shape.state_bytes());
    if bytes > MOST_BYTES || shape.n_vocab > 1 << 16 {
        return Ok(());
    }
    let plan = all_in_memory(shape, CONTEXT, KvType::F32);
    let options = LoadOptions {
        threads: Some(1),
        ..LoadOptions::default()
    };
    let mut engine = Engine::load(Arc::clone(model.gguf()), &plan, &options, &mut |_, _| ())?;
    engine.forward(&[0, 1, 2], LogitsMode::All)?;
    engine.forward(&[3], LogitsMode::Last)?;
    Ok(())
}

/// Checks one input.
pub fn check(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let Ok(seed) = input.choose_index(seeds().len()) else {
        return;
    };
    let mut model = seeds()[seed].clone();
    for _ in 0..4 {
        if input.is_empty() || mutate(&mut model, &mut input).is_err() {
            break;
        }
    }
    let mut bytes = model.finish();
    let is_cut = u8::arbitrary(&mut input).is_ok_and(|n| n == 1);
    if is_cut && let Ok(len) = input.int_in_range(0..=bytes.len()) {
        bytes.truncate(len);
    }
    let file = file(&bytes);
    if let Err(error) = open_and_run(file.path()) {
        assert!(!error.to_string().is_empty());
    }
}
