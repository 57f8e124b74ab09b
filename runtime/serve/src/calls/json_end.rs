//! Where a JSON value ends in a text that is still coming.

/// Looks at the bytes of an object or an array, one after the other.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct JsonEnd {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl JsonEnd {
    /// Takes the next byte. Returns whether the value ends with it. Brackets are only counted: what
    /// is between them is for the parser.
    pub fn take(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' => self.is_escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }

    /// Returns the length of the value that a text begins with, `None` if it does not end there.
    pub fn of(text: &str) -> Option<usize> {
        let mut end = Self::default();
        text.bytes()
            .position(|byte| end.take(byte))
            .map(|at| at + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::JsonEnd;

    #[test]
    fn a_value_ends_with_its_bracket() {
        for (text, expected) in [
            ("{}x", Some(2)),
            (r#"{"a": "}\"}"} b"#, Some(13)),
            ("[{}, []] ]", Some(8)),
            (r#"{"a": "}"#, None),
            ("{", None),
            ("", None),
        ] {
            assert_eq!(JsonEnd::of(text), expected, "{text}");
        }
    }
}
