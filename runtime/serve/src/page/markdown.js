// Markdown as nodes: what models write of it. HTML is text.

import { copy, el, icon } from "./dom.js";
import { fillInline } from "./inline.js";

const MAX_DEPTH = 12;

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const DASHES = /^:?-+:?$/;
const TASK = /^\[([ xX])\][ \t]+/;

function isBlank(line) {
  return line.trim() === "";
}

function isFence(line) {
  const match = FENCE.exec(line);
  // A backtick after backticks is code within a line.
  return match !== null && !(match[2][0] === "`" && match[3].includes("`")) ? match : null;
}

function begins(lines, at) {
  const line = lines[at];
  return (
    isFence(line) !== null ||
    HEADING.test(line) ||
    RULE.test(line) ||
    QUOTE.test(line) ||
    interrupts(isItem(line)) ||
    tableHead(lines, at) !== null
  );
}

function isItem(line) {
  return RULE.test(line) ? null : ITEM.exec(line);
}

/** Whether an item ends a paragraph: a number that is not 1 is more often the end of a sentence. */
function interrupts(item) {
  return item !== null && !isBlank(item[4] ?? "") && (/\D/.test(item[2][0]) || /^1\D/.test(item[2]));
}

/** Returns the cells of a row; a pipe after a backslash is text. */
function cells(line) {
  const row = [""];
  const text = line.trim().replace(/^\|/, "");
  for (let i = 0; i < text.length; i += 1) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      row[row.length - 1] += "|";
      i += 1;
    } else if (text[i] === "|") {
      row.push("");
    } else {
      row[row.length - 1] += text[i];
    }
  }
  if (row.length > 1 && isBlank(row[row.length - 1])) row.pop();
  return row.map((cell) => cell.trim());
}

function tableHead(lines, at) {
  const next = lines[at + 1];
  if (!lines[at].includes("|") || next === undefined || !next.includes("-")) return null;
  const head = cells(lines[at]);
  const dashes = cells(next);
  if (head.length !== dashes.length || !dashes.every((cell) => DASHES.test(cell))) return null;
  const align = dashes.map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return cell.startsWith(":") ? "left" : null;
  });
  return { head, align };
}

/** Cuts lines into blocks; each has the lines `from..to` and what `build` needs. */
function blocks(lines, depth) {
  const all = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const block = { from: at, ...next(lines, at, depth) };
    all.push(block);
    at = block.to;
  }
  return all;
}

function next(lines, at, depth) {
  const fence = isFence(lines[at]);
  if (fence !== null) return fenced(lines, at, fence);
  const heading = HEADING.exec(lines[at]);
  if (heading !== null) {
    const text = (heading[2] ?? "").trimEnd().replace(/(^|\s)#+$/, "");
    return { type: "heading", level: heading[1].length, text, to: at + 1 };
  }
  if (RULE.test(lines[at])) return { type: "rule", to: at + 1 };
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(lines[at])) return quote(lines, at);
    const item = isItem(lines[at]);
    if (item !== null) return list(lines, at, item);
  }
  const head = tableHead(lines, at);
  return head !== null ? table(lines, at, head) : paragraph(lines, at);
}

function fenced(lines, at, fence) {
  const [, indent, mark, info] = fence;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= mark.length && text === mark[0].repeat(text.length);
  };
  let to = at + 1;
  while (to < lines.length && !closes(lines[to])) to += 1;
  const cut = new RegExp(`^ {0,${indent.length}}`);
  const text = lines.slice(at + 1, to).map((line) => line.replace(cut, ""));
  const language = info.trim().split(/\s/, 1)[0];
  return { type: "code", language, text: text.join("\n"), to: Math.min(to + 1, lines.length) };
}

function quote(lines, at) {
  let to = at;
  while (to < lines.length && QUOTE.test(lines[to])) to += 1;
  return { type: "quote", lines: lines.slice(at, to).map((line) => line.replace(QUOTE, "")), to };
}

function width(space) {
  return space.replaceAll("\t", "    ").length;
}

function outdent(line, by) {
  const space = /^[ \t]*/.exec(line)[0];
  return " ".repeat(Math.max(width(space) - by, 0)) + line.slice(space.length);
}

/** Reads a list. Models indent what is nested by two to four columns, whatever the marker's width. */
function list(lines, at, first) {
  const isOrdered = /\d/.test(first[2]);
  const indent = width(first[1]);
  const items = [];
  let isLoose = false;
  let wasBlank = false;
  let to = at;
  for (; to < lines.length; to += 1) {
    const line = lines[to];
    if (isBlank(line)) {
      wasBlank = true;
      items[items.length - 1].lines.push("");
      continue;
    }
    const space = width(/^[ \t]*/.exec(line)[0]);
    const item = isItem(line);
    if (item !== null && space < indent + 2) {
      if (/\d/.test(item[2]) !== isOrdered || space + 2 <= indent) break;
      isLoose ||= wasBlank && items.length > 0;
      const offset = space + item[2].length + Math.min(width(item[3] ?? " "), 4);
      items.push({ offset, lines: [item[4] ?? ""] });
    } else {
      const current = items[items.length - 1];
      const continues = space >= Math.min(current.offset, indent + 2);
      // A line that continues a paragraph needs no indent.
      if (!continues && (wasBlank || begins(lines, to))) break;
      current.lines.push(outdent(line, current.offset));
    }
    wasBlank = false;
  }
  for (const item of items) while (isBlank(item.lines[item.lines.length - 1] ?? "x")) item.lines.pop();
  return { type: "list", isOrdered, start: Number.parseInt(first[2], 10), isLoose, items, to };
}

function table(lines, at, { head, align }) {
  const rows = [];
  let to = at + 2;
  for (; to < lines.length && lines[to].includes("|") && !isBlank(lines[to]); to += 1) {
    rows.push(cells(lines[to]));
  }
  return { type: "table", head, align, rows, to };
}

function paragraph(lines, at) {
  let to = at + 1;
  while (to < lines.length && !isBlank(lines[to]) && !begins(lines, to)) to += 1;
  const text = lines.slice(at, to).map((line) => line.trim());
  return { type: "paragraph", text: text.join("\n"), to };
}

/** Returns a block of code with its language and a button that copies it. */
export function codeBlock(language, text) {
  const code = el("code", {}, text);
  const label = el("span", {}, "Copy");
  const onclick = async () => {
    try {
      await copy(code.textContent);
      label.textContent = "Copied";
    } catch {
      label.textContent = "Not copied";
    }
    setTimeout(() => {
      label.textContent = "Copy";
    }, 2000);
  };
  const button = el("button", { type: "button", class: "copy", onclick }, icon("copy"), label);
  const name = language === "" ? "text" : language.slice(0, 40);
  const head = el("div", { class: "code-head" }, el("span", { class: "language" }, name), button);
  const pre = el("pre", { tabindex: "0", "aria-label": `Code, ${name}` }, code);
  return el("div", { class: "code-block" }, head, pre);
}

function buildTable({ head, align, rows }) {
  const cell = (tag) => (text, i) => {
    const side = align[i];
    return fillInline(el(tag, side ? { class: `to-${side}` } : {}), text);
  };
  const fitted = (row) => head.map((_, i) => row[i] ?? "");
  const body = rows.map((row) => el("tr", {}, fitted(row).map(cell("td"))));
  const top = el("thead", {}, el("tr", {}, head.map(cell("th"))));
  const props = { class: "table-scroll", tabindex: "0", role: "group", "aria-label": "Table" };
  return el("div", props, el("table", {}, top, el("tbody", {}, body)));
}

function buildItem(item, isLoose, depth) {
  const node = el("li");
  const task = TASK.exec(item.lines[0]);
  const lines = item.lines.slice();
  if (task !== null) {
    lines[0] = lines[0].slice(task[0].length);
    const isDone = task[1] !== " ";
    node.className = "task";
    node.append(el("input", { type: "checkbox", disabled: true, checked: isDone, "aria-label": "Task" }));
  }
  for (const block of blocks(lines, depth + 1)) {
    if (block.type === "paragraph" && !isLoose) fillInline(node, block.text);
    else node.append(build(block, depth + 1));
  }
  return node;
}

function build(block, depth) {
  switch (block.type) {
    case "code":
      return codeBlock(block.language, block.text);
    case "heading":
      // The page has the first two levels.
      return fillInline(el(`h${Math.min(block.level + 2, 6)}`, { class: `h${block.level}` }), block.text);
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", {}, blocks(block.lines, depth + 1).map((inner) => build(inner, depth + 1)));
    case "list": {
      const props = block.isOrdered && block.start !== 1 ? { start: block.start } : {};
      const items = block.items.map((item) => buildItem(item, block.isLoose, depth));
      return el(block.isOrdered ? "ol" : "ul", props, items);
    }
    case "table":
      return buildTable(block);
    default:
      return fillInline(el("p"), block.text);
  }
}

/** Markdown that grows: blocks that are as they were stay, with what the reader has selected. */
export class Markdown {
  #shown = [];

  constructor(node) {
    this.node = node;
  }

  render(text) {
    const lines = text.replace(/\r\n?/g, "\n").split("\n");
    const all = blocks(lines, 0).map((block) => ({
      ...block,
      source: `${block.type}\n${lines.slice(block.from, block.to).join("\n")}`,
    }));
    let same = 0;
    while (same < all.length && this.#shown[same]?.source === all[same].source) same += 1;
    if (!this.#growsCode(all, same)) {
      for (const old of this.#shown.splice(same)) old.node.remove();
      for (const block of all.slice(same)) {
        const node = build(block, 0);
        this.node.append(node);
        this.#shown.push({ ...block, node });
      }
    }
  }

  /** Adds to code that is the last block, whose scroll position and button stay. */
  #growsCode(all, same) {
    const isLast = same === all.length - 1 && same === this.#shown.length - 1;
    const old = this.#shown[same];
    if (!isLast || all[same].type !== "code" || old.type !== "code") return false;
    if (all[same].language !== old.language) return false;
    old.node.querySelector("code").textContent = all[same].text;
    this.#shown[same] = { ...all[same], node: old.node };
    return true;
  }
}
