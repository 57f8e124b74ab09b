// A plan for what this server is used for: what it would bring, and the move to it.

import { byId, el } from "./dom.js";
import { bytes, isNumber, many, percent, short } from "./format.js";

/** How often a server that plans or moves is asked how far it is. */
const POLL_MS = 500;

/** Least gain that is worth a word. */
const MIN_GAIN = 0.01;

/** Returns what is predicted of the present plan and the new one. */
function predictedText({ gain, predicted, new_pin_bytes }) {
  const { now, then } = predicted;
  const tiers = then.emulated ? " on emulated tiers" : "";
  const speeds = isNumber(now.decode_tok_s) && isNumber(then.decode_tok_s)
    ? `${short(now.decode_tok_s)} → ${short(then.decode_tok_s)} tokens/s, `
    : "";
  const rates = isNumber(then.decode_tok_s) ? "" : " at supposed rates of memory and drive";
  const hits = `hits ${percent(now.hit_rate)} → ${percent(then.hit_rate)}`;
  if (gain < MIN_GAIN) return `The present plan is about as fast as any, by prediction${tiers}: ${speeds}${hits}.`;
  return `Predicted for these texts${tiers}: ${speeds}${hits}, ${percent(gain)} faster${rates}. ${bytes(new_pin_bytes)} would move.`;
}

function movedText({ failed_pins, left_pins, left_slots }) {
  const pins = failed_pins + left_pins;
  if (pins + left_slots === 0) return "The model has moved to the plan.";
  return `The model has moved to the plan, but for ${many(pins, "expert")} and ${many(left_slots, "slot")}.`;
}

/** The section of the machine view. It is there where the server records what texts choose. */
export class PlanView {
  #api;
  #section = byId("plan-section");
  #words = el("p", { role: "status" });
  #ask = el("button", { type: "button", class: "text-button", onclick: () => this.#post(false) });
  #apply = el("button", { type: "button", class: "text-button", onclick: () => this.#post(true) }, "Move to it");
  #timer = null;

  constructor(api) {
    this.#api = api;
    byId("plan").append(this.#words, el("div", { class: "plan-buttons" }, this.#ask, this.#apply));
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** Asks the server how far it is, and goes on while it has something to do. */
  async look() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    try {
      this.#show(await this.#api.json("plan"));
    } catch {
      // A server without plans, or one that is gone: the rest of the page says so.
      this.#section.hidden = true;
    }
  }

  async #post(apply) {
    this.#ask.disabled = true;
    this.#apply.disabled = true;
    try {
      this.#show(await this.#api.json("plan", { body: { apply, min_gain: 0 } }));
    } catch (error) {
      this.#words.textContent = `Not now: ${error.message}.`;
      this.#ask.disabled = false;
    }
  }

  #show({ status, is_available, uses, proposal, move, error }) {
    this.#section.hidden = !is_available;
    if (!is_available) return;
    const busy = status === "planning" || status === "moving";
    const words = {
      idle: () => "Which experts texts choose is recorded. A plan for that may be faster.",
      planning: () => `Making a plan of ${many(uses.texts, "text")}…`,
      ready: () => predictedText(proposal),
      moving: () => `Moving: ${bytes(move.done_bytes)} of ${bytes(move.total_bytes)}…`,
      moved: () => movedText(move),
      failed: () => `No other plan: ${error}.`,
    };
    const text = words[status]?.() ?? status;
    if (this.#words.textContent !== text) this.#words.textContent = text;
    this.#ask.textContent = status === "idle" ? "Plan for this use" : "Plan again";
    this.#ask.disabled = busy;
    this.#apply.disabled = busy;
    this.#apply.hidden = status !== "ready" || proposal.gain < MIN_GAIN;
    if (busy) this.#timer = setTimeout(() => this.look(), POLL_MS);
  }
}
