// Markdown within a paragraph, built as nodes. A model's text is a stranger's: strings become text
// nodes, links lead to http and https alone, and no input takes more than linear time or deep nesting.

import { el } from "./dom.js";

const MAX_OPEN = 48;
const MAX_URL_CHARS = 2048;

const PLAIN = /[^\\`*_~[\]<!&\nh]+/y;
const URL_TEXT = /https?:\/\/[^\s<>"`]+/y;
const ANGLE_URL = /<(https?:\/\/[^\s<>]{1,2048})>/y;
const BREAK_TAG = /<br\s{0,4}\/?>/iy;
const ENTITY = /&(?:amp|lt|gt|quot|nbsp|#39);/y;
const ENTITIES = {
  "&amp;": "&",
  "&lt;": "<",
  "&gt;": ">",
  "&quot;": '"',
  "&nbsp;": "\u00a0",
  "&#39;": "'",
};
// Without parentheses and brackets: a backslash before those is a formula's more often than markdown's.
const ESCAPABLE = /[\\`*_{}#+\-.!|~<>"'&]/;
const SPACE = /\s/u;
const MARK = /[\p{P}\p{S}]/u;
const WORD = /[\p{L}\p{N}_]/u;

/** Returns a URL that is safe to follow, or null. */
export function safeUrl(text) {
  try {
    const url = new URL(text);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

function link(url, parts) {
  const props = { href: url, target: "_blank", rel: "noopener noreferrer nofollow" };
  return filled(el("a", props), parts);
}

function filled(node, parts) {
  for (const part of parts) node.append(part);
  return node;
}

/** What is open: the paragraph, a bracket, or a run of delimiters. */
class Frame {
  parts = [];

  constructor(kind, length, start) {
    this.kind = kind;
    this.length = length;
    this.start = start;
  }

  push(part) {
    const last = this.parts.length - 1;
    if (typeof part === "string" && typeof this.parts[last] === "string") this.parts[last] += part;
    else this.parts.push(part);
  }
}

class Reader {
  #at = 0;
  #open = [new Frame("", 0, 0)];
  #lastLink = -1;
  /** Lengths of runs of backticks that no later run closes. */
  #unclosed = new Set();

  constructor(text) {
    this.text = text;
  }

  get #top() {
    return this.#open[this.#open.length - 1];
  }

  read() {
    while (this.#at < this.text.length) this.#step();
    this.#collapse(1);
    return this.#top.parts;
  }

  #match(pattern) {
    pattern.lastIndex = this.#at;
    return pattern.exec(this.text);
  }

  #step() {
    const plain = this.#match(PLAIN);
    if (plain !== null) {
      this.#take(plain[0]);
      return;
    }
    const char = this.text[this.#at];
    switch (char) {
      case "\\":
        return this.#escape();
      case "`":
        return this.#code();
      case "*":
      case "_":
      case "~":
        return this.#delimiters(char);
      case "!":
        return this.text[this.#at + 1] === "[" ? this.#bracket(2) : this.#take(char);
      case "[":
        return this.#bracket(1);
      case "]":
        return this.#close();
      case "<":
        return this.#angle();
      case "&":
        return this.#entity();
      case "\n":
        return this.#node(el("br"), 1);
      default:
        return this.#url();
    }
  }

  #take(text) {
    this.#top.push(text);
    this.#at += text.length;
  }

  #node(node, length) {
    this.#top.push(node);
    this.#at += length;
  }

  #escape() {
    const next = this.text[this.#at + 1] ?? "";
    if (next === "\n") {
      this.#at += 1;
    } else if (next !== "" && ESCAPABLE.test(next)) {
      this.#at += 1;
      this.#take(next);
    } else {
      this.#take("\\");
    }
  }

  #run(char, from) {
    let end = from;
    while (this.text[end] === char) end += 1;
    return end - from;
  }

  #code() {
    const length = this.#run("`", this.#at);
    const start = this.#at + length;
    let end = this.#unclosed.has(length) ? -1 : this.text.indexOf("`", start);
    while (end >= 0) {
      const other = this.#run("`", end);
      if (other === length) break;
      end = this.text.indexOf("`", end + other);
    }
    if (end < 0) {
      this.#unclosed.add(length);
      this.#take("`".repeat(length));
      return;
    }
    let code = this.text.slice(start, end).replaceAll("\n", " ");
    if (code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "") code = code.slice(1, -1);
    this.#node(el("code", {}, code), end + length - this.#at);
  }

  /** Opens or closes emphasis, by the characters around a run, as CommonMark has it. */
  #delimiters(char) {
    const length = this.#run(char, this.#at);
    const before = this.#at === 0 ? " " : this.text[this.#at - 1];
    const after = this.text[this.#at + length] ?? " ";
    const left = !SPACE.test(after) && (!MARK.test(after) || SPACE.test(before) || MARK.test(before));
    const right = !SPACE.test(before) && (!MARK.test(before) || SPACE.test(after) || MARK.test(after));
    const within = char === "_" && left && right;
    const canOpen = left && (!within || MARK.test(before));
    const canClose = right && (!within || MARK.test(after));
    const start = this.#at;
    this.#at += length;
    if (char === "~" && length !== 2) {
      this.#top.push(char.repeat(length));
      return;
    }
    const left_over = canClose ? this.#closeRun(char, length) : length;
    if (left_over === 0) return;
    if (canOpen && this.#open.length < MAX_OPEN) {
      this.#open.push(new Frame(char, left_over, start));
    } else {
      this.#top.push(char.repeat(left_over));
    }
  }

  /** Closes what a run can, and returns the delimiters that are left. */
  #closeRun(char, length) {
    while (length > 0) {
      const found = this.#find(char);
      if (found < 0) break;
      this.#collapse(found + 1);
      const frame = this.#top;
      const used = frame.length >= 2 && length >= 2 ? 2 : 1;
      const tag = char === "~" ? "del" : used === 2 ? "strong" : "em";
      const node = filled(el(tag), frame.parts);
      frame.length -= used;
      length -= used;
      if (frame.length > 0) {
        frame.parts = [node];
      } else {
        this.#open.pop();
        this.#top.push(node);
      }
    }
    return length;
  }

  #find(kind) {
    return this.#open.findLastIndex((frame, i) => i > 0 && frame.kind === kind);
  }

  /** Turns what is open from a place on into text. */
  #collapse(from) {
    const target = this.#open[from - 1];
    for (const frame of this.#open.splice(from)) {
      target.push(frame.kind.repeat(frame.length));
      for (const part of frame.parts) target.push(part);
    }
  }

  /** Opens a link, or an image, which is shown as a link. */
  #bracket(length) {
    if (this.#open.length >= MAX_OPEN) {
      this.#take("[".padStart(length, "!"));
      return;
    }
    // The kind is what it becomes if nothing closes it.
    this.#open.push(new Frame("[".padStart(length, "!"), 1, this.#at));
    this.#at += length;
  }

  #close() {
    const found = Math.max(this.#find("["), this.#find("!["));
    const target = found < 0 ? null : this.#target(this.#at + 1);
    const start = found < 0 ? 0 : this.#open[found].start;
    if (target === null || this.#lastLink > start) {
      if (found >= 0) this.#collapse(found);
      this.#take("]");
      return;
    }
    this.#collapse(found + 1);
    const { parts } = this.#open.pop();
    const url = safeUrl(target.url);
    if (url === null) {
      for (const part of parts) this.#top.push(part);
    } else {
      this.#top.push(link(url, parts.length > 0 ? parts : [target.url]));
      this.#lastLink = this.#at;
    }
    this.#at = target.end;
  }

  /** Reads `(url "title")`. */
  #target(from) {
    if (this.text[from] !== "(") return null;
    const text = this.text.slice(from + 1, from + 1 + MAX_URL_CHARS);
    const angle = /^\s*<([^<>\n]*)>/.exec(text);
    let url = angle?.[1];
    let end = angle?.[0].length ?? 0;
    if (url === undefined) {
      end = /^\s*/.exec(text)[0].length;
      const start = end;
      for (let depth = 0; end < text.length && !SPACE.test(text[end]); end += 1) {
        if (text[end] === "(") depth += 1;
        if (text[end] === ")" && depth-- === 0) break;
      }
      url = text.slice(start, end);
    }
    const rest = /^(?:\s+(?:"[^"]*"|'[^']*'|\([^()]*\)))?\s*\)/.exec(text.slice(end));
    return rest === null ? null : { url, end: from + 1 + end + rest[0].length };
  }

  #angle() {
    const url = this.#match(ANGLE_URL);
    const safe = url === null ? null : safeUrl(url[1]);
    if (safe !== null) return this.#node(link(safe, [url[1]]), url[0].length);
    const tag = this.#match(BREAK_TAG);
    return tag === null ? this.#take("<") : this.#node(el("br"), tag[0].length);
  }

  #entity() {
    const entity = this.#match(ENTITY);
    if (entity === null) return this.#take("&");
    this.#top.push(ENTITIES[entity[0]]);
    this.#at += entity[0].length;
    return undefined;
  }

  /** Reads a URL that stands by itself, without the punctuation that ends a sentence. */
  #url() {
    const begins = this.#at === 0 || !WORD.test(this.text[this.#at - 1]);
    const found = begins ? this.#match(URL_TEXT) : null;
    if (found === null || this.#find("[") >= 0) return this.#take("h");
    let url = found[0].slice(0, MAX_URL_CHARS);
    let depth = 0;
    const closing = Array.from(url).findIndex((char) => {
      if (char === "(") depth += 1;
      return char === ")" && depth-- === 0;
    });
    if (closing >= 0) url = url.slice(0, closing);
    while (/[.,:;!?'*_~|\]]$/.test(url)) url = url.slice(0, -1);
    const safe = safeUrl(url);
    return safe === null ? this.#take("h") : this.#node(link(safe, [url]), url.length);
  }
}

/** Returns the nodes and strings of a paragraph. */
export function inline(text) {
  return new Reader(text).read();
}

/** Fills an element with a paragraph. */
export function fillInline(node, text) {
  return filled(node, inline(text));
}
