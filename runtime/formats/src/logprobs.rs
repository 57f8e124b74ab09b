//! Reference log-probabilities: what one model gave every token of its vocabulary at every scored
//! position of a text.
//!
//! A stronger check than perplexity: another quantization, plan, or engine is compared with them
//! position by position. The file is large (two bytes per position and vocabulary entry), so it is
//! written and read row by row.

use super::framed::parse_header;
use super::kind::{Kind, LOGPROBS, LOGPROBS_MAGIC};
use crate::FormatError;
use crate::source_id::SourceId;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// Magic, version, header length.
const FIXED: u64 = 16;
/// Floats and the best token at the start of a row.
const ROW_HEAD: u64 = 16;
/// The checksum at the end.
const SUM: u64 = 8;
/// Longest JSON header, in bytes.
const HEADER_LIMIT: u64 = 1 << 20;
/// Largest vocabulary and context; no model comes near.
const SIZE_LIMIT: u32 = 1 << 24;

/// Returns what the rows are about: model, vocabulary, and tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The model that gave them.
    pub model: SourceId,
    /// UTC moment, see [`crate::units::show_utc`].
    pub made: String,
    /// Tokens in the vocabulary.
    pub n_vocab: u32,
    /// Tokens of a window.
    pub ctx: u32,
    /// `[windows, ctx]`, as they went into the network.
    pub tokens: Vec<u32>,
}

/// Returns the scored positions per window: those of its second half that have a next token.
pub fn scored_per_window(ctx: u32) -> u32 {
    (ctx - ctx / 2).saturating_sub(1)
}

impl Reference {
    /// Returns the number of windows in the text.
    pub fn windows(&self) -> usize {
        self.tokens.len() / self.ctx.max(1) as usize
    }

    /// Returns the number of rows in the file.
    pub fn rows(&self) -> u64 {
        self.windows() as u64 * u64::from(scored_per_window(self.ctx))
    }

    fn check(&self) -> Result<(), String> {
        check_sizes(self.n_vocab, self.ctx)?;
        if self.tokens.is_empty() || !self.tokens.len().is_multiple_of(self.ctx as usize) {
            return Err(format!(
                "{} tokens are not whole windows of {}",
                self.tokens.len(),
                self.ctx
            ));
        }
        match self.tokens.iter().find(|t| **t >= self.n_vocab) {
            Some(token) => Err(format!(
                "token {token} is past the vocabulary of {}",
                self.n_vocab
            )),
            None => Ok(()),
        }
    }
}

fn check_sizes(n_vocab: u32, ctx: u32) -> Result<(), String> {
    if !(1..=SIZE_LIMIT).contains(&n_vocab) {
        return Err(format!(
            "n_vocab is {n_vocab}, but must be 1 to {SIZE_LIMIT}"
        ));
    }
    if !(3..=SIZE_LIMIT).contains(&ctx) {
        return Err(format!("ctx is {ctx}, but must be 3 to {SIZE_LIMIT}"));
    }
    Ok(())
}

/// The log-probabilities of the vocabulary at one position. Token `i` has `top − step · steps[i]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row {
    /// Largest log-probability, in nats.
    pub top: f32,
    /// Nats of one step; not negative.
    pub step: f32,
    /// Log-probability of the token that came next, exactly.
    pub target: f32,
    /// Id of the most likely token.
    pub best: u32,
    /// `[n_vocab]`.
    pub steps: Vec<u16>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireHeader {
    model: WireSource,
    made: String,
    n_vocab: u32,
    ctx: u32,
    windows: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireSource {
    name: String,
    hash: String,
}

/// Writes a file, row by row.
pub struct Writer<W> {
    to: W,
    sum: Xxh3,
    n_vocab: usize,
    rows_left: u64,
    line: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Writes everything that comes before the rows.
    ///
    /// # Errors
    /// When the reference contradicts itself, or writing fails.
    pub fn new(to: W, reference: &Reference) -> io::Result<Self> {
        let invalid = |what: String| io::Error::new(ErrorKind::InvalidInput, what);
        reference.check().map_err(invalid)?;
        let header = WireHeader {
            model: WireSource {
                name: reference.model.name.clone(),
                hash: reference.model.hash.clone(),
            },
            made: reference.made.clone(),
            n_vocab: reference.n_vocab,
            ctx: reference.ctx,
            windows: u32::try_from(reference.windows()).map_err(|e| invalid(e.to_string()))?,
        };
        let header = serde_json::to_vec(&header)?;
        if header.len() as u64 > HEADER_LIMIT {
            return Err(invalid(format!(
                "the header takes {} bytes; at most {HEADER_LIMIT} fit",
                header.len()
            )));
        }
        let mut writer = Self {
            to,
            sum: Xxh3::new(),
            n_vocab: reference.n_vocab as usize,
            rows_left: reference.rows(),
            line: Vec::new(),
        };
        writer.line.extend_from_slice(&LOGPROBS_MAGIC);
        writer.line.extend_from_slice(&1u32.to_le_bytes());
        writer
            .line
            .extend_from_slice(&(header.len() as u32).to_le_bytes());
        writer.line.extend_from_slice(&header);
        writer
            .line
            .extend(reference.tokens.iter().flat_map(|t| t.to_le_bytes()));
        writer.put()?;
        Ok(writer)
    }

    /// Writes the next row.
    ///
    /// # Errors
    /// When the row has another vocabulary or is one too many, or writing fails.
    pub fn push(&mut self, row: &Row) -> io::Result<()> {
        if row.steps.len() != self.n_vocab || self.rows_left == 0 {
            let what = format!(
                "a row of {} with {} rows to come; {} wanted",
                row.steps.len(),
                self.rows_left,
                self.n_vocab
            );
            return Err(io::Error::new(ErrorKind::InvalidInput, what));
        }
        self.rows_left -= 1;
        for number in [row.top, row.step, row.target] {
            self.line.extend_from_slice(&number.to_le_bytes());
        }
        self.line.extend_from_slice(&row.best.to_le_bytes());
        self.line
            .extend(row.steps.iter().flat_map(|s| s.to_le_bytes()));
        self.put()
    }

    /// Writes the checksum.
    ///
    /// # Errors
    /// When rows are missing, or writing fails.
    pub fn finish(mut self) -> io::Result<()> {
        if self.rows_left > 0 {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                format!("{} rows are missing", self.rows_left),
            ));
        }
        self.to.write_all(&self.sum.digest().to_le_bytes())
    }

    fn put(&mut self) -> io::Result<()> {
        self.sum.update(&self.line);
        self.to.write_all(&self.line)?;
        self.line.clear();
        Ok(())
    }
}

/// Reads a file, row by row.
pub struct Reader<R> {
    path: PathBuf,
    from: R,
    sum: Xxh3,
    reference: Reference,
    rows_left: u64,
    line: Vec<u8>,
}

impl Reader<BufReader<File>> {
    /// Opens a file and reads everything before its rows.
    ///
    /// # Errors
    /// When it can't be read, is another kind of file, is newer than this program, is cut short or
    /// contradicts itself.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let io = |source| FormatError::Io {
            path: path.into(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        Self::new(BufReader::with_capacity(1 << 20, file), length, path)
    }
}

impl<R: Read> Reader<R> {
    /// Reads everything before the rows from a source of `length` bytes; `path` is for messages.
    ///
    /// # Errors
    /// As [`open`](Reader::open).
    pub fn new(mut from: R, length: u64, path: &Path) -> Result<Self, FormatError> {
        let io = |source| FormatError::Io {
            path: path.into(),
            source,
        };
        let mut head = Vec::new();
        (&mut from).take(FIXED).read_to_end(&mut head).map_err(io)?;
        let Some(rest) = head.strip_prefix(&LOGPROBS_MAGIC) else {
            return Err(LOGPROBS.mismatch(path, &Kind::describe(&head)));
        };
        let cut = || FormatError::invalid(path, CUT_SHORT);
        let [v0, v1, v2, v3, l0, l1, l2, l3] = *rest else {
            return Err(cut());
        };
        LOGPROBS.check_version(i64::from(u32::from_le_bytes([v0, v1, v2, v3])), path)?;
        let header_bytes = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
        if header_bytes > HEADER_LIMIT {
            return Err(FormatError::invalid(
                path,
                format!("a header of {header_bytes} bytes; the file is damaged"),
            ));
        }
        let mut reader = Self {
            path: path.into(),
            from,
            sum: Xxh3::new(),
            reference: Reference {
                model: SourceId {
                    name: String::new(),
                    hash: String::new(),
                },
                made: String::new(),
                n_vocab: 0,
                ctx: 0,
                tokens: Vec::new(),
            },
            rows_left: 0,
            line: Vec::new(),
        };
        reader.sum.update(&head);
        reader.take(header_bytes)?;
        let header: WireHeader = parse_header(&reader.line)
            .map_err(|e| FormatError::invalid(path, format!("header: {e}; the file is damaged")))?;
        check_sizes(header.n_vocab, header.ctx).map_err(|what| FormatError::invalid(path, what))?;
        // The lengths must agree before anything is allocated for them.
        let token_bytes = u64::from(header.windows) * u64::from(header.ctx) * 4;
        let row_bytes = ROW_HEAD + 2 * u64::from(header.n_vocab);
        let rows = u64::from(header.windows) * u64::from(scored_per_window(header.ctx));
        let wanted = rows
            .checked_mul(row_bytes)
            .and_then(|r| r.checked_add(FIXED + header_bytes + token_bytes + SUM));
        if wanted != Some(length) {
            return Err(FormatError::invalid(
                path,
                format!(
                    "{length} bytes long, but its header makes {}; {CUT_SHORT}",
                    wanted.map_or("too many".into(), |w| w.to_string())
                ),
            ));
        }
        reader.take(token_bytes)?;
        let tokens = reader
            .line
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        reader.reference = Reference {
            model: SourceId {
                name: header.model.name,
                hash: header.model.hash,
            },
            made: header.made,
            n_vocab: header.n_vocab,
            ctx: header.ctx,
            tokens,
        };
        reader
            .reference
            .check()
            .map_err(|what| FormatError::invalid(path, what))?;
        reader.rows_left = rows;
        Ok(reader)
    }

    /// Returns what the rows are about: model, vocabulary, and tokens.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// Reads the next row into `row`; false after the last, once the checksum is found to be right.
    ///
    /// # Errors
    /// When reading fails, the file is cut short, a number makes no sense or the checksum is wrong.
    pub fn next(&mut self, row: &mut Row) -> Result<bool, FormatError> {
        if self.rows_left == 0 {
            let digest = self.sum.digest();
            self.take(SUM)?;
            if self.line != digest.to_le_bytes() {
                return Err(FormatError::invalid(
                    &self.path,
                    "the checksum is wrong: the file is damaged; save it again",
                ));
            }
            return Ok(false);
        }
        self.take(ROW_HEAD + 2 * u64::from(self.reference.n_vocab))?;
        self.rows_left -= 1;
        let (head, steps) = self.line.split_at(ROW_HEAD as usize);
        let word = |at: usize| [head[at], head[at + 1], head[at + 2], head[at + 3]];
        row.top = f32::from_le_bytes(word(0));
        row.step = f32::from_le_bytes(word(4));
        row.target = f32::from_le_bytes(word(8));
        row.best = u32::from_le_bytes(word(12));
        row.steps.clear();
        row.steps.extend(
            steps
                .chunks_exact(2)
                .map(|b| u16::from_le_bytes([b[0], b[1]])),
        );
        let sound = row.top.is_finite()
            && row.target.is_finite()
            && row.step.is_finite()
            && row.step >= 0.0;
        if !sound || row.best >= self.reference.n_vocab {
            return Err(FormatError::invalid(
                &self.path,
                "a row holds impossible numbers: the file is damaged; save it again",
            ));
        }
        Ok(true)
    }

    /// Reads `len` bytes into `line`, in pieces, so that memory grows only with the bytes that are
    /// there.
    fn take(&mut self, bytes: u64) -> Result<(), FormatError> {
        self.line.clear();
        let read = (&mut self.from).take(bytes).read_to_end(&mut self.line);
        let read = read.map_err(|source| FormatError::Io {
            path: self.path.clone(),
            source,
        })?;
        if read as u64 != bytes {
            return Err(FormatError::invalid(&self.path, CUT_SHORT));
        }
        self.sum.update(&self.line);
        Ok(())
    }
}

const CUT_SHORT: &str = "the file is cut short; save it again with `tier-plan perplexity`";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference() -> Reference {
        Reference {
            model: SourceId {
                name: "m".into(),
                hash: "0".repeat(32),
            },
            made: "2026-01-01T00:00:00Z".into(),
            n_vocab: 5,
            ctx: 6,
            tokens: (0..12).map(|i| i % 5).collect(),
        }
    }

    fn file() -> (Vec<u8>, Vec<Row>) {
        let reference = reference();
        let rows: Vec<Row> = (0..reference.rows())
            .map(|i| Row {
                top: -0.5,
                step: 0.25 * i as f32,
                target: -2.0 - i as f32,
                best: 4 - i as u32,
                steps: vec![0, 1, 65535, i as u16, 7],
            })
            .collect();
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &reference).unwrap();
        rows.iter().for_each(|r| writer.push(r).unwrap());
        writer.finish().unwrap();
        (bytes, rows)
    }

    fn read(bytes: &[u8]) -> Result<(Reference, Vec<Row>), FormatError> {
        let mut reader = Reader::new(bytes, bytes.len() as u64, Path::new("base"))?;
        let (mut rows, mut row) = (Vec::new(), Row::default());
        while reader.next(&mut row)? {
            rows.push(row.clone());
        }
        Ok((reader.reference().clone(), rows))
    }

    #[test]
    fn what_is_written_is_read() {
        let (bytes, rows) = file();
        // The second half of six places is 3, 4 and 5; the last has no next token.
        assert_eq!(rows.len(), 2 * 2);
        assert_eq!(read(&bytes).unwrap(), (reference(), rows));
    }

    #[test]
    fn the_committed_file_is_read() {
        let bytes = include_bytes!("../../../tests/data/formats/logprobs.v1.bin");
        assert_eq!(read(bytes).unwrap(), (reference(), file().1));
    }

    #[test]
    fn damage_is_named() {
        let (bytes, _) = file();
        let says = |bytes: &[u8], words: &str| {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        says(b"GGUF and so on", "it is a GGUF model");
        says(&bytes[..bytes.len() - 1], "cut short");
        says(&bytes[..10], "cut short");
        let mut newer = bytes.clone();
        newer[8] = 2;
        says(&newer, "version 2, but this program reads up to version 1");
        let mut flipped = bytes.clone();
        let at = flipped.len() - 9;
        flipped[at] ^= 1;
        says(&flipped, "checksum is wrong");
    }

    #[test]
    fn a_file_with_too_few_or_too_many_rows_is_not_written() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &reference()).unwrap();
        let row = Row {
            steps: vec![0; 5],
            ..Row::default()
        };
        assert!(
            writer
                .push(&Row {
                    steps: vec![0; 4],
                    ..Row::default()
                })
                .is_err()
        );
        for _ in 0..4 {
            writer.push(&row).unwrap();
        }
        assert!(writer.push(&row).is_err());
        assert!(
            Writer::new(Vec::new(), &reference())
                .unwrap()
                .finish()
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn damaged_files_do_no_harm(at in 0usize..400, to: u8, keep in 0usize..500) {
            let (mut bytes, _) = file();
            let n = bytes.len();
            bytes[at % n] = to;
            bytes.truncate(keep.max(n / 2));
            let _ = read(&bytes);
        }
    }
}
