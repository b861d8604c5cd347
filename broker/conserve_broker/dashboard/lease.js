// One lease in words: found by its id or its conversation's.

import { call } from "./access.js";
import { byId, h } from "./dom.js";
import { percent, span, tokens, whole } from "./format.js";

const PICKS = 20;
const PAGES_MAX = 100; // of 20,000 leases looked at each

export function wireLeaseSearch() {
  byId("find").addEventListener("submit", (event) => {
    event.preventDefault();
    find(byId("find-id").value.trim());
  });
}

async function find(id) {
  const place = byId("found");
  place.setAttribute("aria-busy", "true");
  try {
    place.replaceChildren(...(id ? await search(id) : await picks({})));
  } catch (error) {
    place.replaceChildren(h("p", { class: "error" }, `Not found: ${error.message}`));
  } finally {
    place.removeAttribute("aria-busy");
  }
}

async function search(id) {
  try {
    return receipt(await call(`v1/leases/${encodeURIComponent(id)}/explain`));
  } catch (error) {
    if (error.status !== 404) throw error;
  }
  if (!/^[\x21-\x7e]+$/.test(id)) return nothing(id);
  const leases = await list({ conversation_id: id });
  if (!leases.length) return nothing(id);
  return leases.length === 1 ? receipt(await call(`v1/leases/${encodeURIComponent(leases[0].lease_id)}/explain`)) : choice(leases, `Leases of ${id}`);
}

const nothing = (id) => [h("p", { class: "empty" }, `No live lease has the id or the conversation ${id}. A lease is gone once it is released or has expired; the next turn gets a new one.`)];

async function list(query) {
  const found = [];
  let cursor = "";
  for (let page = 0; page < PAGES_MAX && found.length < PICKS; page++) {
    const answer = await call(`v1/leases?${new URLSearchParams({ ...query, limit: PICKS - found.length, cursor })}`);
    found.push(...answer.leases);
    cursor = answer.next_cursor;
    if (!cursor) break;
  }
  return found;
}

async function picks(query) {
  const leases = await list(query);
  return leases.length ? choice(leases, "First leases") : [h("p", { class: "empty" }, "No lease is live.")];
}

function choice(leases, title) {
  const items = leases.map((lease) => {
    const about = `${lease.state} for ${span(lease.state_for_ms)} on ${lease.decoder}, ${whole(lease.turns)} turns, ${tokens(lease.ledger_tokens)} tokens`;
    const pick = h("button", { type: "button", class: "pick" }, h("b", {}, lease.conversation_id), ` ${lease.lineage}`, h("small", {}, about));
    pick.addEventListener("click", () => {
      byId("find-id").value = lease.lease_id;
      find(lease.lease_id);
    });
    return h("li", {}, pick);
  });
  return [h("h3", {}, title), h("ul", { class: "picks" }, ...items)];
}

function receipt(lease) {
  const words = h("ol", { class: "words" }, ...lease.in_words.map((sentence) => h("li", {}, sentence)));
  const heads = [["Role"], ["Engine"], ["Verdict"], ["Leased", 1], ["Scraped", 1], ["Backlog", 1], ["Rate", 1], ["Score", 1]];
  const head = h("tr", {}, ...heads.map(([name, number]) => h("th", { scope: "col", class: number ? "num" : "" }, name)));
  const lines = lease.decision.candidates.map((each) =>
    h(
      "tr", { class: each.verdict === "chosen" ? "chosen" : "" },
      ...[each.role, each.engine_id, each.verdict.replaceAll("_", " ")].map((cell) => h("td", {}, cell)),
      ...[
        `${tokens(each.leased_tokens)} (${percent(each.leased_tokens, each.capacity_tokens)})`,
        tokens(each.used_tokens),
        `${tokens(each.backlog_tokens)} tok`,
        `${tokens(each.rate_tokens_per_s)} tok/s`,
        each.score_us < 0 ? "" : `${whole(each.score_us / 1000)} ms`,
      ].map((cell) => h("td", { class: "num" }, cell)),
    ),
  );
  const scroll = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Candidates" }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...lines)));
  return [h("h3", {}, lease.lease_id), words, ...(lines.length ? [h("h3", {}, "Candidates as they were then"), scroll] : [])];
}
