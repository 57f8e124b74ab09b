// Checks the page in a browser: chats, branches, history, the machine view, keys, and strangers' text.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";
import { prepare, puppet, serve } from "./servers.mjs";

const AXE = readFileSync(new URL("node_modules/axe-core/axe.min.js", import.meta.url), "utf8");
const WIDE = { viewport: { width: 1440, height: 900 } };
const NARROW = { viewport: { width: 360, height: 740 }, hasTouch: true };

let files, browser, chats, words, locked, recorded;

before(async () => {
  files = prepare();
  chats = await serve(["--plan", files.plan, "--chat-template", files.template]);
  words = await puppet(chats.url);
  locked = await serve(["--api-key", "open-sesame"]);
  recorded = await serve(["--plan", files.plan, "--profile-out", files.uses]);
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
});

after(async () => {
  await browser?.close();
  await words?.stop();
  await Promise.all([chats?.stop(), locked?.stop(), recorded?.stop()]);
  files?.remove();
});

/** Opens the page; whatever the browser complains of fails the test, but for what it expects. */
async function open(t, url, { options = WIDE, expected = null, isReady = true } = {}) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  page.setDefaultTimeout(60_000);
  const complaints = [];
  page.on("console", (message) => {
    const isComplaint = ["error", "warning"].includes(message.type());
    if (isComplaint && !expected?.test(message.text())) complaints.push(message.text());
  });
  page.on("pageerror", (error) => complaints.push(String(error)));
  t.after(async () => {
    await context.close();
    assert.deepEqual(complaints, [], "the console is silent");
  });
  await page.goto(url);
  if (isReady) await page.waitForSelector("body.is-ready");
  return page;
}

async function setTokens(page, n) {
  await page.click("#open-settings");
  await page.fill("#field-max_tokens", String(n));
  await page.keyboard.press("Enter");
  await page.getByText("Parameters (1 set)").waitFor();
}

async function ask(page, text) {
  await page.fill("#prompt", text);
  await page.press("#prompt", "Enter");
}

async function done(page) {
  await page.waitForSelector("#stop", { state: "hidden" });
}

const answer = (page) => page.locator(".message.assistant").last();
const textOf = (page) => answer(page).locator(".text").innerText();
const pixels = (page) => page.locator("#heat canvas").evaluate((canvas) => canvas.toDataURL());

test("a chat is answered, with what it took, and the map of experts moves", async (t) => {
  const page = await open(t, chats.url);
  await page.waitForSelector("#machine-state[data-state=live]");
  assert.equal(await page.innerText("#welcome-title"), "demo");
  assert.match(await page.innerText("#welcome-lead"), /context of 1,024.tokens.*predicts [\d.]+.tokens\/s/s);
  await page.waitForSelector("#where-list li:nth-child(3)");
  assert.equal(await page.locator("#examples button").count(), 3);
  await page.waitForFunction(() => /192 experts; none/.test(document.querySelector(".heat-words").textContent));
  const before = await pixels(page);
  await setTokens(page, 120);
  await ask(page, "In the beginning");
  await page.waitForSelector("#stop:not([hidden])");
  await done(page);
  assert.ok((await textOf(page)).length > 40);
  const line = await answer(page).locator(".truth").innerText();
  assert.match(line, /^120.tokens · [\d.]+ tokens\/s measured on emulated tiers, [\d.]+ predicted \([+−±]\d+.%\)/);
  assert.match(line, /expert hits [\d.]+.%/);
  assert.match(line, /read vram .*, dram .*, slow /);
  await page.waitForFunction(() => /uses of \d+ among 192/.test(document.querySelector(".heat-words").textContent));
  await page.waitForTimeout(1000);
  assert.notEqual(await pixels(page), before, "the map shows what was used");
  await page.focus("#heat canvas");
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("ArrowRight");
  assert.match(await page.innerText(".tip"), /^layer 1 · expert \d+ · /);
  await page.click(".heat-table summary");
  // The browser tells the page of an opened table later than it opens it.
  await page.waitForSelector(".heat-table tbody tr");
  assert.equal(await page.locator(".heat-table tbody tr").count(), 6);
  const told = await page.innerText(".chart-words");
  assert.match(told, /[\d.]+ tokens\/s measured on emulated tiers, [\d.]+ predicted/);
  assert.equal(await page.locator("#tiers .tier").count(), 3);
  assert.match(await page.innerText("#queue"), /\d+ of \d+.pages of the KV cache.*of \d+.texts? at work/s);
});

test("an answer stops at once, by the key and by the button", async (t) => {
  const page = await open(t, chats.url);
  await setTokens(page, 900);
  for (const stop of [() => page.keyboard.press("Escape"), () => page.click("#stop")]) {
    await ask(page, "And the earth was without form");
    await page.waitForFunction(() => document.querySelector(".message.assistant:last-child .text").innerText.length > 20);
    await stop();
    await done(page);
    const text = await textOf(page);
    assert.match(await answer(page).locator(".truth").innerText(), /^stopped/);
    const slots = async () => (await (await fetch(`${chats.url}slots`)).json()).filter((slot) => slot.is_processing);
    for (let i = 0; i < 50 && (await slots()).length > 0; i += 1) await page.waitForTimeout(100);
    assert.deepEqual(await slots(), [], "the server computes it no longer");
    assert.equal(await textOf(page), text);
  }
});

test("edits and other answers are branches, and a reload keeps them", async (t) => {
  const page = await open(t, chats.url);
  await setTokens(page, 16);
  await ask(page, "The first question");
  await done(page);
  const first = await textOf(page);
  await answer(page).getByLabel("Another answer").click();
  await done(page);
  assert.equal(await answer(page).locator(".place").innerText(), "2/2");
  await page.locator(".message.user").getByLabel("Edit and ask again").click();
  await page.fill(".edit textarea", "The second question");
  await page.keyboard.press("Enter");
  await done(page);
  assert.equal(await page.locator(".message.user .text").innerText(), "The second question");
  await ask(page, "More");
  await done(page);
  assert.equal(await page.locator(".message").count(), 4);

  await page.reload();
  await page.waitForSelector("body.is-ready");
  assert.equal(await page.locator(".message").count(), 4);
  await page.locator(".message.user").first().getByLabel("Previous version").click();
  assert.equal(await page.locator(".message.user .text").innerText(), "The first question");
  assert.equal(await page.locator(".message").count(), 2);
  await answer(page).getByLabel("Previous version").click();
  assert.equal(await textOf(page), first);
  assert.equal(await answer(page).locator(".place").innerText(), "1/2");
});

test("chats are listed, searched, renamed, exported, deleted, and brought back", async (t) => {
  const page = await open(t, chats.url);
  await setTokens(page, 4);
  for (const text of ["Apples and pears", "Bolts and nuts"]) {
    await page.keyboard.press("Control+k");
    await ask(page, text);
    await done(page);
  }
  const titles = () => page.locator("#conversations .open").allInnerTexts();
  assert.deepEqual(await titles(), ["Bolts and nuts", "Apples and pears"]);
  await page.fill("#search", "PEARS apple");
  assert.deepEqual(await titles(), ["Apples and pears"]);
  await page.fill("#search", "");
  await page.hover("#conversations li:last-child");
  await page.getByLabel("Rename Apples and pears").click();
  await page.fill(".rename", "Fruit");
  await page.keyboard.press("Enter");
  assert.deepEqual(await titles(), ["Bolts and nuts", "Fruit"]);
  const [file] = await Promise.all([page.waitForEvent("download"), page.click("#export-all")]);
  const exported = JSON.parse(readFileSync(await file.path(), "utf8"));
  assert.deepEqual(exported.conversations.map(({ title }) => title), ["Bolts and nuts", "Fruit"]);
  assert.equal(Object.keys(exported.conversations[1].nodes).length, 2);
  await page.hover("#conversations li:last-child");
  await page.getByLabel("Delete Fruit").click();
  assert.deepEqual(await titles(), ["Bolts and nuts"]);
  await page.getByRole("button", { name: "Undo" }).click();
  assert.deepEqual(await titles(), ["Bolts and nuts", "Fruit"]);
  // A write that has not ended is lost with the page.
  await page.waitForFunction(async () => {
    const wait = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
    const database = await wait(indexedDB.open("tier-plan"));
    const n = await wait(database.transaction("conversations").objectStore("conversations").count());
    database.close();
    return n === 2;
  });
  await page.reload();
  await page.waitForSelector("body.is-ready");
  assert.deepEqual(await titles(), ["Bolts and nuts", "Fruit"]);
});

test("what one tab writes, another one shows", async (t) => {
  const page = await open(t, chats.url);
  const other = await page.context().newPage();
  await other.goto(chats.url);
  await other.waitForSelector("body.is-ready");
  await setTokens(page, 200);
  await ask(page, "One tab");
  await other.locator("#conversations .open", { hasText: "One tab" }).waitFor();
  await done(page);
  await other.locator("#conversations .open").click();
  await other.waitForFunction(() => /^200.tokens/.test(document.querySelector(".truth")?.textContent));
  assert.equal(await textOf(other), await textOf(page));
});

test("an answer that a reload cuts off is kept as far as it came", async (t) => {
  const page = await open(t, chats.url);
  await setTokens(page, 900);
  await ask(page, "The beginning");
  await page.waitForFunction(() => document.querySelector(".message.assistant .text")?.innerText.length > 20);
  await page.waitForTimeout(1500);
  await page.reload();
  await page.waitForSelector("body.is-ready");
  await page.getByText("stopped").waitFor();
  assert.ok((await textOf(page)).length > 20);
  await ask(page, "Go on");
  await page.waitForSelector("#stop:not([hidden])");
});

test("an edit while an answer comes is not lost", async (t) => {
  const page = await open(t, chats.url);
  await setTokens(page, 900);
  await ask(page, "The beginning");
  await page.locator(".message.user").getByLabel("Edit and ask again").click();
  await page.fill(".edit textarea", "Another beginning");
  await page.keyboard.press("Enter");
  await page.getByText("An answer is coming").waitFor();
  assert.equal(await page.inputValue(".edit textarea"), "Another beginning");
  await page.click("#stop");
  await done(page);
  await page.press(".edit textarea", "Enter");
  await page.waitForSelector("#stop:not([hidden])");
  await page.click("#stop");
  await done(page);
  assert.equal(await page.locator(".message.user .text").innerText(), "Another beginning");
});

test("a model's markup is text, and its links lead to the web alone", async (t) => {
  const page = await open(t, words.url);
  await ask(page, "script");
  await done(page);
  const text = await textOf(page);
  assert.ok(text.includes("<script>window.pwned = 1</script>"), text);
  assert.ok(text.includes("onerror='window.pwned = 2'"), text);
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  assert.equal(await page.locator("#messages :is(script, img, iframe, object)").count(), 0);
  const links = await answer(page).locator("a").evaluateAll((all) => all.map(({ href, rel }) => ({ href, rel })));
  const rel = "noopener noreferrer nofollow";
  assert.deepEqual(links, [
    { href: "https://example.com/a_(b)", rel },
    { href: "https://example.org/", rel },
  ]);
});

test("markdown, thoughts, and calls have their forms", async (t) => {
  const page = await open(t, words.url);
  await ask(page, "parts");
  await done(page);
  const count = (selector) => answer(page).locator(selector).count();
  for (const [selector, n] of [
    ["details.thought:not([open])", 1],
    ["details.call:not([open])", 1],
    [".text > h3", 1],
    [".text > ol > li", 2],
    [".text > ol ul > li", 1],
    [".text table td.to-right", 1],
    [".text > blockquote", 1],
    [".text del, .text em, .text p > strong, .text p > code", 4],
    [".text .code-block code", 1],
  ]) {
    assert.equal(await count(selector), n, selector);
  }
  assert.ok((await textOf(page)).includes("*star*"));
  await answer(page).locator(".call summary").click();
  assert.match(await answer(page).locator(".call").innerText(), /weather[^]*"city": "Paris"/);
  await answer(page).locator(".thought summary").click();
  assert.equal(await answer(page).locator(".thought strong").innerText(), "think");
});

test("the user gives tools and the results of their calls", async (t) => {
  const page = await open(t, words.url);
  await page.click("#open-settings");
  await page.fill("#field-tools", "{]");
  await page.click("#settings .primary");
  assert.equal(await page.locator("#settings[open]").count(), 1, "what is no JSON is not taken");
  const tool = { type: "function", function: { name: "weather", parameters: { type: "object" } } };
  await page.fill("#field-tools", JSON.stringify([tool]));
  await page.click("#settings .primary");
  await page.getByText("Parameters (1 set)").waitFor();
  await ask(page, "parts");
  await done(page);
  await page.getByLabel("Result of weather").fill("script");
  const [sent] = await Promise.all([
    page.waitForRequest(/chat.completions$/),
    page.getByRole("button", { name: "Give the results" }).click(),
  ]);
  const { tools, messages } = sent.postDataJSON();
  assert.deepEqual(tools, [tool]);
  const calls = [{ id: "c1", type: "function", function: { name: "weather", arguments: '{"city":"Paris"}' } }];
  assert.deepEqual(messages.map(({ role }) => role), ["user", "assistant", "tool"]);
  assert.deepEqual(messages[1].tool_calls, calls);
  assert.deepEqual(messages[2], { role: "tool", tool_call_id: "c1", content: "script" });
  await done(page);
  assert.equal(await page.locator(".message").count(), 4);
  assert.equal(await page.locator("form.results").count(), 0);
  assert.equal(await page.locator(".message.results details:not([open])").count(), 1);
});

test("text that nests without end is shown at once", async (t) => {
  const page = await open(t, words.url);
  const start = Date.now();
  await ask(page, "deep");
  await done(page);
  await answer(page).locator(".text").getByText("y").last().waitFor();
  assert.ok(Date.now() - start < 10_000);
});

test("a server that refuses or breaks off is told of, and asked again", async (t) => {
  const expected = /status of 429|ERR_EMPTY_RESPONSE|Failed to fetch/;
  const page = await open(t, words.url, { expected });
  await ask(page, "full");
  await done(page);
  assert.match(await answer(page).locator(".problem").innerText(), /the queue is full\. Try again in 7/);
  await ask(page, "cut");
  await done(page);
  assert.match(await answer(page).locator(".problem").innerText(), /can't be reached/);
  await answer(page).getByLabel("Another answer").click();
  await done(page);
  assert.equal(await answer(page).locator(".place").innerText(), "2/2");
  const [sent] = await Promise.all([page.waitForRequest(/chat.completions$/), ask(page, "script")]);
  assert.deepEqual(sent.postDataJSON().messages, [{ role: "user", content: "full\n\ncut\n\nscript" }]);
  await done(page);
});

test("a key is asked for once per tab", async (t) => {
  const page = await open(t, locked.url, { expected: /status of 401/, isReady: false });
  await page.waitForSelector("#key-dialog[open]");
  await page.fill("#api-key", "wrong");
  await page.keyboard.press("Enter");
  await page.getByText("The server refused this key.").waitFor();
  await page.fill("#api-key", "open-sesame");
  await page.keyboard.press("Enter");
  await page.waitForSelector("body.is-ready");
  await setTokens(page, 8);
  await ask(page, "In the beginning");
  await done(page);
  assert.match(await page.innerText(".truth"), /^8.tokens/);
  await page.reload();
  await page.waitForSelector("body.is-ready");
  assert.equal(await page.locator("dialog[open]").count(), 0);
  assert.equal(await page.locator(".message").count(), 2);
});

test("a tab that is hidden does not listen", async (t) => {
  const page = await open(t, chats.url);
  await page.waitForSelector("#machine-state[data-state=live]");
  const hide = (isHidden) =>
    page.evaluate((value) => {
      Object.defineProperty(document, "hidden", { value, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }, isHidden);
  const ended = page.waitForEvent("requestfailed", (request) => request.url().endsWith("/tier-plan/live"));
  await hide(true);
  await ended;
  await page.waitForSelector("#machine-state[data-state=paused]");
  await hide(false);
  await page.waitForSelector("#machine-state[data-state=live]");
});

test("keys work without a mouse", async (t) => {
  const page = await open(t, chats.url);
  assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
  await page.keyboard.type("one");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("two?");
  assert.equal(await page.inputValue("#prompt"), "one\ntwo?");
  await page.locator("#switch-theme").focus();
  await page.keyboard.press("?");
  await page.waitForSelector("#keys[open]");
  await page.keyboard.press("Escape");
  await page.waitForSelector("#keys:not([open])", { state: "attached" });
  await page.keyboard.press("/");
  assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
  const visible = await page.evaluate(() => {
    const shown = [];
    for (const one of document.querySelectorAll("button, input, select, textarea, summary, a")) {
      if (!one.checkVisibility() || one.disabled) continue;
      one.focus({ focusVisible: true });
      const { outlineStyle, outlineWidth } = getComputedStyle(one);
      const inner = one.closest(".composer") && one.tagName === "TEXTAREA" ? getComputedStyle(one.closest(".composer")) : null;
      const isMarked = (inner ?? { outlineStyle }).outlineStyle !== "none" && parseFloat((inner ?? { outlineWidth }).outlineWidth) > 0;
      if (!isMarked) shown.push(one.outerHTML.slice(0, 80));
    }
    return shown;
  });
  assert.deepEqual(visible, [], "what has the focus shows it");
});

for (const colorScheme of ["light", "dark"]) {
  for (const [name, size] of Object.entries({ wide: WIDE, narrow: NARROW })) {
    test(`nothing is in the way of anyone: ${colorScheme}, ${name}`, async (t) => {
      const page = await open(t, words.url, { options: { ...size, colorScheme, reducedMotion: "reduce" } });
      const look = async (state) => {
        await page.waitForTimeout(400);
        await page.screenshot({ path: `target/page/${colorScheme}-${name}-${state}.png` });
        const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        assert.ok(wide <= 0, `${state}: ${wide} px too wide`);
        await page.evaluate(AXE);
        const { violations } = await page.evaluate(() => {
          return window.axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"] });
        });
        const told = violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(" ")}`);
        assert.deepEqual(told, [], state);
      };
      await page.waitForSelector("#where-list li");
      await look("empty");
      await ask(page, "parts");
      await done(page);
      await ask(page, "script");
      await done(page);
      await look("chat");
      if (name === "narrow") {
        await page.click("#toggle-machine");
        await page.click(".heat-table summary");
        await look("machine");
        await page.keyboard.press("Escape");
        await page.waitForSelector("#machine", { state: "hidden" });
        await page.click("#toggle-history");
        await look("history");
        await page.keyboard.press("Escape");
      }
      await page.click("#open-settings");
      await look("settings");
    });
  }
}

test("the theme is the system's until it is switched, and stays over a reload", async (t) => {
  const page = await open(t, chats.url, { options: { ...WIDE, colorScheme: "dark" } });
  const color = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const dark = await color();
  await page.getByLabel("Theme: system").click();
  const light = await color();
  assert.notEqual(light, dark);
  await page.reload();
  await page.waitForSelector("body.is-ready");
  assert.equal(await color(), light);
  await page.getByLabel("Theme: light").click();
  assert.equal(await color(), dark);
});

test("a plan for what texts chose is made and moved to", async (t) => {
  const here = await open(t, chats.url);
  await here.waitForSelector("#machine-state[data-state=live]");
  assert.equal(await here.isVisible("#plan-section"), false, "nothing is recorded there");

  const page = await open(t, recorded.url, { expected: /409/ });
  await page.waitForSelector("#plan-section");
  await page.click("text=Plan for this use");
  await page.getByText("Not now: 0 decoded tokens").waitFor();
  for (const prompt of ["In the beginning", "And God said", "Once upon a time"]) {
    const body = JSON.stringify({ prompt, max_tokens: 120 });
    const answer = await fetch(new URL("v1/completions", recorded.url), { method: "POST", body });
    assert.equal(answer.status, 200);
  }
  await page.click("text=Plan for this use");
  await page.getByText(/Predicted for these texts on emulated tiers: .* tokens\/s.*faster/).waitFor();
  await page.locator("#plan-section").scrollIntoViewIfNeeded();
  await page.screenshot({ path: "target/page/plan.png" });
  await page.click("text=Move to it");
  await page.getByText("The model has moved to the plan").waitFor();
  assert.equal(await page.isVisible("text=Move to it"), false);
});
