//! Sets of small numbers as ranges: `0-3,7,12-15`.

/// Highest expert number a file may name.
pub(super) const MAX_EXPERT: u32 = 65_535;
/// Highest layer number a file may name.
pub(super) const MAX_LAYER: u32 = 4_095;

/// Numbers that one file may still expand to. A few bytes of text can name 65,536 experts in 4,096
/// layers, so the total is bounded before anything is allocated.
pub(super) struct Allowance(u64);

impl Allowance {
    /// Allows 4 Mi numbers: 180 times the routed experts of the largest model known.
    pub fn for_a_file() -> Allowance {
        Allowance(4 << 20)
    }

    /// Takes `count` away or fails.
    pub fn take(&mut self, count: u64) -> Result<(), String> {
        self.0 = self
            .0
            .checked_sub(count)
            .ok_or("the file lists more than 4194304 layers and experts in all")?;
        Ok(())
    }
}

/// Writes ascending numbers as ranges.
pub fn show(numbers: &[u32]) -> String {
    let mut out = String::new();
    let mut rest = numbers;
    while let Some(&first) = rest.first() {
        let run = rest
            .iter()
            .zip(u64::from(first)..)
            .take_while(|&(&n, want)| u64::from(n) == want)
            .count();
        if !out.is_empty() {
            out.push(',');
        }
        let last = rest[run - 1];
        match run {
            1 => out.push_str(&first.to_string()),
            _ => out.push_str(&format!("{first}-{last}")),
        }
        rest = &rest[run..];
    }
    out
}

/// Reads ranges in ascending order with no number twice and none above `max`; `what` is `expert` or
/// `layer`.
pub(super) fn parse(
    text: &str,
    what: &str,
    max: u32,
    allowance: &mut Allowance,
) -> Result<Vec<u32>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut spans: Vec<(u32, u32)> = Vec::new();
    let mut total = 0u64;
    for item in text.split(',').map(str::trim) {
        let (low, high) = item.split_once('-').unwrap_or((item, item));
        let (low, high) = (
            number(low, item, what, max)?,
            number(high, item, what, max)?,
        );
        if low > high {
            return Err(format!(
                "the {what} range '{item}' runs backwards; write {high}-{low}"
            ));
        }
        if let Some(&(_, last)) = spans.last()
            && low <= last
        {
            return Err(format!(
                "{what} {low} comes after {what} {last}; write each once, in ascending order"
            ));
        }
        total += u64::from(high - low) + 1;
        spans.push((low, high));
    }
    allowance.take(total)?;
    Ok(spans
        .into_iter()
        .flat_map(|(low, high)| low..=high)
        .collect())
}

/// Reads one set of numbers that a file may name, as typed by a user.
///
/// # Errors
/// When it is not a set of ascending numbers; `what` is `expert` or `layer`.
pub fn parse_one(text: &str, what: &str) -> Result<Vec<u32>, String> {
    let max = if what == "layer" {
        MAX_LAYER
    } else {
        MAX_EXPERT
    };
    parse(text, what, max, &mut Allowance::for_a_file())
}

fn number(text: &str, item: &str, what: &str, max: u32) -> Result<u32, String> {
    let text = text.trim();
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!(
            "'{item}' is neither one {what} nor a range of them; write them like 0-3,7"
        ));
    }
    match text.parse::<u32>() {
        Ok(n) if n <= max => Ok(n),
        _ => Err(format!(
            "{what} {text} is past {max}, the highest that can be named"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<Vec<u32>, String> {
        parse(text, "expert", MAX_EXPERT, &mut Allowance::for_a_file())
    }

    #[test]
    fn known_values() {
        assert_eq!(show(&[0, 1, 2, 3, 7, 12, 13]), "0-3,7,12-13");
        assert_eq!(show(&[]), "");
        assert_eq!(show(&[u32::MAX]), "4294967295");
        assert_eq!(read(" 0-3, 7 ,12-13"), Ok(vec![0, 1, 2, 3, 7, 12, 13]));
        assert_eq!(read("  "), Ok(vec![]));
    }

    #[test]
    fn bad_lists_say_why() {
        for (text, why) in [
            ("0-4294967295", "expert 4294967295 is past 65535"),
            ("99999999999999999999", "is past 65535"),
            ("5-3", "runs backwards; write 3-5"),
            ("1,1", "expert 1 comes after expert 1"),
            ("4-9,2", "expert 2 comes after expert 9"),
            ("1,,2", "'' is neither"),
            ("-3", "'-3' is neither"),
            ("+3", "'+3' is neither"),
            ("1-2-3", "'1-2-3' is neither"),
            ("all", "write them like 0-3,7"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn the_allowance_is_for_the_whole_file() {
        let mut allowance = Allowance::for_a_file();
        for _ in 0..64 {
            parse("0-65535", "expert", MAX_EXPERT, &mut allowance).unwrap();
        }
        assert!(
            parse("0", "expert", MAX_EXPERT, &mut allowance)
                .unwrap_err()
                .contains("4194304")
        );
    }

    proptest! {
        #[test]
        fn any_set_reads_back(set in proptest::collection::btree_set(0u32..=MAX_EXPERT, 0..200)) {
            let numbers: Vec<u32> = set.into_iter().collect();
            prop_assert_eq!(read(&show(&numbers)), Ok(numbers));
        }

        #[test]
        fn any_text_is_safe(text in "[0-9,\\- x]{0,40}") {
            if let Ok(numbers) = read(&text) {
                prop_assert!(numbers.windows(2).all(|w| w[0] < w[1]));
            }
        }
    }
}
