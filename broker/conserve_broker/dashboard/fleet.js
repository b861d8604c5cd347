// The engines: one row each, kept and updated in place so that focus stays where it is.

import { call } from "./access.js";
import { byId, h, set, text } from "./dom.js";
import { count, percent, span, tokens, whole } from "./format.js";

const SIGNS = { ready: "●", draining: "◐", suspect: "▲", unknown: "○", gone: "✕", misfit: "≠" };
const rows = new Map();

export function showFleet(state) {
  const table = byId("fleet");
  byId("fleet-empty").hidden = state.engines.length > 0;
  text(byId("fleet-empty"), "No engine is configured: add [[engine]] tables to the broker's file; it reads them while it runs.");
  const named = new Set(state.engines.map((engine) => engine.engine_id));
  for (const [id, row] of rows) {
    if (!named.has(id)) {
      row.element.remove();
      rows.delete(id);
    }
  }
  state.engines.forEach((engine, place) => {
    const row = rows.get(engine.engine_id) ?? make(engine.engine_id);
    if (table.children[place + 1] !== row.element) table.insertBefore(row.element, table.children[place + 1] ?? null);
    update(row, engine, state.kv_watermark_ppm);
  });
}

function figure(name) {
  const shown = { sign: h("b"), share: h("b"), tokens: h("span") };
  shown.place = h("span", {}, `${name} `, shown.sign, shown.share, shown.tokens);
  return shown;
}

function make(id) {
  const cell = (kind, label, ...children) => h("div", { role: "cell", class: kind }, ...(label ? [h("span", { class: "label" }, label)] : []), ...children);
  const value = () => h("span");
  const row = {
    name: h("b", {}, id), about: h("small"),
    badge: h("span", { class: "badge" }, h("span", { class: "sign", "aria-hidden": "true" }), h("span")), detail: h("small"),
    active: h("i", { class: "active" }), cold: h("i", { class: "cold" }), used: h("i", { class: "used" }), limit: h("i", { class: "limit" }),
    ledger: figure("ledger"), scraped: figure("scraped"), capacity: h("span"),
    leases: value(), backlog: value(), running: value(), rate: value(), seen: value(),
    button: h("button", { type: "button", class: "plain" }),
  };
  row.element = h(
    "div", { role: "row", class: "row", "data-engine": id },
    cell("engine", "", row.name, row.about),
    cell("state", "", row.badge, row.detail),
    cell("kv", "", h("div", { class: "bar", "aria-hidden": "true" }, row.active, row.cold, row.limit), h("div", { class: "bar thin", "aria-hidden": "true" }, row.used), h("small", {}, row.ledger.place, row.scraped.place, row.capacity)),
    cell("num", "Busy / leases", row.leases), cell("num", "Backlog", row.backlog), cell("num", "Run / wait", row.running),
    cell("num", "Prefill rate", row.rate), cell("num", "Seen", row.seen),
    cell("act", "", row.button),
  );
  row.button.addEventListener("click", () => confirmDrain(row.engine));
  rows.set(id, row);
  return row;
}

function update(row, engine, watermarkPpm) {
  row.engine = engine;
  text(row.about, [engine.role, engine.tier, engine.model].filter(Boolean).join(" · "));
  set(row.badge, "data-state", engine.state);
  text(row.badge.firstElementChild, SIGNS[engine.state] ?? "?");
  text(row.badge.lastElementChild, engine.state);
  text(row.detail, engine.detail);
  const all = engine.kv_capacity_tokens;
  const wide = (part) => `${all > 0 ? Math.min(100, (100 * part) / all) : 0}%`;
  row.active.style.width = wide(engine.kv_active_tokens);
  row.cold.style.width = wide(engine.kv_leased_tokens - engine.kv_active_tokens);
  row.used.style.width = wide(engine.kv_used_tokens);
  row.limit.style.left = `calc(${watermarkPpm / 10_000}% - 2px)`;
  for (const [shown, part] of [[row.ledger, engine.kv_leased_tokens], [row.scraped, engine.kv_used_tokens]]) {
    text(shown.share, percent(part, all));
    text(shown.tokens, ` ${tokens(part)}`);
  }
  const over = all > 0 && 1_000_000 * engine.kv_leased_tokens > watermarkPpm * all;
  set(row.ledger.place, "class", over ? "over" : "");
  set(row.ledger.place, "title", over ? "above the watermark: it gets no new lease" : "");
  text(row.ledger.sign, over ? "▲ " : "");
  text(row.capacity, all ? `of ${tokens(all)} tokens` : "capacity unknown");
  text(row.leases, `${whole(engine.busy)} / ${whole(engine.leases)}`);
  text(row.backlog, `${tokens(engine.backlog_tokens)} tok`);
  text(row.running, `${whole(engine.running)} / ${whole(engine.waiting)}`);
  text(row.rate, `${tokens(engine.prefill_rate_tokens_per_s)} tok/s`);
  text(row.seen, engine.observed_ago_ms === null ? "never" : `${span(engine.observed_ago_ms)} ago`);
  text(row.button, engine.draining ? "Undrain" : "Drain");
  set(row.button, "aria-label", `${engine.draining ? "Undrain" : "Drain"} ${engine.engine_id}`);
}

function confirmDrain(engine) {
  const dialog = byId("drain-dialog");
  const form = dialog.querySelector("form");
  const yes = byId("drain-yes");
  const verb = engine.draining ? "Undrain" : "Drain";
  text(byId("drain-title"), `${verb} ${engine.engine_id}?`);
  text(
    byId("drain-text"),
    engine.draining
      ? "It may take new leases again."
      : `It gets no new lease. Its ${count(engine.leases, "lease")} live on and move to another decoder at their next gap, where one has room.`,
  );
  text(byId("drain-error"), "");
  text(yes, verb);
  yes.disabled = false;
  dialog.querySelector("[value=no]").onclick = () => dialog.close();
  form.onsubmit = async (event) => {
    event.preventDefault();
    yes.disabled = true;
    text(byId("drain-error"), "");
    try {
      const after = await call(`v1/engines/${encodeURIComponent(engine.engine_id)}/${verb.toLowerCase()}`, { method: "POST" });
      dialog.close();
      byId("strip").dispatchEvent(new CustomEvent("told", { detail: `${engine.engine_id} is ${after.state}.` }));
    } catch (error) {
      text(byId("drain-error"), `Not done: ${error.message}`);
      yes.disabled = false;
    }
  };
  dialog.showModal();
}
