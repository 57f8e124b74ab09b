// One message of a conversation on the page.

import { copy, el, icon, iconButton, toast } from "./dom.js";
import { count, many, seconds } from "./format.js";
import { Markdown, codeBlock } from "./markdown.js";
import { truthLine } from "./truth.js";

/** Returns JSON with indents, or the text as it is where it is not JSON yet. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function folded(name, label) {
  const summary = el("summary", {}, icon("chevron"), label);
  return el("details", { class: name }, summary);
}

/** A message, which an answer updates while it comes. */
export class MessageView {
  #thought = null;
  #calls = [];

  /** `actions` has what its buttons do; `place` is its place among siblings. */
  constructor(node, place, { author, isMarkdown, actions }) {
    this.node = node;
    this.actions = actions;
    this.text = el("div", { class: isMarkdown ? "text markdown" : "text plain" });
    this.markdown = isMarkdown ? new Markdown(this.text) : null;
    this.before = el("div", { class: "before" });
    this.after = el("div", { class: "after" });
    this.foot = el("div", { class: "foot" });
    const heading = el("h2", { class: "visually-hidden" }, author);
    this.content = el("div", { class: "content" }, this.before, this.text, this.after);
    if (node.role === "results") this.#fold();
    this.root = el(
      "article",
      { class: `message ${node.role}`, "data-id": node.id },
      heading,
      this.content,
      this.foot,
    );
    this.#fillFoot(place);
    this.update();
  }

  /** Shows the message as it is now. */
  update() {
    const { node } = this;
    const isRunning = node.status === "running";
    this.root.classList.toggle("running", isRunning);
    this.root.setAttribute("aria-busy", String(isRunning));
    this.#showThought(isRunning);
    if (this.markdown) this.markdown.render(node.content);
    else this.text.textContent = node.content;
    this.#showCalls();
    const isEmpty = node.content === "" && node.reasoning === "" && node.toolCalls.length === 0;
    this.text.classList.toggle("waiting", isRunning && isEmpty);
    if (!isRunning) this.#showEnd(isEmpty);
  }

  /** Folds results of tools under their names. */
  #fold() {
    const names = this.node.results.map(({ name }) => name).join(", ");
    const details = folded("call", `Results of ${names}`);
    this.text.replaceWith(details);
    details.append(this.text);
  }

  /** Asks for the results of calls that nothing has answered. */
  askForResults() {
    const calls = this.node.toolCalls;
    const areas = calls.map(({ name }, i) => {
      return el("textarea", { rows: 2, id: `result-${this.node.id}-${i}`, placeholder: `What ${name} returns` });
    });
    const onsubmit = (event) => {
      event.preventDefault();
      const results = calls.map(({ id, name }, i) => ({ id, name, text: areas[i].value }));
      this.actions.answerCalls(this.node, results);
    };
    const fields = calls.map(({ name }, i) => [el("label", { for: areas[i].id }, `Result of ${name}`), areas[i]]);
    const send = el("button", { type: "submit", class: "primary" }, "Give the results");
    this.results = el("form", { class: "edit results", onsubmit }, fields, el("div", { class: "edit-buttons" }, send));
    this.content.after(this.results);
  }

  /** Says what an answer without a word waits for. */
  wait(text) {
    if (!this.text.classList.contains("waiting")) return;
    const isReading = text?.state === "prompt" && text.n_prompt_tokens > 0;
    const done = `${count(text?.n_prompt_done)} of ${many(text?.n_prompt_tokens, "token")}`;
    if (isReading) this.text.dataset.wait = `reads the prompt: ${done}…`;
    else if (text?.state === "waiting") this.text.dataset.wait = "waits for its turn…";
    else delete this.text.dataset.wait;
  }

  #showThought(isRunning) {
    const { node } = this;
    if (node.reasoning === "") return;
    if (this.#thought === null) {
      const label = el("span");
      const text = el("div", { class: "thought-text markdown" });
      const details = folded("thought", label);
      details.append(text);
      this.before.append(details);
      this.#thought = { label, markdown: new Markdown(text) };
    }
    const isThinking = isRunning && node.content === "" && node.toolCalls.length === 0;
    const time = node.truth?.seen?.thought;
    const past = time ? `Thought for ${seconds(time)}` : "Thought";
    this.#thought.label.textContent = isThinking ? "Thinking…" : past;
    this.#thought.markdown.render(node.reasoning);
  }

  #showCalls() {
    this.node.toolCalls.forEach((call, i) => {
      if (this.#calls[i] === undefined) {
        const label = el("span");
        const details = folded("call", label);
        const code = codeBlock("json", "");
        details.append(code);
        this.after.append(details);
        this.#calls[i] = { label, code: code.querySelector("code") };
      }
      const { label, code } = this.#calls[i];
      label.textContent = `Calls the tool ${call.name === "" ? "…" : call.name}`;
      code.textContent = pretty(call.arguments);
    });
  }

  #showEnd(isEmpty) {
    this.root.querySelector(".truth")?.remove();
    this.root.querySelector(".problem")?.remove();
    const { node } = this;
    if (node.status === "failed") {
      const after = node.error?.retryAfter ? ` Try again in ${seconds(node.error.retryAfter)}.` : "";
      const text = `${node.error?.message ?? "the answer failed"}.`.replace(/([.!?])\.$/, "$1");
      this.after.after(el("p", { class: "problem", role: "alert" }, icon("warning"), text + after));
    } else if (isEmpty && node.role === "assistant" && node.status === "done") {
      this.after.after(el("p", { class: "problem" }, "The model ended the text at once."));
    }
    const line = truthLine(node);
    if (line !== null) this.foot.prepend(line);
  }

  #fillFoot({ index, total }) {
    const { node, actions } = this;
    const bar = el("div", { class: "actions" });
    if (total > 1) {
      const turn = (by) => () => actions.turn(node, by);
      const before = iconButton("left", "Previous version", turn(-1), { disabled: index === 0 });
      const after = iconButton("right", "Next version", turn(1), { disabled: index === total - 1 });
      const label = el("span", { class: "place" }, `${index + 1}/${total}`);
      label.setAttribute("aria-label", `Version ${index + 1} of ${total}`);
      bar.append(el("span", { class: "versions", role: "group" }, before, label, after));
    }
    bar.append(
      iconButton("copy", "Copy", () => this.#copy()),
    );
    if (node.role !== "results") {
      const label = node.role === "user" ? "Edit and ask again" : "Edit";
      bar.append(iconButton("edit", label, () => this.edit()));
    }
    if (node.role === "assistant") {
      bar.append(iconButton("again", "Another answer", () => actions.regenerate(node)));
    }
    this.foot.append(bar);
  }

  async #copy() {
    try {
      await copy(this.node.content);
      toast("Copied");
    } catch (error) {
      toast(`Not copied: ${error.message}`);
    }
  }

  /** Lets the user change the text, which makes a branch. */
  edit() {
    if (this.root.classList.contains("editing")) return;
    const isUser = this.node.role === "user";
    const area = el("textarea", { "aria-label": "Text of the message", value: this.node.content });
    const end = () => {
      form.remove();
      this.root.classList.remove("editing");
    };
    const save = () => {
      const text = area.value;
      const isSame = text.trim() === "" || text === this.node.content;
      // What can't be taken now stays in the field.
      if (isSame || this.actions.edit(this.node, text)) end();
    };
    const cancel = () => {
      end();
      this.foot.querySelector("[aria-label^=Edit]")?.focus();
    };
    const onkeydown = (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") cancel();
      else if (event.key === "Enter" && !event.shiftKey && isUser) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    const buttons = el(
      "div",
      { class: "edit-buttons" },
      el("button", { type: "button", class: "quiet", onclick: cancel }, "Cancel"),
      el("button", { type: "submit", class: "primary" }, isUser ? "Ask" : "Save as a version"),
    );
    const onsubmit = (event) => {
      event.preventDefault();
      save();
    };
    const form = el("form", { class: "edit", onsubmit, onkeydown }, area, buttons);
    this.content.after(form);
    this.root.classList.add("editing");
    area.style.height = `${Math.min(area.scrollHeight + 4, window.innerHeight / 2)}px`;
    area.focus();
  }
}
