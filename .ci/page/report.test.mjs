// Checks a report in a browser, opened from the disk: tables sort by mouse and by keys, it loads nothing, and it is
// whole without scripts, on narrow screens, and in both themes.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const AXE = readFileSync(new URL("node_modules/axe-core/axe.min.js", import.meta.url), "utf8");
const RECORDS = ["workstation-ilp", "workstation-lru", "older"].map((name) => `tests/data/records/${name}.record.json`);
const PICTURES = "target/page";
const WIDE = { viewport: { width: 1280, height: 900 } };

let folder, file, browser;

before(async () => {
  folder = mkdtempSync(join(tmpdir(), "tier-plan-report-"));
  file = join(folder, "report.html");
  const own = join(folder, "own.record.json");
  const run = ["run", "profiles/demo/demo.gguf", "-p", "And", "-n", "8", "--ignore-eos", "--record", own];
  execFileSync(process.env.TIER_PLAN, run, { stdio: "ignore" });
  execFileSync(process.env.TIER_PLAN, ["compare", own, ...RECORDS, "--html", file], { stdio: "ignore" });
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  mkdirSync(PICTURES, { recursive: true });
});

after(async () => {
  await browser?.close();
  rmSync(folder, { recursive: true, force: true });
});

/** Opens the report; a request beside its own, and what the browser complains of without being expected to, fails. */
async function open(t, options = WIDE, expected = null) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const complaints = [];
  page.on("console", (message) => {
    if (!expected?.test(message.text())) complaints.push(message.text());
  });
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => {
    if (request.url() !== pathToFileURL(file).href) complaints.push(request.url());
  });
  t.after(async () => {
    await context.close();
    assert.deepEqual(complaints, []);
  });
  await page.goto(pathToFileURL(file).href);
  return page;
}

/** The cells of a column of the first table. */
function column(page, at) {
  return page.$$eval("table", ([table], i) => [...table.tBodies[0].rows].map((row) => row.cells[i].textContent), at);
}

const sorts = (page) => page.$$eval("table", ([table]) => [...table.tHead.rows[0].cells].map((head) => head.ariaSort));

test("headings sort as numbers, up and down, by mouse and by keys", async (t) => {
  const page = await open(t);
  const written = await column(page, 2);
  await page.click("table >> nth=0 >> text=weights");
  const up = await column(page, 2);
  assert.match(up[0], /MiB/);
  assert.match(up[1], /GiB/);
  assert.equal(up.at(-1), "–", "what has no value is last");
  assert.equal((await sorts(page))[2], "ascending");
  await page.keyboard.press("Enter");
  const down = await column(page, 2);
  assert.match(down[0], /GiB/);
  assert.equal(down.at(-1), "–");
  assert.deepEqual((await sorts(page)).filter((sort) => sort !== "none"), ["descending"]);
  await page.keyboard.press("Shift+Tab");
  await page.keyboard.press("Space");
  assert.equal((await sorts(page))[1], "ascending");
  const machines = await column(page, 1);
  assert.deepEqual(machines, machines.toSorted((a, b) => a.localeCompare(b, "en", { numeric: true })));
  assert.deepEqual(up.toSorted(), written.toSorted(), "no row is lost");
});

test("rows of one value keep their order", async (t) => {
  const page = await open(t);
  const before = await column(page, 1);
  await page.click("table >> nth=0 >> text=plans");
  assert.deepEqual(new Set(await column(page, 1)), new Set(before));
  const ones = async () => {
    const [machines, plans] = [await column(page, 1), await column(page, 3)];
    return machines.filter((_, i) => plans[i] === "1");
  };
  const kept = before.filter((machine) => !machine.includes("9950"));
  assert.deepEqual(await ones(), kept);
  await page.keyboard.press("Enter");
  assert.deepEqual(await ones(), kept, "and so they do the other way");
});

test("without scripts the report is whole", async (t) => {
  const page = await open(t, { ...WIDE, javaScriptEnabled: false });
  assert.equal(await page.locator("button").count(), 0);
  assert.ok((await page.locator("table tbody tr").count()) > 5);
  assert.ok((await page.locator("svg").count()) > 5);
});

for (const colorScheme of ["light", "dark"]) {
  for (const width of [1280, 400]) {
    test(`${width} pixels wide, ${colorScheme}`, async (t) => {
      const page = await open(t, { viewport: { width, height: 900 }, colorScheme });
      const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
      assert.ok(overflow <= 0, `${overflow} pixels too wide`);
      await page.screenshot({ path: `${PICTURES}/report-${width}-${colorScheme}.png`, fullPage: true });
      // The policy lets no other script in, so the checker goes around it.
      const session = await page.context().newCDPSession(page);
      await session.send("Runtime.evaluate", { expression: AXE });
      const found = await page.evaluate(() => globalThis.axe.run(document, { runOnly: ["wcag2a", "wcag2aa"] }));
      const faults = found.violations.map((v) => `${v.id}: ${v.nodes.length} × ${v.nodes[0].html.slice(0, 120)}`);
      assert.deepEqual(faults, []);
    });
  }
}

test("a script that gets into a report does not run", async (t) => {
  const page = await open(t, WIDE, /Content Security Policy/);
  const ran = await page.evaluate(() => {
    const script = document.createElement("script");
    script.textContent = "window.pwned = true";
    document.body.append(script);
    return window.pwned === true;
  });
  assert.equal(ran, false);
});

test("on paper it is light", async (t) => {
  const page = await open(t, { ...WIDE, colorScheme: "dark" });
  await page.emulateMedia({ media: "print", colorScheme: "dark" });
  const color = await page.evaluate(() => getComputedStyle(document.body).color);
  assert.equal(color, "rgb(30, 28, 25)");
  await page.pdf({ path: `${PICTURES}/report.pdf` });
});
