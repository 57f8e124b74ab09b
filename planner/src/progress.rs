//! Progress bars, drawn only if standard error is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// Returns a progress bar over bytes.
pub fn bytes(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    bar.set_style(style(
        "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
    ));
    bar.set_message(what);
    bar
}

/// Returns a progress bar over `total` items.
pub fn count(what: &'static str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    bar.set_style(style("{msg} [{bar:30}] {pos}/{len} {eta}"));
    bar.set_message(what);
    bar
}

/// Returns a progress bar over requests, whose length and rate are set later.
pub fn requests() -> ProgressBar {
    let bar = ProgressBar::new(0);
    bar.set_style(style("answering [{bar:30}] {pos}/{len} {msg} {eta}"));
    bar
}

/// Returns a spinner whose line names the current step, set with [`ProgressBar::set_message`].
pub fn steps() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    bar.set_style(style("{spinner} {msg} {elapsed}"));
    if !bar.is_hidden() && can_start_thread() {
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
    }
    bar
}

/// Whether the system allows another thread; the library that draws bars panics if not.
fn can_start_thread() -> bool {
    std::thread::Builder::new()
        .spawn(|| ())
        .is_ok_and(|thread| thread.join().is_ok())
}
