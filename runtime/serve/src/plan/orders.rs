//! What the engine's thread does for another plan: gives its maker what texts chose, and has pins and
//! slots move.

use super::{Order, Question, Replanned, Stage};
use crate::error::ApiError;
use crate::job::Command;
use crate::log;
use crate::state::State;
use crate::traces::Traces;
use crate::truth::Promise;
use axum::http::StatusCode;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use tier_plan_runtime::Engine;
use tier_plan_runtime::engine::Rearranged;
use tier_plan_runtime::formats::placement::{Placement, Prediction};
use tier_plan_runtime::formats::profile::Phase;
use tier_plan_runtime::os::lower_priority;
use tier_plan_runtime::units::show_bytes;

/// Fewest decoded tokens that a plan is made from.
const MIN_TOKENS: u64 = 256;

/// A plan that was made, and what is to become of it.
pub(crate) struct Planned {
    order: Order,
    made: Result<Box<Replanned>, String>,
}

fn conflict(message: impl AsRef<str>) -> ApiError {
    ApiError::new(StatusCode::CONFLICT, "conflict", message)
}

/// Begins to make a plan on a thread of its own.
pub(crate) fn begin(
    state: &Arc<State>,
    engine: &Engine,
    traces: Option<&Traces>,
    order: Order,
) -> Result<(), ApiError> {
    if matches!(state.replanning.known().stage, Stage::Planning) {
        return Err(conflict(
            "a plan is being made already; GET /plan says how far it is",
        ));
    }
    if engine.rearranging().is_some() {
        return Err(conflict(
            "pins and slots are moving already; GET /plan says how far they are",
        ));
    }
    let (Some(maker), Some(traces)) = (&state.replan, traces) else {
        let message = "what texts choose is not recorded; start the server with --profile-out FILE";
        return Err(conflict(message));
    };
    let room = engine.bytes_for_experts();
    if room.iter().all(|bytes| *bytes == 0) {
        let message = "the loaded plan has no pins and no slots, so nothing can move";
        return Err(conflict(message));
    }
    let uses = traces.uses();
    let tokens = uses.n_tokens(Some(Phase::Decode), None);
    if tokens < MIN_TOKENS {
        let message = format!(
            "{tokens} decoded tokens of {} texts that ended were recorded, expected at least {MIN_TOKENS}; try again \
             later",
            uses.prompts.len()
        );
        return Err(conflict(message));
    }
    let n_texts = uses.prompts.len();
    let question = Question {
        plan: engine.plan().clone(),
        room,
        uses,
        time_limit_s: order.time_limit_s,
    };
    let (maker, shared) = (Arc::clone(maker), Arc::clone(state));
    let work = move || {
        // Texts at work come first.
        lower_priority();
        let made = maker.replan(&question).map(Box::new);
        // Where the server has ended, nobody waits for it.
        let _ = shared.inbox.send(Command::Planned(Planned { order, made }));
    };
    let thread = std::thread::Builder::new().name("plan".into()).spawn(work);
    thread.map_err(|error| {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        ApiError::new(
            status,
            "server_error",
            format!("no thread to plan on: {error}"),
        )
    })?;
    let mut known = state.replanning.known();
    known.stage = Stage::Planning;
    known.uses = Some((n_texts, tokens));
    known.proposal = None;
    Ok(())
}

/// Takes a plan that was made, and has pins and slots move if that was asked for and is worth it.
pub(crate) fn take(state: &State, engine: &mut Engine, planned: Planned) {
    let Planned { order, made } = planned;
    let made = match made {
        Ok(made) => made,
        Err(error) => return fail(state, error),
    };
    let proposal = proposal(engine, &made);
    state.replanning.known().proposal = Some(proposal);
    let gain = made.gain();
    let what = format!(
        "a plan of what texts chose is {:+.1} % faster{}",
        100.0 * gain,
        made.basis()
    );
    if !order.apply || gain < order.min_gain {
        log::note(state, &what);
        state.replanning.known().stage = Stage::Ready;
        return;
    }
    match engine.rearrange(made.plan) {
        Ok(()) => {
            let moved = engine.rearranging().unwrap_or_default();
            let bytes = show_bytes(moved.total_bytes);
            log::note(
                state,
                &format!("{what}: pins and slots move, {bytes} are copied or read"),
            );
            state.replanning.known().stage = Stage::Moving(moved);
        }
        Err(error) => fail(state, error.to_string()),
    }
}

fn fail(state: &State, error: String) {
    log::warn(state, &format!("no other plan: {error}"));
    state.replanning.known().stage = Stage::Failed(error);
}

/// Notes how far pins and slots have moved. Called after steps, and between them.
pub(crate) fn watch(state: &State, engine: &Engine) {
    let mut known = state.replanning.known();
    if !matches!(known.stage, Stage::Moving(_)) {
        return;
    }
    if let Some(moved) = engine.rearranging() {
        known.stage = Stage::Moving(moved);
        return;
    }
    let moved = engine.rearranged().unwrap_or_default();
    known.stage = Stage::Moved(moved);
    drop(known);
    state.promise_anew(Promise::of(engine));
    let Rearranged {
        failed_pins,
        left_pins,
        left_slots,
        ..
    } = moved;
    let mut words = "pins and slots are where the new plan has them".to_string();
    if failed_pins + left_pins + left_slots > 0 {
        words += &format!(
            "; left out: pins: {}, slots: {left_slots}",
            failed_pins + left_pins
        );
    }
    log::note(state, &words);
}

/// Returns what a plan would bring, and what would move.
fn proposal(engine: &Engine, made: &Replanned) -> Value {
    let now = engine.plan();
    let predicted = |prediction: &Prediction| {
        let speed = made.has_speeds().then_some(prediction.decode_tok_s);
        json!({ "decode_tok_s": speed, "hit_rate": prediction.hit_rate, "emulated": prediction.emulated })
    };
    let (before, after) = (pins(now), pins(&made.plan));
    let bytes = |(at, _, _): &&(usize, u32, usize)| {
        let experts = engine.shape().experts.get(*at);
        experts.map_or(0, |experts| experts.expert_bytes)
    };
    let new: u64 = after.difference(&before).map(|pin| bytes(&pin)).sum();
    let slots = |plan: &Placement| plan.layers.iter().map(|l| u64::from(l.slots)).sum::<u64>();
    let tiers = now.tiers.iter().zip(&made.plan.tiers).map(|(now, then)| {
        let of = |t: &tier_plan_runtime::formats::placement::PlanTier| {
            json!({ "pinned_bytes": t.bytes.pinned, "slot_bytes": t.bytes.slots })
        };
        (now.tier.name.clone(), json!({ "now": of(now), "then": of(then) }))
    });
    json!({
        "gain": made.gain(),
        "predicted": { "now": predicted(&made.now), "then": predicted(&made.then) },
        "new_pins": after.difference(&before).count(),
        "new_pin_bytes": new,
        "dropped_pins": before.difference(&after).count(),
        "slots": { "now": slots(now), "then": slots(&made.plan) },
        "tiers": tiers.collect::<Map<String, Value>>(),
        "notes": made.notes,
        "placement": made.plan.encode(),
    })
}

/// Returns the pins of a plan: position of the layer, expert, and tier.
fn pins(plan: &Placement) -> BTreeSet<(usize, u32, usize)> {
    let layers = plan.layers.iter().enumerate();
    let pins = layers.flat_map(|(at, layer)| layer.pinned.iter().map(move |pins| (at, pins)));
    pins.flat_map(|(at, pins)| pins.experts.iter().map(move |e| (at, *e, pins.tier.get())))
        .collect()
}
