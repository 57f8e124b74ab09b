// The list of conversations.

import { byId, download, el, iconButton, toast } from "./dom.js";
import { matches } from "./tree.js";

function dayOf(time) {
  return new Date(time).setHours(0, 0, 0, 0);
}

function groupOf(time) {
  const days = Math.round((dayOf(Date.now()) - dayOf(time)) / 86_400_000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  return days < 7 ? "Last seven days" : "Earlier";
}

function fileName(title) {
  const name = title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "");
  return `${name.slice(0, 40) || "chat"}.json`;
}

/** Saves conversations as a file. */
export function exportConversations(conversations, name = null) {
  const text = JSON.stringify({ format: "tier-plan conversations", version: 1, conversations }, null, 2);
  download(name ?? fileName(conversations[0].title), text);
}

/** The list in the navigation. */
export class Conversations {
  #list = byId("conversations");
  #search = byId("search");
  #isRenaming = false;
  #shape = "";

  /** `chat` is the conversation on the page; `hooks.opened` is called when the user has chosen one. */
  constructor({ store, chat, hooks }) {
    this.store = store;
    this.chat = chat;
    this.hooks = hooks;
    this.#search.addEventListener("input", () => this.show());
    byId("export-all").addEventListener("click", () => {
      exportConversations(this.store.list(), "tier-plan-chats.json");
    });
    this.#list.addEventListener("keydown", (event) => this.#move(event));
  }

  /** Shows the conversations that have the words of the search. */
  show() {
    if (this.#isRenaming) return;
    const all = this.store.list();
    const found = all.filter((one) => matches(one, this.#search.value));
    byId("export-all").hidden = all.length === 0;
    byId("history-hint").textContent = this.#hint(all.length, found.length);
    const isShown = (one) => one.id === this.chat.conversation.id;
    const state = (one) => [one.id, one.title, groupOf(one.updated), isShown(one), this.chat.runs(one.id)];
    const shape = JSON.stringify(found.map(state));
    // An answer is saved every second; what the user points at stays if the list is as it was.
    if (shape === this.#shape) return;
    this.#shape = shape;
    const groups = new Map();
    for (const one of found) {
      const name = groupOf(one.updated);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(this.#item(one, isShown(one)));
    }
    const focused = document.activeElement?.closest?.("[data-conversation]")?.dataset.conversation;
    this.#list.replaceChildren(
      ...Array.from(groups, ([name, items]) => {
        return el("section", {}, el("h2", { class: "group" }, name), el("ul", {}, items));
      }),
    );
    if (focused) this.#list.querySelector(`[data-conversation="${focused}"] .open`)?.focus();
  }

  #hint(all, found) {
    if (!this.store.isLasting) return "This browser keeps no chats: they last as long as this page.";
    if (all === 0) return "Chats appear here. They stay in this browser.";
    return found === 0 ? "No chat has these words." : "";
  }

  #item({ id, title }, isShown) {
    const props = { type: "button", class: "open", title };
    if (isShown) props["aria-current"] = "true";
    if (this.chat.runs(id)) props["data-running"] = "true";
    // Another tab may have written another version since.
    const on = (act) => () => act(this.store.get(id));
    const choose = on((conversation) => {
      this.chat.open(conversation);
      this.hooks.opened();
    });
    const open = el("button", { ...props, onclick: choose }, title);
    const item = el("li", { "data-conversation": id }, open);
    item.append(
      el(
        "span",
        { class: "item-actions" },
        iconButton("edit", `Rename ${title}`, on((one) => this.#rename(item, one))),
        iconButton("export", `Export ${title}`, on((one) => exportConversations([one]))),
        iconButton("trash", `Delete ${title}`, on((one) => this.#remove(one))),
      ),
    );
    return item;
  }

  #rename(item, conversation) {
    const input = el("input", { class: "rename", "aria-label": "Title", value: conversation.title });
    let isDone = false;
    const end = (keep) => {
      if (isDone) return;
      isDone = true;
      this.#isRenaming = false;
      this.#shape = "";
      const title = input.value.trim().slice(0, 200);
      if (keep && title !== "") {
        conversation.title = title;
        conversation.isNamed = true;
        this.store.put(conversation).catch((error) => toast(`Not saved: ${error.message}`));
        this.hooks.renamed();
      }
      this.show();
      this.#list.querySelector(`[data-conversation="${conversation.id}"] .open`)?.focus();
    };
    input.addEventListener("blur", () => end(true));
    input.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter" || event.key === "Escape") {
        event.preventDefault();
        event.stopPropagation();
        end(event.key === "Enter");
      }
    });
    this.#isRenaming = true;
    item.replaceChildren(input);
    input.focus();
    input.select();
  }

  #remove(conversation) {
    const failed = (error) => toast(`Not saved: ${error.message}`);
    this.chat.forget(conversation.id);
    this.store.remove(conversation.id).catch(failed);
    this.show();
    const undo = () => {
      this.store.put(conversation).catch(failed);
      this.show();
    };
    toast(`“${conversation.title}” is deleted.`, { label: "Undo", run: undo });
  }

  /** Moves between conversations with the arrow keys. */
  #move(event) {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (by === undefined || !event.target.classList.contains("open")) return;
    const all = Array.from(this.#list.querySelectorAll(".open"));
    all[all.indexOf(event.target) + by]?.focus();
    event.preventDefault();
  }
}
