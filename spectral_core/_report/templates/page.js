"use strict";
// Sort and search the table of the page, and plot what is in it.
// Names come from a file: texts are written by textContent alone, never parsed as HTML.
(() => {
const find = (selector) => document.querySelector(selector);
const make = (tag, attributes = {}, text = "") => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
};
const draw = (tag, attributes, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
};

// The table is the data.
const STEP = 100; // rows that are added at once: a browser lays out thousands of rows slowly
const MOST = 1000;
const head = [...find("#matrices thead tr").cells];
const labels = head.map((th) => th.textContent.trim());
const NAME = 1, NOTES = labels.indexOf("notes"), INTERVAL = labels.indexOf("interval");
const isMeasured = (column) => head[column].classList.contains("n") || column === INTERVAL;
const body = find("#matrices tbody");
const rows = [...body.rows].map((tr, i) => {
  const cells = [...tr.cells].map((cell) => cell.textContent.trim());
  const words = cells.filter((_, j) => !isMeasured(j)).join("\n").toLowerCase();
  return { i, tr, cells, kind: tr.className, words };
});
const spectra = JSON.parse(find("#spectra").textContent);

// "64×32" counts as its product, "[1, 2]" as its first number, "–" as nothing.
const number = (text) => {
  const parts = text.split("×").map((part) => Number.parseFloat(part.replace("[", "")));
  return parts.reduce((a, b) => a * b, 1);
};
const isNumeric = (column) => isMeasured(column) || ["shape", "matrix"].includes(labels[column]);
const columns = new Map();
const values = (column) => {
  if (!columns.has(column)) columns.set(column, rows.map((row) => number(row.cells[column])));
  return columns.get(column);
};
const inOrder = new Intl.Collator("en", { numeric: true }); // layer.2 before layer.10

const state = { column: 0, descending: false, query: "", limit: STEP, shown: rows, chosen: 0 };

const compare = () => {
  const sign = state.descending ? -1 : 1, column = state.column;
  if (!isNumeric(column)) {
    return (a, b) => sign * inOrder.compare(a.cells[column], b.cells[column]) || a.i - b.i;
  }
  const keys = values(column);
  return (a, b) => {
    const x = keys[a.i], y = keys[b.i];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a.i - b.i;
    return sign * (x - y) || a.i - b.i; // what is missing stays last in both directions
  };
};

const show = () => {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  state.shown = rows.filter((row) => words.every((word) => row.words.includes(word)));
  state.shown.sort(compare());
  place();
};
// Long names break after a dot or a slash, where that is enough.
const breakable = (row) => {
  const span = row.tr.cells[NAME].firstElementChild;
  if (span.childElementCount || row.cells[NAME].length < 16) return;
  const pieces = row.cells[NAME].split(/(?<=[./_])/);
  span.replaceChildren(...pieces.flatMap((piece) => [piece, make("wbr")]));
};
const place = () => {
  const part = state.shown.slice(0, state.limit);
  part.forEach(breakable);
  body.replaceChildren(...part.map((row) => row.tr));
  body.classList.add("ready");
  const few = part.length < state.shown.length;
  find("#rest").hidden = !few;
  find("#all").textContent = state.shown.length - part.length > MOST ? "Show 1,000 more" : "Show all";
  find("#status").textContent =
    `${state.shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} matrices` +
    (few ? `, the first ${part.length.toLocaleString("en")} shown` : "");
};

const sortBy = (column) => {
  const again = state.column === column;
  // The largest numbers are what one looks for; names and places begin with the first.
  state.descending = again ? !state.descending : isNumeric(column) && column > 0;
  state.column = column;
  state.limit = STEP;
  markSorted();
  show();
  find("#status").textContent += `, by ${labels[column]}, ${state.descending ? "descending" : "ascending"}`;
};
const markSorted = () => {
  head.forEach((th, i) => {
    if (i !== state.column) th.removeAttribute("aria-sort");
    else th.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
  });
};
head.forEach((th, i) => {
  const button = make("button", { type: "button" }, labels[i]);
  button.addEventListener("click", () => sortBy(i));
  th.replaceChildren(button);
});

// Charts: an SVG that the pointer reads, and a range input for keyboards and screen readers.
const MARGIN = { left: 58, right: 14, top: 12, bottom: 40 };
const brief = (x) => {
  const size = Math.abs(x);
  return size && (size < 1e-3 || size >= 1e5) ? x.toExponential(0) : String(Number(x.toPrecision(3)));
};
const steps = (low, high, most) => {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((f) => f * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9); i++) found.push(i * step);
  return found;
};
const decades = (low, high) => {
  const from = Math.log10(low), to = Math.log10(high);
  const every = Math.max(1, Math.ceil((to - from) / 6));
  const factors = to - from < 1.2 ? [1, 2, 5] : to - from < 2.5 ? [1, 3] : [1];
  const found = [];
  for (let e = Math.ceil(Math.floor(from) / every) * every - every; e <= to; e += every) {
    for (const factor of factors) {
      const value = factor * 10 ** e;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found;
};
const scale = (low, high, start, end, isLog) => {
  const at = isLog ? Math.log10 : (x) => x;
  const a = at(low), span = at(high) - a;
  return (x) => (span ? start + ((at(x) - a) / span) * (end - start) : (start + end) / 2);
};
// Logarithmic where the values differ tenfold; else from zero, or about the values.
const range = (all, linear = false) => {
  const positive = all.filter((y) => y > 0 && Number.isFinite(y));
  if (!positive.length) return { low: 0, high: 1, isLog: false };
  const low = positive.reduce((a, b) => Math.min(a, b)), high = positive.reduce((a, b) => Math.max(a, b));
  if (linear || high <= 10 * low) return { low: 0, high: high * 1.05, isLog: false };
  return { low: low / 1.15, high: high * 1.15, isLog: true };
};

const DOTS = {
  "": (x, y) => `M${x} ${y}h0`, // a line without length and with a round end is a dot
  far: (x, y, r) => `M${x} ${y - r}l${r} ${r} ${-r} ${r} ${-r} ${-r}z`,
  bad: (x, y, r) => `M${x - r} ${y - r}l${2 * r} ${2 * r}m0 ${-2 * r}l${-2 * r} ${2 * r}`,
};

class Chart {
  // `choose` is called with the place of a point that the user clicked or moved to.
  constructor(figure, name, choose = () => {}) {
    Object.assign(this, { figure, choose, at: 0, points: [], data: null });
    this.caption = make("figcaption", { id: `${figure.id}-caption` });
    this.svg = draw("svg", { role: "img", "aria-labelledby": this.caption.id });
    this.input = make("input", { type: "range", min: 0, step: 1, "aria-label": name });
    this.tip = make("div", { class: "tip", "aria-hidden": "true" });
    this.tip.hidden = true;
    figure.append(this.svg, this.input, this.tip, this.caption);
    this.svg.addEventListener("pointermove", (event) => this.hover(event));
    this.svg.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    this.svg.addEventListener("click", (event) => this.set(this.nearest(event)));
    this.input.addEventListener("input", () => this.set(Number(this.input.value)));
    this.input.addEventListener("focus", () => this.tell(this.at));
    this.input.addEventListener("blur", () => { this.tip.hidden = true; });
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.tip.hidden = true;
    });
    new ResizeObserver(() => this.draw()).observe(figure);
  }

  // data: xs, ys, xLabel, yLabel, summary, describe(i), and where they apply: kinds and dim of the
  // points, lows and highs of their intervals, curve, linear, xInteger
  load(data, at) {
    this.data = data;
    this.at = Math.min(at, data.xs.length - 1);
    this.input.max = data.xs.length - 1;
    this.caption.textContent = data.summary;
    this.draw();
  }

  draw() {
    const data = this.data, width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (!data || !width) return;
    const inner = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    const y = range([...data.ys, ...(data.highs ?? [])], data.linear);
    const x = { low: Math.min(...ends(data.xs)), high: Math.max(...ends(data.xs)) };
    const toX = scale(x.low, x.high, inner.left, inner.right, false);
    const toY = scale(y.low, y.high, inner.bottom, inner.top, y.isLog);
    const clamp = (value) => Math.min(inner.bottom, Math.max(inner.top, value));
    const yOf = (i) => {
      const value = data.ys[i];
      if (Number.isFinite(value) && (value > 0 || !y.isLog)) return clamp(toY(value));
      return data.kinds?.[i] === "bad" ? inner.bottom : null;
    };
    this.points = data.xs.map((value, i) => ({ i, x: toX(value), y: yOf(i) }));
    this.svg.replaceChildren(...this.axes(inner, x, y, toX, toY), ...this.marks(inner, toY, clamp));
    // The thumb of a range input moves between its halves: so it is below its point.
    this.input.style.marginLeft = `${inner.left - 8}px`;
    this.input.style.width = `${inner.right - inner.left + 16}px`;
    this.point();
  }

  axes(inner, x, y, toX, toY) {
    const found = [];
    const yTicks = y.isLog ? decades(y.low, y.high) : steps(y.low, y.high, 5);
    for (const tick of yTicks) {
      const at = toY(tick);
      found.push(draw("line", { class: "grid", x1: inner.left, x2: inner.right, y1: at, y2: at }));
      found.push(draw("text", { x: inner.left - 6, y: at + 4, "text-anchor": "end" }, brief(tick)));
    }
    let xTicks = steps(x.low, x.high, Math.max(2, (inner.right - inner.left) / 90));
    if (this.data.xInteger) xTicks = xTicks.filter(Number.isInteger);
    for (const tick of xTicks) {
      found.push(draw("text", { x: toX(tick), y: inner.bottom + 16, "text-anchor": "middle" }, brief(tick)));
    }
    const middle = (inner.left + inner.right) / 2;
    found.push(draw("text", { x: middle, y: inner.bottom + 34, "text-anchor": "middle" }, this.data.xLabel));
    const label = this.data.yLabel + (y.isLog ? " (logarithmic)" : "");
    const turned = `rotate(-90) translate(${-(inner.top + inner.bottom) / 2} 12)`;
    found.push(draw("text", { transform: turned, "text-anchor": "middle" }, label));
    return found;
  }

  marks(inner, toY, clamp) {
    const data = this.data, found = [];
    if (data.curve) {
      const line = this.points.filter((p) => p.y !== null).map((p) => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`);
      found.push(draw("path", { class: "curve", d: line.length ? `M${line.join("L")}` : "" }));
      return found;
    }
    const count = this.points.length, radius = count > 1000 ? 2 : count > 100 ? 3 : 4;
    if (data.lows) {
      const lines = this.points.filter((p) => data.highs[p.i] > data.lows[p.i]).map((p) =>
        `M${p.x.toFixed(1)} ${clamp(toY(data.lows[p.i])).toFixed(1)}V${clamp(toY(data.highs[p.i])).toFixed(1)}`);
      found.push(draw("path", { class: "whiskers", d: lines.join("") }));
    }
    for (const dim of [true, false]) {
      for (const kind of ["", "far", "bad"]) {
        const path = this.points
          .filter((p) => p.y !== null && data.kinds[p.i] === kind && data.dim[p.i] === dim)
          .map((p) => DOTS[kind](Number(p.x.toFixed(1)), Number(p.y.toFixed(1)), kind ? radius + 1 : radius));
        if (!path.length) continue;
        const mark = draw("path", { class: `dots ${kind} ${dim ? "dim" : ""}`, d: path.join("") });
        if (!kind) mark.setAttribute("stroke-width", 2 * radius);
        found.push(mark);
      }
    }
    return found;
  }

  // Mark the chosen point, and say it to screen readers.
  point() {
    const p = this.points[this.at];
    this.svg.querySelectorAll(".cursor, .ring").forEach((node) => node.remove());
    this.input.value = this.at;
    this.input.setAttribute("aria-valuetext", this.data.describe(this.at).join(", "));
    if (!p) return;
    const bottom = this.svg.clientHeight - MARGIN.bottom;
    this.svg.append(draw("line", { class: "cursor", x1: p.x, x2: p.x, y1: MARGIN.top, y2: bottom }));
    if (p.y !== null) this.svg.append(draw("circle", { class: "ring", cx: p.x, cy: p.y, r: 6 }));
  }

  nearest(event) {
    const box = this.svg.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let best = this.at, least = Infinity;
    for (const p of this.points) {
      if (p.y === null || this.data.dim?.[p.i]) continue; // what the search left out
      // A curve is read by its place; among dots the height decides between close ones.
      const far = (p.x - x) ** 2 + (this.data.curve ? 0 : 0.1 * (p.y - y) ** 2);
      if (far < least) [best, least] = [p.i, far];
    }
    return best;
  }

  hover(event) {
    if (this.data) this.tell(this.nearest(event));
  }

  tell(i) {
    const p = this.points[i];
    if (!p) return;
    const [title, ...lines] = this.data.describe(i);
    this.tip.replaceChildren(make("b", {}, title), ...lines.map((line) => make("div", {}, line)));
    this.tip.hidden = false;
    const room = this.figure.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(room, p.x - this.tip.offsetWidth / 2))}px`;
    const above = (p.y ?? this.svg.clientHeight / 2) - this.tip.offsetHeight - 12;
    this.tip.style.top = `${above > -20 ? above : (p.y ?? 0) + 14}px`;
  }

  set(i) {
    this.at = i;
    this.point();
    if (document.activeElement === this.input || !this.tip.hidden) this.tell(i);
    this.choose(i);
  }
}
const ends = (xs) => [xs[0], xs[xs.length - 1]];

// The plot against depth, and what is chosen in it.
const measure = find("#measure");
head.forEach((th, i) => {
  if ("plot" in th.dataset) measure.append(new Option(labels[i], i));
});
const SIGMA = labels.indexOf("σ₁");
if (SIGMA >= 0) measure.value = SIGMA;

const interval = (text) => text.replace("[", "").replace("]", "").split(/[ ,]+/).map(Number.parseFloat);
const depthSummary = (column, ys) => {
  const known = rows.filter((row) => Number.isFinite(ys[row.i])).sort((a, b) => ys[a.i] - ys[b.i]);
  if (!known.length) return `No matrix has a finite ${labels[column]}. `;
  const text = (row) => `${row.cells[column]} (${row.cells[NAME].slice(0, 80)})`;
  const middle = known[Math.floor((known.length - 1) / 2)].cells[column];
  return `${labels[column]} of ${known.length} matrices: from ${text(known[0])} to ` +
    `${text(known[known.length - 1])}, half of them up to ${middle}. `;
};
const key = () => {
  const has = (kind) => rows.some((row) => row.kind === kind);
  return (has("far") ? "A diamond is an outlier. " : "") +
    (has("bad") ? "A cross at the lower edge is zero, NaN or Inf. " : "") +
    "The slider and the arrow keys move from matrix to matrix; the table has all numbers.";
};
const depthData = () => {
  const column = Number(measure.value), ys = values(column), shown = new Set(state.shown);
  const bounds = column === SIGMA && INTERVAL >= 0 ? rows.map((row) => interval(row.cells[INTERVAL])) : null;
  return {
    xs: rows.map((row) => row.i + 1), xInteger: true, ys, kinds: rows.map((row) => row.kind),
    dim: rows.map((row) => !shown.has(row)),
    lows: bounds?.map((pair) => pair[0]), highs: bounds?.map((pair) => pair[1]),
    xLabel: "matrix in file order", yLabel: labels[column],
    summary: depthSummary(column, ys) + key(),
    describe: (i) => {
      const cells = rows[i].cells, lines = [cells[NAME], `${labels[column]} ${cells[column]}`];
      if (column === SIGMA && INTERVAL >= 0 && cells[INTERVAL]) lines.push(cells[INTERVAL]);
      if (NOTES >= 0 && cells[NOTES]) lines.push(cells[NOTES]);
      return lines;
    },
  };
};
const replot = () => depth.load(depthData(), state.chosen);

const choose = (i) => {
  rows[state.chosen].tr.classList.remove("picked");
  rows[state.chosen].tr.removeAttribute("aria-current");
  state.chosen = i;
  const row = rows[i], list = make("dl");
  row.tr.classList.add("picked");
  row.tr.setAttribute("aria-current", "true");
  row.cells.forEach((cell, j) => {
    if (j === NAME || !cell) return;
    const pair = make("div");
    pair.append(make("dt", {}, labels[j]), make("dd", {}, cell));
    list.append(pair);
  });
  const button = make("button", { type: "button" }, "Show in the table");
  button.addEventListener("click", () => goTo(row));
  find("#chosen").replaceChildren(make("p", { id: "chosen-name" }, row.cells[NAME]), list, button);
  showSpectrum(i);
};
const goTo = (row) => {
  if (!state.shown.includes(row)) {
    find("#search").value = state.query = "";
    show();
    replot();
  }
  state.limit = Math.max(state.limit, state.shown.indexOf(row) + 1);
  place();
  row.tr.tabIndex = -1;
  row.tr.focus();
  row.tr.scrollIntoView({ block: "center", inline: "start" });
};

// The spectrum of the chosen matrix, where the report has spectra.
const showSpectrum = (i) => {
  if (!spectrum) return;
  const found = spectra.rows[i], name = rows[i].cells[NAME];
  find("#spectrum").hidden = !found;
  find("#spectrum-title").textContent = found ? "Spectrum" : "Spectrum: none of the chosen matrix";
  if (!found) return;
  const { y, count, density } = found, x = found.x ?? spectra.places[count];
  const end = y.length - 1;
  spectrum.load({
    xs: x, ys: y, curve: true, linear: density, xInteger: !density,
    xLabel: density ? "singular value" : "place of the singular value",
    yLabel: density ? "density" : "singular value",
    summary: density
      ? `Estimated density of the singular values of ${name}, from ${x[0]} to ${x[end]}.`
      : `${count.toLocaleString("en")} singular values of ${name}, from ${y[0]} down to ${y[end]}` +
        (count > x.length ? `; ${x.length} of them are drawn.` : "."),
    describe: (j) => density
      ? [`density ${y[j]}`, `at ${x[j]}`]
      : [`σ ${y[j]}`, `number ${x[j]} of ${count.toLocaleString("en")}`],
  }, 0);
};

const depth = new Chart(find("#depth"), "Matrix in file order", choose);
let spectrum = null;
if (Object.keys(spectra.rows).length) {
  find("#spectrum-section").hidden = false;
  spectrum = new Chart(find("#spectrum"), "Place in the spectrum");
}

// Controls
let waiting = 0;
find("#search").addEventListener("input", (event) => {
  state.query = event.target.value;
  state.limit = STEP;
  show();
  clearTimeout(waiting); // the plot follows when the typing rests
  waiting = setTimeout(replot, 150);
});
find("#more").addEventListener("click", () => { state.limit += STEP; place(); });
find("#all").addEventListener("click", () => { state.limit += MOST; place(); });
measure.addEventListener("change", replot);
body.addEventListener("click", (event) => {
  const tr = event.target.closest("tr"), row = rows.find((one) => one.tr === tr);
  if (row && !String(getSelection())) depth.set(row.i); // whoever marks a text copies it
});
window.addEventListener("beforeprint", () => { state.limit = rows.length; place(); });
const theme = find("#theme");
theme.value = document.documentElement.dataset.theme ?? "";
theme.addEventListener("change", () => {
  if (theme.value) document.documentElement.dataset.theme = theme.value;
  else delete document.documentElement.dataset.theme;
  try {
    localStorage.setItem("spectral-theme", theme.value);
  } catch {
    // Without storage the choice holds for this page alone.
  }
});

// At first the largest σ₁ is chosen.
const largest = values(Math.max(SIGMA, 0)).reduce(
  (best, value, i, all) => (value > all[best] || Number.isNaN(all[best]) ? i : best), 0);
state.chosen = largest;
markSorted();
show();
replot();
choose(largest);
})();
