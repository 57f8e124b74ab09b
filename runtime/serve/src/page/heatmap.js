// Layers by experts: how often each was used, and which tier served it.

import { rgb, tierClass, tierRgb } from "./colors.js";
import { el } from "./dom.js";
import { count, many, percent } from "./format.js";

const MIN_CELL_PX = 2;
const MAX_CELL_PX = 18;
const MAX_HEIGHT_PX = 420;
const LEFT_PX = 30;
const TOP_PX = 6;
const BOTTOM_PX = 16;
/** Time in which the last uses fade. */
const FADE_MS = 700;
/** Time between two looks of what fades: the model may compute on the same cores as the browser. */
const FADE_STEP_MS = 100;
/** Most cells that are drawn: a layer may claim any number of experts. */
const MAX_CELLS = 1 << 20;

const isCalm = window.matchMedia("(prefers-reduced-motion: reduce)");

/** Uses by layer, expert, and tier. */
class Uses {
  constructor(layers, columns, tiers) {
    this.n = new Uint32Array(layers * columns * tiers);
    this.max = 0;
  }
}

/** The map with its legend, its tooltip, and its table. */
export class HeatMap {
  #shape = "";
  #layers = [];
  #columns = 0;
  #tiers = [];
  #uses = { answer: null, all: null };
  #scope = "answer";
  #last = { cells: new Map(), at: 0 };
  #cell = null;
  #size = { width: 0, height: 0, dense: 1 };
  #small = document.createElement("canvas");
  #colors = null;
  #frame = 0;
  #timer = 0;
  #isStale = true;

  constructor(root) {
    this.canvas = el("canvas", { tabindex: "0", role: "img" });
    this.scroll = el("div", { class: "heat-scroll" }, this.canvas);
    this.tip = el("div", { class: "tip", role: "status", hidden: true });
    this.legend = el("div", { class: "heat-legend" });
    this.words = el("p", { class: "heat-words" }, "Nothing has been counted yet.");
    this.rows = el("tbody");
    this.head = el("tr");
    this.table = el(
      "details",
      { class: "heat-table", ontoggle: () => this.#fillTable() },
      el("summary", {}, "As a table"),
      el(
        "div",
        { class: "table-scroll", tabindex: "0", role: "group", "aria-label": "Uses by layer" },
        el("table", {}, el("thead", {}, this.head), this.rows),
      ),
    );
    root.append(this.scroll, this.tip, this.legend, this.words, this.table);
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#choose(null));
    this.canvas.addEventListener("blur", () => this.#choose(null));
    this.canvas.addEventListener("keydown", (event) => this.#move(event));
    new ResizeObserver(() => this.#resize()).observe(root);
    this.#describe();
  }

  /** Begins to count an answer. */
  beginAnswer() {
    this.#uses.answer = this.#empty();
    this.draw();
  }

  /** Shows the answer, or all since the page was opened. */
  set scope(scope) {
    this.#scope = scope;
    this.draw();
  }

  /** Takes the colors of another theme. */
  recolor() {
    this.#colors = null;
    this.draw();
  }

  /** Adds what was used in a window; `counts` says whether an answer is coming. */
  add(scene, counts) {
    this.#fit(scene);
    const cells = new Map();
    const tiers = this.#tiers.length;
    scene.layers.forEach(({ experts }, row) => {
      for (const [expert, n, tier] of experts) {
        if (!(expert < this.#columns) || !(tier < tiers)) continue;
        const cell = row * this.#columns + expert;
        cells.set(cell, tier);
        this.#count(this.#uses.all, cell, tier, n);
        if (counts) this.#count(this.#uses.answer, cell, tier, n);
      }
    });
    if (cells.size > 0) this.#last = { cells, at: performance.now() };
    this.draw();
  }

  #count(uses, cell, tier, n) {
    const tiers = this.#tiers.length;
    uses.n[cell * tiers + tier] += n;
    uses.max = Math.max(uses.max, this.#sum(uses, cell));
  }

  #sum(uses, cell) {
    const tiers = this.#tiers.length;
    let sum = 0;
    for (let tier = 0; tier < tiers; tier += 1) sum += uses.n[cell * tiers + tier];
    return sum;
  }

  #empty() {
    return new Uses(this.#layers.length, this.#columns, this.#tiers.length);
  }

  /** Starts anew where the model is another one. */
  #fit(scene) {
    const layers = scene.layers.map(({ layer, n_expert }) => ({ layer, experts: n_expert }));
    const tiers = scene.tiers.map(({ name }) => name);
    const shape = JSON.stringify([layers, tiers]);
    if (shape === this.#shape) return;
    this.#shape = shape;
    const columns = layers.reduce((most, { experts }) => Math.max(most, experts), 0);
    const isShown = layers.length * columns <= MAX_CELLS;
    this.#layers = isShown ? layers : [];
    this.#columns = isShown ? columns : 0;
    this.#tiers = tiers;
    this.#uses = { answer: this.#empty(), all: this.#empty() };
    this.#fillLegend();
    this.#resize();
  }

  #fillLegend() {
    const names = this.#tiers.map((name, i) => {
      return el("span", {}, el("i", { class: `swatch ${tierClass(i, this.#tiers.length)}` }), name);
    });
    this.ramp = el("span", { class: "ramp-label" });
    this.legend.replaceChildren(...names, el("span", { class: "ramp" }, el("i", { class: "ramp-bar" }), this.ramp));
    const columns = ["Layer", "Uses", "Experts used", ...this.#tiers, "Busiest"];
    this.head.replaceChildren(...columns.map((name) => el("th", { scope: "col" }, name)));
  }

  #resize() {
    const rows = this.#layers.length;
    if (rows === 0) return;
    const room = this.scroll.clientWidth - LEFT_PX;
    if (room <= 0) return;
    const width = Math.min(Math.max(room / this.#columns, MIN_CELL_PX), MAX_CELL_PX);
    const height = Math.min(Math.max(width * 1.6, 6), MAX_CELL_PX, Math.max(MAX_HEIGHT_PX / rows, MIN_CELL_PX));
    this.#size = { width, height, dense: window.devicePixelRatio || 1 };
    const all = { x: LEFT_PX + width * this.#columns, y: TOP_PX + height * rows + BOTTOM_PX };
    this.canvas.width = Math.round(all.x * this.#size.dense);
    this.canvas.height = Math.round(all.y * this.#size.dense);
    this.canvas.style.width = `${all.x}px`;
    this.canvas.style.height = `${all.y}px`;
    this.#small.width = this.#columns;
    this.#small.height = rows;
    this.draw();
  }

  /** Draws and describes what is counted. */
  draw() {
    this.#isStale = true;
    this.#paintSoon();
  }

  /** Draws with the next frame, and as long as something fades. */
  #paintSoon() {
    if (this.#frame !== 0 || this.#layers.length === 0) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      const age = performance.now() - this.#last.at;
      this.#paint(isCalm.matches ? 0 : Math.max(1 - age / FADE_MS, 0));
      if (this.#isStale) this.#describe();
      this.#isStale = false;
      if (this.#cell !== null) this.#showTip();
      if (age < FADE_MS && !isCalm.matches) this.#fadeLater();
    });
  }

  #fadeLater() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#paintSoon(), FADE_STEP_MS);
  }

  #palette() {
    this.#colors ??= {
      tiers: this.#tiers.map((_, i) => tierRgb(i, this.#tiers.length)),
      none: rgb("--cell"),
      text: rgb("--muted"),
      strong: rgb("--text"),
    };
    return this.#colors;
  }

  #paint(glow) {
    const { tiers, none, strong } = this.#palette();
    const rows = this.#layers.length;
    const small = this.#small.getContext("2d");
    const image = small.createImageData(this.#columns, rows);
    const uses = this.#uses[this.#scope];
    const scale = 1 / Math.log1p(Math.max(uses.max, 1));
    for (let cell = 0; cell < rows * this.#columns; cell += 1) {
      const { sum, tier } = this.#served(uses, cell);
      const color = tiers[tier] ?? none;
      const part = sum === 0 ? 0 : 0.28 + 0.72 * Math.log1p(sum) * scale;
      const light = glow > 0 && this.#last.cells.has(cell) ? 0.55 * glow : 0;
      const flash = light > 0 ? tiers[this.#last.cells.get(cell)] : none;
      const isCell = cell % this.#columns < this.#layers[Math.floor(cell / this.#columns)].experts;
      for (let i = 0; i < 3; i += 1) {
        const still = none[i] + (color[i] - none[i]) * part;
        const bright = flash[i] + (strong[i] - flash[i]) * 0.45;
        image.data[cell * 4 + i] = still + (bright - still) * light;
      }
      image.data[cell * 4 + 3] = isCell ? 255 : 0;
    }
    small.putImageData(image, 0, 0);
    this.#enlarge(rows);
  }

  /** Returns how often an expert was used, and the tier that served it most. */
  #served(uses, cell) {
    const tiers = this.#tiers.length;
    let [sum, tier, most] = [0, 0, 0];
    for (let i = 0; i < tiers; i += 1) {
      const n = uses.n[cell * tiers + i];
      sum += n;
      if (n > most) [tier, most] = [i, n];
    }
    return { sum, tier };
  }

  #enlarge(rows) {
    const { width, height, dense } = this.#size;
    const context = this.canvas.getContext("2d");
    context.resetTransform();
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.setTransform(dense, 0, 0, dense, 0, TOP_PX * dense);
    context.imageSmoothingEnabled = false;
    const all = { x: width * this.#columns, y: height * rows };
    context.drawImage(this.#small, LEFT_PX, 0, all.x, all.y);
    context.globalCompositeOperation = "destination-out";
    if (height >= 5) for (let i = 1; i < rows; i += 1) context.fillRect(LEFT_PX, i * height - 0.5, all.x, 1);
    if (width >= 5) for (let i = 1; i < this.#columns; i += 1) context.fillRect(LEFT_PX + i * width - 0.5, 0, 1, all.y);
    context.globalCompositeOperation = "source-over";
    this.#label(context, all);
    if (this.#cell !== null) {
      const { row, column } = this.#cell;
      context.strokeStyle = `rgb(${this.#palette().strong.join(" ")})`;
      context.lineWidth = 1.5;
      context.strokeRect(LEFT_PX + column * width - 0.75, row * height - 0.75, width + 1.5, height + 1.5);
    }
  }

  #label(context, all) {
    const rows = this.#layers.length;
    const { height, width } = this.#size;
    context.fillStyle = `rgb(${this.#palette().text.join(" ")})`;
    context.font = "10px system-ui, sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    const step = Math.max(Math.ceil(14 / height), 1);
    for (let row = 0; row < rows; row += step) {
      context.fillText(String(this.#layers[row].layer), LEFT_PX - 5, (row + 0.5) * height);
    }
    context.textBaseline = "bottom";
    context.fillText("layer", LEFT_PX - 5, all.y + BOTTOM_PX);
    context.textAlign = "left";
    context.fillText("expert 0", LEFT_PX, all.y + BOTTOM_PX);
    context.textAlign = "right";
    context.fillText(String(this.#columns - 1), LEFT_PX + width * this.#columns, all.y + BOTTOM_PX);
  }

  #point(event) {
    const { width, height } = this.#size;
    const column = Math.floor((event.offsetX - LEFT_PX) / width);
    const row = Math.floor((event.offsetY - TOP_PX) / height);
    this.#choose({ row, column });
  }

  #move(event) {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (step === undefined || this.#layers.length === 0) return;
    event.preventDefault();
    const at = this.#cell ?? { row: 0, column: -1 };
    const row = Math.min(Math.max(at.row + step[0], 0), this.#layers.length - 1);
    const column = Math.min(Math.max(at.column + step[1], 0), this.#layers[row].experts - 1);
    this.#choose({ row, column });
  }

  #choose(cell) {
    const isThere = cell !== null && cell.column >= 0 && cell.column < (this.#layers[cell.row]?.experts ?? 0);
    this.#cell = isThere ? cell : null;
    this.tip.hidden = !isThere;
    if (isThere) this.#showTip();
    this.#paintSoon();
  }

  #showTip() {
    const { row, column } = this.#cell;
    const { width, height } = this.#size;
    const text = this.#tell(row, column);
    if (this.tip.textContent !== text) this.tip.textContent = text;
    const x = LEFT_PX + (column + 0.5) * width - this.scroll.scrollLeft;
    const room = this.scroll.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = `${Math.min(Math.max(x - this.tip.offsetWidth / 2, 0), Math.max(room, 0))}px`;
    this.tip.style.top = `${this.scroll.offsetTop + TOP_PX + (row + 1) * height + 6}px`;
  }

  #tell(row, column) {
    const uses = this.#uses[this.#scope];
    const tiers = this.#tiers.length;
    const cell = row * this.#columns + column;
    const served = this.#tiers
      .map((name, i) => ({ name, n: uses.n[cell * tiers + i] }))
      .filter(({ n }) => n > 0);
    const place = `layer ${this.#layers[row].layer} · expert ${column}`;
    if (served.length === 0) return `${place} · not used`;
    const sum = served.reduce((all, { n }) => all + n, 0);
    const names = served.map(({ name, n }) => (served.length > 1 ? `${name} ${count(n)}` : name));
    return `${place} · ${names.join(", ")} · ${many(sum, "use")}`;
  }

  /** Returns sums by tier of some rows, and the experts that were used. */
  #totals(from, to) {
    const uses = this.#uses[this.#scope];
    const tiers = this.#tiers.length;
    const totals = { all: 0, experts: 0, tiers: new Array(tiers).fill(0), busiest: -1, most: 0 };
    for (let cell = from * this.#columns; cell < to * this.#columns; cell += 1) {
      const sum = this.#sum(uses, cell);
      if (sum === 0) continue;
      totals.all += sum;
      totals.experts += 1;
      for (let i = 0; i < tiers; i += 1) totals.tiers[i] += uses.n[cell * tiers + i];
      if (sum > totals.most) [totals.busiest, totals.most] = [cell % this.#columns, sum];
    }
    return totals;
  }

  #describe() {
    const rows = this.#layers.length;
    if (rows === 0) {
      const isDense = this.#shape !== "";
      this.words.textContent = isDense ? "This model has no routed experts." : "Nothing has been counted yet.";
      this.canvas.setAttribute("aria-label", "Map of layers by experts, empty");
      return;
    }
    const uses = this.#uses[this.#scope];
    const { all, experts, tiers } = this.#totals(0, rows);
    const of = this.#layers.reduce((sum, layer) => sum + layer.experts, 0);
    const shares = this.#tiers.map((name, i) => `${name} ${percent(tiers[i] / all)}`).join(", ");
    const words =
      all === 0
        ? `${many(rows, "layer")} with ${count(of)} experts; none has been used yet.`
        : `${many(all, "use")} of ${count(experts)} among ${count(of)} experts: ${shares}.`;
    if (this.words.textContent !== words) this.words.textContent = words;
    const size = `${many(rows, "layer")} by ${count(this.#columns)} experts`;
    this.canvas.setAttribute("aria-label", `Map of ${size}. ${words} Arrow keys go from expert to expert.`);
    this.ramp.textContent = uses.max > 1 ? `1 to ${count(uses.max)} uses` : "uses";
    if (this.table.open && performance.now() - (this.tableAt ?? 0) > 1000) this.#fillTable();
  }

  #fillTable() {
    if (!this.table.open) return;
    this.tableAt = performance.now();
    const rows = this.#layers.map(({ layer, experts }, row) => {
      const { all, experts: used, tiers, busiest, most } = this.#totals(row, row + 1);
      const cells = [
        count(all),
        `${count(used)} of ${count(experts)}`,
        ...tiers.map((n) => (all === 0 ? "–" : percent(n / all))),
        busiest < 0 ? "–" : `${busiest} (${count(most)})`,
      ];
      return el("tr", {}, el("th", { scope: "row" }, String(layer)), cells.map((text) => el("td", {}, text)));
    });
    this.rows.replaceChildren(...rows);
  }
}
