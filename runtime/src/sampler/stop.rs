//! Stop strings: texts that end a generation and are not part of it.

/// Text that is certainly before a stop string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// The text.
    pub text: String,
    /// Whether a stop string followed it.
    pub stopped: bool,
}

/// Watches a text that comes in pieces for stop strings, wherever the pieces are cut.
///
/// The stop string that is complete first counts, the longest of those that end together. Text that
/// may be the beginning of one is held back.
///
/// ```
/// use tier_plan_runtime::sampler::StopStrings;
///
/// let mut stops = StopStrings::new(["\n\n".to_string()]);
/// assert_eq!(stops.push("One.\n").text, "One.");
/// let end = stops.push("\nTwo.");
/// assert!(end.stopped && end.text.is_empty());
/// assert_eq!(stops.found(), Some("\n\n"));
/// ```
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    matchers: Vec<Matcher>,
    /// Text of which the end may become a stop string.
    held: String,
    /// The stop string that has come.
    found: Option<String>,
}

impl StopStrings {
    /// Creates a watch for `stops`. Empty ones are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty());
        Self {
            matchers: stops.map(Matcher::new).collect(),
            held: String::new(),
            found: None,
        }
    }

    /// Takes the next piece of the text, and returns what can't be part of a stop string any more.
    /// After a stop string, everything is ignored.
    pub fn push(&mut self, piece: &str) -> Passed {
        if self.is_stopped() {
            return self.passed(0);
        }
        for (i, byte) in piece.bytes().enumerate() {
            let complete = self.matchers.iter_mut().filter_map(|m| m.advance(byte));
            if let Some(len) = complete.max() {
                self.held.push_str(&piece[..=i]);
                let end = self.held.len() - len;
                self.found = Some(self.held[end..].to_string());
                let passed = self.passed(end);
                self.held.clear();
                return passed;
            }
        }
        self.held.push_str(piece);
        let begun = self.matchers.iter().map(|m| m.matched).max().unwrap_or(0);
        self.passed(self.held.len() - begun)
    }

    /// Ends the text, and returns what was held back.
    pub fn finish(&mut self) -> String {
        self.matchers.iter_mut().for_each(|m| m.matched = 0);
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string has come.
    pub fn is_stopped(&self) -> bool {
        self.found.is_some()
    }

    /// Returns the stop string that has come.
    pub fn found(&self) -> Option<&str> {
        self.found.as_deref()
    }

    fn passed(&mut self, end: usize) -> Passed {
        Passed {
            text: self.held.drain(..end).collect(),
            stopped: self.found.is_some(),
        }
    }
}

/// One stop string and how much of it the text ends with (Knuth, Morris, and Pratt).
#[derive(Debug, Clone)]
struct Matcher {
    stop: String,
    /// Per prefix, the length of the longest shorter prefix that it ends with.
    borders: Vec<usize>,
    matched: usize,
}

impl Matcher {
    fn new(stop: String) -> Self {
        let bytes = stop.as_bytes();
        let mut borders = vec![0; bytes.len()];
        let mut len = 0;
        for i in 1..bytes.len() {
            while len > 0 && bytes[i] != bytes[len] {
                len = borders[len - 1];
            }
            len += usize::from(bytes[i] == bytes[len]);
            borders[i] = len;
        }
        Self {
            stop,
            borders,
            matched: 0,
        }
    }

    /// Takes the next byte, and returns the length of the stop string if it is complete.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        let bytes = self.stop.as_bytes();
        while self.matched > 0 && byte != bytes[self.matched] {
            self.matched = self.borders[self.matched - 1];
        }
        self.matched += usize::from(byte == bytes[self.matched]);
        (self.matched == bytes.len()).then_some(bytes.len())
    }
}
