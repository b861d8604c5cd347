// The page: what the stream says goes to its parts; what the connection is like goes to the strip and the header.

import { ask, forget } from "./access.js";
import { Charts } from "./charts.js";
import { byId, h, set, text } from "./dom.js";
import { showFleet } from "./fleet.js";
import { clock, span } from "./format.js";
import { wireLeaseSearch } from "./lease.js";
import { showOverview, showQueue } from "./overview.js";
import { Stream } from "./stream.js";
import { wireTheme } from "./theme.js";

const STALE_AFTER_MS = 5_000;
const HIDDEN_REST_MS = 60_000; // a page that nobody sees stops watching after this long

const charts = new Charts();
let state = null; // last snapshot
let heardAt = 0;
let link = { kind: "connecting" };
let told = ""; // result of the last action, for a few seconds

const stream = new Stream({
  opened: () => (link = { kind: "live" }),
  event: (name, data) => (name === "history" ? charts.history(data) : name === "snapshot" ? take(data) : undefined),
  lost: (reason, pause) => {
    link = { kind: "lost", reason, until: Date.now() + pause };
    showLink();
  },
  denied: async (status) => {
    link = { kind: "denied" };
    showLink();
    if (await ask(status === 403 ? "This key may not look: it lacks the scope admin." : byId("key").hidden ? "" : "The broker does not know this key.")) {
      link = { kind: "connecting" };
      stream.start();
    }
    showLink();
  },
});

function take(snapshot) {
  state = snapshot;
  heardAt = Date.now();
  text(byId("role"), snapshot.role);
  text(byId("preset"), snapshot.preset || "–");
  text(byId("version"), snapshot.version);
  byId("main").hidden = snapshot.role === "standby";
  if (snapshot.role !== "standby") {
    charts.add(snapshot.at_ms, snapshot.totals);
    showOverview(snapshot, charts.since("grants", 60_000));
    showFleet(snapshot);
    showQueue(snapshot);
  }
  showLink();
}

function showLink() {
  const quiet = Date.now() - heardAt;
  const stale = link.kind === "live" && state && state.role !== "standby" && quiet > STALE_AFTER_MS;
  const kind = stale ? "stale" : link.kind;
  set(byId("link"), "data-link", kind);
  const words = { connecting: "Connecting", live: state ? `Live, ${clock(heardAt)}` : "Connected", stale: `Stale for ${span(quiet)}`, lost: "Disconnected", denied: "No access" };
  text(byId("link-text"), words[kind]);
  set(byId("main"), "data-state", !state ? "empty" : kind === "live" ? "fresh" : "old");
  strip(...message(kind, quiet));
}

function message(kind, quiet) {
  const from = state ? ` The figures are from ${clock(heardAt)}.` : "";
  if (kind === "lost") return ["bad", `Disconnected: ${link.reason}. Trying again in ${Math.max(0, Math.ceil((link.until - Date.now()) / 1000))} s.${from}`];
  if (kind === "denied") return ["bad", "This broker wants a key with the scope admin. Reload the page to be asked again."];
  if (kind === "stale") return ["warn", `No word from the broker for ${span(quiet)}.${from}`];
  if (!state) return ["quiet", "Waiting for the broker."];
  if (state.role === "standby") return ["warn", state.reasons.join("; "), state.leader_url];
  if (told) return ["good", told];
  const warnings = state.warnings.length ? ` Look at this: ${state.warnings.join("; ")}.` : "";
  if (!state.ready) return ["bad", `No new conversation can be served: ${state.reasons.join("; ")}.${warnings}`];
  return warnings ? ["warn", `New conversations are served.${warnings}`] : ["good", "All well: new conversations are served."];
}

function strip(tone, words, leaderUrl = "") {
  const place = byId("strip");
  set(place, "data-tone", tone);
  if (place.dataset.words === words + leaderUrl) return;
  place.dataset.words = words + leaderUrl;
  const leader = /^https?:\/\//.test(leaderUrl) ? [" ", h("a", { href: leaderUrl }, "Open the leader's dashboard")] : [];
  place.replaceChildren(words, ...leader);
}

byId("strip").addEventListener("told", (event) => {
  told = event.detail;
  showLink();
  setTimeout(() => (told = ""), 6_000);
});

byId("key").addEventListener("click", () => {
  forget();
  location.reload();
});

let rest = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(rest);
  if (document.hidden) rest = setTimeout(() => stream.stop(), HIDDEN_REST_MS);
  else if (link.kind !== "denied") stream.start();
});

text(byId("where"), location.host);
wireTheme();
wireLeaseSearch();
setInterval(showLink, 1_000);
stream.start();
