//! `tier-plan top`: what a running server does, on a terminal or as lines.
//!
//! `feed` reads snapshots on a thread, `state` adds them up, `view` and `lines` show them. Names come
//! from a server that is not trusted: `state` makes them printable when it reads them.

mod cells;
pub mod feed;
pub mod input;
pub mod lines;
pub mod state;
pub mod view;

#[cfg(test)]
mod tests;

use crate::client::Client;
use crate::interrupt::{self, Ended, Interrupted};
use crate::printable::one_line;
use anyhow::{Context, Result};
use feed::{Feed, Seen};
use input::Action;
use ratatui::crossterm::event;
use ratatui::layout::Rect;
use serde_json::json;
use state::{State, Sums};
use std::time::{Duration, Instant};
use view::Theme;

/// How long the view waits for a key before it looks at the connection and for signals.
const TICK: Duration = Duration::from_millis(100);

/// Time after which the view is drawn anew though nothing came.
const REDRAW: Duration = Duration::from_secs(1);

/// How long lines wait for news before they look again.
const LINE_WAIT: Duration = Duration::from_millis(200);

/// Time that a line counts, a little less than a second, which windows rarely are in sum.
const LINE_S: f64 = 0.95;

/// Exit code after Ctrl-C.
const INTERRUPTED: u8 = 130;

/// What lines are printed.
#[derive(Debug, Clone, Copy)]
pub struct LineOptions {
    /// Whether the first one is the last.
    pub once: bool,
    /// Whether they are JSON.
    pub json: bool,
}

/// Restores the terminal, however the view ends.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        // A terminal that is gone has nothing to restore.
        let _ = ratatui::try_restore();
    }
}

/// Shows the view until a key or a signal ends it.
///
/// # Errors
/// When the terminal cannot be used, the server refuses, or a signal ends it.
pub fn watch(client: Client, theme: Theme) -> Result<()> {
    let _catching = interrupt::catch_interrupts();
    let mut state = State::new(client.url());
    let mut feed = Feed::new(client);
    let _restored = Restored;
    let mut terminal = ratatui::try_init().context("preparing the terminal")?;
    let mut drawn: Option<Instant> = None;
    loop {
        let mut is_new = follow(&mut feed, &mut state)?;
        if interrupt::interrupted() {
            return Err(Interrupted.into());
        }
        while event::poll(Duration::ZERO).context("reading keys")? {
            is_new = true;
            match input::action(&event::read().context("reading keys")?) {
                Action::Quit => return Ok(()),
                Action::Interrupt => return Err(Ended(INTERRUPTED).into()),
                Action::Redraw => {
                    // As `clear`, without a question for the cursor that some terminals don't answer.
                    let size = terminal.size().context("the terminal's size")?;
                    let all = Rect::new(0, 0, size.width, size.height);
                    terminal.resize(all).context("clearing the terminal")?;
                }
                action => act(&mut state, action),
            }
        }
        if is_new || drawn.is_none_or(|drawn| drawn.elapsed() >= REDRAW) {
            let draw = |frame: &mut ratatui::Frame<'_>| view::draw(frame, &state, theme);
            terminal.draw(draw).context("drawing")?;
            drawn = Some(Instant::now());
        }
        event::poll(TICK).context("reading keys")?;
    }
}

/// Does what a key asks of the view.
fn act(state: &mut State, action: Action) {
    match action {
        Action::Pause => state.is_paused = !state.is_paused,
        Action::Help => state.shows_help = !state.shows_help,
        Action::Back => state.shows_help = false,
        Action::Quit | Action::Interrupt | Action::Redraw | Action::None => {}
    }
}

/// Takes in what has come, and returns whether anything has.
fn follow(feed: &mut Feed, state: &mut State) -> Result<bool> {
    let mut is_new = false;
    while let Some(seen) = feed.look()? {
        match seen {
            Seen::Scene(scene) => state.see(*scene),
            Seen::Lost { why, retry_in } => state.lose(&format!("{why:#}"), retry_in),
            Seen::Waiting(wait) => {
                if let state::Link::Lost { retry_in, .. } = &mut state.link {
                    *retry_in = wait;
                }
                return Ok(is_new);
            }
        }
        is_new = true;
    }
    Ok(is_new)
}

/// Prints a line per second until a signal or a closed pipe ends it.
///
/// # Errors
/// When there is no server, or it refuses. A connection that is lost later is made again, and a line
/// says so.
pub fn print_lines(client: Client, options: LineOptions) -> Result<()> {
    let mut feed = Feed::new(client);
    let mut second = Sums::default();
    let mut has_begun = false;
    loop {
        match feed.wait(LINE_WAIT)? {
            Some(Seen::Scene(scene)) => {
                has_begun = true;
                second.add(&scene);
                if second.seconds < LINE_S {
                    continue;
                }
                if options.json {
                    println!("{}", lines::json(&scene, &second));
                } else {
                    println!("{}", lines::words(&scene, &second));
                }
                if options.once {
                    return Ok(());
                }
                second = Sums::default();
            }
            Some(Seen::Lost { why, .. }) if !has_begun || options.once => return Err(why),
            Some(Seen::Lost { why, retry_in }) => {
                second = Sums::default();
                let (why, seconds) = (format!("{why:#}"), retry_in.as_secs_f64());
                if options.json {
                    let line = json!({ "connected": false, "error": why, "retry_in_s": seconds });
                    println!("{line}");
                } else {
                    println!("no connection: {}; next try in {seconds} s", one_line(&why));
                }
            }
            Some(Seen::Waiting(_)) | None => {}
        }
    }
}
