//! A request to stop, which long work polls.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Longest time between two looks at the request while waiting.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A request to stop. Clones share it: one side requests, and work that holds another polls.
///
/// ```
/// use tier_plan_runtime::Cancel;
///
/// let (cancel, polled) = { let cancel = Cancel::default(); (cancel.clone(), cancel) };
/// assert!(!polled.is_requested());
/// cancel.request();
/// assert!(polled.is_requested());
/// ```
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Requests that the work stops. Returns whether that was requested already.
    pub fn request(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }

    /// Withdraws the request, so that later work runs.
    pub fn withdraw(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    /// Returns the request itself, for loops that know no [`Cancel`].
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }

    /// Returns whether the work should stop.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
