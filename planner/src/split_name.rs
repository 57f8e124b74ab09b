//! Names of the files of a split model: `model-00002-of-00005.gguf`.

/// The place of a file among those of a split model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SplitName<'n> {
    /// What stands before the numbers.
    pub stem: &'n str,
    /// Number of the file, from 1 to `count`.
    pub number: u32,
    /// Number of files.
    pub count: u32,
}

/// Returns what stands before `.gguf`, whatever its case.
pub fn gguf_stem(name: &str) -> Option<&str> {
    let at = name.len().checked_sub(".gguf".len())?;
    name.get(at..)
        .is_some_and(|ending| ending.eq_ignore_ascii_case(".gguf"))
        .then(|| &name[..at])
}

/// Parses a name or a path; `None` if it is not of a split model.
pub fn split_name(name: &str) -> Option<SplitName<'_>> {
    let (before, count) = gguf_stem(name)?.rsplit_once("-of-")?;
    let (stem, number) = before.rsplit_once('-')?;
    let (number, count) = (five_digits(number)?, five_digits(count)?);
    (1..=count).contains(&number).then_some(SplitName {
        stem,
        number,
        count,
    })
}

fn five_digits(text: &str) -> Option<u32> {
    let is_number = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_split_files_are_parsed() {
        for name in ["a-b-00002-of-00010.gguf", "a-b-00002-of-00010.GGUF"] {
            let split = split_name(name).unwrap();
            assert_eq!((split.stem, split.number, split.count), ("a-b", 2, 10));
        }
        for name in [
            "a.gguf",
            "a-00001-of-0002.gguf",
            "a-0001-of-00002.gguf",
            "a-+0001-of-00002.gguf",
            "a-00000-of-00002.gguf",
            "a-00003-of-00002.gguf",
            "a-00001-of-00002.txt",
            "00001-of-00002.gguf",
            "",
        ] {
            assert_eq!(split_name(name), None, "{name}");
        }
    }
}
