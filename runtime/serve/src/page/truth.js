// One line under an answer: what it took, beside what was predicted.

import { el } from "./dom.js";
import { bytes, count, isNumber, many, percent, seconds, short } from "./format.js";

const FINISHES = {
  length: "cut at the most tokens",
  content_filter: "filtered",
};

function part(text, title) {
  return el("span", { title }, text);
}

function speed(measured, { predicted_tok_s: predicted, emulated } = {}) {
  if (!isNumber(measured)) return null;
  const text = `${short(measured)} tokens/s`;
  const how = emulated ? "measured on emulated tiers" : "measured";
  if (!isNumber(predicted) || predicted <= 0) {
    return part(`${text} ${how}`, "Tokens after the first per second. The plan predicts no speed.");
  }
  const off = Math.round((measured / predicted - 1) * 100);
  const sign = off > 0 ? "+" : off < 0 ? "−" : "±";
  return part(
    `${text} ${how}, ${short(predicted)} predicted (${sign}${count(Math.abs(off))} %)`,
    "Tokens after the first per second, beside what the plan predicts for a text alone",
  );
}

function prompt({ timings, usage }) {
  const cached = timings?.cache_n ?? usage?.prompt_tokens_details?.cached_tokens;
  const computed = timings?.prompt_n;
  const all = usage?.prompt_tokens ?? (isNumber(computed) ? computed + (cached ?? 0) : null);
  if (!isNumber(all)) return null;
  const time = timings?.prompt_ms > 0 ? ` in ${seconds(timings.prompt_ms / 1000)}` : "";
  return part(
    `prompt ${count(all)}, ${count(cached ?? 0)} cached${time}`,
    "Tokens of the prompt; those that were cached were not computed again",
  );
}

function experts(window) {
  const [hits, misses] = [window?.expert_hits, window?.expert_misses];
  if (!isNumber(hits) || !isNumber(misses) || hits + misses === 0) return null;
  return part(
    `expert hits ${percent(hits / (hits + misses))}`,
    `${count(hits)} uses of experts found in a pin or a slot, ${count(misses)} read from the last tier, ` +
      "by all texts that were decoded at the same time",
  );
}

function reads(window) {
  const tiers = Object.entries(window?.read_bytes ?? {}).filter(([, n]) => isNumber(n) && n > 0);
  if (tiers.length === 0) return null;
  const text = tiers.map(([name, n]) => `${name} ${bytes(n)}`).join(", ");
  return part(`read ${text}`, "Bytes of weights read while decoding, by tier");
}

/** Returns the line, or null where nothing is known. */
export function truthLine({ status, truth }) {
  if (truth === null) return null;
  const { timings, tierPlan, usage, finish, seen } = truth;
  const tokens = timings?.predicted_n ?? usage?.completion_tokens;
  const parts = [];
  if (isNumber(tokens)) {
    parts.push(part(many(tokens, "token"), "Tokens of the answer"));
    const measured = tierPlan?.measured_tok_s ?? (tokens > 1 ? timings?.predicted_per_second : null);
    parts.push(
      speed(measured, tierPlan ?? {}),
      prompt(truth),
      experts(tierPlan?.window),
      reads(tierPlan?.window),
    );
    if (isNumber(timings?.queue_ms) && timings.queue_ms >= 100) {
      parts.push(part(`waited ${seconds(timings.queue_ms / 1000)}`, "Time in the queue"));
    }
  } else if (seen?.tokens > 0) {
    const title = "What the page has seen; the server counts only answers that end by themselves";
    parts.push(part(`about ${many(seen.tokens, "token")} in ${seconds(seen.seconds)}`, title));
  }
  if (status === "stopped") parts.unshift(part("stopped", "The answer was stopped before its end"));
  if (FINISHES[finish]) parts.push(part(FINISHES[finish], `finish_reason: ${finish}`));
  const known = parts.filter((one) => one !== null && one !== undefined);
  if (known.length === 0) return null;
  return el("p", { class: "truth" }, known.flatMap((one, i) => (i === 0 ? [one] : [" · ", one])));
}
