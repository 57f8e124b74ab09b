mod cost;
mod simulation;

use super::*;
use proptest::prelude::*;
use simulation::{Job, Simulation};

fn limits(max_rows: usize, max_texts: usize) -> Limits {
    Limits {
        max_rows,
        max_texts,
        max_step: Duration::from_millis(100),
        max_drafts: 0,
    }
}

fn job(id: u64, prompt: usize, length: usize) -> Job {
    Job {
        request: Request {
            id: TextId(id),
            prompt,
            max_new: length,
            ..Request::default()
        },
        length,
        cancel_at: None,
        shares: None,
    }
}

fn jobs(jobs: impl IntoIterator<Item = Job>) -> Vec<Job> {
    jobs.into_iter().collect()
}

/// Random jobs that fit `total` pages, in the order of their arrival.
fn any_jobs(total: usize) -> impl Strategy<Value = Vec<Job>> {
    let most = total * PAGE;
    let one = (
        1..=most,
        any::<prop::sample::Index>(),
        1..40usize,
        -2..3i8,
        0..3000u64,
        prop::option::weighted(0.2, 0..60usize),
        prop::option::weighted(0.3, any::<prop::sample::Index>()),
    );
    prop::collection::vec(one, 1..14).prop_map(move |texts| {
        let mut arrivals: Vec<u64> = texts.iter().map(|t| t.4).collect();
        arrivals.sort_unstable();
        let jobs = texts.iter().enumerate().map(|(i, text)| {
            let (prompt, max_new, length, priority, _, cancel_at, shares) = *text;
            let max_new = 1 + max_new.index((most - prompt + 1).min(200));
            Job {
                request: Request {
                    id: TextId(i as u64),
                    prompt,
                    cached: 0,
                    max_new,
                    priority,
                    arrival: Duration::from_millis(arrivals[i]),
                },
                length,
                cancel_at,
                shares: shares.filter(|_| i > 0).map(|shares| shares.index(i)),
            }
        });
        jobs.collect()
    })
}

proptest! {
    // The simulation checks every step: pages, rows, positions, the row of each running text, and
    // the predicted time.
    #[test]
    fn any_texts_get_all_their_tokens(
        (total, jobs) in (1..12usize).prop_flat_map(|total| (Just(total), any_jobs(total))),
        max_rows in 1..200usize,
        max_texts in 1..9usize,
        max_drafts in 0..5usize,
    ) {
        let limits = Limits { max_drafts, ..limits(max_rows, max_texts) };
        let mut simulation = Simulation::new(jobs, total, limits);
        simulation.run();
        simulation.check_tokens();
    }

    #[test]
    fn equal_texts_give_equal_schedules(jobs in any_jobs(6)) {
        let run = || {
            let mut simulation = Simulation::new(jobs.clone(), 6, limits(64, 4));
            simulation.run();
            (simulation.took, simulation.now)
        };
        prop_assert_eq!(run(), run());
    }

    #[test]
    fn texts_begin_in_the_order_of_arrival_and_priority(jobs in any_jobs(8)) {
        // One arrival for all, so that the order is that of priorities, then of submission.
        let together = |job: &Job| Job {
            request: Request { arrival: Duration::ZERO, ..job.request },
            cancel_at: None,
            // A text that waits for what it shares is overtaken.
            shares: None,
            ..*job
        };
        let jobs: Vec<Job> = jobs.iter().map(together).collect();
        let mut simulation = Simulation::new(jobs.clone(), 8, limits(64, 3));
        simulation.run();
        let mut order: Vec<usize> = (0..jobs.len()).collect();
        order.sort_by_key(|i| (-jobs[*i].request.priority, *i));
        let begun: Vec<_> = order.iter().map(|i| simulation.seen[*i].first_step).collect();
        prop_assert!(begun.is_sorted(), "{begun:?}");
    }
}

#[test]
fn prompts_of_many_texts_fill_one_batch() {
    let mut simulation = Simulation::new(jobs((0..4).map(|i| job(i, 30, 2))), 99, limits(100, 9));
    simulation.step();
    assert_eq!(simulation.took[0].2, 100);
    simulation.run();
    simulation.check_tokens();
}

#[test]
fn the_time_between_tokens_is_bounded_while_a_long_prompt_comes() {
    let mut all = jobs((0..4).map(|i| job(i, 20, 400)));
    let mut long = job(4, 5000, 3);
    long.request.arrival = Duration::from_secs(1);
    all.push(long);
    let mut simulation = Simulation::new(all, 200, limits(512, 9));
    simulation.run();
    simulation.check_tokens();
    // The first chunk beside running texts is taken by the prior, scaled by the first prompts.
    let longest = simulation.seen[..4]
        .iter()
        .flat_map(|seen| &seen.gaps)
        .max()
        .unwrap();
    assert!(*longest <= Duration::from_millis(105), "{longest:?}");
    // And the prompt is not put off: its steps use the time that there is.
    let steps = simulation
        .took
        .iter()
        .filter(|(_, decode, prompt)| *decode > 0 && *prompt > 0);
    assert!(steps.count() < 60);
}

#[test]
fn prompts_go_on_where_steps_have_no_time_for_them() {
    let mut all = jobs((0..8).map(|i| job(i, 20, 300)));
    let mut late = job(8, 100, 3);
    late.request.arrival = Duration::from_secs(1);
    all.push(late);
    let slow = Limits {
        max_step: Duration::from_millis(25),
        ..limits(512, 9)
    };
    let mut simulation = Simulation::new(all, 200, slow);
    simulation.run();
    let first_token = simulation.seen[8].first_step.unwrap();
    assert!(first_token < Duration::from_secs(2), "{first_token:?}");
    assert!(simulation.seen[8].end.unwrap() < simulation.seen[0].end.unwrap());
}

#[test]
fn a_text_of_low_priority_does_not_starve() {
    // One text at a time, and a steady stream of urgent ones that takes all the time there is.
    let mut all = Vec::new();
    let mut low = job(0, 50, 20);
    low.request.priority = -2;
    all.push(low);
    for i in 1..400 {
        let mut urgent = job(i, 50, 20);
        urgent.request.arrival = Duration::from_millis(400) * i as u32 - Duration::from_millis(390);
        all.push(urgent);
    }
    all[0].request.arrival = Duration::from_millis(20);
    all.swap(0, 1);
    (all[0].request.id, all[1].request.id) = (TextId(0), TextId(1));
    let mut simulation = Simulation::new(all, 4, limits(64, 1));
    simulation.run();
    let waited = simulation.seen[1].first_step.unwrap();
    assert!(waited > AGING, "urgent texts come first: {waited:?}");
    assert!(waited < 4 * AGING, "{waited:?}");
}

#[test]
fn the_last_text_is_preempted_and_comes_back_first() {
    // Texts of one page grow to three each, and there are five for the two that are admitted.
    let mut simulation = Simulation::new(jobs((0..3).map(|i| job(i, 60, 130))), 5, limits(512, 9));
    simulation.run();
    simulation.check_tokens();
    let preempted: Vec<usize> = simulation.seen.iter().map(|seen| seen.preempted).collect();
    assert_eq!(preempted, [0, 1, 0]);
    let ends: Vec<_> = simulation.seen.iter().map(|seen| seen.end).collect();
    assert!(ends.is_sorted());
}

#[test]
fn priorities_decide_who_is_preempted() {
    let mut all = jobs((0..2).map(|i| job(i, 60, 130)));
    all[1].request.priority = 1;
    let mut simulation = Simulation::new(all, 5, limits(512, 9));
    simulation.run();
    simulation.check_tokens();
    assert_eq!(
        (simulation.seen[0].preempted, simulation.seen[1].preempted),
        (1, 0)
    );
}

#[test]
fn pages_that_only_one_text_holds_are_named() {
    let mut scheduler = Scheduler::new();
    let mut pages = Pages { free: 9, total: 9 };
    let request = |id, prompt| Request {
        id: TextId(id),
        prompt,
        max_new: 100,
        ..Request::default()
    };
    scheduler.submit(request(0, 128), pages).unwrap();
    scheduler.submit(request(1, 192), pages).unwrap();
    // A whole page and a part of the next are shared.
    assert_eq!(scheduler.set_cached(TextId(1), 100), 100);
    let limits = limits(512, 9);
    let plan = scheduler.next_step(pages, &limits);
    let rows: Vec<_> = plan.rows.iter().map(|r| (r.from, r.n_tokens)).collect();
    assert_eq!(rows, [(0, 128), (100, 92)]);
    let outcome = |id| TextOutcome {
        id: TextId(id),
        new_tokens: 1,
        ended: false,
    };
    scheduler.finished(Duration::from_millis(9), &[outcome(0), outcome(1)]);
    pages.free = 0;
    let plan = scheduler.next_step(pages, &limits);
    assert_eq!(
        plan.preempt,
        [Preempt {
            id: TextId(1),
            pages: 1..3
        }]
    );
    assert!(plan.rows.is_empty());
    assert_eq!(scheduler.state(TextId(1)), Some(TextState::Preempted));
    // Nothing is left to preempt: the caller has to find pages.
    assert_eq!(scheduler.next_step(pages, &limits).pages_wanted, 1);
    pages.free = 6;
    assert_eq!(scheduler.set_cached(TextId(1), 193), 192);
    let plan = scheduler.next_step(pages, &limits);
    let rows: Vec<_> = plan.rows.iter().map(|r| (r.from, r.n_tokens)).collect();
    assert_eq!(rows, [(128, 1), (192, 1)]);
}

#[test]
fn what_texts_share_is_computed_once_though_they_come_together() {
    let mut all = jobs((0..4).map(|i| job(i, 300, 5)));
    for job in &mut all[1..3] {
        job.shares = Some(0);
    }
    let limits = Limits {
        max_step: Duration::from_secs(9),
        ..limits(1024, 9)
    };
    let mut simulation = Simulation::new(all, 99, limits);
    simulation.step();
    // The last shares nothing, and overtakes the two.
    assert_eq!(simulation.took[0].2, 600);
    assert!(simulation.scheduler.upcoming().eq([TextId(1), TextId(2)]));
    simulation.run();
    simulation.check_tokens();
    let prompts: usize = simulation.took.iter().map(|took| took.2).sum();
    // Half a prompt is offered: 150 tokens.
    assert_eq!(prompts, 600 + 2 * 150);
}

#[test]
fn a_text_waits_only_while_the_other_computes_what_they_share() {
    let mut scheduler = Scheduler::new();
    let pages = Pages { free: 9, total: 9 };
    let request = |id, prompt| Request {
        id: TextId(id),
        prompt,
        max_new: 9,
        ..Request::default()
    };
    (0..2).for_each(|id| scheduler.submit(request(id, 200), pages).unwrap());
    scheduler.set_shared(TextId(1), TextId(0), 128);
    scheduler.set_shared(TextId(0), TextId(1), 128);
    scheduler.set_shared(TextId(7), TextId(0), 128);
    assert!(!scheduler.is_held(TextId(1)), "nothing is computed yet");
    let limits = limits(100, 9);
    let rows = |scheduler: &mut Scheduler| -> Vec<(u64, usize, usize)> {
        let plan = scheduler.next_step(pages, &limits);
        let rows = plan.rows.iter();
        rows.map(|r| (r.id.0, r.from, r.n_tokens)).collect()
    };
    assert_eq!(rows(&mut scheduler), [(0, 0, 100)]);
    scheduler.finished(Duration::from_millis(9), &[]);
    assert!(scheduler.is_held(TextId(1)));
    // As much is offered as it is to wait for.
    scheduler.set_cached(TextId(1), 128);
    assert!(!scheduler.is_held(TextId(1)));
    scheduler.set_cached(TextId(1), 64);
    assert!(scheduler.is_held(TextId(1)));
    // The other one goes, and with it the reason to wait.
    assert!(scheduler.cancel(TextId(0)));
    assert!(!scheduler.is_held(TextId(1)));
    assert_eq!(rows(&mut scheduler), [(1, 64, 100)]);
}

#[test]
fn a_predicted_estimate_keeps_the_first_steps_within_the_time() {
    let point = |rows, micros| RowsTime {
        rows,
        time: Duration::from_micros(micros),
    };
    // As the simulated engine is.
    let cost = StepCost::predicted(
        [point(1, 21_000), point(9, 29_000)],
        [point(16, 8_000), point(512, 256_000)],
    );
    assert_eq!(cost.predict(4, 100), Duration::from_millis(74));
    for max_step in [40, 100] {
        let mut all = jobs((0..4).map(|i| job(i, 20, 400)));
        let mut long = job(4, 5000, 3);
        long.request.arrival = Duration::from_millis(1);
        all.push(long);
        let max_step = Duration::from_millis(max_step);
        let limits = Limits {
            max_step,
            ..limits(512, 9)
        };
        let mut simulation = Simulation::new(all, 200, limits);
        simulation.scheduler = Scheduler::with_cost(cost.clone());
        simulation.run();
        simulation.check_tokens();
        let gaps = simulation.seen[..4].iter().flat_map(|seen| &seen.gaps);
        let longest = gaps.max().unwrap();
        assert!(*longest <= max_step, "{longest:?}");
        // The prompt takes what time there is.
        let mixed = simulation.took.iter().filter(|took| took.1 > 0);
        assert!(mixed.clone().any(|took| took.0 * 10 > max_step * 9));
    }
    // Points in any order, equal ones, and falling ones give no time below zero.
    for points in [
        [point(8, 10), point(1, 3)],
        [point(4, 7), point(4, 9)],
        [point(1, 900), point(100, 1)],
        [point(0, 0), point(0, 0)],
        [point(10, 10), point(20, 1000)],
    ] {
        let cost = StepCost::predicted(points, points);
        assert!(cost.predict(1, 0) <= cost.predict(9, 9), "{points:?}");
    }
}

#[test]
fn texts_have_no_more_drafts_than_they_want() {
    let mut simulation = Simulation::new(jobs((0..3).map(|i| job(i, 9, 30))), 9, limits(64, 9));
    simulation.limits.max_drafts = 4;
    simulation.step();
    assert_eq!(simulation.scheduler.n_running(), 3);
    simulation.scheduler.set_drafts(TextId(0), 0);
    simulation.scheduler.set_drafts(TextId(1), 2);
    let pages = simulation.cache.pages();
    let plan = simulation.scheduler.next_step(pages, &simulation.limits);
    let drafts: Vec<usize> = plan.rows.iter().map(|row| row.drafts).collect();
    assert_eq!(drafts, [0, 2, 4]);
    simulation.scheduler.abandoned();
    simulation.run();
    simulation.check_tokens();
}

#[test]
fn what_can_never_fit_is_refused() {
    let mut scheduler = Scheduler::new();
    let pages = Pages { free: 0, total: 2 };
    let request = |prompt, max_new| Request {
        id: TextId(7),
        prompt,
        max_new,
        ..Request::default()
    };
    assert_eq!(
        scheduler.submit(request(0, 1), pages),
        Err(SubmitError::EmptyPrompt)
    );
    assert_eq!(
        scheduler.submit(request(1, 0), pages),
        Err(SubmitError::NoTokens)
    );
    let long = scheduler
        .submit(request(100, 30), pages)
        .unwrap_err()
        .to_string();
    assert!(
        long.contains("129 positions need 3 pages of the KV cache, 2 available"),
        "{long}"
    );
    assert!(scheduler.submit(request(1, usize::MAX), pages).is_err());
    assert_eq!(scheduler.submit(request(100, 29), pages), Ok(()));
    let twice = scheduler.submit(request(1, 1), pages);
    assert_eq!(twice, Err(SubmitError::Duplicate(TextId(7))));
    assert_eq!(scheduler.len(), 1);
}

#[test]
fn a_step_that_failed_is_planned_again() {
    let mut scheduler = Scheduler::new();
    let pages = Pages { free: 4, total: 4 };
    scheduler
        .submit(
            Request {
                prompt: 9,
                max_new: 1,
                ..Request::default()
            },
            pages,
        )
        .unwrap();
    let first = scheduler.next_step(pages, &limits(8, 1));
    scheduler.abandoned();
    assert_eq!(scheduler.next_step(pages, &limits(8, 1)).rows, first.rows);
    // Canceled while it is computed: its outcome is of no consequence.
    assert!(scheduler.cancel(TextId(0)));
    scheduler.finished(
        Duration::from_millis(1),
        &[TextOutcome {
            id: TextId(0),
            new_tokens: 1,
            ended: false,
        }],
    );
    assert!(scheduler.is_empty() && !scheduler.cancel(TextId(0)));
}
