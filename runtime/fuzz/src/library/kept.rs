//! Files of kept texts, one of them changed: used if it is right, else removed, and never a wrong
//! token.
//!
//! The first byte chooses the model and the file, the rest changes it.

use arbitrary::{Arbitrary, Result, Unstructured};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use tempfile::TempDir;
use tier_plan_runtime::engine::{LogitsMode, Rows};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::Model;
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::plans::in_memory::in_memory_with;
use tier_plan_runtime::{Engine, KvType, LoadOptions};

/// Models with keys and values, with latents, and with recurrent states.
const MODELS: [&str; 3] = ["qwen3moe", "deepseek-v3", "qwen3next"];

/// Tokens of the text: two whole pages and some more.
const TOKENS: usize = 2 * 64 + 9;
const CONTEXT: u32 = 192;
const MOST_BYTES: u64 = 64 << 20;

/// A kept text and what it is to give.
struct Base {
    gguf: Arc<Gguf>,
    tokens: Vec<u32>,
    files: Vec<File>,
    /// Logits after all tokens.
    logits: Vec<f32>,
    /// Tokens that the whole files save.
    n_kept: usize,
}

#[derive(Clone)]
struct File {
    name: PathBuf,
    bytes: Vec<u8>,
}

/// What a folder gives a text.
struct Given {
    logits: Vec<f32>,
    n_kept: usize,
}

/// A folder in memory where the system has one.
fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() {
        TempDir::new_in(memory)
    } else {
        TempDir::new()
    };
    folder.expect("a folder")
}

/// Takes the text through an engine that keeps texts in `folder`, and has it kept.
fn run(gguf: &Arc<Gguf>, tokens: &[u32], folder: &Path) -> Given {
    let model = Model::open(gguf.path()).expect("a model of the tests");
    let room = CacheRoom {
        checkpoints: 4,
        ..CacheRoom::of_one(CONTEXT)
    };
    let plan = in_memory_with(model.shape(), room, KvType::F16);
    let options = LoadOptions {
        threads: Some(1),
        ..LoadOptions::default()
    };
    let mut engine =
        Engine::load(Arc::clone(gguf), &plan, &options, &mut |_, _| ()).expect("an engine");
    engine.keep_in(folder, MOST_BYTES).expect("a folder");
    let (sequence, n_kept) = engine.begin_sequence(tokens).expect("a text");
    let rows = Rows {
        sequence,
        tokens: &tokens[n_kept..],
        logits: Some(LogitsMode::Last),
    };
    let logits = engine.step(&[rows]).expect("logits").to_vec();
    engine.keep_sequence(sequence);
    Given { logits, n_kept }
}

fn files(folder: &Path) -> Vec<File> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut files: Vec<File> = entries
        .map(|entry| entry.expect("a file").path())
        .map(|path| File {
            bytes: std::fs::read(&path).expect("a file"),
            name: path.file_name().expect("a name").into(),
        })
        .collect();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    files
}

fn bases() -> &'static [Base] {
    static BASES: OnceLock<Vec<Base>> = OnceLock::new();
    BASES.get_or_init(|| {
        let base = |name: &&str| {
            let path = tier_plan_testing::data("arch").join(format!("{name}.gguf"));
            let gguf = Arc::new(Gguf::open(&path).expect("a model of the tests"));
            let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i * 7 % 90).collect();
            let folder = folder();
            let logits = run(&gguf, &tokens, folder.path()).logits;
            let again = run(&gguf, &tokens, folder.path());
            assert_eq!(again.logits, logits, "{name}");
            assert!(again.n_kept > 0, "{name}: nothing was kept");
            Base {
                gguf,
                tokens,
                files: files(folder.path()),
                logits,
                n_kept: again.n_kept,
            }
        };
        MODELS.iter().map(base).collect()
    })
}

/// Changes the bytes of a file some times.
fn change(bytes: &mut Vec<u8>, input: &mut Unstructured<'_>) -> Result<()> {
    while !input.is_empty() {
        let at = input.int_in_range(0..=bytes.len())?;
        match input.int_in_range(0..=3)? {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, u8::arbitrary(input)?),
            2 if at < bytes.len() => bytes[at] = u8::arbitrary(input)?,
            3 if at < bytes.len() => drop(bytes.remove(at)),
            _ => {}
        }
    }
    Ok(())
}

/// Checks one input.
pub fn check(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else {
        return;
    };
    let base = &bases()[usize::from(*first) % MODELS.len()];
    let mut kept = base.files.clone();
    let which = usize::from(*first) / MODELS.len() % kept.len();
    // An input that ends early has changed enough.
    let _ = change(&mut kept[which].bytes, &mut Unstructured::new(rest));
    let folder = folder();
    for file in &kept {
        std::fs::write(folder.path().join(&file.name), &file.bytes).expect("a written file");
    }
    let given = run(&base.gguf, &base.tokens, folder.path());
    assert_eq!(given.logits, base.logits, "a changed file changed the text");
    let is_whole = kept[which].bytes == base.files[which].bytes;
    assert!(given.n_kept <= base.n_kept);
    assert!(
        !is_whole || given.n_kept == base.n_kept,
        "a whole file is not used"
    );
    // What was damaged was removed and written anew, or never looked at.
    let found = files(folder.path());
    let now = found.iter().find(|file| file.name == kept[which].name);
    assert!(now.is_none_or(|now| {
        now.bytes == base.files[which].bytes || now.bytes == kept[which].bytes
    }));
}
