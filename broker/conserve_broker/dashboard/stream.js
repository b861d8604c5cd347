// Server-sent events over fetch, because EventSource cannot carry a key. Reconnects for ever, each time with a whole
// snapshot; the server names the shortest pause.

import { headers } from "./access.js";

const PAUSE_MAX_MS = 10_000;
const SILENCE_MAX_MS = 40_000; // the server says something at least every 15 s

export class Stream {
  #handlers;
  #lastId = "";
  #retryMs = 1_000;
  #failures = 0;
  #abort = null;
  #timer = 0;
  #stopped = true;

  // handlers: event(name, data), opened(), lost(reason, retryInMs), denied(status)
  constructor(handlers) {
    this.#handlers = handlers;
  }

  start() {
    this.#stopped = false;
    clearTimeout(this.#timer);
    if (!this.#abort) this.#connect();
  }

  stop() {
    this.#stopped = true;
    clearTimeout(this.#timer);
    this.#abort?.abort();
  }

  async #connect() {
    const abort = (this.#abort = new AbortController());
    let silence = 0;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => abort.abort(), SILENCE_MAX_MS);
    };
    let reason = "the broker closed the connection";
    try {
      heard();
      const response = await fetch("v1/events", {
        headers: headers(this.#lastId ? { "Last-Event-ID": this.#lastId } : {}),
        signal: abort.signal,
        cache: "no-store",
      });
      if (response.status === 401 || response.status === 403) {
        this.#stopped = true;
        this.#handlers.denied(response.status);
        return;
      }
      if (!response.ok) throw new Error(await detailOf(response));
      this.#failures = 0;
      this.#handlers.opened();
      await this.#read(response.body, heard);
    } catch (error) {
      reason = error instanceof TypeError ? "the broker does not answer" : error.message;
    } finally {
      clearTimeout(silence);
      this.#abort = null;
      if (!this.#stopped) this.#again(reason);
    }
  }

  #again(reason) {
    const pause = Math.min(this.#retryMs * 2 ** this.#failures++, PAUSE_MAX_MS);
    this.#handlers.lost(reason, pause);
    this.#timer = setTimeout(() => this.#connect(), pause);
  }

  async #read(body, heard) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) this.#take(block);
    }
  }

  #take(block) {
    let name = "message";
    let data = "";
    for (const line of block.split("\n")) {
      const [field, ...value] = line.split(": ");
      const said = value.join(": ");
      if (field === "event") name = said;
      else if (field === "data") data += said;
      else if (field === "id") this.#lastId = said;
      else if (field === "retry") this.#retryMs = Number(said) || this.#retryMs;
    }
    if (data) this.#handlers.event(name, JSON.parse(data));
  }
}

export async function detailOf(response) {
  try {
    const problem = await response.json();
    return problem.detail || problem.title || `status ${response.status}`;
  } catch {
    return `status ${response.status}`;
  }
}
