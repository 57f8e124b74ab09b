//! Python's `strftime` of a local time without a zone, as `datetime.now()` gives it.

use tier_plan_runtime::os::LocalTime;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// Formats a time with the conversions and flags of glibc, which Python passes them to. Unknown
/// conversions stay as they are. The locale is C.
pub(super) fn strftime(format: &str, time: &LocalTime) -> String {
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let conversion = &rest[at + 1..];
        let flags = conversion.len()
            - conversion
                .trim_start_matches(['-', '_', '0', '^', '#'])
                .len();
        let (flags, after) = conversion.split_at(flags);
        let Some(letter) = after.chars().next() else {
            out.push_str(&rest[at..]);
            return out;
        };
        match field(letter, time) {
            Some(field) => out.push_str(&field.written(flags)),
            None => {
                out.push('%');
                out.push_str(flags);
                out.push(letter);
            }
        }
        rest = &after[letter.len_utf8()..];
    }
    out.push_str(rest);
    out
}

/// A part of a date.
enum Field {
    /// A number, its least width, and what fills it.
    Number(i64, usize, char),
    /// A text.
    Text(String),
}

impl Field {
    fn written(&self, flags: &str) -> String {
        let text = match self {
            Self::Number(n, width, fill) => {
                let (width, fill) = match flags.chars().rfind(|c| "-_0".contains(*c)) {
                    Some('-') => (0, ' '),
                    Some('_') => (*width, ' '),
                    Some(_) => (*width, '0'),
                    None => (*width, *fill),
                };
                let digits = n.to_string();
                let missing = width.saturating_sub(digits.len());
                std::iter::repeat_n(fill, missing).collect::<String>() + &digits
            }
            Self::Text(text) => text.clone(),
        };
        if flags.contains('^') {
            text.to_uppercase()
        } else if flags.contains('#') && text.chars().all(char::is_uppercase) {
            text.to_lowercase()
        } else if flags.contains('#') {
            text.to_uppercase()
        } else {
            text
        }
    }
}

fn field(letter: char, time: &LocalTime) -> Option<Field> {
    let zeros = |n: i64, width| Field::Number(n, width, '0');
    let spaces = |n: u32| Field::Number(i64::from(n), 2, ' ');
    let two = |n: u32| zeros(i64::from(n), 2);
    let composed = |format: &str| Field::Text(strftime(format, time));
    let name = |names: &[&str], n: u32| names[n as usize % names.len()].to_string();
    let month = name(&MONTHS, time.month.saturating_sub(1));
    let day = name(&DAYS, time.weekday);
    let half = if time.hour < 12 { "AM" } else { "PM" };
    let hour12 = (time.hour + 11) % 12 + 1;
    let (year, yday) = (time.year, time.day_of_year);
    Some(match letter {
        'Y' => Field::Number(year, 1, '0'),
        'C' => zeros(year.div_euclid(100), 2),
        'y' => zeros(year.rem_euclid(100), 2),
        'm' => two(time.month),
        'd' => two(time.day),
        'e' => spaces(time.day),
        'j' => zeros(i64::from(yday) + 1, 3),
        'H' => two(time.hour),
        'k' => spaces(time.hour),
        'I' => two(hour12),
        'l' => spaces(hour12),
        'M' => two(time.minute),
        'S' => two(time.second),
        'f' => zeros(i64::from(time.microsecond), 6),
        's' => Field::Number(time.unix_seconds, 1, '0'),
        'p' => Field::Text(half.to_string()),
        'P' => Field::Text(half.to_lowercase()),
        'B' => Field::Text(month),
        'b' | 'h' => Field::Text(month[..3].to_string()),
        'A' => Field::Text(day),
        'a' => Field::Text(day[..3].to_string()),
        'w' => Field::Number(i64::from(time.weekday), 1, '0'),
        'u' => Field::Number(i64::from((time.weekday + 6) % 7) + 1, 1, '0'),
        'U' => two((yday + 7 - time.weekday) / 7),
        'W' => two((yday + 7 - (time.weekday + 6) % 7) / 7),
        'V' => two(iso_week(time).1),
        'G' => Field::Number(iso_week(time).0, 1, '0'),
        'g' => zeros(iso_week(time).0.rem_euclid(100), 2),
        'c' => composed("%a %b %e %H:%M:%S %Y"),
        'x' | 'D' => composed("%m/%d/%y"),
        'X' | 'T' => composed("%H:%M:%S"),
        'R' => composed("%H:%M"),
        'r' => composed("%I:%M:%S %p"),
        'F' => composed("%Y-%m-%d"),
        'n' => Field::Text("\n".into()),
        't' => Field::Text("\t".into()),
        '%' => Field::Text("%".into()),
        // The time has no zone, as that of `datetime.now()`.
        'Z' | 'z' => Field::Text(String::new()),
        _ => return None,
    })
}

/// Returns year and number of the ISO week, which belongs to the year of its Thursday.
fn iso_week(time: &LocalTime) -> (i64, u32) {
    let days_in = |year: i64| {
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        365 + i64::from(leap)
    };
    let monday = i64::from((time.weekday + 6) % 7);
    let thursday = i64::from(time.day_of_year) - monday + 3;
    let (year, thursday) = if thursday < 0 {
        (time.year - 1, thursday + days_in(time.year - 1))
    } else if thursday >= days_in(time.year) {
        (time.year + 1, thursday - days_in(time.year))
    } else {
        (time.year, thursday)
    };
    (year, u32::try_from(thursday / 7).unwrap_or(0) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_runtime::os::utc_time;

    fn at(seconds: i64, format: &str) -> String {
        strftime(format, &utc_time(seconds))
    }

    #[test]
    fn dates_are_pythons() {
        assert_eq!(
            at(0, "%A %Y-%m-%d %H:%M:%S"),
            "Thursday 1970-01-01 00:00:00"
        );
        assert_eq!(at(951_782_400, "%d %B %Y"), "29 February 2000");
        assert_eq!(
            at(1_709_298_305, "%a %-d %b %y, %I:%M %p %Q %%"),
            "Fri 1 Mar 24, 01:05 PM %Q %"
        );
        assert_eq!(
            at(1_735_689_599, "%F %T|%c|%x|%X"),
            "2024-12-31 23:59:59|Tue Dec 31 23:59:59 2024|12/31/24|23:59:59"
        );
        assert_eq!(
            at(
                1_709_298_305,
                "%j %U %W %w %u %V %G %e %k %l %_m %^a %#p %P"
            ),
            "061 08 09 5 5 09 2024  1 13  1  3 FRI pm pm"
        );
        assert_eq!(at(1_735_689_599, "%V %G|%Z%z|%"), "01 2025||%");
        // 2027-01-01 is a Friday of the last week of 2026.
        assert_eq!(at(1_798_761_600, "%V %G %U %W"), "53 2026 00 00");
    }
}
