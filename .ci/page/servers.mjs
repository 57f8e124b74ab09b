// The servers that the page is checked with: the program itself, and one that puts words in its mouth.

import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import http from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

const PROGRAM = process.env.TIER_PLAN;
const MODEL = "profiles/demo/demo.gguf";
const MACHINE = "profiles/machines/demo-emulated.toml";
const TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}";
const START_MS = 120_000;

/** A folder with a plan over three emulated tiers, which also make the model slow enough to watch. */
export function prepare() {
  const folder = mkdtempSync(join(tmpdir(), "tier-plan-page-"));
  const plan = join(folder, "placement.toml");
  execFileSync(PROGRAM, ["solve", MODEL, "-M", MACHINE, "-o", plan], { stdio: ["ignore", "ignore", "inherit"] });
  const template = join(folder, "chat.jinja");
  writeFileSync(template, TEMPLATE);
  const uses = join(folder, "use.profile");
  return { plan, template, uses, remove: () => rmSync(folder, { recursive: true, force: true }) };
}

/** Starts `tier-plan serve` on a free port and waits until it is ready. */
export async function serve(more) {
  const args = ["serve", MODEL, "--port", "0", ...more];
  const child = spawn(PROGRAM, args, { stdio: ["ignore", "ignore", "pipe"] });
  const log = [];
  const url = await new Promise((resolve, reject) => {
    const late = setTimeout(() => reject(new Error(`not ready:\n${log.join("\n")}`)), START_MS);
    createInterface({ input: child.stderr }).on("line", (line) => {
      log.push(line);
      const ready = /(http:\/\/127\.0\.0\.1:\d+): ready/.exec(line);
      if (ready === null) return;
      clearTimeout(late);
      resolve(ready[1]);
    });
    child.on("exit", (code) => reject(new Error(`ended with ${code}:\n${log.join("\n")}`)));
  });
  const stop = async () => {
    const ended = new Promise((resolve) => child.on("exit", resolve));
    child.kill("SIGTERM");
    await ended;
  };
  return { url: `${url}/`, stop };
}

function chunk(delta, finish = null, more = {}) {
  return { id: "chatcmpl-1", choices: [{ index: 0, delta, finish_reason: finish }], ...more };
}

/** What a model says that means no good, and one that has much to show. */
export const SAYINGS = {
  script: [
    chunk({ role: "assistant", content: "" }),
    chunk({ content: "<script>window.pwned = 1</scr" }),
    chunk({ content: "ipt> <img src=x onerror='window.pwned = 2'>\n\n" }),
    chunk({ content: "[go](javascript:window.pwned=3) [there](https://example.com/a_(b)) " }),
    chunk({ content: "![x](data:text/html,<b>x</b>) <https://example.org>\n\n" }),
    chunk({ content: "```html\n<script>window.pwned = 4</script>\n```\n" }),
    chunk({}, "stop", { timings: { predicted_n: 40, predicted_per_second: 20, cache_n: 0, prompt_n: 5 } }),
  ],
  parts: [
    chunk({ role: "assistant", content: "" }),
    chunk({ reasoning_content: "First I **think**." }),
    chunk({ content: "# Title\n\n1. one\n   - inner\n2. two\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n> quoted\n\n" }),
    chunk({ content: "~~old~~ *new* **bold** `code` \\*star\\*\n\n```rust\nfn main() {}\n```\n" }),
    chunk({ tool_calls: [{ index: 0, id: "c1", function: { name: "weather", arguments: '{"ci' } }] }),
    chunk({ tool_calls: [{ index: 0, function: { arguments: 'ty":"Paris"}' } }] }),
    chunk({}, "tool_calls"),
  ],
  deep: [
    chunk({ content: `${"> ".repeat(3000)}x\n${"*a **b ".repeat(3000)}\n${"[".repeat(5000)}\n` }),
    chunk({ content: `${"- ".repeat(3000)}y\n\n${"`".repeat(3000)}${"_x_".repeat(3000)}` }),
    chunk({}, "stop"),
  ],
};

function say(response, sayings) {
  response.writeHead(200, { "content-type": "text/event-stream" });
  for (const one of sayings) response.write(`data: ${JSON.stringify(one)}\r\n\r\n`);
  response.end("data: [DONE]\n\n");
}

function refuse(response) {
  response.writeHead(429, { "content-type": "application/json", "retry-after": "7" });
  response.end(JSON.stringify({ error: { message: "the queue is full", code: "queue_full" } }));
}

/** Starts a server that is another one, but for chats whose last line is the name of a saying. */
export async function puppet(behind) {
  const target = new URL(behind);
  const server = http.createServer(async (request, response) => {
    const parts = [];
    for await (const part of request) parts.push(part);
    const body = Buffer.concat(parts);
    if (request.url === "/v1/chat/completions") {
      const last = JSON.parse(body).messages.at(-1).content.split("\n").at(-1);
      if (SAYINGS[last]) return say(response, SAYINGS[last]);
      if (last === "full") return refuse(response);
      if (last === "cut") return response.destroy();
    }
    const { host, origin, ...headers } = request.headers;
    const options = { host: target.hostname, port: target.port, path: request.url, method: request.method, headers };
    const forward = http.request(options, (answer) => {
      response.writeHead(answer.statusCode, answer.headers);
      answer.pipe(response);
    });
    response.on("close", () => forward.destroy());
    forward.on("error", () => response.destroy());
    forward.end(body);
    return undefined;
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const stop = () => {
    server.closeAllConnections();
    return new Promise((resolve) => server.close(resolve));
  };
  return { url: `http://127.0.0.1:${server.address().port}/`, stop };
}
