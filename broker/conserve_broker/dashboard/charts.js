// Small lines of what happened per minute, drawn from totals: what counts is the difference of two samples.

import { byId, h, set, svg, text } from "./dom.js";
import { clock, rate } from "./format.js";

const WINDOW_MS = 15 * 60_000;
const EVERY_MS = 5_000;
const WIDTH = 300;
const HEIGHT = 90;
const CHARTS = [
  ["grants", "Grants", "calm", "leases given out"],
  ["waits", "Waits", "warn", "requests that had to queue for room"],
  ["refusals", "Refusals", "warn", "requests sent away"],
  ["migrations", "Migrations", "calm", "KV caches moved from a prefiller to a decoder"],
  ["spill_overs", "Spill-overs", "calm", "prompts prefilled on their decoder because it was faster there"],
  ["failovers", "Failovers", "warn", "leases replaced because their decoder failed"],
];

export class Charts {
  #samples = []; // [at_ms, totals]
  #latest = null;
  #views = new Map();

  constructor() {
    for (const [name, title, tone, about] of CHARTS) this.#views.set(name, make(name, title, tone, about, (share) => this.#point(name, share)));
    byId("charts").append(...[...this.#views.values()].map((view) => view.element));
  }

  history({ fields, samples }) {
    this.#samples = samples.map(([at, ...totals]) => [at, Object.fromEntries(fields.map((field, place) => [field, totals[place]]))]);
    this.#latest = null;
  }

  add(at, totals) {
    const before = this.#latest?.[1] ?? this.#samples.at(-1)?.[1];
    if (before && before.grants > totals.grants) this.#samples = []; // another broker leads, or this one began anew
    this.#latest = [at, totals];
    const last = this.#samples.at(-1);
    if (!last || at - last[0] >= EVERY_MS) this.#samples.push(this.#latest);
    while (this.#samples.length && at - this.#samples[0][0] > WINDOW_MS + EVERY_MS) this.#samples.shift();
    for (const name of this.#views.keys()) this.#draw(name, at);
  }

  // How many happened in the last `ms`; null while that is not known.
  since(name, ms) {
    if (!this.#latest) return null;
    const [at, totals] = this.#latest;
    const from = this.#samples.findLast(([then]) => at - then >= ms) ?? this.#samples[0];
    return totals[name] - (from?.[1][name] ?? totals[name]);
  }

  #rates(name) {
    const points = this.#latest && this.#samples.at(-1) !== this.#latest ? [...this.#samples, this.#latest] : this.#samples;
    const rates = [];
    for (let place = 1; place < points.length; place++) {
      const [from, before] = points[place - 1];
      const [to, after] = points[place];
      if (to - from >= EVERY_MS / 2) rates.push([to, ((after[name] - before[name]) * 60_000) / (to - from)]);
    }
    return rates;
  }

  #draw(name, now) {
    const view = this.#views.get(name);
    const rates = this.#rates(name);
    const top = nice(Math.max(0, ...rates.map(([, value]) => value)));
    const x = (at) => WIDTH * (1 - (now - at) / WINDOW_MS);
    const y = (value) => HEIGHT * (1 - value / top);
    const line = rates.map(([at, value], place) => `${place ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    set(view.line, "d", line || "M0 0");
    set(view.area, "d", line ? `${line}L${x(rates.at(-1)[0]).toFixed(1)} ${HEIGHT}L${x(rates[0][0]).toFixed(1)} ${HEIGHT}Z` : "M0 0");
    const value = rates.at(-1)?.[1];
    view.plain = value === undefined ? "collecting" : `${rate(value)} /min`;
    if (!view.held) text(view.now, view.plain);
    text(view.top, rates.length ? `${rate(top)} /min` : "");
    const peak = Math.max(0, ...rates.map(([, each]) => each));
    set(view.svg, "aria-label", rates.length ? `${view.title}: ${rate(value)} per minute now, at most ${rate(peak)} in the time shown` : `${view.title}: no figures yet`);
  }

  #point(name, share) {
    const view = this.#views.get(name);
    const rates = this.#rates(name);
    view.held = share !== null && rates.length > 0;
    view.cursor.style.display = view.held ? "" : "none";
    if (!view.held) {
      text(view.now, view.plain ?? "");
      return;
    }
    const now = this.#latest[0];
    const at = now - (1 - share) * WINDOW_MS;
    const [when, value] = rates.reduce((best, each) => (Math.abs(each[0] - at) < Math.abs(best[0] - at) ? each : best));
    const x = (WIDTH * (1 - (now - when) / WINDOW_MS)).toFixed(1);
    set(view.cursor, "x1", x);
    set(view.cursor, "x2", x);
    text(view.now, `${rate(value)} /min at ${clock(when)}`);
  }
}

function nice(value) {
  if (value <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

function make(name, title, tone, about, point) {
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: no figures yet` });
  const view = {
    title, svg: drawing, now: h("span", { class: "now" }, "–"), top: h("span"),
    area: svg("path", { class: "area" }), line: svg("path", { class: "line" }),
    cursor: svg("line", { class: "cursor", y1: 0, y2: HEIGHT }),
  };
  view.cursor.style.display = "none";
  drawing.append(svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: 0, y2: 0 }), svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }), view.area, view.line, view.cursor);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    point((event.clientX - box.left) / box.width);
  });
  drawing.addEventListener("pointerleave", () => point(null));
  view.element = h(
    "div", { class: "chart", "data-chart": name, "data-tone": tone, title: about },
    h("header", {}, h("h3", {}, title), view.now), h("div", { class: "axis" }, view.top), drawing,
    h("div", { class: "axis", "aria-hidden": "true" }, h("span", {}, "15 min ago"), h("span", {}, "now")),
  );
  return view;
}
