//! Texts, bars, and charts that fill a number of columns.

use super::state::Sums;
use crate::print::digits;
use crate::printable::printable;
use ratatui::text::Span;

/// Returns columns that a text takes.
pub(super) fn width_of(text: &str) -> usize {
    Span::raw(text).width()
}

/// Returns what of a text may be shown, cut to a width.
pub(super) fn fit(text: &str, width: usize) -> String {
    let text = printable(text);
    if width_of(&text) <= width {
        return text.into_owned();
    }
    let (mut cut, mut taken) = (String::new(), 0);
    let mut bytes = [0; 4];
    for c in text.chars() {
        taken += width_of(c.encode_utf8(&mut bytes));
        if taken + 1 > width {
            break;
        }
        cut.push(c);
    }
    if width > 0 {
        cut.push('…');
    }
    cut
}

/// Returns a text with spaces up to a width.
pub(super) fn pad(text: &str, width: usize) -> String {
    let more = width.saturating_sub(width_of(text));
    format!("{text}{}", " ".repeat(more))
}

/// Returns a rate of tokens, which is unknown where nothing was counted.
pub(super) fn per_second(counted: &Sums, rate: f64) -> String {
    if counted.seconds > 0.0 {
        format!("{} tok/s", digits(rate))
    } else {
        "–".to_string()
    }
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

/// Columns of a bar.
const BAR: usize = 16;

/// Returns a bar that is full where `part` is 1.
pub(super) fn bar(part: f64) -> String {
    let full = (part.clamp(0.0, 1.0) * BAR as f64).round() as usize;
    format!("{}{}", "█".repeat(full), "░".repeat(BAR - full))
}

pub(super) fn most(values: &[Option<f64>]) -> f64 {
    values.iter().flatten().copied().fold(0.0, f64::max)
}

/// Returns a chart of the last values, with the latest at the right. What is unknown is blank.
pub(super) fn sparkline(values: &[Option<f64>], top: f64, width: usize) -> String {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let shown = &values[values.len().saturating_sub(width)..];
    let level = |value: &Option<f64>| match value {
        None => ' ',
        Some(value) if top > 0.0 => {
            let level = (value / top).clamp(0.0, 1.0) * (LEVELS.len() - 1) as f64;
            LEVELS[level.round() as usize]
        }
        Some(_) => LEVELS[0],
    };
    let blank = std::iter::repeat_n(' ', width - shown.len());
    blank.chain(shown.iter().map(level)).collect()
}

/// Returns a time span in its two largest units.
pub(super) fn span_of(seconds: f64) -> String {
    let s = seconds as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min", s / 60),
        3600..86400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86400, s % 86400 / 3600),
    }
}
