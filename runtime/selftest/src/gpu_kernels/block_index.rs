//! Block-sparse attention: ratings and choices of blocks, and attention to what was chosen, for each
//! head of keys and values by itself.

use super::Check;
use super::attention::{Scores, plain_attention};
use super::index::best;
use super::kv_rows::{stored, widened};
use super::texts::Text;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{
    Attend, AttentionBuffers, BlockQueries, Choice, ChosenBlocks, OpenBlock,
};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::WindowKind;
use tier_plan_kernels::random::Random;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for kv_type in KvType::ALL {
        checks.push(Check::new(
            format!("rate_best, choose_blocks, {kv_type}"),
            move |ops, random| choose(ops, random, kv_type),
        ));
        checks.push(Check::new(
            format!("attend_chosen, blocks, {kv_type}"),
            move |ops, random| attend(ops, random, kv_type),
        ));
    }
    checks
}

/// Rows of a text's positions in a cache whose other rows are not numbers.
fn cached(
    random: &mut Random,
    text: &Text,
    kv_type: KvType,
    end: usize,
    width: usize,
) -> Vec<Vec<u8>> {
    let mut rows = vec![stored(kv_type, &vec![f32::NAN; width]); text.capacity()];
    for position in 0..end {
        rows[text.at(position)] = stored(kv_type, &random.floats(width));
    }
    rows
}

/// Sizes of a choice.
#[derive(Clone, Copy)]
struct Case {
    n_head: usize,
    dim: usize,
    tokens: usize,
    past: usize,
    kept: usize,
    block: usize,
    local: usize,
}

fn choose(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let plain = Case {
        n_head: 2,
        dim: 64,
        tokens: 4,
        past: 61,
        kept: 3,
        block: 8,
        local: 1,
    };
    let cases = [
        plain,
        // Several groups of heads, and a key that is no multiple of a round.
        Case {
            n_head: 11,
            dim: 36,
            local: 2,
            ..plain
        },
        // The token's own block must be among the best.
        Case { local: 0, ..plain },
        // The first tokens attend to all blocks.
        Case {
            past: 21,
            tokens: 9,
            ..plain
        },
        // More positions than are rated together, and nothing but neighbors.
        Case {
            block: 40,
            past: 170,
            kept: 2,
            local: 2,
            ..plain
        },
        // Positions by themselves.
        Case {
            block: 1,
            kept: 20,
            local: 3,
            n_head: 1,
            ..plain
        },
    ];
    let mut outcome = Outcome::default();
    for case in cases {
        outcome.merge(choose_case(ops, random, kv_type, case)?);
    }
    Ok(outcome)
}

fn choose_case(
    ops: &Ops,
    random: &mut Random,
    kv_type: KvType,
    case: Case,
) -> Result<Outcome, CudaError> {
    let Case {
        n_head,
        dim,
        tokens,
        past,
        kept,
        block,
        local,
    } = case;
    let (device, text) = (ops.device(), Text::new(ops, past, tokens)?);
    let choice = Choice {
        kept,
        block,
        open: OpenBlock::Rated,
    };
    let rows = cached(random, &text, kv_type, past + tokens, dim);
    let queries = random.floats(tokens * n_head * dim);
    let keys = Buffer::of_bytes(device, &rows.concat())?;
    let on_device = Buffer::of_f32(device, &queries)?;
    let b = BlockQueries {
        queries: on_device.view(),
        n_head,
        key_dim: dim,
        positions: text.positions(),
        kv_type,
        keys: keys.view(),
        choice,
        local,
    };
    let width = choice.rating_words(past + tokens);
    let ratings = Buffer::new_f32(device, tokens * n_head * width)?;
    let untouched = vec![-7; tokens * n_head * kept];
    let lists = Buffer::of_i32(device, &untouched)?;
    ops.choose_blocks(&b, ratings.view(), lists.view())?;
    let (rated, got) = (ratings.view().to_f32()?, lists.view().to_i32()?);
    let mut outcome = Outcome::default();
    for (at, list) in got.chunks_exact(kept).enumerate() {
        let position = past + at / n_head;
        let visible = position / block + 1;
        if visible <= kept {
            outcome.compare_exact(list, &untouched[..kept]);
            continue;
        }
        let query = &queries[at * dim..][..dim];
        let dot = |position: usize| -> f64 {
            let key = widened(kv_type, &rows[text.at(position)], dim);
            query.iter().zip(key).map(|(q, k)| f64::from(q * k)).sum()
        };
        let of_block = |b: usize| {
            let positions = b * block..((b + 1) * block).min(position + 1);
            positions.map(dot).fold(f64::NEG_INFINITY, f64::max)
        };
        let rated = &rated[at * width..][..visible];
        let (free, always) = rated.split_at(visible - local);
        let near = |value| Expected {
            value,
            allowed: 1e-5 * dim as f64 / 16.0,
        };
        outcome.compare(free, (0..free.len()).map(of_block).map(near));
        outcome.compare_exact(always, &vec![f32::INFINITY; local]);
        outcome.compare_exact(list, &best(rated, kept));
    }
    // A few tokens at a time choose the same.
    let fewer = Buffer::new_f32(device, n_head * width)?;
    let again = Buffer::of_i32(device, &untouched)?;
    ops.choose_blocks(&b, fewer.view(), again.view())?;
    outcome.compare_exact(&again.view().to_i32()?, &got);
    Ok(outcome)
}

/// Attention to chosen blocks.
#[derive(Clone, Copy)]
struct Attention {
    n_head_kv: usize,
    group: usize,
    width: usize,
    tokens: usize,
    past: usize,
    per_token: usize,
    choice: Choice,
    sinks: bool,
}

/// Returns the positions that a token attends to which sees `seen`, and chose `list`.
fn attended(choice: Choice, seen: usize, list: Option<&[i32]>) -> Vec<usize> {
    let block = choice.block;
    let (visible, end) = match choice.open {
        OpenBlock::Rated => (seen.div_ceil(block), seen),
        OpenBlock::Added | OpenBlock::Skipped => (seen / block, seen / block * block),
    };
    let chosen: Vec<usize> = match list {
        Some(list) => list.iter().map(|b| *b as usize).collect(),
        None => (0..visible).collect(),
    };
    let positions = chosen
        .into_iter()
        .flat_map(|b| b * block..((b + 1) * block).min(end));
    let added = match choice.open {
        OpenBlock::Added => end..seen,
        OpenBlock::Skipped | OpenBlock::Rated => seen..seen,
    };
    positions.chain(added).collect()
}

/// Compares attention to chosen blocks with the formula. Tokens that see few attend to all.
fn attend(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let of = |kept, block, open| Choice { kept, block, open };
    let plain = Attention {
        n_head_kv: 2,
        group: 3,
        width: 64,
        tokens: 3,
        past: 61,
        per_token: 2,
        choice: of(3, 8, OpenBlock::Rated),
        sinks: false,
    };
    let cases = [
        plain,
        // More heads than a block has, and more than a chunk of positions.
        Attention {
            group: 9,
            width: 36,
            past: 700,
            choice: of(9, 40, OpenBlock::Rated),
            sinks: true,
            ..plain
        },
        Attention {
            per_token: 1,
            choice: of(4, 7, OpenBlock::Added),
            ..plain
        },
        Attention {
            per_token: 1,
            choice: of(4, 7, OpenBlock::Skipped),
            ..plain
        },
        // The first tokens see no complete block, and those before the last choose nothing.
        Attention {
            past: 0,
            tokens: 13,
            per_token: 1,
            choice: of(2, 4, OpenBlock::Skipped),
            ..plain
        },
        Attention {
            past: 20,
            tokens: 13,
            choice: of(3, 8, OpenBlock::Rated),
            ..plain
        },
    ];
    let mut outcome = Outcome::default();
    for case in cases {
        outcome.merge(attend_case(ops, random, kv_type, case)?);
    }
    Ok(outcome)
}

fn attend_case(
    ops: &Ops,
    random: &mut Random,
    kv_type: KvType,
    case: Attention,
) -> Result<Outcome, CudaError> {
    let Attention {
        n_head_kv,
        group,
        width,
        tokens,
        past,
        per_token,
        choice,
        sinks,
    } = case;
    let (device, heads) = (ops.device(), n_head_kv * group);
    let text = Text::new(ops, past, tokens)?;
    // The heads of a position lie beside each other.
    let mut cache = || {
        let heads: Vec<Vec<Vec<u8>>> = (0..n_head_kv)
            .map(|_| cached(random, &text, kv_type, past + tokens, width))
            .collect();
        let at = |position: usize| heads.iter().flat_map(move |rows| rows[position].clone());
        let bytes: Vec<u8> = (0..text.capacity()).flat_map(at).collect();
        (heads, bytes)
    };
    let ((keys, key_bytes), (values, value_bytes)) = (cache(), cache());
    let mut lists = Vec::new();
    for token in 0..tokens {
        let seen = past + token + 1;
        let visible = match choice.open {
            OpenBlock::Rated => seen.div_ceil(choice.block),
            OpenBlock::Added | OpenBlock::Skipped => seen / choice.block,
        };
        for _ in 0..per_token {
            // What is not read may be anything.
            lists.extend(match visible > choice.kept {
                true => best(&random.floats(visible), choice.kept),
                false => vec![i32::MIN; choice.kept],
            });
        }
    }
    let queries = random.floats(tokens * heads * width);
    let sink_values = random.floats(heads);
    let [on_device, sink_buffer] = [&queries, &sink_values].map(|v| Buffer::of_f32(device, v));
    let (on_device, sink_buffer) = (on_device?, sink_buffer?);
    let [key_cache, value_cache] =
        [&key_bytes, &value_bytes].map(|bytes| Buffer::of_bytes(device, bytes));
    let (key_cache, value_cache) = (key_cache?, value_cache?);
    let list_buffer = Buffer::of_i32(device, &lists)?;
    let out = Buffer::new_f32(device, tokens * heads * width)?;
    // For two tokens at once, so that more tokens take several launches.
    let room = AttentionBuffers::values(tokens.min(2), heads, past + tokens, width);
    let buffers = AttentionBuffers::new(device, room, width)?;
    let scale = 2.0 / (width as f32).sqrt();
    let attention = Attend {
        queries: on_device.view(),
        keys: key_cache.view(),
        values: value_cache.view(),
        kv_type,
        n_head_kv,
        group,
        key_width: width,
        value_row_width: width,
        value_width: width,
        scale,
        softcap: None,
        positions: text.positions(),
        window: None,
        window_kind: WindowKind::Sliding,
        sinks: sinks.then_some(sink_buffer.view()),
    };
    let chosen = ChosenBlocks {
        lists: list_buffer.view(),
        per_token,
        choice,
    };
    ops.attend_chosen(&attention, chosen, &buffers, out.view())?;
    let mut outcome = Outcome::default();
    for (at, got) in out.view().to_f32()?.chunks_exact(width).enumerate() {
        let (token, head) = (at / heads, at % heads);
        let kv_head = head / group;
        let own = token * per_token + kv_head.min(per_token - 1);
        let list = &lists[own * choice.kept..][..choice.kept];
        let list = (list[0] != i32::MIN).then_some(list);
        let positions = attended(choice, past + token + 1, list);
        if positions.is_empty() {
            outcome.compare_exact(got, &vec![0.0; width]);
            continue;
        }
        let read = |rows: &[Vec<u8>]| -> Vec<Vec<f32>> {
            let row = |position: &usize| widened(kv_type, &rows[text.at(*position)], width);
            positions.iter().map(row).collect()
        };
        let scores = Scores {
            scale: f64::from(scale),
            cap: None,
            sink: sinks.then(|| f64::from(sink_values[head])),
        };
        let query = &queries[at * width..][..width];
        let expected = plain_attention(
            &scores,
            query,
            &read(&keys[kv_head]),
            &read(&values[kv_head]),
        );
        let near = |value| Expected {
            value,
            allowed: 1e-5,
        };
        outcome.compare(got, expected.into_iter().map(near));
    }
    Ok(outcome)
}
