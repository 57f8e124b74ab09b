//! Numbers as people read them: three significant digits, a real minus sign, familiar units.

use tier_plan_runtime::units::ByteUnit;

/// Formats three significant digits without an exponent: `0.263`, `15.5`, `1240`.
pub(super) fn sig3(value: f64) -> String {
    if !value.is_finite() {
        return "–".into();
    }
    let size = value.abs();
    let digits = match size {
        0.0 => 0,
        s if s >= 99.95 => 0,
        s if s >= 9.995 => 1,
        s if s >= 0.9995 => 2,
        s if s >= 0.09995 => 3,
        s if s >= 0.009995 => 4,
        _ => 5,
    };
    minus(&format!("{value:.digits$}"))
}

/// Formats a share as a percentage, `7.3 %` or `98 %`, with a non-breaking space.
pub(super) fn percent(share: f64) -> String {
    let p = share * 100.0;
    if !p.is_finite() {
        return "–".into();
    }
    if p == 0.0 || p.abs() >= 9.95 {
        minus(&format!("{p:.0}\u{a0}%"))
    } else {
        minus(&format!("{p:.1}\u{a0}%"))
    }
}

/// Formats a relative difference with its sign: `+4.2 %`, `−12 %`.
pub(super) fn signed_percent(share: f64) -> String {
    let shown = percent(share);
    if share >= 0.0 && share.is_finite() {
        format!("+{shown}")
    } else {
        shown
    }
}

fn minus(number: &str) -> String {
    let negative_zero =
        number.starts_with('-') && !number.bytes().any(|b| (b'1'..=b'9').contains(&b));
    if negative_zero {
        number[1..].to_string()
    } else {
        number.replace('-', "−")
    }
}

/// Returns the binary unit that suits a largest value, and its size in bytes.
pub(super) fn byte_unit(largest: u64) -> (&'static str, f64) {
    let unit = ByteUnit::of(largest);
    (unit.name(), unit.bytes() as f64)
}

/// Joins items as `a`, `a and b`, or `a, b and c`.
pub(super) fn list<S: AsRef<str>>(items: &[S]) -> String {
    match items {
        [] => String::new(),
        [one] => one.as_ref().to_string(),
        [most @ .., last] => {
            let most: Vec<&str> = most.iter().map(AsRef::as_ref).collect();
            format!("{} and {}", most.join(", "), last.as_ref())
        }
    }
}

/// Returns round steps for an axis from 0 to at least `largest`, about `about` of them: `(step,
/// last)`.
pub(super) fn steps(largest: f64, about: usize) -> (f64, f64) {
    let largest = if largest.is_finite() && largest > 0.0 {
        largest
    } else {
        1.0
    };
    let raw = largest / about.max(1) as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|s| *s >= raw * 0.999)
        .unwrap_or(raw);
    (step, (largest / step * 0.9999).ceil().max(1.0) * step)
}

/// Formats an axis number with as many decimals as its step needs.
pub(super) fn tick(value: f64, step: f64) -> String {
    let mut digits = 0usize;
    let mut scaled = step;
    while digits < 9 && (scaled - scaled.round()).abs() > 1e-6 * scaled.abs().max(1e-12) {
        scaled *= 10.0;
        digits += 1;
    }
    minus(&format!("{value:.digits$}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let shown: Vec<String> = [0.2634, 15.49, 1240.4, 0.0, 9.999, -1.234, 99.96]
            .map(sig3)
            .to_vec();
        assert_eq!(
            shown,
            ["0.263", "15.5", "1240", "0", "10.0", "−1.23", "100"]
        );
        assert_eq!(sig3(f64::NAN), "–");
        assert_eq!(percent(0.0731), "7.3\u{a0}%");
        assert_eq!(percent(0.9999), "100\u{a0}%");
        assert_eq!(signed_percent(-0.12), "−12\u{a0}%");
        assert_eq!(signed_percent(-0.00001), "0.0\u{a0}%");
        assert_eq!(list(&["a", "b", "c"]), "a, b and c");
    }

    #[test]
    fn axes_take_round_steps() {
        assert_eq!(steps(18.2, 5), (5.0, 20.0));
        assert_eq!(steps(1.0, 5), (0.2, 1.0));
        assert_eq!(steps(0.0, 5), (0.2, 1.0));
        let (step, last) = steps(f64::INFINITY, 4);
        assert!(step > 0.0 && last.is_finite());
        assert_eq!(tick(0.5, 0.25), "0.50");
        assert_eq!(tick(20.0, 5.0), "20");
        for largest in [1e-9, 3.3e-4, 0.7, 1.0, 9.99, 1e7] {
            let (step, last) = steps(largest, 5);
            assert!(
                last >= largest * 0.999 && last / step < 8.0,
                "{largest}: {step} {last}"
            );
        }
    }
}
