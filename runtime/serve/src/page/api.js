// The server's interface: the key, requests, and streams of events.

const KEY = "tier-plan-key";

/** Why a request has no answer, in the server's words. */
export class ApiError extends Error {
  constructor(status, message, { code = "", retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

function readKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function writeKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Storage is off: the key lasts as long as the page.
  }
}

async function failure(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // A proxy's page, for instance.
  }
  const after = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
  const message = error?.message ?? `status ${response.status} ${response.statusText}`.trim();
  return new ApiError(response.status, message, {
    code: error?.code ?? "",
    retryAfter: Number.isNaN(after) ? null : after,
  });
}

/**
 * Yields the data of server-sent events.
 * Lines end in LF, CR LF, or CR; a comment or another field is none of our business.
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A CR at the end may be half of a CR LF.
      const text = rest + value;
      const held = text.endsWith("\r") ? 1 : 0;
      const lines = text.slice(0, text.length - held).split(/\r\n|\n|\r/);
      rest = lines.pop() + text.slice(text.length - held);
      for (const line of lines) {
        if (line === "") {
          if (data.length > 0) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Requests to the server that the page came from. */
export class Api {
  #key = readKey();
  #asking = null;

  /** `askForKey(isWrong)` resolves to a key, or to null where the user gives none. */
  constructor(askForKey) {
    this.askForKey = askForKey;
  }

  async #newKey(refused) {
    // Requests that were refused together ask once.
    if (this.#key !== refused) return this.#key;
    this.#asking ??= this.askForKey(refused !== null).finally(() => {
      this.#asking = null;
    });
    const key = await this.#asking;
    if (key !== null) {
      this.#key = key;
      writeKey(key);
    }
    return key;
  }

  /** Sends a request and returns a response with a good status. */
  async send(path, { body = null, signal = null, accept = "application/json" } = {}) {
    for (;;) {
      const key = this.#key;
      const headers = { accept };
      if (key !== null) headers.authorization = `Bearer ${key}`;
      if (body !== null) headers["content-type"] = "application/json";
      const response = await fetch(new URL(path, document.baseURI), {
        method: body === null ? "GET" : "POST",
        headers,
        body: body === null ? undefined : JSON.stringify(body),
        signal,
        cache: "no-store",
      });
      if (response.ok) return response;
      const error = await failure(response);
      if (response.status !== 401 || (await this.#newKey(key)) === null) throw error;
    }
  }

  async json(path, options = {}) {
    return (await this.send(path, options)).json();
  }

  /** Yields what comes of an answer: text, reasoning, parts of tool calls, and its truth at the end. */
  async *answer(path, body, signal) {
    const request = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this.send(path, { body: request, signal, accept: "text/event-stream" });
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        throw new ApiError(chunk.error.status ?? 500, chunk.error.message ?? "the server failed", chunk.error);
      }
      yield piece(chunk);
    }
    throw new ApiError(0, "the connection ended before the answer did");
  }
}

function piece(chunk) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  return {
    isToken: choice !== undefined && choice.finish_reason == null && delta.role === undefined,
    content: delta.content ?? choice?.text ?? "",
    reasoning: delta.reasoning_content ?? "",
    toolCalls: delta.tool_calls ?? [],
    finish: choice?.finish_reason ?? null,
    timings: chunk.timings ?? null,
    tierPlan: chunk.tier_plan ?? null,
    usage: chunk.usage ?? null,
  };
}

/** Listens to what the engine does while the page is visible and has a reason to. */
export class Live {
  #abort = null;
  #reasons = new Set();

  constructor(api, { onScene, onState }) {
    this.api = api;
    this.onScene = onScene;
    this.onState = onState;
    document.addEventListener("visibilitychange", () => this.#update());
  }

  /** Says whether scenes are wanted for a reason. */
  want(reason, isWanted) {
    if (isWanted) this.#reasons.add(reason);
    else this.#reasons.delete(reason);
    this.#update();
  }

  #update() {
    const listens = this.#reasons.size > 0 && !document.hidden;
    if (listens && this.#abort === null) {
      this.#abort = new AbortController();
      this.#listen(this.#abort.signal);
    } else if (!listens && this.#abort !== null) {
      this.#abort.abort();
      this.#abort = null;
      this.onState("paused");
    }
  }

  async #listen(signal) {
    let wait = 1000;
    while (!signal.aborted) {
      try {
        this.onState("connecting");
        const options = { signal, accept: "text/event-stream" };
        const response = await this.api.send("tier-plan/live", options);
        for await (const data of events(response.body)) {
          if (signal.aborted) return;
          wait = 1000;
          this.onState("live");
          this.onScene(JSON.parse(data));
        }
      } catch (error) {
        if (signal.aborted) return;
        if (error.status === 404 || error.status === 401) {
          this.onState(error.status === 404 ? "missing" : "locked");
          return;
        }
      }
      this.onState("lost");
      await new Promise((resume) => setTimeout(resume, wait));
      wait = Math.min(wait * 2, 15_000);
    }
  }
}
