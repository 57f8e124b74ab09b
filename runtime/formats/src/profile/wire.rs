//! The bytes of versions 1 to 3 of a profile.
//!
//! Version 2 adds profiles of counts alone, version 3 the guesses of a profile with traces; each is
//! written in the lowest version that has all of it, which older programs read.
//!
//! A trace has millions of choices, so they are packed: an expert in as many bits as the number of
//! experts needs, its weight in a byte. Everything small and of varying length is in a JSON header.

use super::{Guesses, Profile, PromptTrace, Split};
use crate::FormatError;
use crate::framed::parse_header;
use crate::kind::{Kind, PROFILE, PROFILE_MAGIC};
use crate::ranges::{Allowance, MAX_EXPERT, MAX_LAYER};
use crate::source_id::SourceId;
use serde::{Deserialize, Serialize};
use std::path::Path;
use xxhash_rust::xxh3::xxh3_64;

/// Magic, version, header length.
const FIXED: usize = 16;
/// Most experts that a token may use in a layer; no model comes near, and checks are quadratic in
/// it.
const MAX_USED: u32 = 1024;
/// Most uses of an expert: whole numbers up to here are exact in 64-bit floats.
const MAX_COUNT: u64 = 1 << 53;
/// Bytes of a count.
const COUNT_BYTES: usize = 8;
/// The checksum at the end.
const SUM: usize = 8;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireHeader {
    model: WireSource,
    made: String,
    n_expert: u32,
    n_used: u32,
    layers: Vec<u32>,
    prompts: Vec<WirePrompt>,
    /// Version 2: the payload is counts and nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    counts: Option<WireCounts>,
    /// Version 3: guessed experts of each layer, and how many of them were chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    guesses: Option<Vec<[u64; 2]>>,
}

/// What the counts of a profile without traces count.
#[derive(Serialize, Deserialize, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum WireCounts {
    /// Choices of tokens that were processed as prompts.
    Prompt,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireSource {
    name: String,
    hash: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WirePrompt {
    domain: String,
    name: String,
    split: WireSplit,
    prompt_tokens: u32,
    decode_tokens: u32,
    /// Bytes from the end of the header to this prompt's choices.
    offset: u64,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum WireSplit {
    Train,
    HeldOut,
}

/// Bits that the number of an expert takes.
fn bits_for(n_expert: u32) -> u32 {
    n_expert
        .saturating_sub(1)
        .checked_ilog2()
        .map_or(0, |top| top + 1)
}

/// Choices (experts and as many weights) in a prompt's trace.
fn choices(prompt_tokens: u32, decode_tokens: u32, layers: usize, n_used: u32) -> Option<u64> {
    let tokens = u64::from(prompt_tokens) + u64::from(decode_tokens);
    tokens
        .checked_mul(layers as u64)?
        .checked_mul(u64::from(n_used))
}

/// Returns the bytes of `count` packed experts.
fn packed_bytes(choices: u64, bits: u32) -> Option<u64> {
    Some(choices.checked_mul(u64::from(bits))?.div_ceil(8))
}

/// Checks the sizes, whatever the traces say.
fn check_shape(layers: &[u32], n_expert: u32, n_used: u32) -> Result<(), String> {
    if layers.is_empty() {
        return Err("no layers; only models with routed experts have a profile".into());
    }
    if let Some(pair) = layers.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(format!(
            "layer {} comes after layer {}, but layers must ascend",
            pair[1], pair[0]
        ));
    }
    if let Some(&last) = layers.last().filter(|&&last| last > MAX_LAYER) {
        return Err(format!(
            "layer {last} is past {MAX_LAYER}, the highest that can be named"
        ));
    }
    if n_expert == 0 || n_expert > MAX_EXPERT + 1 {
        return Err(format!(
            "n_expert is {n_expert}, but must be 1 to {}",
            MAX_EXPERT + 1
        ));
    }
    if n_used == 0 || n_used > n_expert || n_used > MAX_USED {
        return Err(format!(
            "n_used is {n_used}, but must be 1 to {} with n_expert = {n_expert}",
            n_expert.min(MAX_USED)
        ));
    }
    // Whoever counts accesses holds a number for each of these.
    Allowance::for_a_file().take(layers.len() as u64 * u64::from(n_expert))?;
    Ok(())
}

/// Checks that each token's choices in a layer are different experts that exist.
fn check_trace(name: &str, experts: &[u16], n_expert: u32, n_used: u32) -> Result<(), String> {
    if let Some(&bad) = experts.iter().find(|&&e| u32::from(e) >= n_expert) {
        return Err(format!(
            "prompt '{name}' chose expert {bad}, but there are only {n_expert}"
        ));
    }
    for chosen in experts.chunks_exact(n_used as usize) {
        for (at, expert) in chosen.iter().enumerate() {
            if chosen[..at].contains(expert) {
                return Err(format!(
                    "a token of prompt '{name}' chose expert {expert} twice in one layer"
                ));
            }
        }
    }
    Ok(())
}

/// Counts must be those of a whole layer, of as many tokens as floats can count.
fn check_counts(counted: &[Vec<u64>], layers: &[u32], n_expert: u32) -> Result<(), String> {
    if counted.len() != layers.len() {
        return Err(format!(
            "counts of {} layers, but there are {}",
            counted.len(),
            layers.len()
        ));
    }
    for (counts, layer) in counted.iter().zip(layers) {
        if counts.len() != n_expert as usize {
            return Err(format!(
                "layer {layer} has {} counts for {n_expert} experts",
                counts.len()
            ));
        }
        if let Some(count) = counts.iter().find(|&&c| c > MAX_COUNT) {
            return Err(format!(
                "layer {layer} has an expert with {count} uses, but at most {MAX_COUNT} are counted"
            ));
        }
        if counts.iter().all(|&c| c == 0) {
            return Err(format!(
                "layer {layer} has no uses of any expert; nothing was counted there"
            ));
        }
    }
    Ok(())
}

/// Guesses must be those of every layer, no more of them right than were made, and as many as
/// floats can count.
fn check_guesses(guesses: &[Guesses], layers: &[u32]) -> Result<(), String> {
    if guesses.len() != layers.len() {
        return Err(format!(
            "guesses of {} layers, but there are {}",
            guesses.len(),
            layers.len()
        ));
    }
    for (Guesses { made, right }, layer) in guesses.iter().zip(layers) {
        if right > made || *made > MAX_COUNT {
            return Err(format!(
                "layer {layer} has {right} right guesses of {made}; at most {MAX_COUNT} are counted"
            ));
        }
    }
    Ok(())
}

/// Says why a profile could not be read back.
pub(super) fn check(profile: &Profile) -> Result<(), String> {
    check_shape(&profile.layers, profile.n_expert, profile.n_used)?;
    if let Some(counted) = &profile.counted {
        check_counts(counted, &profile.layers, profile.n_expert)?;
        if !profile.prompts.is_empty() {
            return Err(
                "it has both counts and traces; counts are for profiles without traces".into(),
            );
        }
    }
    if let Some(guesses) = &profile.guesses {
        check_guesses(guesses, &profile.layers)?;
    }
    for prompt in &profile.prompts {
        let want = choices(
            prompt.prompt_tokens,
            prompt.decode_tokens,
            profile.layers.len(),
            profile.n_used,
        );
        for (what, found) in [
            ("experts", prompt.experts.len()),
            ("weights", prompt.weights.len()),
        ] {
            if want != Some(found as u64) {
                return Err(format!(
                    "prompt '{}' has {found} {what}, but its tokens make {}",
                    prompt.name,
                    want.map_or("too many".into(), |w| w.to_string())
                ));
            }
        }
        check_trace(
            &prompt.name,
            &prompt.experts,
            profile.n_expert,
            profile.n_used,
        )?;
    }
    Ok(())
}

/// Encodes the file. A profile that [`check`] refuses gives bytes that [`decode`] refuses.
pub(super) fn encode(profile: &Profile) -> Vec<u8> {
    let bits = bits_for(profile.n_expert);
    let mut payload = Vec::new();
    let mut prompts = Vec::with_capacity(profile.prompts.len());
    for prompt in &profile.prompts {
        prompts.push(WirePrompt {
            domain: prompt.domain.clone(),
            name: prompt.name.clone(),
            split: match prompt.split {
                Split::Train => WireSplit::Train,
                Split::HeldOut => WireSplit::HeldOut,
            },
            prompt_tokens: prompt.prompt_tokens,
            decode_tokens: prompt.decode_tokens,
            offset: payload.len() as u64,
        });
        pack(&prompt.experts, bits, &mut payload);
        payload.extend_from_slice(&prompt.weights);
    }
    for count in profile.counted.iter().flatten().flatten() {
        payload.extend_from_slice(&count.to_le_bytes());
    }
    let header = WireHeader {
        model: WireSource {
            name: profile.model.name.clone(),
            hash: profile.model.hash.clone(),
        },
        made: profile.made.clone(),
        n_expert: profile.n_expert,
        n_used: profile.n_used,
        layers: profile.layers.clone(),
        prompts,
        counts: profile.counted.as_ref().map(|_| WireCounts::Prompt),
        guesses: profile
            .guesses
            .as_ref()
            .map(|all| all.iter().map(|g| [g.made, g.right]).collect()),
    };
    // A struct of strings and numbers has no way to fail; if it did, an empty header would be
    // refused on reading.
    let header = serde_json::to_vec(&header).unwrap_or_default();
    let mut out = Vec::with_capacity(FIXED + header.len() + payload.len() + SUM);
    out.extend_from_slice(&PROFILE_MAGIC);
    let version: u32 = match (&profile.guesses, &profile.counted) {
        (Some(_), _) => 3,
        (None, Some(_)) => 2,
        (None, None) => 1,
    };
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&u32::try_from(header.len()).unwrap_or(0).to_le_bytes());
    out.extend_from_slice(&header);
    out.append(&mut payload);
    let sum = xxh3_64(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out
}

/// Returns the identity of a file with these bytes; its name says whether it has only counts.
pub(super) fn identify(model: &str, counted: bool, bytes: &[u8]) -> SourceId {
    let what = if counted {
        ", marginal counts of prompt processing"
    } else {
        ""
    };
    SourceId::of_bytes(&format!("{model}{what}"), bytes)
}

/// Reads the file's bytes.
pub(super) fn decode(bytes: &[u8], path: &Path) -> Result<Profile, FormatError> {
    let (version, rest) = open(bytes, path)?;
    PROFILE.check_version(i64::from(version), path)?;
    decode_body(version, bytes, rest).map_err(|what| FormatError::invalid(path, what))
}

/// Splits off the version from what comes after it.
fn open<'a>(bytes: &'a [u8], path: &Path) -> Result<(u32, &'a [u8]), FormatError> {
    let Some(rest) = bytes.strip_prefix(&PROFILE_MAGIC) else {
        return Err(PROFILE.mismatch(path, &Kind::describe(bytes)));
    };
    match rest.split_first_chunk::<4>() {
        Some((version, rest)) => Ok((u32::from_le_bytes(*version), rest)),
        None => Err(FormatError::invalid(path, CUT_SHORT)),
    }
}

const CUT_SHORT: &str = "the file is cut short; run `tier-plan profile` again";

fn decode_body(version: u32, all: &[u8], rest: &[u8]) -> Result<Profile, String> {
    let (length, rest) = rest.split_first_chunk::<4>().ok_or(CUT_SHORT)?;
    let length = u32::from_le_bytes(*length) as usize;
    // The checksum comes first, so that damage is called damage and not whatever the damaged bytes
    // would mean.
    let (rest, sum) = rest.split_last_chunk::<SUM>().ok_or(CUT_SHORT)?;
    if length > rest.len() {
        return Err(CUT_SHORT.into());
    }
    if xxh3_64(&all[..all.len() - SUM]) != u64::from_le_bytes(*sum) {
        return Err("the checksum is wrong: the file is damaged or cut short; run `tier-plan profile` again".into());
    }
    let (header, payload) = rest.split_at(length);
    let header: WireHeader = parse_header(header).map_err(|e| format!("header: {e}"))?;
    check_shape(&header.layers, header.n_expert, header.n_used)?;
    if header.counts.is_some() && version < 2 {
        return Err("header: unknown field `counts` in version 1; write version 2".into());
    }
    if header.guesses.is_some() && version < 3 {
        return Err(format!(
            "header: unknown field `guesses` in version {version}; write version 3"
        ));
    }
    let guesses: Option<Vec<Guesses>> = header.guesses.as_ref().map(|all| {
        all.iter()
            .map(|&[made, right]| Guesses { made, right })
            .collect()
    });
    if let Some(guesses) = &guesses {
        check_guesses(guesses, &header.layers)?;
    }
    let counted = match header.counts {
        Some(WireCounts::Prompt) => Some(decode_counts(&header, payload)?),
        None => None,
    };
    let bits = bits_for(header.n_expert);
    let mut at = if counted.is_some() { payload.len() } else { 0 };
    let mut prompts = Vec::with_capacity(header.prompts.len());
    for wire in header.prompts {
        let name = &wire.name;
        if wire.offset != at as u64 {
            return Err(format!(
                "prompt '{name}' says offset {}, but its choices start at {at}",
                wire.offset
            ));
        }
        let lengths = choices(
            wire.prompt_tokens,
            wire.decode_tokens,
            header.layers.len(),
            header.n_used,
        )
        .and_then(|n| {
            Some((
                usize::try_from(n).ok()?,
                usize::try_from(packed_bytes(n, bits)?).ok()?,
            ))
        });
        // Nothing is allocated before the file is known to hold that many weights.
        let Some((packed, weights, end)) = lengths.and_then(|(n, packed)| {
            let middle = at.checked_add(packed)?;
            let end = middle.checked_add(n)?;
            Some((payload.get(at..middle)?, payload.get(middle..end)?, end))
        }) else {
            return Err(format!(
                "prompt '{name}' has more tokens than the file has choices; {CUT_SHORT}"
            ));
        };
        at = end;
        let experts = unpack(packed, bits, weights.len());
        check_trace(name, &experts, header.n_expert, header.n_used)?;
        prompts.push(PromptTrace {
            domain: wire.domain,
            name: wire.name,
            split: match wire.split {
                WireSplit::Train => Split::Train,
                WireSplit::HeldOut => Split::HeldOut,
            },
            prompt_tokens: wire.prompt_tokens,
            decode_tokens: wire.decode_tokens,
            experts,
            weights: weights.to_vec(),
        });
    }
    if at != payload.len() {
        return Err(format!(
            "{} bytes after the last prompt belong to none",
            payload.len() - at
        ));
    }
    Ok(Profile {
        id: identify(&header.model.name, counted.is_some(), all),
        counted,
        guesses,
        model: SourceId {
            name: header.model.name,
            hash: header.model.hash,
        },
        layers: header.layers,
        n_expert: header.n_expert,
        n_used: header.n_used,
        made: header.made,
        prompts,
    })
}

/// Decodes the counts of a profile that has nothing else.
fn decode_counts(header: &WireHeader, payload: &[u8]) -> Result<Vec<Vec<u64>>, String> {
    let (n_layer, n_expert) = (header.layers.len(), header.n_expert as usize);
    if !header.prompts.is_empty() {
        return Err("it has both counts and traces; counts are for profiles without traces".into());
    }
    // At most 4,194,304 of them, as the shape was checked.
    let want = n_layer * n_expert * COUNT_BYTES;
    if payload.len() != want {
        return Err(format!(
            "{} bytes of counts, but {n_layer} layers of {n_expert} experts take {want}",
            payload.len()
        ));
    }
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .rev()
            .fold(0u64, |sum, &b| sum << 8 | u64::from(b))
    };
    let layer = |bytes: &[u8]| {
        bytes
            .chunks_exact(COUNT_BYTES)
            .map(number)
            .collect::<Vec<u64>>()
    };
    let counted: Vec<Vec<u64>> = payload
        .chunks_exact(n_expert * COUNT_BYTES)
        .map(layer)
        .collect();
    check_counts(&counted, &header.layers, header.n_expert)?;
    Ok(counted)
}

/// Appends numbers of `bits` bits (at most 16), the lowest bits first, and fills up the last byte
/// with zeros.
fn pack(numbers: &[u16], bits: u32, out: &mut Vec<u8>) {
    out.reserve(packed_bytes(numbers.len() as u64, bits).unwrap_or(0) as usize);
    let mask = (1u32 << bits) - 1;
    let mut held = 0u32;
    let mut n_held = 0u32;
    for &number in numbers {
        // At most 7 bits wait here, and at most 16 join them.
        held |= (u32::from(number) & mask) << n_held;
        n_held += bits;
        while n_held >= 8 {
            out.push(held as u8);
            held >>= 8;
            n_held -= 8;
        }
    }
    if n_held > 0 {
        out.push(held as u8);
    }
}

/// Unpacks the first `count` numbers of `bits` bits; missing bytes read as zero.
fn unpack(packed: &[u8], bits: u32, count: usize) -> Vec<u16> {
    let mask = (1u32 << bits) - 1;
    let mut bytes = packed.iter();
    let mut held = 0u32;
    let mut n_held = 0u32;
    let mut out = Vec::with_capacity(count);
    for _ in 0..count {
        while n_held < bits {
            held |= u32::from(bytes.next().copied().unwrap_or(0)) << n_held;
            n_held += 8;
        }
        out.push((held & mask) as u16);
        held >>= bits;
        n_held -= bits;
    }
    out
}
