//! Where the tokens of a batch are in their texts, and where the pages of those texts are in the KV
//! cache.
//!
//! A cache is `[pages, positions of a page, heads, width]`. A text has pages anywhere in it, in the
//! order of its positions. Kernels read positions and pages from the device, so that recorded
//! launches serve for other tokens.

use super::int;
use super::runs::{TextRuns, rounds};
use crate::CudaError;
use crate::device::{Arg, Buffer, Device, View};
use std::ops::Range;
use std::sync::Arc;

/// Consecutive tokens of one text in a batch.
#[derive(Debug, Clone, Copy)]
pub struct TextTokens<'a> {
    /// Tokens of the text before these.
    pub past: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// The pages of the text, for these tokens too.
    pub pages: &'a [u32],
    /// Which of a layer's recurrent states is the text's, in layers that have some.
    pub state: u32,
    /// Tokens of the batch that checkpoints follow, ascending: the number of the next token, and the
    /// state that the text's goes to.
    pub checkpoints: &'a [(usize, u32)],
}

/// Size of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSize {
    /// Positions of all pages.
    pub positions: usize,
    /// Positions per page, a power of two. The last page may have fewer.
    pub page: usize,
}

/// The tokens of a batch, on the host and on the device.
pub struct BatchPositions {
    /// 32-bit integers: the position of each token, where the pages of its text begin in the table, and its
    /// run; three for each run; and the table, with the pages of all texts one after the other. Where the
    /// parts begin does not depend on positions, so that recorded launches serve for others.
    on_device: Buffer,
    /// What is on the device.
    words: Vec<i32>,
    /// The next batch, to be compared with that.
    next: Vec<i32>,
    /// The tokens of each text.
    runs: Vec<Range<usize>>,
    /// Runs that are taken after their states together, one round after the other.
    rounds: Vec<Range<usize>>,
    /// The tokens of the longest run of each round.
    longest: Vec<usize>,
    /// The largest number of a text's state.
    last_state: u32,
    n_tokens: usize,
    cache: CacheSize,
}

impl BatchPositions {
    /// Returns the words for batches of `tokens` tokens of up to `texts` texts, each with up to
    /// `context` positions.
    pub fn words(tokens: usize, texts: usize, context: usize, page: usize) -> usize {
        let pages = tokens.min(texts).saturating_mul(context.div_ceil(page));
        // Every token may be a run.
        tokens.saturating_mul(6).saturating_add(pages)
    }

    /// Allocates room for so many [`words`](Self::words); no batch is there yet.
    ///
    /// # Panics
    /// When the positions per page are not a power of two.
    pub fn new(
        device: &Arc<dyn Device>,
        words: usize,
        cache: CacheSize,
    ) -> Result<Self, CudaError> {
        assert!(cache.page.is_power_of_two(), "pages of {}", cache.page);
        Ok(Self {
            on_device: Buffer::new_f32(device, words)?,
            words: Vec::new(),
            next: Vec::new(),
            runs: Vec::new(),
            rounds: Vec::new(),
            longest: Vec::new(),
            last_state: 0,
            n_tokens: 0,
            cache,
        })
    }

    /// Takes the next batch, and copies it to the device where it is another one. Returns whether
    /// it is.
    ///
    /// # Panics
    /// When a text has too few pages for its tokens, a page is not in the cache, or the batch is
    /// larger than planned.
    pub fn set<'a>(
        &mut self,
        texts: impl Iterator<Item = TextTokens<'a>> + Clone,
    ) -> Result<bool, CudaError> {
        let CacheSize { positions, page } = self.cache;
        let (words, mut begin) = (&mut self.next, 0);
        words.clear();
        for text in texts.clone() {
            words.extend((text.past..text.past + text.tokens).map(|at| at as i32));
        }
        self.n_tokens = words.len();
        for text in texts.clone() {
            words.extend(std::iter::repeat_n(begin as i32, text.tokens));
            begin += (text.past + text.tokens).div_ceil(page);
        }
        let of_tokens = words.len();
        words.resize(of_tokens + self.n_tokens, 0);
        self.rounds.clear();
        self.longest.clear();
        self.last_state = texts.clone().map(|text| text.state).max().unwrap_or(0);
        let mut n_runs = 0;
        for round in rounds(texts.clone()) {
            for (number, (tokens, state)) in (n_runs..).zip(&round) {
                words[of_tokens..][tokens.clone()].fill(number as i32);
                words.extend([tokens.start as i32, tokens.len() as i32, *state as i32]);
            }
            let longest = round.iter().map(|(tokens, _)| tokens.len()).max();
            self.longest.push(longest.unwrap_or(0));
            self.rounds.push(n_runs..n_runs + round.len());
            n_runs += round.len();
        }
        self.runs.clear();
        let mut first = 0;
        for text in texts {
            let end = text.past + text.tokens;
            let pages = &text.pages[..end.div_ceil(page)];
            for (index, at) in pages.iter().enumerate() {
                let in_page = (end - index * page).min(page);
                assert!(
                    *at as usize * page + in_page <= positions,
                    "page {at} of {positions} positions"
                );
                words.push(*at as i32);
            }
            self.runs.push(first..first + text.tokens);
            first += text.tokens;
        }
        if self.next == self.words {
            return Ok(false);
        }
        // Until the copy is made, the device has no batch.
        self.words.clear();
        let bytes: Vec<u8> = self.next.iter().flat_map(|v| v.to_ne_bytes()).collect();
        self.on_device.view().write(&bytes)?;
        std::mem::swap(&mut self.words, &mut self.next);
        Ok(true)
    }

    /// Forgets the batch, so that the next one is copied in any case.
    pub fn forget(&mut self) {
        self.words.clear();
    }

    fn n_runs(&self) -> usize {
        self.rounds.last().map_or(0, |round| round.end)
    }

    /// Returns the runs of tokens between checkpoints, in rounds: each has at most one of every text, and
    /// may have none.
    pub fn rounds(&self) -> impl Iterator<Item = TextRuns<'_>> {
        let (n, n_runs, view) = (self.n_tokens, self.n_runs(), self.on_device.view());
        let rounds = self.rounds.iter().zip(&self.longest);
        rounds.map(move |(round, longest)| TextRuns {
            longest: *longest,
            positions: view.floats(0..n),
            of_tokens: view.floats(2 * n..3 * n),
            table: view.floats(3 * (n + round.start)..3 * (n + n_runs)),
            first: round.start,
            count: round.len(),
            last_state: self.last_state,
        })
    }

    /// Returns the positions of all tokens of the batch.
    pub fn all(&self) -> Positions<'_> {
        Positions {
            batch: self,
            first: 0,
            tokens: self.n_tokens,
        }
    }
}

/// Positions of neighboring tokens of a batch.
#[derive(Clone, Copy)]
pub struct Positions<'a> {
    batch: &'a BatchPositions,
    first: usize,
    tokens: usize,
}

impl<'a> Positions<'a> {
    /// Returns those of a part of the tokens.
    ///
    /// # Panics
    /// When there are no such tokens.
    #[must_use]
    pub fn part(self, tokens: Range<usize>) -> Self {
        assert!(
            tokens.start <= tokens.end && tokens.end <= self.tokens,
            "tokens {tokens:?} of {}",
            self.tokens
        );
        Self {
            first: self.first + tokens.start,
            tokens: tokens.len(),
            ..self
        }
    }

    /// Returns the number of tokens.
    pub fn tokens(self) -> usize {
        self.tokens
    }

    /// Returns the position of a token in its text.
    pub(super) fn of(self, token: usize) -> usize {
        self.batch.words[self.first + token] as usize
    }

    /// Returns the positions of the cache.
    pub(super) fn capacity(self) -> usize {
        self.batch.cache.positions
    }

    /// Returns the rows of a cache that has one per block of positions: in each page as many as blocks
    /// may end in it.
    pub(super) fn rows_of_blocks(self, block: usize) -> usize {
        let CacheSize { positions, page } = self.batch.cache;
        positions / page * page.div_ceil(block) + (positions % page).div_ceil(block)
    }

    /// Returns the tokens by text: consecutive ones of one text each.
    pub(super) fn runs(self) -> impl Iterator<Item = Range<usize>> + 'a {
        let (first, end) = (self.first, self.first + self.tokens);
        let clipped = move |run: &Range<usize>| run.start.max(first)..run.end.min(end);
        self.batch
            .runs
            .iter()
            .map(clipped)
            .filter(|run| !run.is_empty())
            .map(move |run| run.start - first..run.end - first)
    }

    /// Returns the words of the tokens' positions.
    pub(super) fn at(self) -> View<'a> {
        let view = self.batch.on_device.view();
        view.floats(self.first..self.first + self.tokens)
    }

    /// Returns the arguments of kernels: positions, where the pages of each token's text begin, the
    /// pages of all texts, and the logarithm of the positions per page.
    pub(super) fn args(self) -> [Arg; 4] {
        let (view, n) = (self.batch.on_device.view(), self.batch.n_tokens);
        let begins = view.floats(n + self.first..n + self.first + self.tokens);
        let tables = view.floats(3 * (n + self.batch.n_runs())..self.batch.words.len());
        [
            self.at().arg(),
            begins.arg(),
            tables.arg(),
            int(self.batch.cache.page.ilog2() as usize),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim;

    const SIZE: CacheSize = CacheSize {
        positions: 21,
        page: 8,
    };

    fn text(past: usize, tokens: usize, pages: &[u32]) -> TextTokens<'_> {
        TextTokens {
            past,
            tokens,
            pages,
            state: 5,
            checkpoints: &[],
        }
    }

    #[test]
    fn a_batch_is_copied_once() {
        let device: Arc<dyn Device> = shim::shared();
        let mut batch = BatchPositions::new(&device, 64, SIZE).unwrap();
        let texts = [text(7, 2, &[1, 0, 9]), text(0, 1, &[2])];
        assert!(batch.set(texts.into_iter()).unwrap());
        assert!(!batch.set(texts.into_iter()).unwrap());
        let words = batch.on_device.view().floats(0..18).to_i32().unwrap();
        assert_eq!(words[..9], [7, 8, 0, 0, 0, 2, 0, 0, 1]);
        let (runs, pages) = ([0, 2, 5, 2, 1, 5], [1, 0, 2]);
        assert_eq!((&words[9..15], &words[15..]), (&runs[..], &pages[..]));
        let all = batch.all();
        assert_eq!(all.runs().collect::<Vec<_>>(), [0..2, 2..3]);
        let part = all.part(1..3);
        assert_eq!(part.runs().collect::<Vec<_>>(), [0..1, 1..2]);
        assert_eq!([part.of(0), part.of(1)], [8, 0]);
        batch.forget();
        assert!(batch.set(texts.into_iter()).unwrap());
    }

    #[test]
    fn the_last_page_may_be_short() {
        let device: Arc<dyn Device> = shim::shared();
        let mut batch = BatchPositions::new(&device, 64, SIZE).unwrap();
        batch.set([text(4, 1, &[2])].into_iter()).unwrap();
        let too_far = || batch.set([text(5, 1, &[2])].into_iter()).map(drop);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(too_far));
        assert!(outcome.is_err());
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn a_text_has_pages_for_its_tokens() {
        let device: Arc<dyn Device> = shim::shared();
        let mut batch = BatchPositions::new(&device, 64, SIZE).unwrap();
        let _ = batch.set([text(8, 1, &[2])].into_iter());
    }
}
