// The panels beside the conversation.

import { byId } from "./dom.js";
import { loadSettings, saveSettings } from "./store.js";

/** Widths at which the panels become drawers over the page; page.css has the same. */
const isNarrow = {
  history: window.matchMedia("(max-width: 859px)"),
  machine: window.matchMedia("(max-width: 1199px)"),
};

/** A panel at a side: beside the conversation, or a drawer over it. */
class Panel {
  constructor(name, onToggle) {
    this.name = name;
    this.onToggle = onToggle;
    this.root = byId(name);
    this.button = byId(`toggle-${name}`);
    this.button.addEventListener("click", () => this.toggle());
    isNarrow[name].addEventListener("change", () => this.reset());
    this.reset();
  }

  get isOpen() {
    return !this.root.hidden;
  }

  get isDrawer() {
    return isNarrow[this.name].matches;
  }

  reset() {
    this.#set(!this.isDrawer && loadSettings()[this.name] !== "closed");
  }

  toggle(open = !this.isOpen) {
    this.#set(open);
    if (!this.isDrawer) saveSettings({ [this.name]: open ? "open" : "closed" });
    else if (open) this.root.querySelector("button, input, select")?.focus();
  }

  /** Closes a drawer. Returns whether there was one. */
  closeDrawer() {
    if (!this.isDrawer || !this.isOpen) return false;
    this.#set(false);
    this.button.focus();
    return true;
  }

  #set(open) {
    this.root.hidden = !open;
    this.button.setAttribute("aria-expanded", String(open));
    document.body.classList.toggle(`has-${this.name}`, open);
    this.onToggle(open);
  }
}

/** Sets up both panels; `onMachine` is told whether the machine view is open. */
export function setUpPanels(onMachine) {
  const machine = new Panel("machine", onMachine);
  const history = new Panel("history", () => {});
  const panels = [machine, history];
  const backdrop = byId("backdrop");
  backdrop.addEventListener("click", () => panels.forEach((panel) => panel.closeDrawer()));
  const update = () => {
    backdrop.hidden = !panels.some((panel) => panel.isDrawer && panel.isOpen);
  };
  for (const panel of panels) new MutationObserver(update).observe(panel.root, { attributeFilter: ["hidden"] });
  byId("close-machine").addEventListener("click", () => {
    machine.toggle(false);
    machine.button.focus();
  });
  return { machine, history, all: panels };
}
