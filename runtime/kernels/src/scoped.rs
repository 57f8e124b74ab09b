//! Threads of a scope that need not exist: where the system allows no more of them (a limit on
//! processes, or no address space for a stack), the calling thread does their work.

use std::sync::{Arc, Mutex};
use std::thread::{Builder, Scope, ScopedJoinHandle};

/// Work that was given to a thread, or done by the caller.
pub enum ScopedTask<'scope, T> {
    /// A thread does it.
    Running(ScopedJoinHandle<'scope, T>),
    /// The caller has done it.
    Done(T),
}

impl<T> ScopedTask<'_, T> {
    /// Returns what the work returned.
    ///
    /// # Errors
    /// When the work panicked on its thread.
    pub fn join(self) -> std::thread::Result<T> {
        match self {
            Self::Running(thread) => thread.join(),
            Self::Done(value) => Ok(value),
        }
    }
}

/// Starts a thread of a scope for `work`, and calls `work` here if the system allows no thread.
///
/// ```
/// use tier_plan_kernels::scoped::spawn_or_run;
///
/// let sum = std::thread::scope(|scope| {
///     let half = spawn_or_run(scope, || (1..=50).sum::<u32>());
///     (51..=100).sum::<u32>() + half.join().unwrap()
/// });
/// assert_eq!(sum, 5050);
/// ```
pub fn spawn_or_run<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> ScopedTask<'scope, T> {
    start(Builder::new(), scope, work)
}

fn start<'scope, T: Send + 'scope>(
    builder: Builder,
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> ScopedTask<'scope, T> {
    // A thread that could not start drops what it was given, so both sides can take the work.
    let work = Arc::new(Mutex::new(Some(work)));
    let take = |work: &Mutex<Option<_>>| work.lock().unwrap_or_else(|e| e.into_inner()).take();
    let given = Arc::clone(&work);
    let spawned = builder.spawn_scoped(scope, move || match take(&given) {
        Some(work) => work(),
        None => unreachable!("the caller takes the work only if there is no thread"),
    });
    match spawned {
        Ok(thread) => ScopedTask::Running(thread),
        Err(_) => match take(&work) {
            Some(work) => ScopedTask::Done(work()),
            None => unreachable!("a thread that did not start has taken nothing"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "every thread starts there")]
    fn work_is_done_here_where_no_thread_starts() {
        // No address space has room for this stack.
        let impossible = || Builder::new().stack_size(usize::MAX >> 2);
        let caller = std::thread::current().id();
        let mut values = [1, 2, 3];
        let ran_on = std::thread::scope(|scope| {
            let task = start(impossible(), scope, || {
                values.iter_mut().for_each(|v| *v *= 2);
                std::thread::current().id()
            });
            assert!(matches!(task, ScopedTask::Done(_)));
            task.join().unwrap()
        });
        assert_eq!((ran_on, values), (caller, [2, 4, 6]));
    }

    #[test]
    fn work_is_done_on_a_thread_where_one_starts() {
        let caller = std::thread::current().id();
        let ran_on = std::thread::scope(|scope| {
            spawn_or_run(scope, || std::thread::current().id())
                .join()
                .unwrap()
        });
        assert_ne!(ran_on, caller);
    }
}
