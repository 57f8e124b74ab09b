// A conversation as a tree of messages: an edit or another answer is a branch, and nothing is lost.
//
// Roles are "user", "assistant", and "results", which answers the tool calls of the message above.
//
// {
//   id, title, isNamed, created, updated, system,
//   nodes: { id: { id, parent, role, content, reasoning, toolCalls, results, status, error, truth, created } },
//   children: { parent id or "root": [ids] },
//   chosen: { parent id or "root": id },
// }

const TITLE_CHARS = 60;

/** The parent of first messages. */
export const ROOT = "root";

/** Returns a name that no other thing has. */
export function newId() {
  // `randomUUID` needs a secure context, which a plain address on a network is not.
  const words = crypto.getRandomValues(new Uint32Array(4));
  return Array.from(words, (word) => word.toString(16).padStart(8, "0")).join("");
}

/** Returns an empty conversation. */
export function newConversation(system) {
  const now = Date.now();
  return {
    id: newId(),
    title: "New chat",
    isNamed: false,
    created: now,
    updated: now,
    system,
    nodes: {},
    children: {},
    chosen: {},
  };
}

/** Adds a message below another, and chooses it. */
export function add(conversation, parent, message) {
  const node = {
    content: "",
    reasoning: "",
    toolCalls: [],
    results: [],
    status: "done",
    error: null,
    truth: null,
    ...message,
    id: newId(),
    parent,
    created: Date.now(),
  };
  conversation.nodes[node.id] = node;
  (conversation.children[parent] ??= []).push(node.id);
  conversation.chosen[parent] = node.id;
  conversation.updated = node.created;
  if (!conversation.isNamed && parent === ROOT && node.role === "user") {
    conversation.title = titleOf(node.content);
  }
  return node;
}

/** Returns the first line of a text, cut to the length of a title. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  const chars = Array.from(line);
  if (chars.length === 0) return "New chat";
  return chars.length > TITLE_CHARS ? `${chars.slice(0, TITLE_CHARS).join("")}…` : line;
}

/** Returns the messages from the first to the last, along what is chosen. */
export function path(conversation) {
  const messages = [];
  let at = ROOT;
  while (conversation.chosen[at] !== undefined) {
    const node = conversation.nodes[conversation.chosen[at]];
    if (node === undefined) break;
    messages.push(node);
    at = node.id;
  }
  return messages;
}

/** Returns the messages from the first down to one. */
export function pathTo(conversation, id) {
  const messages = [];
  for (let at = id; at !== ROOT; at = conversation.nodes[at].parent) {
    messages.push(conversation.nodes[at]);
  }
  return messages.reverse();
}

/** Returns a message's place among its siblings, from 0, and their number. */
export function place(conversation, node) {
  const siblings = conversation.children[node.parent] ?? [node.id];
  return { index: siblings.indexOf(node.id), total: siblings.length };
}

/** Chooses the sibling that is some places further. */
export function turn(conversation, node, by) {
  const siblings = conversation.children[node.parent];
  const next = siblings[siblings.indexOf(node.id) + by];
  if (next !== undefined) conversation.chosen[node.parent] = next;
  return next;
}

/** Whether a title or any message has all words of a search. */
export function matches(conversation, search) {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0) return true;
  const texts = Object.values(conversation.nodes).map((node) => node.content);
  const all = [conversation.title, ...texts].join("\n").toLowerCase();
  return words.every((word) => all.includes(word));
}

function assistant({ content, reasoning, toolCalls }, isAnswered) {
  const message = { role: "assistant", content };
  if (reasoning) message.reasoning_content = reasoning;
  if (isAnswered) {
    message.tool_calls = toolCalls.map(({ id, name, arguments: text }) => {
      return { id, type: "function", function: { name, arguments: text } };
    });
  }
  return message;
}

/** Returns the messages as a request has them. Templates want authors to take turns: an answer that
    never began is left out, and what the user wrote before and after it is one message. Calls
    without results are left out, too. */
export function request(conversation, messages) {
  const system = conversation.system.trim();
  const all = system === "" ? [] : [{ role: "system", content: system }];
  messages.forEach((node, i) => {
    const { role, content, reasoning } = node;
    const last = all.at(-1);
    const isAnswered = messages[i + 1]?.role === "results";
    if (role === "results") {
      all.push(...node.results.map(({ id, text }) => ({ role: "tool", tool_call_id: id, content: text })));
    } else if (role === "user") {
      if (last?.role === "user") last.content += `\n\n${content}`;
      else all.push({ role, content });
    } else if (content !== "" || reasoning !== "" || isAnswered) {
      all.push(assistant(node, isAnswered));
    }
  });
  return all;
}
