//! Texts whose pages lie anywhere in the KV cache, and checks that neither other tokens nor other
//! texts change a result.

use super::kv_rows::stored;
use crate::outcome::Outcome;
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{
    Attend, AttentionBuffers, BatchPositions, CacheSize, Positions, TextRuns, TextTokens,
};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::WindowKind;
use tier_plan_kernels::random::Random;

/// Windows that texts are compared with.
const WINDOWS: [(Option<usize>, WindowKind); 3] = [
    (None, WindowKind::Sliding),
    (Some(11), WindowKind::Sliding),
    (Some(24), WindowKind::Chunked),
];

/// Positions per page: few, so that short texts have several.
const PAGE: usize = 8;

/// Tokens of one text, whose pages are in descending order.
pub(super) struct Text {
    batch: BatchPositions,
    size: CacheSize,
}

impl Text {
    /// Makes `tokens` tokens after `past` others.
    pub(super) fn new(ops: &Ops, past: usize, tokens: usize) -> Result<Self, CudaError> {
        Self::within(ops, past, tokens, past + tokens)
    }

    /// Makes `tokens` tokens after `past` others of a text that will have `all`.
    pub(super) fn within(
        ops: &Ops,
        past: usize,
        tokens: usize,
        all: usize,
    ) -> Result<Self, CudaError> {
        let positions = all.next_multiple_of(PAGE);
        let size = CacheSize {
            positions,
            page: PAGE,
        };
        let words = BatchPositions::words(tokens, 1, positions, PAGE);
        let mut batch = BatchPositions::new(ops.device(), words, size)?;
        let pages: Vec<u32> = (0..(positions / PAGE) as u32).rev().collect();
        let text = TextTokens {
            past,
            tokens,
            pages: &pages,
            state: 0,
            checkpoints: &[],
        };
        batch.set(std::iter::once(text))?;
        Ok(Self { batch, size })
    }

    /// Makes as many tokens of several texts, each with the recurrent state of its number. Their pages are
    /// not those of any cache.
    pub(super) fn alike(
        ops: &Ops,
        past: usize,
        tokens: usize,
        texts: u32,
    ) -> Result<Self, CudaError> {
        let positions = (past + tokens).next_multiple_of(PAGE);
        let size = CacheSize {
            positions,
            page: PAGE,
        };
        let n = texts as usize;
        let words = BatchPositions::words(n * tokens, n, positions, PAGE);
        let mut batch = BatchPositions::new(ops.device(), words, size)?;
        let pages: Vec<u32> = (0..(positions / PAGE) as u32).collect();
        batch.set((0..texts).map(|state| TextTokens {
            past,
            tokens,
            pages: &pages,
            state,
            checkpoints: &[],
        }))?;
        Ok(Self { batch, size })
    }

    /// Returns the tokens as runs after recurrent states.
    pub(super) fn runs(&self) -> TextRuns<'_> {
        let mut rounds = self.batch.rounds();
        rounds
            .next()
            .unwrap_or_else(|| unreachable!("a batch has texts"))
    }

    pub(super) fn positions(&self) -> Positions<'_> {
        self.batch.all()
    }

    /// Returns the positions of the cache.
    pub(super) fn capacity(&self) -> usize {
        self.size.positions
    }

    /// Returns the positions of a page.
    pub(super) fn page(&self) -> usize {
        self.size.page
    }

    /// Returns where a position is in the cache.
    pub(super) fn at(&self, position: usize) -> usize {
        self.size.positions - PAGE - position / PAGE * PAGE + position % PAGE
    }
}

/// Returns what is of the first of some texts that are alike, and compares the others with that, to the bit.
pub(super) fn of_first(
    outcome: &mut Outcome,
    all: &Buffer,
    texts: usize,
) -> Result<Vec<f32>, CudaError> {
    let all = all.view().to_f32()?;
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let (first, others) = all.split_at(all.len() / texts);
    for other in others.chunks_exact(first.len().max(1)) {
        outcome.compare_exact(&bits(other), &bits(first));
    }
    Ok(first.to_vec())
}

/// Compares a prompt with parts of it: other tokens change no bit of a token's result.
pub(super) fn parts_of_a_prompt(
    ops: &Ops,
    random: &mut Random,
    kv_type: KvType,
) -> Result<Outcome, CudaError> {
    let (tokens, past) = (45, 19);
    let text = Text::new(ops, past, tokens)?;
    let shared = SharedCache::new(ops, random, kv_type, text.capacity(), tokens)?;
    let mut outcome = Outcome::default();
    for window in WINDOWS {
        let whole = shared.run(ops, text.positions(), 0, window)?;
        let [first, second] = [0..29, 29..45].map(|part| {
            let positions = text.positions().part(part.clone());
            shared.run(ops, positions, part.start, window)
        });
        outcome.compare_exact(&[first?, second?].concat(), &whole);
    }
    Ok(outcome)
}

/// Compares several texts at once with each by itself: other texts change no bit of a text's
/// result. Some have enough tokens for the kernels of prompts.
pub(super) fn several_texts(
    ops: &Ops,
    random: &mut Random,
    kv_type: KvType,
) -> Result<Outcome, CudaError> {
    let texts = [(300, 1), (5, 2), (30, 20), (0, 1), (520, 3), (10, 16)];
    // Pages are given out in turn, so that those of a text lie apart.
    let mut pages = vec![Vec::new(); texts.len()];
    let n_pages = |(past, tokens): (usize, usize)| (past + tokens).div_ceil(PAGE);
    let mut next = 0;
    while let Some(text) = (0..texts.len())
        .filter(|text| pages[*text].len() < n_pages(texts[*text]))
        .min_by_key(|text| pages[*text].len())
    {
        pages[text].push(next);
        next += 1;
    }
    let size = CacheSize {
        positions: next as usize * PAGE,
        page: PAGE,
    };
    let n: usize = texts.iter().map(|(_, tokens)| tokens).sum();
    let words = BatchPositions::words(n, texts.len(), 600, PAGE);
    let shared = SharedCache::new(ops, random, kv_type, size.positions, n)?;
    let rows = texts.iter().zip(&pages);
    let rows = rows.map(|(&(past, tokens), pages)| TextTokens {
        state: 0,
        checkpoints: &[],
        past,
        tokens,
        pages,
    });
    let mut together = BatchPositions::new(ops.device(), words, size)?;
    together.set(rows.clone())?;
    let mut outcome = Outcome::default();
    for window in WINDOWS {
        let all = shared.run(ops, together.all(), 0, window)?;
        let (mut first, mut apart) = (0, Vec::new());
        for text in rows.clone() {
            let mut alone = BatchPositions::new(ops.device(), words, size)?;
            alone.set(std::iter::once(text))?;
            apart.extend(shared.run(ops, alone.all(), first, window)?);
            first += text.tokens;
        }
        outcome.compare_exact(&all, &apart);
    }
    Ok(outcome)
}

/// Queries, and a cache with random rows.
struct SharedCache {
    kv_type: KvType,
    keys: Buffer,
    values: Buffer,
    queries: Buffer,
    buffers: AttentionBuffers,
}

impl SharedCache {
    const N_HEAD_KV: usize = 2;
    const GROUP: usize = 3;
    const WIDTH: usize = 32;
    const HEADS: usize = Self::N_HEAD_KV * Self::GROUP;

    /// Makes a cache of `positions` positions, and `tokens` queries.
    fn new(
        ops: &Ops,
        random: &mut Random,
        kv_type: KvType,
        positions: usize,
        tokens: usize,
    ) -> Result<Self, CudaError> {
        let mut rows = || {
            let rows = 0..positions * Self::N_HEAD_KV;
            let rows = rows.map(|_| stored(kv_type, &random.floats(Self::WIDTH)));
            Buffer::of_bytes(ops.device(), &rows.collect::<Vec<_>>().concat())
        };
        let (keys, values) = (rows()?, rows()?);
        let queries = random.floats(tokens * Self::HEADS * Self::WIDTH);
        let workspace = AttentionBuffers::values(tokens, Self::HEADS, positions, Self::WIDTH);
        Ok(Self {
            kv_type,
            keys,
            values,
            queries: Buffer::of_f32(ops.device(), &queries)?,
            buffers: AttentionBuffers::new(ops.device(), workspace, Self::WIDTH)?,
        })
    }

    /// Returns the bits of the results of tokens whose queries begin with number `first`.
    fn run(
        &self,
        ops: &Ops,
        positions: Positions<'_>,
        first: usize,
        (window, window_kind): (Option<usize>, WindowKind),
    ) -> Result<Vec<u32>, CudaError> {
        let width = Self::WIDTH;
        let values = positions.tokens() * Self::HEADS * width;
        let from = first * Self::HEADS * width;
        let out = Buffer::new_f32(ops.device(), values)?;
        let attention = Attend {
            queries: self.queries.view().floats(from..from + values),
            keys: self.keys.view(),
            values: self.values.view(),
            kv_type: self.kv_type,
            n_head_kv: Self::N_HEAD_KV,
            group: Self::GROUP,
            key_width: width,
            value_row_width: width,
            value_width: width,
            scale: 0.3,
            softcap: None,
            positions,
            window,
            window_kind,
            sinks: None,
        };
        ops.attend(&attention, &self.buffers, out.view(), None)?;
        Ok(out.view().to_f32()?.into_iter().map(f32::to_bits).collect())
    }
}
