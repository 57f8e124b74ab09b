// Conversations, kept in the browser: IndexedDB, or memory where the browser has none to give.

const DATABASE = "tier-plan";
const TABLE = "conversations";
const SETTINGS = "tier-plan-settings";

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function open() {
  const request = indexedDB.open(DATABASE, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
  return done(request);
}

function isConversation(value) {
  const isObject = (part) => typeof part === "object" && part !== null;
  return isObject(value) && isObject(value.nodes) && isObject(value.children) && isObject(value.chosen);
}

/** All conversations. What one tab changes, others are told. */
export class Store {
  #database = null;
  #all = new Map();
  #channel = "BroadcastChannel" in window ? new BroadcastChannel("tier-plan") : null;

  /** Whether conversations outlive the page. */
  get isLasting() {
    return this.#database !== null;
  }

  async load() {
    try {
      this.#database = await open();
      const table = this.#database.transaction(TABLE).objectStore(TABLE);
      for (const one of await done(table.getAll())) {
        if (isConversation(one)) this.#all.set(one.id, one);
      }
    } catch {
      this.#database = null;
    }
  }

  /** Calls back when another tab has changed a conversation, or removed it. */
  onChange(callback) {
    if (this.#channel === null) return;
    this.#channel.onmessage = async ({ data: id }) => {
      if (this.#database === null) return;
      const table = this.#database.transaction(TABLE).objectStore(TABLE);
      const one = await done(table.get(id));
      if (one === undefined) this.#all.delete(id);
      else this.#all.set(id, one);
      callback(id);
    };
  }

  get(id) {
    return this.#all.get(id);
  }

  /** Returns all conversations, the newest first. */
  list() {
    return Array.from(this.#all.values()).sort((a, b) => b.updated - a.updated);
  }

  async put(conversation) {
    this.#all.set(conversation.id, conversation);
    await this.#write((table) => table.put(conversation), conversation.id);
  }

  async remove(id) {
    this.#all.delete(id);
    await this.#write((table) => table.delete(id), id);
  }

  async #write(change, id) {
    if (this.#database === null) return;
    const table = this.#database.transaction(TABLE, "readwrite").objectStore(TABLE);
    await done(change(table));
    this.#channel?.postMessage(id);
  }
}

/** Returns the settings that were saved. */
export function loadSettings() {
  try {
    const saved = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
    return typeof saved === "object" && saved !== null ? saved : {};
  } catch {
    return {};
  }
}

/** Saves settings over those that are there. */
export function saveSettings(changes) {
  const all = { ...loadSettings(), ...changes };
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(all));
  } catch {
    // Storage is off or full: settings last as long as the page.
  }
  return all;
}
