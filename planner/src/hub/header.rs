//! Opens a model by its header alone: files with the header's bytes, and nothing where the weights
//! would be.
//!
//! Such a file is as long as the whole one and takes the room of its header. So everything that
//! reads no weights works on it as on the model, and gives it the same hash.

use super::choose::Listed;
use super::client::Client;
use crate::printable::printable;
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::safely::TemporaryFolder;
use tier_plan_runtime::gguf::{GgufError, Header};

/// Bytes to ask for first: the header of a part that is not the first is shorter.
const FIRST_BYTES: u64 = 256 << 10;

/// Factor by which more is asked for while the header is cut.
const GROWTH: u64 = 4;

/// Most bytes of a header. Real ones are below 100 MB.
const MAX_BYTES: u64 = 256 << 20;

/// A folder with the headers of a model, removed at its end.
#[derive(Debug)]
pub struct Headers {
    /// The file, or the first part.
    pub path: PathBuf,
    _folder: TemporaryFolder,
}

/// Reads the header of each part of a model.
///
/// # Errors
/// When the server fails, a file is not a GGUF model, or its header is too long.
pub fn read(
    client: &Client,
    parts: &[Listed],
    address: &dyn Fn(&Listed) -> String,
) -> Result<Headers> {
    let folder = TemporaryFolder::create(&std::env::temp_dir())
        .context("making a temporary folder for headers")?;
    let mut first = None;
    for part in parts {
        let bytes = prefix(client, &address(part), part)?;
        let name = part.path.rsplit('/').next().unwrap_or(&part.path);
        let path = folder.path().join(name);
        write(&path, &bytes, part.bytes).with_context(|| format!("making {}", path.display()))?;
        first.get_or_insert(path);
    }
    Ok(Headers {
        path: first.context("a model without files")?,
        _folder: folder,
    })
}

/// Writes the beginning of a file of this length.
fn write(path: &Path, bytes: &[u8], length: u64) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    // The rest is a hole, which takes no room.
    file.set_len(length)?;
    fs::metadata(path).map(drop)
}

/// Fetches as many bytes from a file's beginning as its header takes.
fn prefix(client: &Client, url: &str, file: &Listed) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut wanted = FIRST_BYTES.min(file.bytes);
    loop {
        extend(client, url, file, &mut bytes, wanted)?;
        let error = match Header::decode(&bytes, Path::new(&*printable(&file.path))) {
            Ok(_) => return Ok(bytes),
            Err(error) => error,
        };
        let missing = match &error {
            GgufError::Truncated {
                at_least, missing, ..
            } if *at_least => *missing,
            // The header is there, and the weights are not.
            GgufError::Truncated { .. } => return Ok(bytes),
            _ => return Err(error.into()),
        };
        let whole = wanted == file.bytes;
        let least = wanted.saturating_add(missing);
        if whole || least > file.bytes {
            return Err(error.into());
        }
        ensure!(
            least <= MAX_BYTES,
            "{}: a header of more than {MAX_BYTES} bytes, expected fewer",
            printable(&file.path)
        );
        wanted = wanted.saturating_mul(GROWTH).max(least);
        wanted = wanted.min(MAX_BYTES).min(file.bytes);
    }
}

/// Fetches more bytes until there are `wanted`.
fn extend(
    client: &Client,
    url: &str,
    file: &Listed,
    bytes: &mut Vec<u8>,
    wanted: u64,
) -> Result<()> {
    let mut failures = 0;
    while (bytes.len() as u64) < wanted {
        let before = bytes.len();
        let name = printable(&file.path);
        let Some(ranged) = client.range(url, before as u64, Some(wanted))? else {
            bail!(
                "{name}: the server has no bytes from {before} on, expected {}",
                file.bytes
            );
        };
        ensure!(
            ranged.total.is_none_or(|total| total == file.bytes),
            "{name}: the server has {} bytes, expected {} as listed",
            ranged.total.unwrap_or(0),
            file.bytes
        );
        if ranged.start == 0 {
            // Also a server without ranges, which sends everything from the beginning.
            bytes.clear();
        }
        ensure!(
            ranged.start == bytes.len() as u64,
            "{name}: the server sends bytes from {} on, expected {before}",
            ranged.start
        );
        let why = take(ranged.body, bytes, wanted);
        failures = if bytes.len() > before {
            1
        } else {
            failures + 1
        };
        if (bytes.len() as u64) < wanted {
            ensure!(
                failures < super::client::MAX_TRIES,
                "{name}: {why} after {} of {wanted} bytes of the header",
                bytes.len()
            );
            client.wait(failures, None);
        }
    }
    Ok(())
}

/// Takes bytes of an answer until there are `wanted`; returns why it ended.
fn take(mut body: Box<dyn Read>, bytes: &mut Vec<u8>, wanted: u64) -> String {
    let mut chunk = vec![0; 64 << 10];
    loop {
        let left = wanted.saturating_sub(bytes.len() as u64);
        let most = usize::try_from(left)
            .unwrap_or(chunk.len())
            .min(chunk.len());
        if most == 0 {
            return "complete".to_string();
        }
        match body.read(&mut chunk[..most]) {
            Ok(0) => return "the connection ended".to_string(),
            Ok(n) => bytes.extend_from_slice(&chunk[..n]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return printable(&error.to_string()).into_owned(),
        }
    }
}
