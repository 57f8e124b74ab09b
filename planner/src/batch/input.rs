//! A file of requests: where its lines are, and in which order they are answered.

use super::{BadLine, Code, Endpoint, MAX_LINE_BYTES, MAX_LINES, Prompt, Request};
use crate::hint::HintExt;
use crate::printable::printable;
use crate::text::wide_encoding;
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher, DefaultHasher, Hasher, RandomState};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Bytes of a prompt up to which it is compared with others.
const PREFIX_BYTES: [usize; 4] = [256, 1024, 4096, 16384];

/// A line of the file that is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// Number of the line, from 1.
    pub number: usize,
    offset: u64,
    bytes: u64,
    /// Per length of a prefix, the first line that begins alike.
    alike: [usize; PREFIX_BYTES.len()],
}

/// Names of requests as numbers that no one can make collide.
#[derive(Debug, Default)]
struct Names {
    keys: [RandomState; 2],
    /// The line of each name.
    lines: HashMap<[u64; 2], usize>,
}

impl Names {
    fn key(&self, name: &str) -> [u64; 2] {
        [self.keys[0].hash_one(name), self.keys[1].hash_one(name)]
    }
}

/// An open file of requests.
#[derive(Debug)]
pub struct Input {
    path: PathBuf,
    file: File,
    lines: Vec<Line>,
    names: Names,
    has_chats: bool,
}

impl Input {
    /// Opens a file and looks at every line. Lines that are no requests are kept, to be refused one
    /// by one.
    ///
    /// # Errors
    /// When it can't be read twice, has no requests or too many, or has a name twice.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        // A pipe would wait for a writer.
        let found = std::fs::metadata(path).with_context(|| format!("reading {shown}"))?;
        if !found.is_file() {
            let other = || bail!("{shown}: not a regular file, expected one that is read twice");
            return other().hint("save the requests in a file first");
        }
        let file = File::open(path).with_context(|| format!("reading {shown}"))?;
        let mut input = Self {
            path: path.into(),
            file,
            lines: Vec::new(),
            names: Names::default(),
            has_chats: false,
        };
        input.index()?;
        if input.lines.is_empty() {
            let none = || bail!("{shown}: no requests, expected one JSON object per line");
            return none().hint(
                r#"a request is {"custom_id": "1", "url": "/v1/completions", "body": {"prompt": "Once upon a time"}}"#,
            );
        }
        Ok(input)
    }

    fn index(&mut self) -> Result<()> {
        let path = self.path.clone();
        let shown = path.display();
        let mut reader = BufReader::with_capacity(1 << 16, self.file.try_clone()?);
        let start = reader
            .fill_buf()
            .with_context(|| format!("reading {shown}"))?;
        if let Some(encoding) = wide_encoding(start) {
            let wide = || bail!("{shown}: {encoding} text, expected UTF-8");
            return wide().hint(format!(
                "convert it: iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"
            ));
        }
        let mut first_alike = HashMap::new();
        let (mut offset, mut number) = (0, 0);
        let mut line = Vec::new();
        loop {
            line.clear();
            let bytes =
                read_line(&mut reader, &mut line).with_context(|| format!("reading {shown}"))?;
            if bytes == 0 {
                return Ok(());
            }
            number += 1;
            if line.iter().any(|b| !b.is_ascii_whitespace()) {
                ensure!(
                    self.lines.len() < MAX_LINES,
                    "{shown}: more than {MAX_LINES} requests; split the file"
                );
                let alike = self.look(number, &line, bytes, &mut first_alike)?;
                self.lines.push(Line {
                    number,
                    offset,
                    bytes,
                    alike,
                });
            }
            offset += bytes;
        }
    }

    /// Notes a line's name, and returns the first lines that begin alike.
    fn look(
        &mut self,
        number: usize,
        line: &[u8],
        bytes: u64,
        first: &mut HashMap<(usize, u64), usize>,
    ) -> Result<[usize; PREFIX_BYTES.len()]> {
        let request = parse(line, bytes);
        let name = match &request {
            Ok(request) => Some(&request.custom_id),
            Err(bad) => bad.custom_id.as_ref(),
        };
        if let Some(name) = name {
            let key = self.names.key(name);
            if let Some(before) = self.names.lines.insert(key, number) {
                let shown = self.path.display();
                let name = printable(name);
                let twice = || {
                    bail!("{shown}: line {number} has the custom_id \"{name}\" of line {before}")
                };
                return twice().hint("give each line a custom_id of its own");
            }
        }
        let Ok(request) = request else {
            return Ok([number; PREFIX_BYTES.len()]);
        };
        self.has_chats |= request.endpoint == Endpoint::Chat;
        let hashes = prefix_hashes(&request.prompt);
        let mut level = 0;
        Ok(hashes.map(|hash| {
            level += 1;
            *first.entry((level, hash)).or_insert(number)
        }))
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the number of lines that are not empty.
    pub fn n_lines(&self) -> usize {
        self.lines.len()
    }

    /// Whether a request has messages, which a chat template makes a prompt of.
    pub fn has_chats(&self) -> bool {
        self.has_chats
    }

    /// Returns the lines in the order in which they are answered: those whose prompts begin alike
    /// follow each other, else they are as in the file.
    pub fn in_order(&self) -> Vec<Line> {
        let mut lines = self.lines.clone();
        lines.sort_by_key(|line| (line.alike, line.number));
        lines
    }

    /// Returns the number of the line with this name.
    pub fn line_of(&self, name: &str) -> Option<usize> {
        self.names.lines.get(&self.names.key(name)).copied()
    }

    /// Returns the line with a number, if it is not empty.
    pub fn line(&self, number: usize) -> Option<&Line> {
        let at = self.lines.binary_search_by_key(&number, |line| line.number);
        at.ok().map(|i| &self.lines[i])
    }

    /// Reads a line again.
    ///
    /// # Errors
    /// When the file can't be read, or has changed; inside, when the line is no request.
    pub fn read(&mut self, line: &Line) -> Result<Result<Request, BadLine>> {
        let shown = self.path.display();
        self.file.seek(SeekFrom::Start(line.offset))?;
        let mut bytes = Vec::new();
        // What is longer is refused by its length alone.
        let most = line.bytes.min(MAX_LINE_BYTES);
        (&self.file)
            .take(most)
            .read_to_end(&mut bytes)
            .with_context(|| format!("reading {shown}"))?;
        let request = parse(&bytes, line.bytes);
        let name = match &request {
            Ok(request) => Some(&request.custom_id),
            Err(bad) => bad.custom_id.as_ref(),
        };
        let same = name.is_none_or(|name| self.line_of(name) == Some(line.number));
        let same = same && bytes.len() as u64 == most;
        if !same {
            let changed = || bail!("{shown}: line {} changed during the run", line.number);
            return changed().hint("run the command again with the file at rest");
        }
        Ok(request)
    }
}

fn parse(line: &[u8], bytes: u64) -> Result<Request, BadLine> {
    if bytes > MAX_LINE_BYTES {
        let message = format!("a line of {bytes} bytes, expected at most {MAX_LINE_BYTES}");
        return Err(BadLine::new(Code::InvalidJson, message));
    }
    // A byte order mark is no JSON. Files that were joined have one in the middle, too.
    Request::parse(line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line))
}

/// Reads the next line, of which no more than the most that a line may have is kept. Returns its
/// whole length with its end.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<u64> {
    let mut bytes = 0;
    loop {
        let buffer = reader.fill_buf()?;
        let end = buffer.iter().position(|b| *b == b'\n');
        let part = end.map_or(buffer, |end| &buffer[..=end]);
        let room = MAX_LINE_BYTES as usize - line.len();
        line.extend_from_slice(&part[..part.len().min(room)]);
        let used = part.len();
        bytes += used as u64;
        reader.consume(used);
        if end.is_some() || used == 0 {
            return Ok(bytes);
        }
    }
}

/// Returns hashes of a prompt's beginnings.
fn prefix_hashes(prompt: &Prompt) -> [u64; PREFIX_BYTES.len()] {
    let longest = PREFIX_BYTES[PREFIX_BYTES.len() - 1];
    let mut start = Vec::with_capacity(longest);
    let mut add = |bytes: &[u8]| start.extend(bytes.iter().take(longest - start.len()));
    match prompt {
        Prompt::Text(text) => add(text.as_bytes()),
        Prompt::Tokens(tokens) => tokens
            .iter()
            .take(longest)
            .for_each(|t| add(&t.to_le_bytes())),
        Prompt::Messages(messages) => {
            for message in messages {
                add(&[0, message.role as u8]);
                add(message.content.as_bytes());
            }
        }
    }
    PREFIX_BYTES.map(|bytes| {
        let mut hasher = DefaultHasher::new();
        hasher.write(&start[..bytes.min(start.len())]);
        hasher.finish()
    })
}
