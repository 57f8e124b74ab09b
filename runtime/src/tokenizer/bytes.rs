//! The printable alphabet of byte-level vocabularies: each byte is written as one character.
//!
//! Bytes that print in Latin-1 stand for themselves, the other 68 for the characters from U+0100
//! on, in order.

/// Returns whether byte `b` stands for itself.
const fn prints(b: u8) -> bool {
    matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// Returns the character of every byte.
pub(super) const CHARS: [char; 256] = {
    let mut table = ['\0'; 256];
    let mut next = 0x100u32;
    let mut b = 0;
    while b < 256 {
        table[b] = if prints(b as u8) {
            b as u8 as char
        } else {
            next += 1;
            match char::from_u32(next - 1) {
                Some(c) => c,
                None => panic!("U+0100 to U+0143 are characters"),
            }
        };
        b += 1;
    }
    table
};

/// Returns the byte of every character up to U+0143; `None` where there is none.
const BYTES: [Option<u8>; 0x144] = {
    let mut table = [None; 0x144];
    let mut b = 0;
    while b < 256 {
        table[CHARS[b] as usize] = Some(b as u8);
        b += 1;
    }
    table
};

/// Returns the byte that `c` stands for.
pub(super) fn byte_of(c: char) -> Option<u8> {
    BYTES.get(c as usize).copied().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        for b in 0..=255u8 {
            assert_eq!(byte_of(CHARS[b as usize]), Some(b));
        }
        assert_eq!(
            (CHARS[b' ' as usize], CHARS[b'\n' as usize], CHARS[0xAD]),
            ('Ġ', 'Ċ', 'Ń')
        );
        assert_eq!(
            (byte_of(' '), byte_of('\u{144}'), byte_of('日')),
            (None, None, None)
        );
    }
}
