//! Names of the parts of a split model: `NAME-00002-of-00005.gguf`.

use std::path::{Path, PathBuf};

/// Parts that one model may have; the name has five digits for them.
pub(super) const MAX_PARTS: u32 = 99_999;

/// A file name that follows the pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PartName {
    /// Folder and name up to the part number.
    prefix: PathBuf,
    /// What the name says, from 1.
    pub(super) number: u32,
    /// Parts in all, as the name says.
    pub(super) count: u32,
}

impl PartName {
    /// Reads the pattern, if the name follows it.
    pub(super) fn parse(path: &Path) -> Option<PartName> {
        let name = path.file_name()?.to_str()?;
        let stem = name.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let (number, count) = (five_digits(number)?, five_digits(count)?);
        if number == 0 || number > count {
            return None;
        }
        Some(PartName {
            prefix: path.with_file_name(prefix),
            number,
            count,
        })
    }

    /// Returns the path of part `number`, from 1.
    pub(super) fn sibling(&self, number: u32) -> PathBuf {
        let mut name = self.prefix.as_os_str().to_os_string();
        name.push(format!("-{number:05}-of-{:05}.gguf", self.count));
        PathBuf::from(name)
    }
}

/// Returns the name of a model by its file: without the extension and without the part number.
pub(super) fn stem(path: &Path) -> String {
    let stem = match PartName::parse(path) {
        Some(part) => part
            .prefix
            .file_name()
            .map(|s| s.to_string_lossy().into_owned()),
        None => path.file_stem().map(|s| s.to_string_lossy().into_owned()),
    };
    stem.unwrap_or_default()
}

fn five_digits(text: &str) -> Option<u32> {
    (text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit()))
        .then(|| text.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_names_read_and_write() {
        let part = PartName::parse(Path::new("/m/Big-Q4_K_M-00002-of-00013.gguf")).unwrap();
        assert_eq!((part.number, part.count), (2, 13));
        assert_eq!(
            part.sibling(2),
            Path::new("/m/Big-Q4_K_M-00002-of-00013.gguf")
        );
        assert_eq!(
            part.sibling(13),
            Path::new("/m/Big-Q4_K_M-00013-of-00013.gguf")
        );
        assert_eq!(
            PartName::parse(Path::new("a-00001-of-00002.gguf"))
                .unwrap()
                .sibling(2),
            Path::new("a-00002-of-00002.gguf")
        );
    }

    #[test]
    fn other_names_are_not_parts() {
        for name in [
            "model.gguf",
            "model-00001-of-00002.bin",
            "model-1-of-2.gguf",
            "model-00000-of-00002.gguf",
            "model-00003-of-00002.gguf",
            "model-+0001-of-00002.gguf",
            "00001-of-00002.gguf",
            "model-000001-of-00002.gguf",
        ] {
            assert_eq!(PartName::parse(Path::new(name)), None, "{name}");
        }
    }

    #[test]
    fn stems_drop_the_part() {
        assert_eq!(stem(Path::new("/m/Big-Q4-00001-of-00003.gguf")), "Big-Q4");
        assert_eq!(stem(Path::new("/m/tiny.gguf")), "tiny");
    }
}
