// Predicted and measured speed over the last two minutes.

import { el, svg } from "./dom.js";
import { isNumber, short } from "./format.js";

const SPAN_S = 120;
const HEIGHT_PX = 140;
const EDGE = { left: 48, right: 8, top: 10, bottom: 30 };
/** Time over which windows are averaged: one alone has few steps. */
const SMOOTH_S = 1.2;
/** Longest pause that the line bridges. */
const GAP_S = 3;

/** Returns a round number that is not below another, and a step that divides it. */
function scale(most) {
  if (!(most > 0)) return { top: 1, step: 0.5 };
  const size = 10 ** Math.floor(Math.log10(most));
  const step = [0.2, 0.5, 1, 2, 5].map((part) => part * size).find((one) => most / one <= 4);
  return { top: Math.ceil(most / step - 1e-9) * step, step };
}

/** The chart with its axes. */
export class SpeedChart {
  #points = [];
  #recent = [];
  #predicted = null;
  #where = "";
  #width = 0;

  constructor(root) {
    this.title = svg("title", {}, "Tokens per second of a text over time");
    this.drawing = svg("g");
    this.picture = svg("svg", { class: "chart", role: "img", height: HEIGHT_PX }, this.title, this.drawing);
    this.words = el("p", { class: "chart-words" });
    const key = (name, label) => el("span", {}, el("i", { class: `line ${name}` }), label);
    const legend = el("div", { class: "chart-legend" }, key("measured", "measured"), key("predicted", "predicted"));
    root.append(this.picture, legend, this.words);
    new ResizeObserver(() => {
      this.#width = root.clientWidth;
      this.draw();
    }).observe(root);
  }

  /** Adds what a window had. */
  add(scene) {
    const now = performance.now() / 1000;
    this.#where = scene.tiers.some((tier) => tier.emulated) ? " on emulated tiers" : "";
    this.#predicted = isNumber(scene.predicted_tok_s) ? scene.predicted_tok_s : null;
    if (isNumber(scene.text_tok_s) && scene.text_tok_s > 0) {
      const steps = isNumber(scene.decode_steps) ? Math.max(scene.decode_steps, 1) : 1;
      this.#recent.push({ at: now, steps, time: steps / scene.text_tok_s });
      this.#recent = this.#recent.filter(({ at, time }) => now - at < Math.max(SMOOTH_S, time));
      const sum = (name) => this.#recent.reduce((all, one) => all + one[name], 0);
      this.#points.push({ at: now, speed: sum("steps") / sum("time") });
    } else {
      this.#recent = [];
    }
    this.#points = this.#points.filter(({ at }) => now - at <= SPAN_S);
    this.draw();
  }

  draw() {
    if (this.#width <= EDGE.left + EDGE.right) return;
    const now = performance.now() / 1000;
    const most = this.#points.reduce((top, { speed }) => Math.max(top, speed), this.#predicted ?? 0);
    const { top, step } = scale(most);
    const inner = { x: this.#width - EDGE.left - EDGE.right, y: HEIGHT_PX - EDGE.top - EDGE.bottom };
    const x = (at) => EDGE.left + inner.x * (1 - (now - at) / SPAN_S);
    const y = (speed) => EDGE.top + inner.y * (1 - speed / top);
    this.picture.setAttribute("width", this.#width);
    this.picture.setAttribute("viewBox", `0 0 ${this.#width} ${HEIGHT_PX}`);
    this.drawing.replaceChildren(...this.#axes({ top, step, x, y, now }), ...this.#lines({ x, y, now }));
    this.#tell();
  }

  #axes({ top, step, x, y, now }) {
    const parts = [];
    const end = this.#width - EDGE.right;
    for (let tick = 0; tick <= top + step / 2; tick += step) {
      const at = y(tick);
      parts.push(svg("line", { class: "grid", x1: EDGE.left, x2: end, y1: at, y2: at }));
      const label = String(Number(tick.toPrecision(3)));
      parts.push(svg("text", { x: EDGE.left - 6, y: at + 3.5, "text-anchor": "end" }, label));
    }
    for (const ago of [120, 80, 40, 0]) {
      const at = x(now - ago);
      const anchor = ago === 0 ? "end" : ago === SPAN_S ? "start" : "middle";
      const label = ago === 0 ? "now" : `−${ago} s`;
      parts.push(svg("text", { x: at, y: HEIGHT_PX - EDGE.bottom + 14, "text-anchor": anchor }, label));
    }
    const middle = EDGE.top + (HEIGHT_PX - EDGE.top - EDGE.bottom) / 2;
    const turn = `rotate(-90 9 ${middle})`;
    parts.push(svg("text", { class: "axis", x: 9, y: middle + 3, "text-anchor": "middle", transform: turn }, "tokens/s"));
    const below = { class: "axis", x: (EDGE.left + end) / 2, y: HEIGHT_PX - 2, "text-anchor": "middle" };
    parts.push(svg("text", below, "time"));
    return parts;
  }

  #lines({ x, y, now }) {
    const parts = [];
    if (this.#predicted !== null) {
      const at = y(this.#predicted);
      parts.push(svg("line", { class: "predicted", x1: x(now - SPAN_S), x2: x(now), y1: at, y2: at }));
    }
    let path = "";
    let before = -Infinity;
    for (const { at, speed } of this.#points) {
      path += `${at - before > GAP_S ? "M" : "L"}${x(at).toFixed(1)} ${y(speed).toFixed(1)}`;
      before = at;
    }
    if (path !== "") parts.push(svg("path", { class: "measured", d: path }));
    return parts;
  }

  #tell() {
    const last = this.#points.at(-1);
    const measured = last === undefined ? "nothing measured yet" : `${short(last.speed)} tokens/s measured${this.#where}`;
    const predicted = this.#predicted === null ? "no prediction" : `${short(this.#predicted)} predicted`;
    const words = `Last: ${measured}, ${predicted} for a text alone.`;
    if (this.words.textContent !== words) this.words.textContent = words;
  }
}
