// What requests ask for beside the conversation, and the dialog that changes it.

import { byId, el } from "./dom.js";
import { loadSettings, saveSettings } from "./store.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", help: "0 is greedy", min: 0, step: 0.05 },
  { name: "max_tokens", label: "Most tokens", help: "per answer", min: 1, step: 1 },
  { name: "top_p", label: "Top-p", help: "nucleus sampling", min: 0, max: 1, step: 0.01 },
  { name: "top_k", label: "Top-k", help: "0 keeps all", min: 0, step: 1 },
  { name: "min_p", label: "Min-p", help: "share of the top token", min: 0, max: 1, step: 0.01 },
  { name: "seed", label: "Seed", help: "repeats an answer", min: 0, step: 1 },
  { name: "repetition_penalty", label: "Repetition penalty", help: "1 is none", min: 0.01, step: 0.05 },
  { name: "presence_penalty", label: "Presence penalty", help: "0 is none", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", help: "0 is none", min: -2, max: 2, step: 0.1 },
];

/** Names that the server's options have for what a request leaves out. */
const DEFAULTS = { repetition_penalty: "repeat_penalty" };

function defaultOf(defaults, name) {
  const value = defaults?.[DEFAULTS[name] ?? name];
  // Single precision has digits that nobody wrote.
  return typeof value === "number" ? String(Number(value.toPrecision(6))) : "";
}

/** Returns tools as a request has them, or null where a text is no JSON of tools. */
function readTools(text) {
  try {
    const value = JSON.parse(text);
    const all = Array.isArray(value) ? value : [value];
    const isTool = (one) => one?.type === "function" && typeof one.function?.name === "string";
    return all.every(isTool) ? all : null;
  } catch {
    return null;
  }
}

function read(saved) {
  const given = {};
  for (const { name, min, max, step } of FIELDS) {
    const value = Number(saved[name]);
    const isSet = saved[name] !== undefined && saved[name] !== "" && Number.isFinite(value);
    if (!isSet || value < min || value > (max ?? Infinity)) continue;
    given[name] = step === 1 ? Math.round(value) : value;
  }
  if (typeof saved.stop === "string" && saved.stop !== "") {
    given.stop = saved.stop.split("\n").filter((line) => line !== "");
  }
  const tools = typeof saved.tools === "string" ? readTools(saved.tools) : null;
  if (tools !== null && tools.length > 0) given.tools = tools;
  return given;
}

/** The dialog, and what it holds. */
export class Settings {
  #dialog = byId("settings");
  #inputs = new Map();

  /** `defaults` are the server's; `hooks` read and change the system prompt of the chat. */
  constructor({ defaults, isChat, hooks }) {
    this.hooks = hooks;
    byId("system-field").hidden = !isChat;
    const fields = FIELDS.map(({ name, label, help, min, max, step }) => {
      const props = { type: "number", id: `field-${name}`, min, max, step: step === 1 ? 1 : "any" };
      const input = el("input", { ...props, placeholder: defaultOf(defaults, name) });
      input.setAttribute("inputmode", "decimal");
      this.#inputs.set(name, input);
      return this.#field(input, label, help);
    });
    const stop = el("textarea", { id: "field-stop", rows: 2 });
    this.#inputs.set("stop", stop);
    const last = this.#field(stop, "Stop strings", "one per line");
    last.classList.add("wide");
    byId("fields").replaceChildren(...fields, last);
    if (isChat) byId("fields").append(this.#toolsField());
    this.#dialog.addEventListener("close", () => this.#save());
    byId("reset-settings").addEventListener("click", () => {
      for (const input of this.#inputs.values()) input.value = "";
    });
    byId("open-settings").addEventListener("click", () => this.open());
    this.#show();
  }

  #toolsField() {
    const input = el("textarea", { id: "field-tools", rows: 3, spellcheck: "false" });
    const check = () => {
      const isRight = input.value.trim() === "" || readTools(input.value) !== null;
      input.setCustomValidity(isRight ? "" : "Tools are a JSON array of objects with a type and a function");
    };
    input.addEventListener("input", check);
    this.#inputs.set("tools", input);
    const field = this.#field(input, "Tools", "as JSON in OpenAI's form; you give the results of calls by hand");
    field.classList.add("wide");
    return field;
  }

  #field(input, label, help) {
    const hint = el("span", { class: "help", id: `${input.id}-help` }, help);
    input.setAttribute("aria-describedby", hint.id);
    return el("div", { class: "field" }, el("label", { for: input.id }, label), hint, input);
  }

  open() {
    const saved = loadSettings().parameters ?? {};
    for (const [name, input] of this.#inputs) input.value = saved[name] ?? "";
    byId("system").value = this.hooks.system();
    this.#dialog.showModal();
  }

  /** Returns the fields of a request. */
  parameters() {
    return read(loadSettings().parameters ?? {});
  }

  #save() {
    const parameters = {};
    for (const [name, input] of this.#inputs) {
      if (input.value !== "" && input.validity.valid) parameters[name] = input.value;
    }
    saveSettings({ parameters });
    this.hooks.setSystem(byId("system").value);
    this.#show();
  }

  /** Says beside the button how many parameters are set. */
  #show() {
    const n = Object.keys(this.parameters()).length;
    byId("settings-label").textContent = n === 0 ? "Parameters" : `Parameters (${n} set)`;
  }
}
