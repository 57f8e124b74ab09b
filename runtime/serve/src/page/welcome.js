// What a newcomer sees: which model answers, where it lies, and what to ask.

import { tierClass } from "./colors.js";
import { byId, el } from "./dom.js";
import { bytes, count, isNumber, many, short } from "./format.js";
import { sizeOf } from "./machine.js";

const QUESTIONS = [
  { title: "Explain", text: "Explain to a curious child why the sky is blue and sunsets are red." },
  { title: "Program", text: "Write a Python function that merges overlapping intervals, and three tests for it." },
  { title: "Compare", text: "Compare SSDs, DRAM, and VRAM in a table: capacity, bandwidth, latency, and price." },
];

const BEGINNINGS = [
  { title: "Story", text: "In the beginning" },
  { title: "Program", text: "def read_lines(path):\n    " },
  { title: "Manual", text: "The command line options are" },
];

/** The empty conversation. */
export class Welcome {
  /** `onExample` is called with the text of an example. */
  constructor(onExample) {
    this.onExample = onExample;
    this.title = byId("welcome-title");
    this.lead = byId("welcome-lead");
    this.loading = byId("loading");
  }

  /** Says why there is no model to ask yet. */
  wait(title, lead, progress = null) {
    this.title.textContent = title;
    this.lead.textContent = lead;
    this.loading.hidden = progress === null;
    if (progress === null) return;
    const value = Math.round(progress * 100);
    this.loading.setAttribute("aria-valuenow", String(value));
    this.loading.firstElementChild.style.width = `${value}%`;
  }

  /** Says which model answers, and how fast it should be. */
  showModel({ model_alias, n_ctx, total_slots, predicted_tok_s, has_chat_template, emulated }) {
    this.loading.hidden = true;
    this.title.textContent = model_alias;
    const facts = [
      `a context of ${many(n_ctx, "token")}`,
      isNumber(total_slots) ? `${many(total_slots, "text")} at once` : null,
    ].filter(Boolean);
    const speed = isNumber(predicted_tok_s)
      ? `The plan predicts ${short(predicted_tok_s)} tokens/s for a text alone.`
      : "The plan predicts no speed.";
    const tiers = emulated ? " Tiers are emulated: speeds are not those of a machine." : "";
    const kind = has_chat_template ? "" : " It has no chat template, so it continues your text.";
    this.lead.textContent = `It has ${facts.join(" and takes ")}. ${speed}${tiers}${kind}`;
    const examples = has_chat_template ? QUESTIONS : BEGINNINGS;
    byId("examples").replaceChildren(
      ...examples.map(({ title, text }) => {
        const onclick = () => this.onExample(text);
        const shown = text.trim();
        return el("button", { type: "button", onclick }, el("strong", {}, title), el("span", {}, shown));
      }),
    );
  }

  /** Says in which tiers the model lies. */
  showTiers(tiers) {
    const used = tiers.filter((tier) => tier.used_bytes > 0);
    const all = used.reduce((sum, tier) => sum + tier.used_bytes, 0);
    byId("where").hidden = all === 0;
    if (all === 0) return;
    const parts = [];
    const lines = [];
    const words = [];
    tiers.forEach((tier, i) => {
      if (!(tier.used_bytes > 0)) return;
      const tone = tierClass(i, tiers.length);
      const part = el("div", { class: tone });
      part.style.flexGrow = String(tier.used_bytes / all);
      parts.push(part);
      const text = `${bytes(tier.used_bytes)} of ${bytes(sizeOf(tier))}`;
      words.push(`${tier.name} ${text}`);
      lines.push(el("li", {}, el("i", { class: `swatch ${tone}` }), el("strong", {}, tier.name), ` ${text}`));
    });
    const bar = byId("where-bar");
    bar.replaceChildren(...parts);
    bar.setAttribute("aria-label", `Where the model lies: ${words.join(", ")} in ${count(words.length)} tiers`);
    byId("where-list").replaceChildren(...lines);
  }
}
