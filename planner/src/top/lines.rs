//! What is printed where the output is no terminal: a line per second, for people or programs.

use super::state::{Scene, Sums};
use crate::print::digits;
use serde_json::{Value, json};

/// Returns a second in words. Names in it are printable.
pub fn words(scene: &Scene, second: &Sums) -> String {
    let mut line = scene.model.clone();
    if let Some(plan) = &scene.plan {
        line += &format!(" (plan {plan})");
    }
    line += &format!(": decode {} tok/s", digits(second.decode_tok_s()));
    if let Some(rate) = second.text_tok_s() {
        line += &format!(", {} per text", digits(rate));
    }
    if let Some(predicted) = scene.predicted_tok_s {
        line += &format!(", predicted {}", digits(predicted));
    }
    line += &format!(" · prompt {} tok/s", digits(second.prompt_tok_s()));
    if let Some(rate) = second.hit_rate() {
        line += &format!(" · hits {:.1}%", rate * 100.0);
    }
    if let Some((last, tier)) = scene.tiers.iter().enumerate().next_back() {
        let of = match tier.read_gbps {
            Some(limit) => format!(" of {}", digits(limit)),
            None => String::new(),
        };
        let read = digits(second.read_gbps(last));
        line += &format!(" · {} {read}{of} GB/s", tier.name);
    }
    line += &format!(
        " · {} of {} texts, {} waiting · KV {} of {} pages",
        scene.running,
        scene.max_running,
        scene.waiting,
        scene.pages_used(),
        scene.pages_total
    );
    if let Some(requests) = &scene.requests {
        line += &format!(" · {} failed", requests.failed);
    }
    if scene.is_emulated() {
        line += " · emulated tiers";
    }
    line
}

/// Returns a second as JSON, with the names of `/tier-plan/live`.
pub fn json(scene: &Scene, second: &Sums) -> Value {
    let tiers = scene.tiers.iter().enumerate().map(|(i, tier)| {
        json!({
            "name": tier.name,
            "kind": tier.kind,
            "emulated": tier.emulated,
            "size_bytes": tier.size_bytes,
            "used_bytes": tier.used_bytes,
            "read_gbps": tier.read_gbps,
            "measured_gbps": second.read_gbps(i),
            "hit_rate": second.share(i),
        })
    });
    let texts = scene.texts.iter().map(|text| {
        json!({
            "id": text.id,
            "state": text.stage.name(),
            "n_prompt_tokens": text.n_prompt,
            "n_prompt_done": text.n_done,
            "n_decoded": text.n_decoded,
        })
    });
    let requests = scene.requests.map(|requests| {
        json!({
            "answered": requests.answered,
            "refused": requests.refused,
            "queue_full": requests.queue_full,
            "abandoned": requests.abandoned,
            "failed": requests.failed,
        })
    });
    json!({
        "connected": true,
        "model": scene.model,
        "plan": scene.plan,
        "emulated": scene.is_emulated(),
        "uptime_s": scene.uptime_s,
        "window_s": second.seconds,
        "decode_tok_s": second.decode_tok_s(),
        "text_tok_s": second.text_tok_s(),
        "predicted_tok_s": scene.predicted_tok_s,
        "prompt_tok_s": second.prompt_tok_s(),
        "hit_rate": second.hit_rate(),
        "tiers": tiers.collect::<Vec<Value>>(),
        "pages": { "free": scene.pages_free, "total": scene.pages_total },
        "queue": {
            "running": scene.running,
            "waiting": scene.waiting,
            "max_running": scene.max_running,
            "max_waiting": scene.max_waiting,
        },
        "requests": requests,
        "texts": texts.collect::<Vec<Value>>(),
    })
}
