//! Byte sizes as people write them: `3.4GiB`, `768G`, `12582912`.

use thiserror::Error;

/// A size that could not be read.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is not a size: write a number with B, KiB, MiB, GiB, TiB (or kB, MB, GB, TB), like 3.4GiB")]
pub struct BadSize(pub String);

/// Reads a size in bytes. `K`, `M`, `G`, `T` alone mean the binary multiples, as in llama.cpp and `head -c`.
pub fn parse_bytes(text: &str) -> Result<u64, BadSize> {
    let bad = || BadSize(text.to_string());
    let t = text.trim();
    let split = t.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(t.len());
    let (number, unit) = t.split_at(split);
    let value: f64 = number.parse().map_err(|_| bad())?;
    let scale = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(bad()),
    };
    let bytes = value * scale;
    if bytes.is_finite() && bytes < u64::MAX as f64 { Ok(bytes.round() as u64) } else { Err(bad()) }
}

/// Writes a size for people, in binary multiples with three significant digits: `3.40 GiB`.
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match (unit, value) {
        (0, _) => 0,
        (_, v) if v < 10.0 => 2,
        (_, v) if v < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_back() {
        assert_eq!(parse_bytes("3.5GiB"), Ok(3_758_096_384));
        assert_eq!(parse_bytes(" 12 mb "), Ok(12_000_000));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        for bad in ["", "x", "3 parsecs", "-1", "1e99TiB", "."] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(show_bytes(512), "512 B");
        assert_eq!(show_bytes(3_758_096_384), "3.50 GiB");
        assert_eq!(show_bytes(152_000_000), "145 MiB");
    }
}
