//! A file of answers that grows line by line.
//!
//! A line is written at once. If the program is killed meanwhile, the file ends in a part of a line,
//! which the next run removes. A lock keeps a second process off.

use super::Input;
use super::answer::ID_PREFIX;
use crate::hint::HintExt;
use crate::printable::printable;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tier_plan_runtime::formats::safely;

/// Longest line in bytes: many answers of a whole context with log-probabilities.
const MAX_ANSWER_BYTES: u64 = 1 << 30;

/// Longest time for which answers may be in the system's memory alone.
const SYNC_EVERY: Duration = Duration::from_secs(5);

/// What is looked at in a line of an earlier run.
#[derive(Deserialize)]
struct Earlier {
    id: String,
    custom_id: Option<String>,
    line: Option<usize>,
    #[serde(rename = "response")]
    _response: Option<IgnoredAny>,
    error: Option<IgnoredAny>,
}

/// A locked file of answers.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    bytes: u64,
    /// Whether there was no such file before.
    is_new: bool,
    synced: Instant,
    /// Numbers of the lines of the input that have an answer.
    answered: HashSet<usize>,
    /// How many of them have an error instead, of earlier runs.
    refused: usize,
}

impl Output {
    /// Opens a file that is new, or that an earlier run with this input has left.
    ///
    /// # Errors
    /// When it can't be written, another process is writing it, or it holds anything but answers to
    /// this input. It is left as it is then.
    pub fn open(path: &Path, input: &Input) -> Result<Self> {
        safely::check_file(path)?;
        let shown = path.display();
        let is_new = !path.exists();
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .with_context(|| format!("writing {shown}"))?;
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            let busy = || bail!("{shown}: another process is writing this file");
            return busy().hint("wait for it or choose another output");
        }
        let mut output = Self {
            path: path.into(),
            file,
            bytes: 0,
            is_new,
            synced: Instant::now(),
            answered: HashSet::new(),
            refused: 0,
        };
        output.take_over(input)?;
        Ok(output)
    }

    /// Reads what an earlier run has written, and removes a last line that is not whole.
    fn take_over(&mut self, input: &Input) -> Result<()> {
        let shown = self.path.display();
        let mut reader = BufReader::new(self.file.try_clone()?);
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            (&mut reader)
                .take(MAX_ANSWER_BYTES)
                .read_until(b'\n', &mut line)
                .with_context(|| format!("reading {shown}"))?;
            if line.is_empty() {
                return Ok(());
            }
            if line.last() != Some(&b'\n') {
                if !is_torn_answer(&line) {
                    return not_answers(&self.path, number);
                }
                let shown = shown.to_string();
                eprintln!(
                    "{}: the last line was cut off in an earlier run, and is removed",
                    printable(&shown)
                );
                break;
            }
            let Some(earlier) = answer_in(&line) else {
                return not_answers(&self.path, number);
            };
            let answered = answered_line(&self.path, number, &earlier, input)?;
            if self.answered.insert(answered) {
                self.refused += usize::from(earlier.error.is_some());
            }
            self.bytes += line.len() as u64;
        }
        self.cut().with_context(|| format!("writing {shown}"))
    }

    /// Whether a line of the input has an answer.
    pub fn has_answer(&self, number: usize) -> bool {
        self.answered.contains(&number)
    }

    /// Returns the number of lines that have an answer, or an error instead.
    pub fn n_answered(&self) -> usize {
        self.answered.len()
    }

    /// Returns the number of lines that earlier runs have refused.
    pub fn n_refused(&self) -> usize {
        self.refused
    }

    /// Appends the answer to a line of the input.
    ///
    /// # Errors
    /// When the file system refuses. The file has only whole lines then, too.
    pub fn append(&mut self, number: usize, answer: &Value) -> Result<()> {
        let mut line = answer.to_string();
        line.push('\n');
        if let Err(error) = self.file.write_all(line.as_bytes()) {
            // If this fails too, the next run does it.
            let _ = self.cut();
            let shown = self.path.display();
            return Err(error).with_context(|| format!("writing {shown}")).hint(
                "the answers so far are kept; with the cause removed, the same command goes on",
            );
        }
        self.bytes += line.len() as u64;
        self.answered.insert(number);
        if self.synced.elapsed() >= SYNC_EVERY {
            self.sync()?;
        }
        Ok(())
    }

    /// Waits until all answers are on the disk.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn sync(&mut self) -> Result<()> {
        self.synced = Instant::now();
        let synced = self.file.sync_data();
        synced.with_context(|| format!("writing {}", self.path.display()))
    }

    /// Removes what follows the last whole line.
    fn cut(&self) -> std::io::Result<()> {
        self.file.set_len(self.bytes)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.is_new && self.bytes == 0 {
            // A run that failed before its first answer leaves nothing behind.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Returns the line of the input that an earlier answer belongs to.
fn answered_line(path: &Path, number: usize, earlier: &Earlier, input: &Input) -> Result<usize> {
    let line = match (&earlier.custom_id, earlier.line) {
        (Some(name), _) => input.line_of(name),
        (None, Some(line)) => input.line(line).map(|line| line.number),
        (None, None) => None,
    };
    if let Some(line) = line {
        return Ok(line);
    }
    let name = match (&earlier.custom_id, earlier.line) {
        (Some(name), _) => format!("custom_id \"{}\"", printable(name)),
        (None, line) => format!("line {}", line.unwrap_or(0)),
    };
    let (shown, input) = (path.display(), input.path().display());
    let other = || bail!("{shown}: line {number} answers {name}, which is not in {input}");
    other().hint("choose another output, or the input that these answers belong to")
}

fn not_answers<T>(path: &Path, number: usize) -> Result<T> {
    let shown = path.display();
    let other = || {
        bail!(
            "{shown}: line {number} is not an answer of a batch, expected a new file or an unfinished output"
        )
    };
    other().hint("choose another output; nothing was changed")
}

/// Returns a line of an earlier run.
fn answer_in(line: &[u8]) -> Option<Earlier> {
    let earlier: Earlier = serde_json::from_slice(line).ok()?;
    earlier.id.starts_with(ID_PREFIX).then_some(earlier)
}

/// Whether bytes are the beginning of an answer, so that no other file loses anything.
fn is_torn_answer(line: &[u8]) -> bool {
    let start = format!("{{\"id\":\"{ID_PREFIX}");
    let n = line.len().min(start.len());
    line[..n] == start.as_bytes()[..n]
}
