use super::*;
use proptest::prelude::*;

fn reading(threads: &[(u32, u64, u64)], machine: [u64; 3]) -> Reading {
    let time = |&(id, ran_ms, waited_ms): &(u32, u64, u64)| {
        let (ran_ns, waited_ns) = (ran_ms * 1_000_000, waited_ms * 1_000_000);
        (id, ThreadTime { ran_ns, waited_ns })
    };
    let [busy, idle, stolen] = machine;
    Reading {
        at: Some(Instant::now()),
        caller: Some(1),
        threads: threads.iter().map(time).collect(),
        machine: Some(MachineTicks { busy, idle, stolen }),
        own: Some(threads.iter().map(|t| t.1 / 10).sum()),
        pressure_us: Some(0),
        preempted: Some(0),
    }
}

fn near(value: Option<f64>, wanted: f64) {
    let value = value.unwrap();
    assert!((value - wanted).abs() < 1e-9, "{value}, not {wanted}");
}

#[test]
fn quiet_threads_have_the_processors() {
    let before = reading(&[(1, 0, 0), (2, 0, 0)], [100, 100, 0]);
    let after = reading(&[(1, 10_000, 0), (2, 10_000, 0)], [2100, 100, 0]);
    let usage = Usage::of(&before, &after, 2, 10.0);
    near(usage.share, 1.0);
    near(usage.stolen, 0.0);
    near(usage.others, 0.0);
    near(usage.processors, 2.0);
    near(usage.pressure, 0.0);
    near(usage.preempted_per_s, 0.0);
}

#[test]
fn a_busy_thread_beside_one_of_two_takes_a_part() {
    // Both processors are busy; one of them is shared with another program.
    let before = reading(&[(1, 5_000, 40), (2, 70, 90)], [0, 0, 0]);
    let mut after = reading(&[(1, 15_000, 40), (2, 5_070, 5_090)], [2000, 0, 0]);
    (after.pressure_us, after.preempted) = (Some(5_000_000), Some(2_500));
    let usage = Usage::of(&before, &after, 2, 10.0);
    near(usage.share, 0.75);
    // Beside the caller, it takes half.
    let mut caller = after.clone();
    caller.caller = Some(2);
    near(Usage::of(&before, &caller, 2, 10.0).share, 0.5);
    near(usage.others, 0.5);
    near(usage.pressure, 0.5);
    near(usage.preempted_per_s, 250.0);
}

#[test]
fn stolen_time_counts_once() {
    let before = reading(&[(1, 0, 0), (2, 0, 0)], [0, 0, 0]);
    let after = reading(&[(1, 9_000, 0), (2, 9_000, 0)], [1800, 0, 200]);
    let usage = Usage::of(&before, &after, 2, 10.0);
    near(usage.stolen, 0.1);
    near(usage.share, 0.9);
}

#[test]
fn workers_that_are_kept_off_lack_in_part() {
    let before = reading(&[(1, 0, 0), (2, 0, 0), (3, 0, 0)], [0, 0, 0]);
    let after = [(1, 7_000, 3_000), (2, 4_000, 6_000), (3, 9_000, 0)];
    let after = reading(&after, [2000, 0, 0]);
    near(Usage::of(&before, &after, 3, 10.0).share, 0.7 * 2.4 / 3.0);
    // A worker that never runs leaves the work to the caller.
    let after = reading(&[(1, 8_000, 2_000), (2, 0, 10_000)], [2000, 0, 0]);
    near(Usage::of(&before, &after, 2, 10.0).share, 0.4);
}

#[test]
fn threads_that_hardly_run_do_not_count() {
    // Reader threads wait for a drive, and one was hardly let run when it was ready.
    let before = reading(&[(1, 0, 0)], [0, 0, 0]);
    let after = reading(&[(1, 8_000, 2_000), (7, 1, 99), (8, 1, 0)], [800, 200, 0]);
    near(Usage::of(&before, &after, 4, 10.0).share, 0.8);
    // Nor do more threads than compute.
    let after = reading(&[(1, 8_000, 2_000), (2, 700, 700)], [800, 200, 0]);
    near(Usage::of(&before, &after, 1, 10.0).share, 0.8);
}

#[test]
fn a_thread_number_that_is_given_again_counts_from_zero() {
    let before = reading(&[(1, 90_000, 50_000)], [0, 0, 0]);
    let after = reading(&[(1, 3_000, 1_000)], [1000, 0, 0]);
    near(Usage::of(&before, &after, 1, 4.0).share, 0.75);
}

#[test]
fn what_is_not_counted_is_not_known() {
    let nothing = Reading::of(Path::new("/nowhere"));
    let usage = Usage::of(&nothing, &nothing, 2, 1.0);
    let unknown = Usage {
        seconds: 1.0,
        ..Usage::default()
    };
    assert_eq!(usage, unknown);
    // A reading of no moment, and no time between two.
    assert_eq!(
        Usage::between(&Reading::default(), &Reading::default(), 2),
        Usage::default()
    );
    assert_eq!(Usage::of(&nothing, &nothing, 2, 0.0), Usage::default());
}

#[test]
fn real_files_are_read() {
    let stat =
        "cpu  9604705 2603025 1022734 1747501 53301 5 23068 14396 7 3\ncpu0 1 2 3 4\nintr 5\n";
    assert_eq!(
        machine_ticks(stat),
        Some(MachineTicks {
            busy: 9_604_705 + 2_603_025 + 1_022_734 + 5 + 23_068,
            idle: 1_747_501 + 53_301,
            stolen: 14_396
        })
    );
    // Linux 2.4 has four fields.
    let old = machine_ticks("cpu 1 2 3 4\n").unwrap();
    assert_eq!((old.busy, old.idle, old.stolen), (6, 4, 0));
    let psi =
        "some avg10=88.66 avg60=72.88 avg300=45.26 total=44067154240\nfull avg10=0.00 total=9\n";
    assert_eq!(pressure_us(psi), Some(44_067_154_240));
    let time = thread_time("346327185 1085833845 106\n").unwrap();
    assert_eq!((time.ran_ns, time.waited_ns), (346_327_185, 1_085_833_845));
    let stat = "4 (a ) b) R 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20 0 3\n";
    assert_eq!(process_ticks(stat), Some(175));
    let status = "Name:\tx\nvoluntary_ctxt_switches:\t3\nnonvoluntary_ctxt_switches:\t104\n";
    assert_eq!(preemptions(status), Some(104));
}

#[test]
fn odd_files_are_read_as_far_as_they_go() {
    for text in [
        "",
        "cpu",
        "cpu ",
        "cpu 1 2 3",
        "cpu0 1 2 3 4",
        "cpu x 2 3 4",
        "cpu -1 2 3 4 5",
        "cpu 18446744073709551616 1 1 1",
        "gpu 1 2 3 4",
    ] {
        assert_eq!(machine_ticks(text), None, "{text:?}");
    }
    let most = u64::MAX;
    let full = format!("cpu {most} {most} {most} {most} {most} {most} {most} {most}");
    let ticks = machine_ticks(&full).unwrap();
    assert_eq!((ticks.busy, ticks.idle, ticks.stolen), (most, most, most));
    for text in [
        "",
        "some",
        "some avg10=1",
        "full total=5",
        "some total=x",
        "some total=-1",
    ] {
        assert_eq!(pressure_us(text), None, "{text:?}");
    }
    for text in ["", "1", "1 x 3", "x 1 1", "-1 2 3", "1.5 2 3"] {
        assert_eq!(thread_time(text), None, "{text:?}");
    }
    for text in [
        "",
        "nonvoluntary_ctxt_switches:",
        "nonvoluntary_ctxt_switches: x",
    ] {
        assert_eq!(preemptions(text), None, "{text:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn this_process_has_a_thread_that_ran() {
    let before = Reading::now();
    let mut sum = 0u64;
    let start = Instant::now();
    while start.elapsed().as_millis() < 40 {
        sum = std::hint::black_box(sum.wrapping_add(1));
    }
    let usage = Usage::between(&before, &Reading::now(), 1);
    assert!(usage.seconds >= 0.04);
    assert!(usage.share.is_none_or(|s| s > 0.0 && s <= 1.0), "{usage:?}");
}

proptest! {
    #[test]
    fn no_text_is_too_odd(text in ".{0,300}", words in "(cpu|some|total=|[0-9]{1,22}|[ \n-]){0,40}") {
        for text in [&text, &words] {
            let _ = (
                thread_time(text), machine_ticks(text), pressure_us(text), preemptions(text), process_ticks(text),
            );
        }
    }

    #[test]
    fn shares_are_shares(
        before in proptest::collection::vec((any::<u64>(), any::<u64>()), 0..5),
        after in proptest::collection::vec((any::<u64>(), any::<u64>()), 0..5),
        machine in any::<[u64; 6]>(),
        n_threads in 0usize..6,
        seconds in 0.0f64..1e6,
    ) {
        let of = |times: &[(u64, u64)], [busy, idle, stolen]: [u64; 3]| {
            let time = |(id, &(ran_ns, waited_ns)): (usize, &(u64, u64))| {
                (id as u32, ThreadTime { ran_ns, waited_ns })
            };
            Reading {
                caller: Some(2),
                threads: times.iter().enumerate().map(time).collect(),
                machine: Some(MachineTicks { busy, idle, stolen }),
                own: Some(stolen),
                pressure_us: Some(busy),
                preempted: Some(idle),
                at: None,
            }
        };
        let [a, b, c, d, e, f] = machine;
        let usage = Usage::of(&of(&before, [a, b, c]), &of(&after, [d, e, f]), n_threads, seconds);
        prop_assert!(usage.share.is_none_or(|s| s > 0.0 && s <= 1.0), "{usage:?}");
        for part in [usage.stolen, usage.pressure] {
            prop_assert!(part.is_none_or(|p| (0.0..=1.0).contains(&p)), "{usage:?}");
        }
        for amount in [usage.others, usage.preempted_per_s] {
            prop_assert!(amount.is_none_or(|x| x.is_finite() && x >= 0.0), "{usage:?}");
        }
    }
}
