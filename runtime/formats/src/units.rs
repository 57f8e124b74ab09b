//! Readable quantities: sizes (`3.4GiB`, `768G`, `12582912`) and moments (`2026-11-22T17:00:00Z`).

use std::time::{SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// A size that could not be read.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "'{0}' is not a size: write a number with B, KiB, MiB, GiB, TiB (or kB, MB, GB, TB), like 3.4GiB"
)]
pub struct BadSize(pub String);

/// Reads a size in bytes. `K`, `M`, `G`, `T` alone mean the binary multiples, as in llama.cpp and
/// `head -c`.
///
/// ```
/// use tier_plan_formats::units::parse_bytes;
///
/// assert_eq!(parse_bytes("1.5 GiB")?, 1_610_612_736);
/// assert_eq!(parse_bytes("512M")?, 512 << 20);
/// assert!(parse_bytes("3 parsecs").is_err());
/// # Ok::<(), tier_plan_formats::units::BadSize>(())
/// ```
pub fn parse_bytes(text: &str) -> Result<u64, BadSize> {
    let bad = || BadSize(text.to_string());
    let t = text.trim();
    let split = t
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(t.len());
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
    if bytes.is_finite() && bytes < u64::MAX as f64 {
        Ok(bytes.round() as u64)
    } else {
        Err(bad())
    }
}

/// Formats a size in binary multiples with three significant digits.
///
/// ```
/// use tier_plan_formats::units::show_bytes;
///
/// assert_eq!(show_bytes(512), "512 B");
/// assert_eq!(show_bytes(3_650_722_202), "3.40 GiB");
/// ```
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

/// A binary unit of sizes, from bytes to EiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteUnit(u32);

/// Least number of steps of one unit in a size that is spoken of in steps.
const MIN_STEPS: u64 = 4;

impl ByteUnit {
    const NAMES: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    const LARGEST: u32 = 6;
    const KIB: u32 = 1;

    /// Returns the largest unit that is not above a size: the one to write the size in.
    pub fn of(size: u64) -> Self {
        let mut units = (0..=Self::LARGEST).rev().map(Self);
        units.find(|u| u.bytes() <= size).unwrap_or(Self(0))
    }

    /// Returns the largest unit, at least a KiB, of which a model of this size has several: the one to
    /// say in what a little more or less memory is worth. A GiB more means nothing to a model of 11 MiB.
    ///
    /// ```
    /// use tier_plan_formats::units::ByteUnit;
    ///
    /// assert_eq!(ByteUnit::of_step(11 << 20).name(), "MiB");
    /// assert_eq!(ByteUnit::of_step(600_000_000_000).name(), "GiB");
    /// ```
    pub fn of_step(size: u64) -> Self {
        Self::of(size / MIN_STEPS).max(Self(Self::KIB))
    }

    /// Returns the next smaller unit, down to a KiB.
    pub fn smaller(self) -> Self {
        Self(self.0.saturating_sub(1).max(Self::KIB))
    }

    /// Returns `MiB`, for instance.
    pub fn name(self) -> &'static str {
        Self::NAMES[self.0 as usize]
    }

    /// Returns the bytes of one unit.
    pub fn bytes(self) -> u64 {
        1 << (10 * self.0)
    }

    /// Returns the part of a GiB that one unit is.
    pub fn per_gib(self) -> f64 {
        self.bytes() as f64 / f64::from(1u32 << 30)
    }
}

/// Formats a moment in UTC, to the second: `2026-11-22T17:00:00Z`. Moments before 1970 show as
/// 1970.
pub fn show_utc(moment: SystemTime) -> String {
    let seconds = moment.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days counted from 0000-03-01, so that a leap day ends its year; eras are 400 years of 146,097
    // days.
    let since_march = days + 719_468;
    let (era, day_of_era) = (since_march / 146_097, since_march % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
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

    #[test]
    fn units_fit_the_size() {
        let of = |size| ByteUnit::of(size).name();
        assert_eq!([of(0), of(1), of(1023), of(1024)], ["B", "B", "B", "KiB"]);
        assert_eq!([of((1 << 30) - 1), of(1 << 30)], ["MiB", "GiB"]);
        assert_eq!([of(1 << 40), of(u64::MAX)], ["TiB", "EiB"]);
        let step = |size| ByteUnit::of_step(size).name();
        assert_eq!([step(0), step(100), step((4 << 20) - 1)], ["KiB"; 3]);
        assert_eq!([step(4 << 20), step(11 << 20), step(3 << 30)], ["MiB"; 3]);
        assert_eq!([step(9_000_000_000), step(600_000_000_000)], ["GiB"; 2]);
        assert_eq!([step(5 << 40), step(u64::MAX)], ["TiB", "EiB"]);
        assert_eq!(ByteUnit::of(1 << 30).smaller().name(), "MiB");
        assert_eq!(ByteUnit::of(0).smaller().name(), "KiB");
        assert_eq!(ByteUnit::of(1 << 20).per_gib(), 1.0 / 1024.0);
    }

    #[test]
    fn moments_are_shown_in_utc() {
        let at = |s| show_utc(UNIX_EPOCH + std::time::Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_795_366_800), "2026-11-22T17:00:00Z");
    }
}
