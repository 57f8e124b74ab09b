//! Comparing keys in a time that does not depend on where they differ.

use std::hint::black_box;

/// Whether two keys are equal. The time depends on the length of the first alone.
pub(crate) fn is_equal(given: &[u8], expected: &[u8]) -> bool {
    let mut difference = u8::from(given.len() != expected.len());
    for (i, byte) in given.iter().enumerate() {
        let other = expected.get(i % expected.len().max(1)).copied();
        difference = black_box(difference | (byte ^ other.unwrap_or(0)));
    }
    black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::is_equal;

    #[test]
    fn only_equal_keys_are_equal() {
        assert!(is_equal(b"abc", b"abc") && is_equal(b"", b""));
        for given in [&b""[..], b"ab", b"abcd", b"abcabc", b"abd", b"xbc"] {
            assert!(!is_equal(given, b"abc"), "{given:?}");
        }
        assert!(!is_equal(b"\0", b""));
    }
}
