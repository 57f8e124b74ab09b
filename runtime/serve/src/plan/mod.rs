//! Another plan for the model while it is served: made of what its texts chose, beside the steps, and
//! moved to between them.
//!
//! `POST /plan` asks for one, and `GET /plan` says how far it is. The engine's thread takes both the
//! order and the plan that comes of it ([`orders`]); a thread of its own makes the plan.

pub(crate) mod orders;

use crate::error::{ApiError, json_response};
use crate::http::body;
use crate::job::Command;
use crate::request::fields::Fields;
use crate::request::{BadLine, Code, object};
use crate::state::State;
use crate::utilities::STATUS_TIME;
use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tier_plan_runtime::engine::Rearranged;
use tier_plan_runtime::formats::placement::{PerTier, Placement, Prediction};
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::printable::printable;
use tokio::sync::oneshot;

/// Where a plan is asked for.
pub(crate) const PATH: &str = "/plan";

/// Longest search for a plan.
const MAX_TIME_LIMIT_S: usize = 600;

/// What a plan is to be made from.
pub struct Question {
    /// The present plan.
    pub plan: Placement,
    /// Bytes by tier for pins and slots together.
    pub room: PerTier<u64>,
    /// What texts chose.
    pub uses: Profile,
    /// Seconds after which the search stops improving.
    pub time_limit_s: f64,
}

/// A plan for a loaded model, and what it would bring.
#[derive(Debug, Clone, PartialEq)]
pub struct Replanned {
    /// The plan. It predicts speeds only if the present one does.
    pub plan: Placement,
    /// What is predicted of the present plan for these uses.
    pub now: Prediction,
    /// What is predicted of the new one.
    pub then: Prediction,
    /// What the reader should know, in sentences.
    pub notes: Vec<String>,
}

impl Replanned {
    /// Returns how much faster a decoded token is predicted to be, 0.1 for a tenth.
    pub fn gain(&self) -> f64 {
        self.now.token_s() / self.then.token_s().max(f64::MIN_POSITIVE) - 1.0
    }

    /// Returns what the gain rests on, for the end of a sentence.
    pub(crate) fn basis(&self) -> &'static str {
        match (self.has_speeds(), self.then.emulated) {
            (false, _) => ", predicted at supposed rates of memory and drive",
            (true, true) => ", predicted for emulated tiers",
            (true, false) => ", predicted",
        }
    }

    /// Whether speeds are predicted from rates of this machine.
    pub fn has_speeds(&self) -> bool {
        self.plan.predicted.decode_tok_s > 0.0
    }
}

/// Makes plans.
pub trait Replan: Send + Sync {
    /// Makes a plan that differs from the present one in pins and slots alone.
    ///
    /// # Errors
    /// A sentence, when there is nothing to choose, or the uses don't suffice.
    fn replan(&self, question: &Question) -> Result<Replanned, String>;
}

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Order {
    /// Whether pins and slots are to move.
    pub apply: bool,
    /// Least gain for which they do.
    pub min_gain: f64,
    pub time_limit_s: f64,
}

impl Default for Order {
    fn default() -> Self {
        Self {
            apply: false,
            min_gain: 0.01,
            time_limit_s: 10.0,
        }
    }
}

/// How far a plan is.
#[derive(Debug, Clone, Default)]
enum Stage {
    /// None was asked for.
    #[default]
    Idle,
    Planning,
    /// There is one, and nothing moves.
    Ready,
    Moving(Rearranged),
    Moved(Rearranged),
    Failed(String),
}

/// What is known of the last plan that was asked for.
#[derive(Debug, Default)]
struct Known {
    stage: Stage,
    /// Texts and decoded tokens that it was made from.
    uses: Option<(usize, u64)>,
    /// The plan as JSON.
    proposal: Option<Value>,
}

/// The last plan that was asked for, for all connections.
#[derive(Debug, Default)]
pub(crate) struct Replanning(Mutex<Known>);

impl Replanning {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is known; `is_available` says whether plans can be made.
    fn json(&self, is_available: bool) -> Value {
        let known = self.known();
        let (status, moved, error) = match &known.stage {
            Stage::Idle => ("idle", None, None),
            Stage::Planning => ("planning", None, None),
            Stage::Ready => ("ready", None, None),
            Stage::Moving(moved) => ("moving", Some(moved), None),
            Stage::Moved(moved) => ("moved", Some(moved), None),
            Stage::Failed(error) => ("failed", None, Some(error)),
        };
        json!({
            "status": status,
            "is_available": is_available,
            "uses": known.uses.map(|(texts, tokens)| json!({ "texts": texts, "decoded_tokens": tokens })),
            "proposal": known.proposal,
            "move": moved.map(|moved| json!({
                "total_bytes": moved.total_bytes,
                "done_bytes": moved.done_bytes,
                "failed_pins": moved.failed_pins,
                "left_pins": moved.left_pins,
                "left_slots": moved.left_slots,
            })),
            "error": error,
        })
    }
}

/// Says how far the last plan is that was asked for.
pub(crate) async fn show(Shared(state): Shared<Arc<State>>) -> Result<Response, ApiError> {
    if state.loaded().is_none() {
        return Err(ApiError::loading(state.progress()));
    }
    Ok(json_response(
        StatusCode::OK,
        &state.replanning.json(state.replan.is_some()),
    ))
}

/// Begins to make a plan.
pub(crate) async fn ask(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let bytes = body::read(&state, &headers, body).await?;
    let order = order(&bytes)?;
    let (reply, answer) = oneshot::channel();
    let sent = state.inbox.send(Command::Replan(order, reply));
    sent.map_err(|_| ApiError::stopping())?;
    match tokio::time::timeout(STATUS_TIME, answer).await {
        Ok(Ok(begun)) => begun?,
        Ok(Err(_)) => return Err(ApiError::stopping()),
        Err(_) => return Err(ApiError::slow_step()),
    }
    Ok(json_response(
        StatusCode::ACCEPTED,
        &state.replanning.json(state.replan.is_some()),
    ))
}

/// Reads a body; an empty one asks for what is usual.
pub(crate) fn order(bytes: &[u8]) -> Result<Order, BadLine> {
    let usual = Order::default();
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(usual);
    }
    let body = object(bytes)?;
    let known = ["apply", "min_gain", "time_limit_s"];
    if let Some(name) = body.keys().find(|name| !known.contains(&name.as_str())) {
        let message = format!(
            "{}: not known, expected {}",
            printable(name),
            known.join(", ")
        );
        return Err(BadLine::new(Code::InvalidRequest, message));
    }
    let fields = Fields::new(&body, "");
    let min_gain = fields.number("min_gain")?.map(f64::from);
    if min_gain.is_some_and(|gain| !(0.0..=10.0).contains(&gain)) {
        return Err(fields.bad("min_gain", "a number from 0 to 10"));
    }
    let time_limit = fields.count("time_limit_s", 1..=MAX_TIME_LIMIT_S)?;
    Ok(Order {
        apply: fields.flag("apply")?.unwrap_or(usual.apply),
        min_gain: min_gain.unwrap_or(usual.min_gain),
        time_limit_s: time_limit.map_or(usual.time_limit_s, |s| s as f64),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_says_what_is_wrong_with_it() {
        assert_eq!(order(b" \n").unwrap(), Order::default());
        let full = order(br#"{"apply": true, "min_gain": 0, "time_limit_s": 3}"#).unwrap();
        assert_eq!(
            (full.apply, full.min_gain, full.time_limit_s),
            (true, 0.0, 3.0)
        );
        for (body, word) in [
            (r#"{"aply": true}"#, "aply"),
            (r#"{"apply": "yes"}"#, "apply"),
            (r#"{"min_gain": -1}"#, "min_gain"),
            (r#"{"min_gain": 1e300}"#, "min_gain"),
            (r#"{"time_limit_s": 0}"#, "time_limit_s"),
            (r#"{"time_limit_s": 1e9}"#, "time_limit_s"),
            ("[]", "object"),
        ] {
            let error = order(body.as_bytes()).unwrap_err();
            assert!(error.message.contains(word), "{body}: {error:?}");
        }
    }

    #[test]
    fn what_is_known_is_json() {
        let replanning = Replanning::default();
        assert_eq!(replanning.json(true)["status"], "idle");
        replanning.known().stage = Stage::Moving(Rearranged {
            total_bytes: 10,
            done_bytes: 4,
            ..Rearranged::default()
        });
        assert_eq!(replanning.json(true)["move"]["done_bytes"], 4);
    }
}
