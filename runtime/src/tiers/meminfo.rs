//! Files with lines `name: 123 kB`, such as `/proc/meminfo` and `/proc/self/status`.

/// Returns the value of the first line of a name, in bytes; `None` where there is no such line, or
/// its value is no number of kilobytes that fits.
///
/// The lines of a NUMA node begin with its number, `Node 0 MemTotal:`, which is passed over.
///
/// ```
/// use tier_plan_runtime::tiers::meminfo::bytes_of;
///
/// assert_eq!(bytes_of("MemTotal:       2 kB\n", "MemTotal"), Some(2048));
/// ```
pub fn bytes_of(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| {
        let (before, value) = line.split_once(':')?;
        (without_node(before).trim() == name).then_some(value)
    })?;
    let kilobytes = value.trim().strip_suffix("kB")?.trim_end();
    // A sign is no part of such numbers, and `parse` would take one.
    let is_number = kilobytes.bytes().all(|b| b.is_ascii_digit());
    let kilobytes: u64 = kilobytes.parse().ok().filter(|_| is_number)?;
    kilobytes.checked_mul(1024)
}

/// Returns what follows `Node 0 ` at the beginning, or all.
fn without_node(name: &str) -> &str {
    let rest = name.trim_start().strip_prefix("Node ");
    let rest = rest.and_then(|rest| rest.split_once(' '));
    match rest {
        Some((number, rest)) if number.bytes().all(|b| b.is_ascii_digit()) => rest,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_are_read_by_whole_names() {
        let text = "MemTotal:       24000 kB\nMemFree: 12 kB\nRssAnon:\t     24 kB\nHugePages_Total:       3\n";
        assert_eq!(bytes_of(text, "MemTotal"), Some(24000 << 10));
        assert_eq!(bytes_of(text, "RssAnon"), Some(24 << 10));
        for missing in ["Mem", "MemTotalX", "MemAvailable", "", "HugePages_Total"] {
            assert_eq!(bytes_of(text, missing), None, "{missing}");
        }
        let node = "Node 0 MemTotal:  5 kB\nNode 12 MemFree: 7 kB\nNode x MemUsed: 1 kB\n";
        assert_eq!(bytes_of(node, "MemTotal"), Some(5 << 10));
        assert_eq!(bytes_of(node, "MemFree"), Some(7 << 10));
        assert_eq!(bytes_of(node, "MemUsed"), None);
    }

    #[test]
    fn odd_values_are_none() {
        for odd in [
            "A:",
            "A",
            "A: kB",
            "A: many kB",
            "A: 5",
            "A: 5 MB",
            "A: -5 kB",
            "A: +5 kB",
            "A: 5 5 kB",
            "A: 18014398509481984 kB",
            "A: 99999999999999999999999 kB",
        ] {
            assert_eq!(bytes_of(odd, "A"), None, "{odd}");
        }
        let largest = "A: 18014398509481983 kB";
        assert_eq!(bytes_of(largest, "A"), Some(u64::MAX - 1023));
        // The first line counts, also where it is damaged.
        assert_eq!(bytes_of("A: x kB\nA: 1 kB\n", "A"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(Node [0-9]{0,3} )?[A-C]{0,2}:? ?.{0,12}(kB)?\n?") {
            for name in ["A", "AB", ""] {
                let _ = bytes_of(&text, name);
            }
        }
    }
}
