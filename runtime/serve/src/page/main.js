// Starts the page: panels, theme, keys, and the parts that do the work.

import { Api, Live } from "./api.js";
import { Chat } from "./chat.js";
import { Conversations, exportConversations } from "./conversations.js";
import { byId, toast } from "./dom.js";
import { Machine } from "./machine.js";
import { setUpPanels } from "./panels.js";
import { PlanView } from "./plan.js";
import { Settings } from "./settings.js";
import { Store, loadSettings, saveSettings } from "./store.js";
import { path } from "./tree.js";
import { Welcome } from "./welcome.js";

const POLL_MS = 1000;
const THEMES = ["system", "light", "dark"];

function setUpTheme(onChange) {
  const button = byId("switch-theme");
  const show = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme-icon").setAttribute("href", `#icon-${theme}`);
    button.setAttribute("aria-label", `Theme: ${theme}`);
    button.title = `Theme: ${theme}`;
    onChange();
  };
  let theme = THEMES.includes(loadSettings().theme) ? loadSettings().theme : "system";
  show(theme);
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    saveSettings({ theme });
    show(theme);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
}

/** Asks the user for the server's key. */
function askForKey(isWrong) {
  const dialog = byId("key-dialog");
  const input = byId("api-key");
  byId("key-text").textContent = isWrong
    ? "The server refused this key."
    : "This server answers requests with a key. It is kept until this tab is closed.";
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const give = (event) => {
      event.preventDefault();
      dialog.close("key");
    };
    dialog.querySelector("form").addEventListener("submit", give, { once: true });
    byId("cancel-key").onclick = () => dialog.close("");
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "key" ? input.value : null), { once: true });
  });
}

/** Waits until the server takes requests, and says meanwhile how far it is. */
async function untilReady(welcome) {
  for (;;) {
    try {
      const response = await fetch(new URL("health", document.baseURI), { cache: "no-store" });
      if (response.ok) return;
      const { progress } = await response.json();
      if (typeof progress === "number") {
        welcome.wait("The model is loading", "The page begins by itself.", progress);
      } else {
        welcome.wait("The server takes no requests", "It is ending, or busy. The page tries again.");
      }
    } catch {
      welcome.wait("The server can't be reached", "Is it running? The page tries again.");
    }
    await new Promise((resume) => setTimeout(resume, POLL_MS));
  }
}

/** Asks for the model until there is an answer. */
async function askForModel(api, welcome) {
  for (;;) {
    await untilReady(welcome);
    try {
      return await api.json("props");
    } catch (error) {
      const lead = error.status === 401 ? "Reload the page to give the key." : error.message;
      welcome.wait(error.status === 401 ? "The server wants a key" : "The server does not answer", lead);
      if (error.status === 401) return null;
    }
    await new Promise((resume) => setTimeout(resume, POLL_MS));
  }
}

/** The prompt's field, which grows with its text. */
class Composer {
  constructor(chat) {
    this.chat = chat;
    this.area = byId("prompt");
    this.area.addEventListener("input", () => this.update());
    this.area.addEventListener("keydown", (event) => this.#key(event));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => {
      chat.stop();
      this.area.focus();
    });
  }

  #key(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && this.area.value === "") {
      const edits = document.querySelectorAll(".message.user [aria-label^=Edit]");
      edits[edits.length - 1]?.click();
      event.preventDefault();
    }
  }

  send() {
    if (!this.chat.send(this.area.value)) return;
    this.area.value = "";
    this.update();
    this.area.focus();
  }

  update() {
    const { isRunning } = this.chat;
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
    byId("send").hidden = isRunning;
    byId("send").disabled = this.area.value.trim() === "";
    byId("stop").hidden = !isRunning;
    byId("export-one").hidden = path(this.chat.conversation).length === 0;
  }
}

function isTyping(target) {
  return target.matches?.("input, textarea, select") || target.isContentEditable;
}

function setUpKeys({ chat, begin, panels }) {
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing) return;
    if ((event.ctrlKey || event.metaKey) && !event.altKey && event.key.toLowerCase() === "k") {
      begin();
    } else if (event.key === "Escape") {
      // A search that has words is cleared first.
      if (event.target.type === "search" && event.target.value !== "") return;
      if (panels.some((panel) => panel.closeDrawer())) return;
      if (!chat.isRunning) return;
      chat.stop();
    } else if (event.key === "?" && !isTyping(event.target)) {
      byId("keys").showModal();
    } else if (event.key === "/" && !isTyping(event.target)) {
      byId("prompt").focus();
    } else {
      return;
    }
    event.preventDefault();
  });
  byId("show-keys").addEventListener("click", () => byId("keys").showModal());
}

async function start() {
  const store = new Store();
  const api = new Api(askForKey);
  const machine = new Machine();
  setUpTheme(() => machine.heat.recolor());
  const welcome = new Welcome((text) => {
    byId("prompt").value = text;
    composer?.send();
  });
  let composer = null;
  const [props] = await Promise.all([askForModel(api, welcome), store.load()]);
  if (props === null) return;
  const model = { name: props.model_alias, isChat: props.has_chat_template };
  byId("model-name").textContent = model.name;
  document.title = `${model.name} · tier-plan`;
  welcome.showModel(props);

  const onScene = (scene) => {
    machine.show(scene);
    chat.showProgress(scene);
  };
  const plan = new PlanView(api);
  const live = new Live(api, { onScene, onState: (name) => machine.state(name) });
  const panels = setUpPanels((open) => live.want("view", open));
  const hooks = {
    opened: (conversation) => {
      const isKept = store.get(conversation.id) !== undefined;
      const address = isKept ? `#${conversation.id}` : location.pathname + location.search;
      window.history.replaceState(null, "", address);
      conversations?.show();
    },
    changed: () => composer?.update(),
    began: () => {
      machine.beginAnswer();
      live.want("answer", true);
    },
    ended: () => {
      plan.look();
      machine.endAnswer(() => live.want("answer", false));
      conversations?.show();
    },
    saved: () => {
      const { id } = chat.conversation;
      if (store.get(id) !== undefined) window.history.replaceState(null, "", `#${id}`);
      conversations?.show();
    },
  };
  let conversations = null;
  const defaults = props.default_generation_settings?.params;
  const settings = new Settings({
    defaults,
    isChat: model.isChat,
    hooks: {
      system: () => chat.conversation.system,
      setSystem: (system) => {
        if (system === chat.conversation.system) return;
        chat.conversation.system = system;
        saveSettings({ system });
        chat.save();
      },
    },
  });
  const chat = new Chat({ api, store, model, parameters: () => settings.parameters(), hooks });
  composer = new Composer(chat);
  const toPrompt = () => {
    panels.history.closeDrawer();
    byId("prompt").focus();
  };
  const begin = () => {
    chat.begin(loadSettings().system ?? "");
    toPrompt();
  };
  conversations = new Conversations({ store, chat, hooks: { opened: toPrompt, renamed: () => {} } });
  byId("new-chat").addEventListener("click", begin);
  byId("export-one").addEventListener("click", () => exportConversations([chat.conversation]));
  setUpKeys({ chat, begin, panels: panels.all });
  store.onChange((id) => {
    if (chat.runs(id)) return;
    if (chat.conversation.id === id && store.get(id) !== undefined) chat.refresh(store.get(id));
    conversations.show();
  });
  if (!model.isChat) byId("prompt").placeholder = "Begin a text";
  const kept = store.get(location.hash.slice(1));
  if (kept !== undefined) chat.open(kept);
  else chat.begin(loadSettings().system ?? "");
  composer.update();
  byId("prompt").focus();
  document.body.classList.add("is-ready");
  showTiers(api, welcome);
  plan.look();
}

/** Says once where the model lies; the machine view goes on by itself. */
async function showTiers(api, welcome) {
  try {
    const { tiers } = await api.json("tier-plan/live");
    welcome.showTiers(tiers);
  } catch {
    // The rest of the page needs none of it.
  }
}

start().catch((error) => {
  console.error(error);
  toast(`The page failed to start: ${error.message}`);
});
