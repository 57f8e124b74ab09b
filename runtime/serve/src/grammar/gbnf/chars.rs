//! Sets of characters.

use std::fmt::Write;

/// Code points that are no characters.
const SURROGATES: [u32; 2] = [0xd800, 0xdfff];

/// The last code point.
const LAST: u32 = 0x10_ffff;

/// A set of characters as ranges that are sorted and apart.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Chars(Vec<[u32; 2]>);

impl Chars {
    /// Returns the set of the characters in some ranges, which include their ends.
    pub fn of(mut ranges: Vec<[u32; 2]>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<[u32; 2]> = Vec::with_capacity(ranges.len());
        for [from, to] in ranges {
            match merged.last_mut() {
                Some([_, end]) if from <= end.saturating_add(1) => *end = to.max(*end),
                _ => merged.push([from, to]),
            }
        }
        Self(merged)
    }

    pub fn one(c: char) -> Self {
        Self(vec![[c.into(), c.into()]])
    }

    /// Returns all characters.
    pub fn any() -> Self {
        Self::default().complement()
    }

    /// Returns the characters that are not in the set.
    pub fn complement(&self) -> Self {
        let mut taken = self.0.clone();
        taken.push(SURROGATES);
        let taken = Self::of(taken);
        let mut ranges = Vec::with_capacity(taken.0.len() + 1);
        let mut next = 0;
        for [from, to] in taken.0 {
            if from > next {
                ranges.push([next, from - 1]);
            }
            next = to + 1;
        }
        if next <= LAST {
            ranges.push([next, LAST]);
        }
        Self(ranges)
    }

    pub fn ranges(&self) -> &[[u32; 2]] {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether some character is in both sets.
    pub fn meets(&self, other: &Self) -> bool {
        let (mut a, mut b) = (self.0.iter().peekable(), other.0.iter().peekable());
        while let (Some([a_from, a_to]), Some([b_from, b_to])) = (a.peek(), b.peek()) {
            if a_to < b_from {
                a.next();
            } else if b_to < a_from {
                b.next();
            } else {
                return true;
            }
        }
        false
    }

    /// Returns the characters of both sets.
    pub fn union(&self, other: &Self) -> Self {
        Self::of([&self.0[..], &other.0].concat())
    }

    /// Whether some characters of both sets begin with the same byte in UTF-8.
    pub fn share_a_byte(&self, other: &Self) -> bool {
        let (one, other) = (self.first_bytes(), other.first_bytes());
        one.iter().zip(other).any(|(a, b)| a & b != 0)
    }

    /// Returns a bit per byte that a character of the set begins with.
    fn first_bytes(&self) -> [u64; 4] {
        let mut bytes = [0u64; 4];
        let byte = |point: u32| match point {
            0..0x80 => point,
            0x80..0x800 => 0xc0 | point >> 6,
            0x800..0x1_0000 => 0xe0 | point >> 12,
            _ => 0xf0 | point >> 18,
        };
        for [from, to] in &self.0 {
            for byte in byte(*from)..=byte(*to) {
                bytes[byte as usize / 64] |= 1 << (byte % 64);
            }
        }
        bytes
    }

    /// Writes the set as a part of a regular expression.
    pub fn write(&self, regex: &mut String) {
        if let [[from, to]] = self.0[..]
            && from == to
        {
            return write_code(from, regex);
        }
        regex.push('[');
        for [from, to] in &self.0 {
            write_code(*from, regex);
            if to > from {
                regex.push('-');
                write_code(*to, regex);
            }
        }
        regex.push(']');
    }
}

/// Writes a code point so that it has no other meaning.
fn write_code(point: u32, regex: &mut String) {
    match char::from_u32(point) {
        Some(c) if c.is_ascii_alphanumeric() => regex.push(c),
        _ => {
            // Writing to a string does not fail.
            let _ = write!(regex, "\\x{{{point:x}}}");
        }
    }
}
