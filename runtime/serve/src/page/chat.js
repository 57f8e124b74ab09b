// The conversation that is shown, and answers as they come.

import { ApiError } from "./api.js";
import { byId, toast } from "./dom.js";
import { MessageView } from "./message.js";
import { ROOT, add, newConversation, path, pathTo, place, request, turn } from "./tree.js";

/** Distance from the end at which the page follows an answer. */
const NEAR_PX = 80;
const SAVE_MS = 1000;
/** Time without a save after which an answer is not coming any more. */
const STALE_MS = 4000;
/** Time between two looks of an answer: the model may compute on the same cores as the browser. */
const PAINT_MS = 50;
/** Tokens of a continuation where the user says nothing: the server's own default is 16. */
const CONTINUATION_TOKENS = 256;

/** Reads an answer to a screen reader, sentence by sentence. */
class Announcer {
  #read = 0;

  constructor(region) {
    this.region = region;
  }

  begin(text) {
    this.#read = 0;
    this.region.replaceChildren(text);
  }

  follow(content, isEnd) {
    const rest = content.slice(this.#read);
    const ends = Array.from(rest.matchAll(/[.!?:;。！？]\s|\n/g));
    const last = ends.length === 0 ? 0 : ends[ends.length - 1].index + ends[ends.length - 1][0].length;
    const length = isEnd ? rest.length : last;
    if (length === 0) return;
    this.region.append(document.createElement("br"), rest.slice(0, length));
    this.#read += length;
  }
}

/** The conversation on the page. */
export class Chat {
  #views = new Map();
  #runs = new Map();
  #follows = true;
  #isUnsaved = false;
  #announcer = new Announcer(byId("announcer"));
  #thread = byId("thread");
  #messages = byId("messages");

  /** `model` says how the model is asked; `hooks` are called as things happen. */
  constructor({ api, store, model, parameters, hooks }) {
    this.api = api;
    this.store = store;
    this.model = model;
    this.parameters = parameters;
    this.hooks = hooks;
    this.conversation = newConversation("");
    this.#thread.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    byId("latest").addEventListener("click", () => this.#toEnd(true));
    window.addEventListener("pagehide", () => this.#saveRunning());
  }

  get isRunning() {
    return this.#runs.has(this.conversation.id);
  }

  /** Whether an answer of a conversation is coming. */
  runs(id) {
    return this.#runs.has(id);
  }

  /** Shows a conversation. */
  open(conversation) {
    this.conversation = conversation;
    this.#endStale();
    this.show();
    this.#toEnd(true);
    this.hooks.opened(conversation);
  }

  /** Shows what another tab has made of the conversation. */
  refresh(conversation) {
    if (this.#messages.querySelector(".edit") !== null) return;
    this.conversation = conversation;
    this.#endStale();
    this.show();
    this.#follow();
  }

  /** Ends answers that nobody saves any more: their page was closed while they came. */
  #endStale() {
    const { conversation } = this;
    const running = Object.values(conversation.nodes).filter((node) => node.status === "running");
    if (running.length === 0 || this.#runs.has(conversation.id)) return;
    const left = conversation.updated + STALE_MS - Date.now();
    if (left > 0) {
      const again = () => {
        if (this.conversation === conversation) this.refresh(conversation);
      };
      setTimeout(again, left + 1);
      return;
    }
    for (const node of running) node.status = "stopped";
  }

  /** Shows an empty conversation. */
  begin(system = "") {
    this.open(newConversation(system));
  }

  /** Shows the messages that are chosen. */
  show() {
    this.#views.clear();
    const messages = path(this.conversation);
    const views = messages.map((node) => {
      const view = new MessageView(node, place(this.conversation, node), {
        author: { user: "You", results: "Tools" }[node.role] ?? this.model.name,
        isMarkdown: node.role === "assistant" && this.model.isChat,
        actions: this.#actions,
      });
      this.#views.set(node.id, view);
      return view.root;
    });
    this.#messages.replaceChildren(...views);
    this.#askForResults();
    document.body.classList.toggle("is-empty", messages.length === 0);
    this.hooks.changed();
  }

  /** Asks for results where the conversation ends with calls of tools. */
  #askForResults() {
    const last = path(this.conversation).at(-1);
    const isOpen = last?.status === "done" && last.toolCalls.length > 0;
    if (isOpen) this.#views.get(last.id)?.askForResults();
  }

  #actions = {
    turn: (node, by) => {
      const id = turn(this.conversation, node, by);
      if (id === undefined) return;
      this.show();
      this.#save();
      const label = by < 0 ? "Previous version" : "Next version";
      const foot = this.#views.get(id).foot;
      const button = foot.querySelector(`[aria-label="${label}"]:not(:disabled)`);
      (button ?? foot.querySelector(".versions button:not(:disabled)"))?.focus();
    },
    answerCalls: (node, results) => {
      if (this.#isBusy()) return;
      const content = results.map(({ name, text }) => `${name}:\n${text}`).join("\n\n");
      this.#ask(add(this.conversation, node.id, { role: "results", content, results }).id);
    },
    regenerate: (node) => this.#ask(node.parent),
    edit: (node, content) => {
      if (this.#isBusy()) return false;
      const changed = add(this.conversation, node.parent, { role: node.role, content });
      this.show();
      if (node.role === "user") this.#ask(changed.id);
      else this.#save();
      return true;
    },
  };

  #isBusy() {
    if (this.isRunning) toast("An answer is coming. Esc stops it.");
    return this.isRunning;
  }

  /** Sends a message. Returns whether it was taken. */
  send(content) {
    if (content.trim() === "" || this.#isBusy()) return false;
    const last = path(this.conversation).at(-1);
    const node = add(this.conversation, last?.id ?? ROOT, { role: "user", content });
    this.#ask(node.id);
    return true;
  }

  /** Says how far the prompt of an answer is, where no other text is at work that it could be. */
  showProgress({ texts }) {
    const node = this.#runs.get(this.conversation.id)?.node;
    const view = node === undefined ? undefined : this.#views.get(node.id);
    view?.wait(texts.length === 1 ? texts[0] : null);
  }

  /** Stops the answer that is coming. */
  stop() {
    this.#runs.get(this.conversation.id)?.abort.abort();
  }

  /** Ends what belongs to a conversation that is removed. */
  forget(id) {
    this.#runs.get(id)?.abort.abort();
    if (this.conversation.id === id) this.begin(this.conversation.system);
  }

  #body(conversation, parent) {
    const messages = pathTo(conversation, parent);
    const given = this.parameters();
    if (this.model.isChat) {
      return { path: "v1/chat/completions", body: { messages: request(conversation, messages), ...given } };
    }
    const prompt = messages.map((node) => node.content).join("");
    return { path: "v1/completions", body: { prompt, max_tokens: CONTINUATION_TOKENS, ...given } };
  }

  async #ask(parent) {
    if (this.#isBusy()) return;
    const { conversation } = this;
    const asked = this.#body(conversation, parent);
    for (const one of Object.values(conversation.nodes)) {
      if (one.status === "running") one.status = "stopped";
    }
    const node = add(conversation, parent, { role: "assistant", status: "running" });
    const run = { abort: new AbortController(), node, conversation, isDirty: true, isPainting: false };
    this.#runs.set(conversation.id, run);
    this.show();
    this.#toEnd(true);
    this.#announcer.begin(`${this.model.name} answers.`);
    this.hooks.began();
    const saving = setInterval(() => this.#saveRun(run), SAVE_MS);
    this.#saveRun(run);
    const started = performance.now();
    try {
      await this.#receive(run, asked, started);
      node.status = "done";
    } catch (error) {
      this.#failed(run, error);
    }
    clearInterval(saving);
    this.#runs.delete(conversation.id);
    this.#views.get(node.id)?.update();
    if (this.conversation === conversation) {
      this.#announcer.follow(node.content, true);
      this.#askForResults();
    }
    this.#follow();
    run.isDirty = true;
    this.#saveRun(run);
    this.hooks.ended();
    this.hooks.changed();
  }

  async #receive(run, { path: where, body }, started) {
    const { node } = run;
    const truth = { timings: null, tierPlan: null, usage: null, finish: null, seen: { tokens: 0, seconds: 0 } };
    node.truth = truth;
    for await (const piece of this.api.answer(where, body, run.abort.signal)) {
      const passed = (performance.now() - started) / 1000;
      const isFirst = node.content === "" && node.reasoning !== "" && piece.content !== "";
      if (isFirst) truth.seen.thought = passed;
      node.content += piece.content;
      node.reasoning += piece.reasoning;
      addCalls(node.toolCalls, piece.toolCalls);
      if (piece.isToken) truth.seen.tokens += 1;
      truth.seen.seconds = passed;
      truth.finish = piece.finish ?? truth.finish;
      truth.timings = piece.timings ?? truth.timings;
      truth.tierPlan = piece.tierPlan ?? truth.tierPlan;
      truth.usage = piece.usage ?? truth.usage;
      run.isDirty = true;
      this.#paint(run);
    }
  }

  #failed({ node, abort }, error) {
    if (abort.signal.aborted) {
      node.status = "stopped";
      return;
    }
    node.status = "failed";
    const isServers = error instanceof ApiError;
    const message = isServers ? error.message : "the server can't be reached, or its answer is not readable";
    if (!isServers) console.warn(error);
    node.error = { message, retryAfter: isServers ? error.retryAfter : null };
  }

  /** Shows what came, but not more often than an eye needs. */
  #paint(run) {
    if (run.isPainting) return;
    run.isPainting = true;
    const show = () => {
      run.isPainting = false;
      const view = this.#views.get(run.node.id);
      if (view === undefined || run.node.status !== "running") return;
      view.update();
      this.#announcer.follow(run.node.content, false);
      this.#follow();
    };
    setTimeout(() => requestAnimationFrame(show), PAINT_MS);
  }

  #saveRun(run) {
    // What was removed meanwhile stays removed.
    if (!run.isDirty || (this.store.get(run.conversation.id) === undefined && run.wasSaved)) return;
    run.isDirty = false;
    run.wasSaved = true;
    run.conversation.updated = Date.now();
    this.#put(run.conversation);
  }

  #saveRunning() {
    for (const run of this.#runs.values()) this.#saveRun(run);
  }

  #save() {
    this.#put(this.conversation);
  }

  #put(conversation) {
    this.store.put(conversation).catch((error) => {
      // Once: it would be told every second.
      if (!this.#isUnsaved) toast(`The conversation is not saved: ${error.message}`);
      this.#isUnsaved = true;
    });
    this.hooks.saved();
  }

  /** Saves the conversation if it has messages. */
  save() {
    if (path(this.conversation).length > 0) this.#save();
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#thread;
    this.#follows = scrollHeight - clientHeight - scrollTop < NEAR_PX;
    byId("latest").hidden = this.#follows;
  }

  #follow() {
    if (this.#follows) this.#toEnd(false);
  }

  #toEnd(always) {
    if (always) this.#follows = true;
    this.#thread.scrollTop = this.#thread.scrollHeight;
    this.#scrolled();
  }
}

/** Joins the parts of calls: a name comes first, then arguments bit by bit. */
function addCalls(calls, parts) {
  for (const part of parts) {
    const index = Number.isInteger(part.index) && part.index >= 0 ? part.index : calls.length;
    // A gap would be a call that never began.
    const at = Math.min(index, calls.length);
    calls[at] ??= { id: "", name: "", arguments: "" };
    calls[at].id = part.id ?? calls[at].id;
    calls[at].name += part.function?.name ?? "";
    calls[at].arguments += part.function?.arguments ?? "";
  }
}
