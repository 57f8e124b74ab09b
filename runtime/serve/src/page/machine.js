// What the machine is doing: tiers, speed, experts, pages, and the queue.

import { SpeedChart } from "./chart.js";
import { tierClass } from "./colors.js";
import { byId, el } from "./dom.js";
import { bytes, count, isNumber, many, percent, short } from "./format.js";
import { HeatMap } from "./heatmap.js";

/** Scenes over which rates are averaged: some two seconds. */
const SMOOTH = 8;
const MAX_TEXTS = 8;
const LAST_SCENE_MS = 600;

const STATES = {
  connecting: "connecting…",
  live: "live",
  paused: "paused",
  lost: "connection lost, trying again",
  missing: "this server tells nothing",
  locked: "needs the API key",
};

/** Returns the size of a tier: what it has, else what is planned or used. */
export function sizeOf(tier) {
  return Math.max(tier.capacity_bytes || 0, tier.budget_bytes || 0, tier.used_bytes || 0);
}

function meter(label, tone) {
  const bar = el("div", { class: `bar-fill ${tone}` });
  const props = { class: "meter", role: "meter", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100" };
  const root = el("div", props, bar);
  const set = (share, text) => {
    const value = Math.min(Math.max(share, 0), 1) * 100;
    bar.style.width = `${value}%`;
    root.setAttribute("aria-valuenow", value.toFixed(0));
    root.setAttribute("aria-valuetext", text);
  };
  return { root, set };
}

/** One tier: how full it is, what it serves, and how fast it is read. */
class TierRow {
  constructor(tier, tone) {
    this.used = meter(`${tier.name}: bytes used`, tone);
    this.hits = meter(`${tier.name}: share of expert uses`, tone);
    this.rate = el("span", { class: "rate", title: "Share of expert uses that it serves, and bytes of weights read per second" });
    this.line = el("div", { class: "tier-line" });
    const isKind = tier.kind.toLowerCase() === tier.name.toLowerCase();
    const words = [isKind ? null : tier.kind, tier.emulated ? "emulated" : null].filter(Boolean);
    const kind = words.length === 0 ? null : el("span", { class: "kind" }, words.join(", "));
    this.root = el(
      "div",
      { class: "tier" },
      el("div", { class: "tier-head" }, el("i", { class: `swatch ${tone}` }), el("strong", {}, tier.name), kind, this.rate),
      this.used.root,
      el("div", { class: "hits" }, this.hits.root),
      this.line,
    );
  }

  show(tier, { rate, share }) {
    const size = sizeOf(tier);
    const planned = tier.budget_bytes > 0 && tier.budget_bytes < size ? `, ${bytes(tier.budget_bytes)} planned` : "";
    const text = `${bytes(tier.used_bytes)} of ${bytes(size)}${planned}`;
    this.used.set(size > 0 ? tier.used_bytes / size : 0, text);
    const speed = isNumber(rate) && rate > 0 ? `${bytes(rate)}/s` : "idle";
    this.rate.textContent = isNumber(share) ? `${percent(share)} of uses · ${speed}` : speed;
    this.line.textContent = text;
    const served = isNumber(share) ? `serves ${percent(share)} of expert uses` : "no expert used lately";
    this.hits.set(share ?? 0, served);
  }
}

/** Pages of the cache, and who waits. */
class Queue {
  constructor(root) {
    this.pages = meter("Pages of the KV cache in use", "tone-accent");
    this.pageText = el("p", {});
    this.queueText = el("p", {});
    this.list = el("ul", { class: "texts" });
    root.append(this.pages.root, this.pageText, this.queueText, this.list);
  }

  show({ pages, queue, texts, decode_tok_s, prompt_tok_s }) {
    const used = pages.total - pages.free;
    const text = `${count(used)} of ${many(pages.total, "page")} of the KV cache in use`;
    this.pages.set(pages.total > 0 ? used / pages.total : 0, text);
    this.pageText.textContent = text;
    const speeds = [
      decode_tok_s > 0 ? `${short(decode_tok_s)} tokens/s of all texts` : null,
      prompt_tok_s > 0 ? `${short(prompt_tok_s)} tokens/s of prompts` : null,
    ].filter(Boolean);
    const running = `${count(queue.running)} of ${many(queue.max_running, "text")} at work`;
    const waiting = `${count(queue.waiting)} waiting`;
    this.queueText.textContent = [running, waiting, ...speeds].join(" · ");
    const shown = texts.slice(0, MAX_TEXTS).map((one) => el("li", {}, Queue.#line(one)));
    if (texts.length > MAX_TEXTS) shown.push(el("li", {}, `and ${count(texts.length - MAX_TEXTS)} more`));
    this.list.replaceChildren(...shown);
  }

  static #line({ state, n_prompt_tokens, n_prompt_done, n_decoded }) {
    if (state === "prompt") return `reads its prompt: ${count(n_prompt_done)} of ${many(n_prompt_tokens, "token")}`;
    if (state === "generating") return `writes: ${many(n_decoded, "token")} after ${count(n_prompt_tokens)}`;
    return `${state}: prompt of ${many(n_prompt_tokens, "token")}`;
  }
}

/** The view beside the conversation. */
export class Machine {
  #rows = [];
  #shape = "";
  #recent = [];
  #answers = 0;
  #countsUntil = 0;
  #state = byId("machine-state");

  constructor() {
    this.heat = new HeatMap(byId("heat"));
    this.chart = new SpeedChart(byId("speed"));
    this.queue = new Queue(byId("queue"));
    this.tiers = byId("tiers");
    byId("heat-scope").addEventListener("change", (event) => {
      this.heat.scope = event.target.value;
    });
  }

  /** Says whether scenes come. */
  state(name) {
    // Each scene says that it is live; a screen reader need not.
    if (this.#state.dataset.state === name) return;
    this.#state.textContent = STATES[name] ?? name;
    this.#state.dataset.state = name;
    if (name !== "live" && name !== "connecting") this.#recent = [];
  }

  beginAnswer() {
    if (this.#answers === 0) this.heat.beginAnswer();
    this.#answers += 1;
  }

  /** Ends an answer, whose last steps come with the next scene, and calls back when none is left. */
  endAnswer(onLast) {
    this.#answers -= 1;
    this.#countsUntil = performance.now() + LAST_SCENE_MS;
    setTimeout(() => {
      if (this.#answers === 0) onLast();
    }, LAST_SCENE_MS);
  }

  /** Shows a scene. */
  show(scene) {
    this.#recent.push(scene);
    if (this.#recent.length > SMOOTH) this.#recent.shift();
    this.#showTiers(scene.tiers);
    this.heat.add(scene, this.#answers > 0 || performance.now() < this.#countsUntil);
    this.chart.add(scene);
    this.queue.show(scene);
  }

  #showTiers(tiers) {
    const shape = JSON.stringify(tiers.map(({ name, kind }) => [name, kind]));
    if (shape !== this.#shape) {
      this.#shape = shape;
      this.#recent = this.#recent.slice(-1);
      this.#rows = tiers.map((tier, i) => new TierRow(tier, tierClass(i, tiers.length)));
      this.tiers.replaceChildren(...this.#rows.map((row) => row.root));
    }
    const time = this.#recent.reduce((sum, scene) => sum + scene.window_s, 0);
    const total = (value) => this.#recent.reduce((sum, scene) => sum + value(scene), 0);
    const uses = tiers.map((_, i) => total((scene) => scene.tiers[i].accesses));
    const all = uses.reduce((sum, n) => sum + n, 0);
    tiers.forEach((tier, i) => {
      const read = total((scene) => scene.tiers[i].read_bytes_per_s * scene.window_s);
      this.#rows[i].show(tier, { rate: time > 0 ? read / time : null, share: all > 0 ? uses[i] / all : null });
    });
  }
}
