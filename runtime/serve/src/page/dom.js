// Builders of elements. Strings become text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** Returns an element; properties that begin with "on" are listeners. */
export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** Returns an SVG element. */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

/** Returns an icon of the sheet in index.html, hidden from screen readers. */
export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#icon-${name}` }));
}

/** Returns a button with an icon, whose label is its name and tooltip. */
export function iconButton(name, label, onclick, props = {}) {
  const all = { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props };
  return el("button", all, icon(name));
}

/** Returns the element with an id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Shows a sentence for a while, with at most one action. */
export function toast(text, action = null) {
  const place = byId("toasts");
  const line = el("div", { class: "toast" }, el("span", {}, text));
  const close = () => line.remove();
  if (action) {
    const run = () => {
      close();
      action.run();
    };
    line.append(el("button", { type: "button", class: "text-button", onclick: run }, action.label));
  }
  place.append(line);
  setTimeout(close, action ? 8000 : 5000);
}

/** Copies a text. The clipboard needs a secure context, which a plain address on a network is not. */
export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    return navigator.clipboard.writeText(text);
  }
  const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true", value: text });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!done) throw new Error("the browser refused to copy");
}

/** Offers a text as a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = el("a", { href: url, download: name, class: "visually-hidden" });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
