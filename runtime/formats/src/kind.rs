//! Recognizes tier-plan's files: the format, the version, and how much of a file may be read into
//! memory.

use super::FormatError;
use super::cost::{self, Cost};
use serde::Deserialize;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// First bytes of every profile.
pub(super) const PROFILE_MAGIC: [u8; 8] = *b"tierprof";

/// First bytes of every file of reference log-probabilities.
pub(super) const LOGPROBS_MAGIC: [u8; 8] = *b"tierlogp";

/// First bytes of every file of checksums.
pub(super) const SUMS_MAGIC: [u8; 8] = *b"tiersums";

/// First bytes of every file of packed experts.
pub(super) const PACK_MAGIC: [u8; 8] = *b"tierpack";

/// Bytes at the start of a file that decide its format.
const HEAD_BYTES: u64 = 4096;

/// One kind of file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// Value of its `format` key; for the binary kind only a label.
    pub format: &'static str,
    /// What messages call it.
    pub what: &'static str,
    /// Newest version this program reads.
    pub newest: u64,
    /// Larger files are refused unread, in bytes.
    pub limit_bytes: u64,
    /// How to get one.
    pub hint: &'static str,
}

pub(super) const MACHINE: Kind = Kind {
    format: "tier-plan machine",
    what: "machine file",
    newest: 7,
    limit_bytes: 1 << 20,
    hint: "profiles/machines holds examples",
};
pub(super) const PLACEMENT: Kind = Kind {
    format: "tier-plan placement",
    what: "placement plan",
    newest: 12,
    limit_bytes: 64 << 20,
    hint: "`tier-plan solve` writes one",
};
pub(super) const PROFILE: Kind = Kind {
    format: "tier-plan profile",
    what: "profile",
    newest: 3,
    limit_bytes: 4 << 30,
    hint: "`tier-plan profile` writes one",
};
pub(super) const RECORD: Kind = Kind {
    format: "tier-plan run record",
    what: "run record",
    newest: 6,
    limit_bytes: 64 << 20,
    hint: "`tier-plan run` can write one",
};

pub(super) const SHAPE: Kind = Kind {
    format: "tier-plan shape",
    what: "model shape",
    newest: 4,
    limit_bytes: 1 << 20,
    hint: "profiles/models holds examples",
};

pub(super) const LOGPROBS: Kind = Kind {
    format: "tier-plan log-probabilities",
    what: "file of reference log-probabilities",
    newest: 1,
    // Read row by row.
    limit_bytes: u64::MAX,
    hint: "`tier-plan perplexity` can write one",
};

pub(super) const SUMS: Kind = Kind {
    format: "tier-plan checksums",
    what: "file of checksums",
    newest: 1,
    limit_bytes: 64 << 20,
    hint: "`tier-plan checksum` writes one",
};

pub(super) const PACK: Kind = Kind {
    format: "tier-plan packed experts",
    what: "file of packed experts",
    newest: 1,
    // Only its header is read here.
    limit_bytes: u64::MAX,
    hint: "`tier-plan pack` writes one",
};

pub(super) const SLOTS: Kind = Kind {
    format: "tier-plan slots",
    what: "file of slots",
    newest: 1,
    limit_bytes: 64 << 20,
    hint: "`tier-plan run` can write one",
};

pub(super) const ALL: [&Kind; 9] = [
    &MACHINE, &PLACEMENT, &PROFILE, &RECORD, &LOGPROBS, &SHAPE, &SUMS, &PACK, &SLOTS,
];

impl Kind {
    /// Returns the error of a file of another kind; `found` says which, as a clause.
    pub fn mismatch(&self, path: &Path, found: &str) -> FormatError {
        let found = format!("{found}; {}", self.hint);
        FormatError::Kind {
            path: path.into(),
            expected: self.what,
            found,
        }
    }

    /// Accepts versions 1 to the newest.
    pub fn check_version(&self, version: i64, path: &Path) -> Result<(), FormatError> {
        match u64::try_from(version) {
            Ok(v) if v > self.newest => Err(FormatError::Newer {
                path: path.into(),
                what: self.what,
                found: v,
                supported: self.newest,
            }),
            Ok(v) if v > 0 => Ok(()),
            _ => Err(FormatError::invalid(
                path,
                format!("version is {version}, but versions start at 1"),
            )),
        }
    }

    /// Reads a whole file, but not one that is too large or evidently of another kind (a model of
    /// hundreds of gigabytes given by mistake must not be loaded to find that out).
    pub fn read(&self, path: &Path) -> Result<Vec<u8>, FormatError> {
        let io = |source| FormatError::Io {
            path: path.into(),
            source,
        };
        self.read_from(File::open(path).map_err(io)?, path)
    }

    /// Reads an open file as [`read`](Self::read) does. `path` is only named in errors.
    pub fn read_from(&self, mut file: File, path: &Path) -> Result<Vec<u8>, FormatError> {
        let io = |source| FormatError::Io {
            path: path.into(),
            source,
        };
        let mut bytes = Vec::new();
        (&mut file)
            .take(HEAD_BYTES)
            .read_to_end(&mut bytes)
            .map_err(io)?;
        let found = sniff(&bytes);
        if found.binary && found.kind != Some(self) {
            return Err(self.mismatch(path, &found.words));
        }
        let rest = self.limit_bytes.saturating_sub(bytes.len() as u64);
        file.take(rest + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > self.limit_bytes {
            if found.kind != Some(self) {
                return Err(self.mismatch(path, &found.words));
            }
            let limit = crate::units::show_bytes(self.limit_bytes);
            return Err(FormatError::invalid(
                path,
                format!(
                    "larger than {limit}, the most that a {} may have",
                    self.what
                ),
            ));
        }
        Ok(bytes)
    }

    /// Describes what a file seems to be, as a clause.
    pub fn describe(bytes: &[u8]) -> String {
        sniff(bytes).words
    }

    /// Checks `format` and `version` of a TOML file and returns its text.
    pub fn open_toml<'a>(&self, bytes: &'a [u8], path: &Path) -> Result<&'a str, FormatError> {
        let text = self.text(bytes, path)?;
        self.check_cost(cost::of_toml(bytes), bytes, path)?;
        let envelope = toml::from_str::<Envelope>(text);
        self.check_envelope(envelope.map_err(|e| toml_words(text, &e)), bytes, path)?;
        Ok(text)
    }

    /// Checks `format` and `version` of a JSON file and returns its text.
    pub fn open_json<'a>(&self, bytes: &'a [u8], path: &Path) -> Result<&'a str, FormatError> {
        let text = self.text(bytes, path)?;
        self.check_cost(cost::of_json(bytes), bytes, path)?;
        let envelope = serde_json::from_str::<Envelope>(text);
        self.check_envelope(envelope.map_err(|e| e.to_string()), bytes, path)?;
        Ok(text)
    }

    /// Refuses a text that would take too much memory to parse.
    fn check_cost(&self, cost: Cost, bytes: &[u8], path: &Path) -> Result<(), FormatError> {
        let found = sniff(bytes);
        match cost.check() {
            Ok(()) => Ok(()),
            Err(_) if found.kind != Some(self) => Err(self.mismatch(path, &found.words)),
            Err(words) => Err(FormatError::invalid(
                path,
                format!("{words}; {}", self.hint),
            )),
        }
    }

    fn text<'a>(&self, bytes: &'a [u8], path: &Path) -> Result<&'a str, FormatError> {
        std::str::from_utf8(bytes).map_err(|e| {
            let found = sniff(bytes);
            if found.kind == Some(self) {
                FormatError::invalid(
                    path,
                    format!(
                        "byte {} is not UTF-8; save the file as UTF-8",
                        e.valid_up_to()
                    ),
                )
            } else {
                self.mismatch(path, &found.words)
            }
        })
    }

    fn check_envelope(
        &self,
        envelope: Result<Envelope, String>,
        bytes: &[u8],
        path: &Path,
    ) -> Result<(), FormatError> {
        let found = sniff(bytes);
        match envelope {
            // A file that names itself ours but cannot be parsed is damaged; anything else is
            // simply not ours.
            Err(words) if found.kind == Some(self) => Err(FormatError::invalid(path, words)),
            Err(_) => Err(self.mismatch(path, &found.words)),
            Ok(Envelope { format: None, .. }) => Err(self.mismatch(path, &found.words)),
            Ok(Envelope {
                format: Some(format),
                ..
            }) if format != self.format => Err(self.mismatch(
                path,
                &format!("its format is {}", super::text::quote(&format)),
            )),
            Ok(Envelope { version: None, .. }) => Err(FormatError::invalid(
                path,
                format!("no version; write `version = {}`", self.newest),
            )),
            Ok(Envelope {
                version: Some(version),
                ..
            }) => self.check_version(version, path),
        }
    }
}

/// The two keys that every text file of ours has.
#[derive(Deserialize)]
struct Envelope {
    format: Option<String>,
    version: Option<i64>,
}

/// What a file seems to be.
struct Found {
    /// The tier-plan format that it is in.
    kind: Option<&'static Kind>,
    /// A clause such as `it is a GGUF model`.
    words: String,
    /// Whether the bytes decide it without parsing.
    binary: bool,
}

fn sniff(bytes: &[u8]) -> Found {
    let head = &bytes[..bytes.len().min(HEAD_BYTES as usize)];
    if head.is_empty() {
        return Found {
            kind: None,
            words: "it is empty".into(),
            binary: false,
        };
    }
    if head.starts_with(b"GGUF") {
        return Found {
            kind: None,
            words: "it is a GGUF model".into(),
            binary: true,
        };
    }
    if head.starts_with(&PROFILE_MAGIC) {
        return Found {
            kind: Some(&PROFILE),
            words: "it is a tier-plan profile".into(),
            binary: true,
        };
    }
    if head.starts_with(&LOGPROBS_MAGIC) {
        let words = "it is a tier-plan file of reference log-probabilities".into();
        return Found {
            kind: Some(&LOGPROBS),
            words,
            binary: true,
        };
    }
    if head.starts_with(&SUMS_MAGIC) {
        return Found {
            kind: Some(&SUMS),
            words: "it is a tier-plan file of checksums".into(),
            binary: true,
        };
    }
    if head.starts_with(&PACK_MAGIC) {
        return Found {
            kind: Some(&PACK),
            words: "it is a tier-plan file of packed experts".into(),
            binary: true,
        };
    }
    for kind in ALL {
        let quoted = format!("\"{}\"", kind.format);
        if head.windows(quoted.len()).any(|w| w == quoted.as_bytes()) {
            return Found {
                kind: Some(kind),
                words: format!("it is a {}", kind.what),
                binary: false,
            };
        }
    }
    if head
        .iter()
        .any(|&b| b < 0x20 && !b"\t\n\r\x0c".contains(&b))
    {
        let first: Vec<String> = head.iter().take(4).map(|b| format!("{b:02x}")).collect();
        let words = format!("it is binary data that starts with {}", first.join(" "));
        return Found {
            kind: None,
            words,
            binary: true,
        };
    }
    Found {
        kind: None,
        words: "it is text that names no tier-plan format".into(),
        binary: false,
    }
}

/// Puts a TOML error in one line, with the number of the line that it concerns.
pub(super) fn toml_words(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().trim().replace('\n', ", ");
    match error.span() {
        Some(span) => {
            let before = &text.as_bytes()[..span.start.min(text.len())];
            let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
            format!("line {line}: {message}")
        }
        None => message,
    }
}
