// What users of OpenAI's package for JavaScript do.

import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { serve } from "./servers.mjs";

const TEMPLATE = `{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}
</tool_call>{% endfor %}

{% endfor %}assistant:`;
const KEY = "k";
const messages = [{ role: "user", content: "Hello" }];
const greedy = { model: "m", messages, temperature: 0 };
const Weather = z.object({ city: z.enum(["Paris", "Rome"]), days: z.int().min(1).max(9) });
const parameters = z.toJSONSchema(Weather);
const tools = [{ type: "function", function: { name: "weather", description: "Tells it.", parameters, strict: true } }];
const forced = { ...greedy, max_tokens: 200, tools, tool_choice: "required", parallel_tool_calls: false };

let folder;
let server;
let client;

function connect(url, more = {}) {
  return new OpenAI({ baseURL: `${url}v1`, apiKey: KEY, maxRetries: 0, ...more });
}

before(async () => {
  folder = mkdtempSync(join(tmpdir(), "tier-plan-npm-"));
  writeFileSync(join(folder, "chat.jinja"), TEMPLATE);
  server = await serve(["--chat-template", join(folder, "chat.jinja"), "--api-key", KEY, "--parallel", "2"]);
  client = connect(server.url);
});

after(async () => {
  await server?.stop();
  rmSync(folder, { recursive: true, force: true });
});

test("a streamed chat is the whole one", async () => {
  const whole = await client.chat.completions.create({ ...greedy, max_tokens: 12 });
  assert.equal(whole.choices[0].finish_reason, "length");
  assert.equal(whole.usage.completion_tokens, 12);
  const options = { ...greedy, max_tokens: 12, stream: true, stream_options: { include_usage: true } };
  let text = "";
  let usage = null;
  for await (const chunk of await client.chat.completions.create(options)) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.total_tokens, whole.usage.total_tokens);
});

test("tools are called, whole, as a stream, and by the runner", async () => {
  const whole = await client.chat.completions.create(forced);
  const [call] = whole.choices[0].message.tool_calls;
  const weather = Weather.parse(JSON.parse(call.function.arguments));
  const stream = client.chat.completions.stream(forced);
  const seen = [];
  stream.on("tool_calls.function.arguments.done", (event) => seen.push(event));
  const last = await stream.finalChatCompletion();
  assert.equal(last.choices[0].finish_reason, "tool_calls");
  assert.deepEqual(seen.map((event) => event.name), ["weather"]);
  assert.deepEqual(seen[0].parsed_arguments, weather);

  const called = [];
  const runnable = {
    type: "function",
    function: { ...tools[0].function, parse: JSON.parse, function: (given) => (called.push(given), "It rains.") },
  };
  const runner = client.chat.completions.runTools({ ...forced, tools: [runnable] }, { maxChatCompletions: 2 });
  await runner.done();
  assert.ok(called.length >= 1);
  assert.deepEqual(called[0], weather);
  assert.ok(runner.messages.some((message) => message.role === "tool" && message.content === "It rains."));
});

test("an answer is parsed by a schema", async () => {
  const options = { ...greedy, max_tokens: 400, response_format: zodResponseFormat(Weather, "weather") };
  const answer = await client.chat.completions.parse(options);
  assert.deepEqual(answer.choices[0].message.parsed, Weather.parse(JSON.parse(answer.choices[0].message.content)));
});

test("a streamed response is the whole one", async () => {
  const options = { model: "m", instructions: "s", input: "Hello", temperature: 0, max_output_tokens: 12 };
  const whole = await client.responses.create(options);
  assert.equal(whole.status, "incomplete");
  let text = "";
  let last;
  for await (const event of await client.responses.create({ ...options, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
    last = event;
  }
  assert.equal(last.type, "response.incomplete");
  assert.equal(text, whole.output_text);
  assert.equal(last.response.output[0].content[0].text, text);
  const stream = client.responses.stream(options);
  assert.equal((await stream.finalResponse()).output_text, text);
  const parsed = await client.responses.parse({
    ...options,
    max_output_tokens: 400,
    text: { format: zodTextFormat(Weather, "weather") },
  });
  assert.ok(Weather.safeParse(parsed.output_parsed).success);
});

test("a stream that is given up ends the text, and its place is free", async () => {
  const one = await serve(["--api-key", KEY, "--parallel", "1", "--max-queue", "0", "--chat-template", join(folder, "chat.jinja")]);
  try {
    const patient = connect(one.url);
    const long = { ...greedy, max_tokens: 3000, stream: true, ignore_eos: true };
    const stream = await patient.chat.completions.create(long);
    const first = await stream[Symbol.asyncIterator]().next();
    assert.ok(!first.done);
    // The only place is taken.
    const short = { ...greedy, max_tokens: 1 };
    await assert.rejects(patient.chat.completions.create(short), (error) => {
      assert.ok(error instanceof OpenAI.RateLimitError);
      assert.equal(error.code, "queue_full");
      assert.ok(Number(error.headers.get("retry-after")) >= 1);
      return true;
    });
    stream.controller.abort();
    // The package tries again after what `Retry-After` says.
    await connect(one.url, { maxRetries: 5 }).chat.completions.create(short);
  } finally {
    await one.stop();
  }
});

test("errors have their classes", async () => {
  const cases = [
    [() => client.chat.completions.create({ model: "m", messages: [] }), OpenAI.BadRequestError, "invalid_request"],
    [() => client.chat.completions.create({ ...greedy, temperature: -1 }), OpenAI.BadRequestError, "invalid_request"],
    [() => client.chat.completions.create({ ...greedy, audio: { voice: "v", format: "wav" } }), OpenAI.BadRequestError, "unsupported"],
    [() => connect(server.url, { apiKey: "x" }).models.list(), OpenAI.AuthenticationError, "invalid_api_key"],
    [() => client.models.retrieve("none"), OpenAI.NotFoundError, "model_not_found"],
    [() => client.embeddings.create({ model: "m", input: "a" }), OpenAI.InternalServerError, "unsupported"],
  ];
  for (const [ask, kind, code] of cases) {
    await assert.rejects(ask, (error) => {
      assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
      assert.equal(error.code, code);
      return true;
    });
  }
  const wrong = await client.chat.completions.create({ ...greedy, top_p: 7 }).catch((error) => error);
  assert.equal(wrong.param, "top_p");
});
