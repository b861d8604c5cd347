// Tiles and the waiting queue.

import { byId, h, text } from "./dom.js";
import { count, percent, span, tokens, whole } from "./format.js";

export function showOverview(state, grantsLastMinute) {
  const { busy, idle, parked } = state.leases;
  const all = busy + idle + parked;
  text(byId("leases"), whole(all));
  text(byId("lease-note"), `busy ${whole(busy)}, idle ${whole(idle)}, parked ${whole(parked)}`);
  const parts = byId("lease-bar").children;
  [busy, idle, parked].forEach((part, place) => (parts[place].style.width = all ? `${(100 * part) / all}%` : "0"));

  text(byId("waiting"), whole(state.waiting_requests));
  const longest = Math.max(0, ...state.waiting.map((each) => each.waited_ms));
  text(byId("waiting-note"), state.waiting_requests ? `longest wait ${span(longest)}` : "nobody waits");

  text(byId("grants"), grantsLastMinute === null ? "–" : whole(grantsLastMinute));
  text(byId("grants-note"), `${whole(state.totals.grants)} since the start`);

  const decoders = state.engines.filter((engine) => engine.role !== "prefiller");
  const sum = (name) => decoders.reduce((total, engine) => total + engine[name], 0);
  const capacity = sum("kv_capacity_tokens");
  text(byId("kv"), percent(sum("kv_leased_tokens"), capacity));
  text(
    byId("kv-note"),
    capacity ? `in use as scraped ${percent(sum("kv_used_tokens"), capacity)}, of ${tokens(capacity)} tokens` : "no capacity known yet",
  );
}

export function showQueue(state) {
  const list = byId("queue");
  byId("queue-empty").hidden = state.waiting.length > 0;
  list.hidden = state.waiting.length === 0;
  const more = state.waiting_requests - state.waiting.length;
  text(byId("queue-count"), state.waiting_requests ? count(state.waiting_requests, "request") : "");
  while (list.children.length > state.waiting.length) list.lastElementChild.remove();
  state.waiting.forEach((each, place) => {
    const line = list.children[place] ?? list.appendChild(entry());
    text(line.children[0], `${place + 1}.`);
    text(line.children[1], each.conversation_id);
    text(line.children[2], `${span(each.waited_ms)}`);
    text(line.children[3], `needs ${tokens(each.need_tokens)} tokens of ${each.model}, gives up in ${span(each.left_ms)}, tenant ${each.tenant}`);
  });
  if (more > 0) text(byId("queue-count"), `${count(state.waiting_requests, "request")}, first ${state.waiting.length} shown`);
}

const entry = () => h("li", {}, h("span", { class: "place" }), h("b"), h("span"), h("small"));
