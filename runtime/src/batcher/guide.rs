//! Texts that must follow a grammar: which tokens may come next is worked out beside the steps.
//!
//! When a token is drawn, a thread takes it into the grammar and works out the mask of the next one,
//! while the engine computes that one's logits. Only a draw that comes before its mask waits.

use crate::error::RunError;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// The state of a text in a grammar.
pub trait Guide: Send {
    /// Takes a token that the mask allowed.
    ///
    /// # Errors
    /// Why the text cannot go on, such as a bound on the work of a grammar.
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// Returns which tokens may come next: bit `t % 32` of word `t / 32` for the token `t`. Where the
    /// text may end, that has the bits of tokens that end a text; at least one bit is set.
    ///
    /// # Errors
    /// Why the text cannot go on.
    fn mask(&mut self) -> Result<Vec<u32>, String>;
}

/// A grammar, by which any number of texts may go.
#[derive(Clone)]
pub struct Grammar(Arc<dyn Fn() -> Box<dyn Guide> + Send + Sync>);

impl Grammar {
    /// Creates a grammar from what makes the state at its start.
    pub fn new(start: impl Fn() -> Box<dyn Guide> + Send + Sync + 'static) -> Self {
        Self(Arc::new(start))
    }

    /// Returns the state at the start.
    pub fn begin(&self) -> Box<dyn Guide> {
        (self.0)()
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

impl PartialEq for Grammar {
    /// Whether both are one grammar; equal ones that were made apart are not found.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// What the thread is asked for.
struct Question {
    guide: Box<dyn Guide>,
    token: Option<u32>,
    reply: Sender<Answer>,
}

type Answer = (Box<dyn Guide>, Result<Vec<u32>, String>);

/// The thread that works out masks. It ends with the batcher and its texts.
#[derive(Clone)]
pub(super) struct Masks(Sender<Question>);

impl Masks {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start() -> Result<Self, RunError> {
        let (sender, questions) = channel::<Question>();
        let work = move || {
            for Question {
                mut guide,
                token,
                reply,
            } in questions
            {
                let taken = token.map_or(Ok(()), |token| guide.accept(token));
                let mask = taken.and_then(|()| guide.mask());
                // Where the text is gone, so is its state.
                let _ = reply.send((guide, mask));
            }
        };
        let thread = std::thread::Builder::new().name("masks".into());
        let started = thread.spawn(work);
        started.map_err(|error| RunError::Grammar(format!("starting a thread: {error}")))?;
        Ok(Self(sender))
    }
}

/// A text's way through a grammar.
pub(super) struct Guided {
    masks: Masks,
    coming: Receiver<Answer>,
    guide: Option<Box<dyn Guide>>,
}

impl Guided {
    /// Begins at the start of a grammar.
    pub fn new(grammar: &Grammar, masks: Masks) -> Self {
        let coming = ask(&masks, grammar.begin(), None);
        Self {
            masks,
            coming,
            guide: None,
        }
    }

    /// Makes the tokens impossible that may not come next.
    ///
    /// # Errors
    /// When the text cannot go on.
    pub fn restrict(&mut self, logits: &mut [f32]) -> Result<(), RunError> {
        let stopped = |_| RunError::Grammar("the thread of masks has stopped".into());
        let (guide, mask) = self.coming.recv().map_err(stopped)?;
        self.guide = Some(guide);
        let mask = mask.map_err(RunError::Grammar)?;
        let mut is_any = false;
        for (token, logit) in logits.iter_mut().enumerate() {
            let word = mask.get(token / 32).copied().unwrap_or(0);
            if word >> (token % 32) & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            } else {
                is_any = true;
            }
        }
        if is_any {
            Ok(())
        } else {
            Err(RunError::Grammar("no token of the model can follow".into()))
        }
    }

    /// Takes a token of the text, and has the next mask worked out.
    pub fn take(&mut self, token: u32) {
        if let Some(guide) = self.guide.take() {
            self.coming = ask(&self.masks, guide, Some(token));
        }
    }
}

/// Asks for the mask after a token.
fn ask(masks: &Masks, guide: Box<dyn Guide>, token: Option<u32>) -> Receiver<Answer> {
    let (reply, coming) = channel();
    // Where the thread has stopped, waiting for its answer fails.
    let _ = masks.0.send(Question {
        guide,
        token,
        reply,
    });
    coming
}
