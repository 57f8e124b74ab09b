//! The KV cache: how it stores values, and the bytes and arithmetic that it takes.

use super::shape::{CacheShape, ModelShape};
use std::fmt;
use std::str::FromStr;
use thiserror::Error;
use tier_plan_kernels::q8_row_bytes;

/// How the cache stores a value of a key, a value or a latent. Recurrent state is always of 32-bit
/// floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvType {
    /// 16-bit floats: half the memory of 32-bit ones, and differences of about 10⁻⁷ (NMSE of the
    /// logits).
    #[default]
    F16,
    /// Blocks of 32 values: a 16-bit float scale and one signed byte per value. The last block of a
    /// row may be shorter. Differences of about 10⁻⁴ where weights are random.
    Q8_0,
    /// 32-bit floats, for checking one engine against another.
    F32,
}

/// Positions per page of the KV cache.
pub const PAGE: u32 = 64;

/// Tokens of a batch, of all texts together, that layers with a sliding window have room for beside
/// the windows of the texts.
pub const WINDOW_CHUNK: u32 = 2048;

/// Checkpoints per text of a model whose texts can't go back otherwise, where they are of the pages
/// of windows only and so cost little.
const WINDOW_CHECKPOINTS_PER_TEXT: u32 = 4;

/// What a KV cache has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheRoom {
    /// Tokens of a text.
    pub context: u32,
    /// Texts at once.
    pub sequences: u32,
    /// Recurrent states and pages of windows beside those of the texts, which texts can go back to.
    pub checkpoints: u32,
    /// Tokens of a batch, of all texts together, whose rows layers with a sliding window hold beside
    /// the windows. `None` where such layers hold all positions of a text.
    pub window_chunk: Option<u32>,
}

impl CacheRoom {
    /// Returns the room for one text.
    pub fn of_one(context: u32) -> Self {
        Self {
            context,
            sequences: 1,
            checkpoints: 0,
            window_chunk: Some(WINDOW_CHUNK),
        }
    }

    /// Returns this room as plans for a model say it: windows count only where they save memory, and
    /// have checkpoints then.
    #[must_use]
    pub fn for_model(self, shape: &ModelShape) -> Self {
        let windows = shape.caches.iter().filter_map(CacheShape::window);
        let least = windows.filter_map(|window| self.least_window_pages(window));
        let wanted = self.sequences.saturating_mul(WINDOW_CHECKPOINTS_PER_TEXT);
        let Some(free) = least.map(|pages| pages.checkpoints).min() else {
            return self.whole();
        };
        // A recurrent state is larger, so how many there are is decided elsewhere.
        let more = if shape.state_bytes() > 0 { 0 } else { wanted };
        let more = more.min(u32::try_from(free).unwrap_or(u32::MAX));
        Self {
            checkpoints: self.checkpoints.max(more),
            ..self
        }
    }

    /// Returns the room where layers with a window hold all positions, as on a GPU.
    #[must_use]
    pub fn whole(self) -> Self {
        Self {
            window_chunk: None,
            ..self
        }
    }

    /// Returns the positions that a layer holds in which a token sees `window` positions at most,
    /// its own included. `None` where it holds all of them: then windows take no less.
    ///
    /// With `w = ⌈window / 64⌉`, a text has `w + 2` pages, the texts share `⌈chunk / 64⌉` more for
    /// the tokens of a batch, and a checkpoint has `w + 1`. The `c` tokens of a text in a batch see
    /// `window - 1 + c` positions, which touch at most one page more than whole pages would.
    pub fn window_positions(self, window: u64) -> Option<u64> {
        let pages = self.least_window_pages(window)?;
        let checkpoints = pages.per_checkpoint.saturating_mul(self.checkpoints.into());
        let all = pages.least.saturating_add(checkpoints);
        Some(all.saturating_mul(PAGE.into()))
    }

    /// Returns the pages of a window, where they are fewer than those of all positions.
    fn least_window_pages(self, window: u64) -> Option<WindowPages> {
        let (page, window) = (u64::from(PAGE), window.div_ceil(u64::from(PAGE)));
        let chunk = u64::from(self.window_chunk?).div_ceil(page);
        let texts = window
            .saturating_add(2)
            .saturating_mul(self.sequences.into());
        let least = texts.saturating_add(chunk);
        let left = self.positions().div_ceil(page).checked_sub(least)?;
        let per_checkpoint = window.saturating_add(1);
        (left > 0).then_some(WindowPages {
            least,
            per_checkpoint,
            checkpoints: left / per_checkpoint,
        })
    }

    /// Returns the recurrent states of a layer that has some.
    pub fn states(self) -> u64 {
        u64::from(self.sequences) + u64::from(self.checkpoints)
    }

    /// Returns the positions of all texts. Several texts have whole pages each.
    pub fn positions(self) -> u64 {
        let context = u64::from(self.context);
        match self.sequences {
            1 => context,
            n => context
                .next_multiple_of(u64::from(PAGE))
                .saturating_mul(u64::from(n)),
        }
    }
}

/// Pages of a layer with a window.
#[derive(Debug, Clone, Copy)]
struct WindowPages {
    /// Pages of the texts and a batch.
    least: u64,
    per_checkpoint: u64,
    /// Checkpoints with which the layer holds no more than all positions.
    checkpoints: u64,
}

impl fmt::Display for CacheRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.sequences {
            1 => write!(f, "{} tokens of context", self.context),
            n => write!(f, "{n} texts of {} tokens of context", self.context),
        }
    }
}

/// A name of no KV cache type.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("unknown KV cache type '{0}': expected f16, q8_0, or f32")]
pub struct UnknownKvType(pub String);

/// Rows of one width that a layer's cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KvRows {
    /// Values of a row: a head's key or value, or a latent with its rotated key part.
    pub width: u64,
    /// Rows that so many tokens of context add as `every` says.
    pub per_token: u64,
    /// Tokens that share rows: more than 1 where a block of tokens has one.
    pub every: u64,
    /// Dot products per row for each later token: one per query head for a key or value, two per
    /// head for a latent, which is both.
    pub queries: u64,
    /// Positions that a token looks back at, its own included; all of them when `None`.
    pub window: Option<u64>,
    /// Positions that a token reads at most, wherever they are, as an indexer chose them; all that
    /// it looks back at when `None`.
    pub chosen: Option<u64>,
}

impl KvRows {
    /// Returns the rows that a pass of `tokens` tokens reads, the last of which is at position
    /// `positions`. The tokens of a pass share their reads.
    pub fn read(&self, positions: u64, tokens: u64) -> u64 {
        let reach = self.window.map_or(u64::MAX, |window| {
            window.saturating_add(tokens.saturating_sub(1))
        });
        let chosen = self
            .chosen
            .map_or(u64::MAX, |chosen| chosen.saturating_mul(tokens));
        self.rows_of(positions.min(reach).min(chosen))
    }

    /// Returns the rows of so many positions.
    fn rows_of(&self, positions: u64) -> u64 {
        self.per_token
            .saturating_mul(positions.div_ceil(self.every.max(1)))
    }

    /// Returns the rows that a cache for so many positions holds. A page has a row for every block
    /// that may end in it.
    pub fn held(&self, positions: u64) -> u64 {
        let (page, every) = (u64::from(PAGE), self.every.max(1));
        let full = (positions / page).saturating_mul(page.div_ceil(every));
        let rows = full.saturating_add((positions % page).div_ceil(every));
        self.per_token.saturating_mul(rows)
    }

    /// Returns the positions that a token reads at most.
    fn most(&self) -> u64 {
        let most = |positions: Option<u64>| positions.unwrap_or(u64::MAX);
        most(self.window).min(most(self.chosen))
    }
}

impl KvRows {
    /// Returns the multiply-accumulates of a token with the rows of `positions` positions, its own
    /// included.
    pub fn token_macs(&self, positions: u64) -> f64 {
        let seen = positions.min(self.most()) as f64 / self.every.max(1) as f64;
        seen * (self
            .width
            .saturating_mul(self.per_token)
            .saturating_mul(self.queries)) as f64
    }

    /// Returns the multiply-accumulates of a prompt's first `tokens` tokens with the rows of the
    /// tokens before each and its own.
    pub fn prompt_macs(&self, tokens: u64) -> f64 {
        let (n, window) = (tokens as f64, self.most().min(tokens) as f64);
        let pairs = window * (window + 1.0) / 2.0 + (n - window) * window;
        let pairs = pairs / self.every.max(1) as f64;
        pairs
            * (self
                .width
                .saturating_mul(self.per_token)
                .saturating_mul(self.queries)) as f64
    }
}

impl KvType {
    /// All types, in the order of messages.
    pub const ALL: [KvType; 3] = [KvType::F16, KvType::Q8_0, KvType::F32];

    /// Returns the name that options and files use.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::Q8_0 => "q8_0",
            KvType::F32 => "f32",
        }
    }

    /// Returns the bytes of a row of `width` values: 2 or 4 per value; for `q8_0`, one per value
    /// and 2 per block of 32 begun.
    pub fn row_bytes(self, width: u64) -> u64 {
        match self {
            KvType::F16 => width.saturating_mul(2),
            KvType::Q8_0 => {
                usize::try_from(width).map_or(u64::MAX, |width| q8_row_bytes(width) as u64)
            }
            KvType::F32 => width.saturating_mul(4),
        }
    }

    /// Returns the bytes of KV cache per token of context, over all layers.
    pub fn token_bytes(self, shape: &ModelShape) -> u64 {
        shape
            .caches
            .iter()
            .fold(0, |sum, cache| sum.saturating_add(cache.token_bytes(self)))
    }

    /// Returns the bytes of KV cache and recurrent states for some texts, over all layers.
    pub fn cache_bytes(self, shape: &ModelShape, room: CacheRoom) -> u64 {
        shape
            .caches
            .iter()
            .fold(0, |sum, cache| sum.saturating_add(cache.bytes(self, room)))
    }
}

impl CacheShape {
    /// Returns the bytes that one token of context adds, its part of the rows that it shares
    /// included.
    pub fn token_bytes(&self, kv_type: KvType) -> u64 {
        let bytes = |rows: &KvRows| {
            let bytes = kv_type.row_bytes(rows.width).saturating_mul(rows.per_token);
            bytes.div_ceil(rows.every.max(1))
        };
        self.rows
            .iter()
            .fold(0, |sum, rows| sum.saturating_add(bytes(rows)))
    }

    /// Returns the bytes of the rows of a cache for so many positions.
    pub fn rows_bytes(&self, kv_type: KvType, positions: u64) -> u64 {
        let bytes = |rows: &KvRows| {
            kv_type
                .row_bytes(rows.width)
                .saturating_mul(rows.held(positions))
        };
        self.rows
            .iter()
            .fold(0, |sum, rows| sum.saturating_add(bytes(rows)))
    }

    /// Returns the positions that a token sees at most, its own included; `None` where it sees all
    /// before it, or no rows are kept.
    pub fn window(&self) -> Option<u64> {
        let mut widest = None;
        for rows in &self.rows {
            widest = widest.max(Some(rows.window?));
        }
        widest
    }

    /// Returns the positions that the layer holds for some texts.
    pub fn positions(&self, room: CacheRoom) -> u64 {
        self.window()
            .and_then(|window| room.window_positions(window))
            .unwrap_or(room.positions())
    }

    /// Returns the layer's bytes of KV cache and recurrent states for some texts.
    pub fn bytes(&self, kv_type: KvType, room: CacheRoom) -> u64 {
        let states = self.state_bytes.saturating_mul(room.states());
        self.rows_bytes(kv_type, self.positions(room))
            .saturating_add(states)
    }

    /// Returns what a checkpoint adds to [`bytes`](Self::bytes).
    pub fn checkpoint_bytes(&self, kv_type: KvType, room: CacheRoom) -> u64 {
        let more = CacheRoom {
            checkpoints: room.checkpoints.saturating_add(1),
            ..room
        };
        self.bytes(kv_type, more)
            .saturating_sub(self.bytes(kv_type, room))
    }

    /// Returns the bytes that a pass of `tokens` tokens moves, the last of which is at position
    /// `positions`: cached rows are read once per layer that reads them, recurrent state is read and
    /// written back.
    pub fn moved_bytes(&self, kv_type: KvType, positions: u64, tokens: u64) -> u64 {
        let bytes = |rows: &KvRows| {
            kv_type
                .row_bytes(rows.width)
                .saturating_mul(rows.read(positions, tokens))
        };
        let state = self.state_bytes.saturating_mul(2);
        let once = self
            .rows
            .iter()
            .fold(0, |sum: u64, rows| sum.saturating_add(bytes(rows)));
        once.saturating_mul(self.more_readers.saturating_add(1))
            .saturating_add(state)
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvType {
    type Err = UnknownKvType;

    fn from_str(text: &str) -> Result<Self, UnknownKvType> {
        let found = KvType::ALL
            .into_iter()
            .find(|ty| ty.name().eq_ignore_ascii_case(text.trim()));
        found.ok_or_else(|| UnknownKvType(text.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source_id::SourceId;

    #[test]
    fn names_are_read_back() {
        for ty in KvType::ALL {
            assert_eq!(ty.to_string().parse(), Ok(ty));
        }
        assert_eq!(" Q8_0".parse(), Ok(KvType::Q8_0));
        let error = "q4_0".parse::<KvType>().unwrap_err().to_string();
        assert_eq!(
            error,
            "unknown KV cache type 'q4_0': expected f16, q8_0, or f32"
        );
    }

    #[test]
    fn rows_take_the_bytes_that_docs_say() {
        let bytes = |width| KvType::ALL.map(|ty| ty.row_bytes(width));
        assert_eq!(bytes(128), [256, 136, 512]);
        assert_eq!(bytes(16), [32, 18, 64]);
        assert_eq!(bytes(24), [48, 26, 96]);
        assert_eq!(bytes(33), [66, 37, 132]);
        assert_eq!(bytes(576), [1152, 612, 2304]);
        assert_eq!(bytes(0), [0, 0, 0]);
    }

    #[test]
    fn several_texts_have_whole_pages_each() {
        let room = |context, sequences| CacheRoom {
            checkpoints: 3,
            sequences,
            ..CacheRoom::of_one(context)
        };
        let positions = |context, sequences| room(context, sequences).positions();
        assert_eq!(
            [positions(100, 1), positions(100, 2), positions(128, 3)],
            [100, 256, 384]
        );
        assert_eq!(
            positions(u32::MAX, u32::MAX),
            (1 << 32) * u64::from(u32::MAX)
        );
        let cache = CacheShape {
            rows: vec![KvRows {
                width: 8,
                per_token: 2,
                every: 1,
                queries: 1,
                window: None,
                chosen: None,
            }],
            state_bytes: 1000,
            more_readers: 0,
        };
        let bytes = |context, sequences| cache.bytes(KvType::F16, room(context, sequences));
        assert_eq!(
            [bytes(100, 1), bytes(100, 2)],
            [100 * 32 + 4000, 256 * 32 + 5000]
        );
    }

    #[test]
    fn windows_end_what_is_read() {
        let all = KvRows {
            width: 8,
            per_token: 3,
            every: 1,
            queries: 2,
            window: None,
            chosen: None,
        };
        let near = KvRows {
            window: Some(10),
            ..all
        };
        // Token i has i rows to look at, the near one at most ten of them.
        assert_eq!(
            (all.token_macs(12), near.token_macs(12)),
            (12.0 * 48.0, 10.0 * 48.0)
        );
        assert_eq!(
            (all.prompt_macs(4), near.prompt_macs(4)),
            (10.0 * 48.0, 10.0 * 48.0)
        );
        assert_eq!(
            (all.prompt_macs(12), near.prompt_macs(12)),
            (78.0 * 48.0, 75.0 * 48.0)
        );
        assert_eq!(
            [all.read(4, 1), all.read(40, 1), all.read(40, 8)],
            [12, 120, 120]
        );
        // Eight tokens that share their reads look back at 17 positions: the first of them at 10.
        assert_eq!(
            [
                near.read(4, 1),
                near.read(40, 1),
                near.read(40, 8),
                near.read(12, 8)
            ],
            [12, 30, 51, 36]
        );
        assert_eq!(near.read(u64::MAX, u64::MAX), u64::MAX);
    }

    #[test]
    fn chosen_rows_end_what_a_token_reads_wherever_they_are() {
        let chosen = KvRows {
            width: 8,
            per_token: 3,
            every: 1,
            queries: 2,
            window: None,
            chosen: Some(10),
        };
        // Eight tokens may choose other positions each.
        assert_eq!(
            [
                chosen.read(4, 1),
                chosen.read(40, 1),
                chosen.read(40, 8),
                chosen.read(400, 8)
            ],
            [12, 30, 120, 240]
        );
        assert_eq!(
            (chosen.token_macs(12), chosen.prompt_macs(12)),
            (10.0 * 48.0, 75.0 * 48.0)
        );
        assert_eq!(chosen.read(u64::MAX, u64::MAX), u64::MAX);
    }

    #[test]
    fn rows_of_blocks_are_shared_by_their_positions() {
        let blocks = |every| KvRows {
            width: 8,
            per_token: 2,
            every,
            queries: 3,
            window: None,
            chosen: None,
        };
        let held = |every| [0, 1, 64, 65, 192].map(|n| blocks(every).held(n));
        assert_eq!(held(1), [0, 2, 128, 130, 384]);
        assert_eq!(held(4), [0, 2, 32, 34, 96]);
        // 22 blocks of three may end in a page, and one longer than a page in every page.
        assert_eq!(held(3), [0, 2, 44, 46, 132]);
        assert_eq!(held(128), [0, 2, 2, 4, 6]);
        assert_eq!(blocks(1).held(u64::MAX), u64::MAX);
        let read = |n| (blocks(4).read(n, 1), blocks(4).token_macs(n));
        assert_eq!([read(4), read(40)], [(2, 48.0), (20, 480.0)]);
        let chosen = KvRows {
            chosen: Some(8),
            ..blocks(4)
        };
        assert_eq!((chosen.read(40, 1), chosen.token_macs(40)), (4, 96.0));
        assert_eq!(chosen.prompt_macs(9), (36.0 + 8.0) * 12.0);
        let cache = CacheShape {
            more_readers: 0,
            rows: vec![blocks(4)],
            state_bytes: 100,
        };
        assert_eq!(cache.token_bytes(KvType::F32), 16);
        assert_eq!(cache.token_bytes(KvType::Q8_0), 5);
        let room = CacheRoom::of_one(65);
        assert_eq!(cache.bytes(KvType::F32, room), 34 * 32 + 100);
    }

    #[test]
    fn layers_with_windows_hold_the_windows_and_a_batch() {
        let rows = |window| CacheShape {
            rows: vec![KvRows {
                width: 8,
                per_token: 2,
                every: 1,
                queries: 1,
                window,
                chosen: None,
            }],
            state_bytes: 0,
            more_readers: 0,
        };
        let room = |context, sequences, checkpoints| CacheRoom {
            sequences,
            checkpoints,
            ..CacheRoom::of_one(context)
        };
        let held = |window, room| rows(window).positions(room) / 64;
        // Two pages of the window and two more, 32 of a batch, three of each checkpoint.
        assert_eq!(held(Some(128), room(131_072, 1, 0)), 4 + 32);
        assert_eq!(held(Some(129), room(131_072, 1, 0)), 5 + 32);
        assert_eq!(held(Some(128), room(131_072, 16, 10)), 16 * 4 + 32 + 10 * 3);
        assert_eq!(held(Some(1), room(131_072, 2, 1)), 2 * 3 + 32 + 2);
        assert_eq!(held(None, room(131_072, 2, 1)), 2 * 2048);
        // What saves nothing is not done.
        assert_eq!(held(Some(128), room(36 * 64, 1, 9)), 36);
        assert_eq!(held(Some(128), room(36 * 64 + 1, 1, 9)), 36 + 27);
        assert_eq!(rows(Some(128)).positions(room(100, 1, 0)), 100);
        assert_eq!(held(Some(u64::MAX), room(131_072, 1, 0)), 2048);
        assert_eq!(held(Some(128), room(131_072, 1, 0).whole()), 2048);
        let most = room(u32::MAX, 1, u32::MAX);
        assert_eq!(
            held(Some(1 << 31), most),
            (1 << 25) + 34 + ((1 << 25) + 1) * u64::from(u32::MAX)
        );
        let bytes = |n| rows(Some(128)).bytes(KvType::F16, room(131_072, 1, n));
        let one = rows(Some(128)).checkpoint_bytes(KvType::F16, room(131_072, 1, 5));
        assert_eq!((bytes(1) - bytes(0), one), (3 * 64 * 32, 3 * 64 * 32));
        // Checkpoints come where they leave something of what is saved.
        let shape = ModelShape {
            id: SourceId {
                name: String::new(),
                hash: String::new(),
            },
            arch: String::new(),
            n_layer: 3,
            hidden: 0,
            n_vocab: 0,
            context: 0,
            caches: vec![rows(Some(128)), rows(None), rows(Some(1024))],
            dense: Vec::new(),
            experts: Vec::new(),
            cpu_only: Vec::new(),
        };
        let checkpoints = |context, sequences| {
            let room = room(context, sequences, 0).for_model(&shape);
            (room.window_chunk, room.checkpoints)
        };
        assert_eq!(checkpoints(131_072, 3), (Some(WINDOW_CHUNK), 12));
        assert_eq!(
            checkpoints((18 + 32 + 3 * 17) * 64, 1),
            (Some(WINDOW_CHUNK), 3)
        );
        assert_eq!(checkpoints((4 + 32 + 7) * 64, 1), (Some(WINDOW_CHUNK), 2));
        assert_eq!(checkpoints((4 + 32) * 64, 1), (None, 0));
        // A layer whose rows differ holds what the widest needs.
        let mut both = rows(Some(5));
        both.rows.extend(rows(Some(9)).rows);
        assert_eq!(both.window(), Some(9));
        both.rows.extend(rows(None).rows);
        assert_eq!(both.window(), None);
    }
}
