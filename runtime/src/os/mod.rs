//! Calls of the operating system that the standard library lacks: limits of this process, signals
//! that ask it to end, and the local time.

pub mod processors;
pub mod signals;

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Limits of a process that runs what a stranger wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessLimits {
    /// Bytes of address space.
    pub address_space_bytes: u64,
    /// Seconds of CPU time, after which the system ends the process.
    pub cpu_seconds: u64,
}

/// Limits this process for the rest of its life, never above the limits that it already has. It
/// writes no core file, ends with its parent, and is the first to go when memory runs out, as far
/// as the system allows.
///
/// # Errors
/// When the system refuses a limit.
#[cfg(unix)]
pub fn limit_process(limits: ProcessLimits) -> io::Result<()> {
    macro_rules! lower {
        ($resource:ident, $soft:expr, $hard:expr) => {{
            let mut limit = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: `limit` is a valid place for the call to write to.
            if unsafe { libc::getrlimit(libc::$resource, &mut limit) } != 0 {
                return Err(io::Error::last_os_error());
            }
            limit.rlim_max = limit.rlim_max.min($hard);
            limit.rlim_cur = limit.rlim_cur.min($soft).min(limit.rlim_max);
            // SAFETY: `limit` is initialized, and the call only reads it.
            if unsafe { libc::setrlimit(libc::$resource, &limit) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }};
    }
    end_with_parent();
    lower!(RLIMIT_CORE, 0, 0);
    // The soft limit's signal ends the process; the hard one is for a process that survived it.
    lower!(
        RLIMIT_CPU,
        limits.cpu_seconds,
        limits.cpu_seconds.saturating_add(1)
    );
    // Not every Unix enforces a limit of the address space, so a refusal is no error there.
    #[cfg(target_os = "linux")]
    lower!(
        RLIMIT_AS,
        limits.address_space_bytes,
        limits.address_space_bytes
    );
    Ok(())
}

/// Does nothing: only Unix systems have these limits.
#[cfg(not(unix))]
pub fn limit_process(_: ProcessLimits) -> io::Result<()> {
    Ok(())
}

/// Asks the system to end this process with its parent, and before others when memory runs out.
#[cfg(target_os = "linux")]
fn end_with_parent() {
    // SAFETY: the call takes a number and touches no memory of this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // Without /proc the kernel chooses by size.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
}

#[cfg(all(unix, not(target_os = "linux")))]
fn end_with_parent() {}

/// A moment on the clock of the place where this process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct LocalTime {
    pub year: i64,
    /// 1 to 12.
    pub month: u32,
    /// 1 to 31.
    pub day: u32,
    pub hour: u32,
    pub minute: u32,
    /// 0 to 60: a minute may have a leap second.
    pub second: u32,
    pub microsecond: u32,
    /// Days since Sunday, 0 to 6.
    pub weekday: u32,
    /// Days since January 1, 0 to 365.
    pub day_of_year: u32,
    /// Seconds since 1970 in UTC.
    pub unix_seconds: i64,
}

/// Returns the version of the GNU C library that this process runs with, `2.36`; `None` with another
/// library.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn glibc_version() -> Option<String> {
    // SAFETY: the call takes nothing, and returns a constant text that ends in a zero.
    let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
    version.to_str().ok().map(str::to_string)
}

/// Returns `None`: only GNU systems have this library.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn glibc_version() -> Option<String> {
    None
}

/// Gives this thread, and those that it starts, the lowest priority, where the system has
/// priorities of threads.
pub fn lower_priority() {
    #[cfg(target_os = "linux")]
    // SAFETY: the call takes no pointers. On Linux, 0 is the calling thread. A refusal changes
    // nothing.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 19);
    }
}

/// Converts a moment to local time: `TZ`, or else the zone of the system. Returns UTC where the
/// system cannot convert it.
pub fn local_time(moment: SystemTime) -> LocalTime {
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let mut time = system_local_time(seconds).unwrap_or_else(|| utc_time(seconds));
    time.microsecond = since.subsec_micros();
    time
}

#[cfg(unix)]
fn system_local_time(seconds: i64) -> Option<LocalTime> {
    let moment = libc::time_t::try_from(seconds).ok()?;
    let mut parts = std::mem::MaybeUninit::<libc::tm>::uninit();
    // SAFETY: both pointers are valid, and the call has filled `parts` unless it returns null.
    let parts = unsafe {
        if libc::localtime_r(&moment, parts.as_mut_ptr()).is_null() {
            return None;
        }
        parts.assume_init()
    };
    let part = |n: libc::c_int| u32::try_from(n).unwrap_or(0);
    Some(LocalTime {
        year: i64::from(parts.tm_year) + 1900,
        month: part(parts.tm_mon) + 1,
        day: part(parts.tm_mday),
        hour: part(parts.tm_hour),
        minute: part(parts.tm_min),
        second: part(parts.tm_sec),
        microsecond: 0,
        weekday: part(parts.tm_wday),
        day_of_year: part(parts.tm_yday),
        unix_seconds: seconds,
    })
}

#[cfg(not(unix))]
fn system_local_time(_: i64) -> Option<LocalTime> {
    None
}

/// Converts seconds since 1970 to a time in UTC. Months count from March, so that the leap day is
/// the last of a year, and years in eras of 400.
pub fn utc_time(seconds: i64) -> LocalTime {
    const DAYS_TO_1970: i64 = 719_468;
    let days = seconds.div_euclid(86_400);
    let of_day = seconds.rem_euclid(86_400);
    let shifted = days.saturating_add(DAYS_TO_1970);
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let from_march_1 = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * from_march_1 + 2) / 153;
    let day = from_march_1 - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    // January and February are the last 306 to 365 days of a year that begins in March.
    let day_of_year = if month <= 2 {
        from_march_1 - 306
    } else {
        from_march_1 + 59 + i64::from(leap)
    };
    let part = |n: i64| u32::try_from(n).unwrap_or(0);
    LocalTime {
        year,
        month: part(month),
        day: part(day),
        hour: part(of_day / 3600),
        minute: part(of_day / 60 % 60),
        second: part(of_day % 60),
        microsecond: 0,
        weekday: part((days + 4).rem_euclid(7)),
        day_of_year: part(day_of_year),
        unix_seconds: seconds,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utc_dates_are_right() {
        let date = |seconds| {
            let t = utc_time(seconds);
            (
                [t.year, t.month.into(), t.day.into()],
                [t.hour, t.minute, t.second],
                [t.weekday, t.day_of_year],
            )
        };
        assert_eq!(date(0), ([1970, 1, 1], [0, 0, 0], [4, 0]));
        assert_eq!(date(951_782_400), ([2000, 2, 29], [0, 0, 0], [2, 59]));
        assert_eq!(date(1_709_298_305), ([2024, 3, 1], [13, 5, 5], [5, 60]));
        assert_eq!(
            date(1_735_689_599),
            ([2024, 12, 31], [23, 59, 59], [2, 365])
        );
        assert_eq!(
            date(1_767_225_599),
            ([2025, 12, 31], [23, 59, 59], [3, 364])
        );
    }

    #[test]
    fn local_time_is_within_a_day_of_utc() {
        let now = SystemTime::now();
        let local = local_time(now);
        let utc = utc_time(local.unix_seconds);
        assert!((local.year - utc.year).abs() <= 1);
        assert_eq!(local.second, utc.second);
    }
}
