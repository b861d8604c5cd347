// The key, if the broker wants one: in this module's memory and nowhere else.

import { byId } from "./dom.js";
import { detailOf } from "./stream.js";

let key = "";
let asking = null;

export const headers = (more = {}) => (key ? { ...more, Authorization: `Bearer ${key}` } : more);

export function forget() {
  key = "";
  byId("key").hidden = true;
}

// Asks the person once, however many calls were denied; true when there is another key to try.
export function ask(why = "") {
  asking ??= new Promise((answer) => {
    const dialog = byId("key-dialog");
    const input = byId("key-value");
    const form = dialog.querySelector("form");
    byId("key-error").textContent = why;
    input.value = "";
    const done = (given) => {
      form.onsubmit = dialog.oncancel = null;
      dialog.close();
      input.value = "";
      asking = null;
      answer(given);
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      if (!input.value.trim()) return;
      key = input.value.trim();
      byId("key").hidden = false;
      done(true);
    };
    dialog.querySelector("[value=no]").onclick = () => done(false);
    dialog.oncancel = (event) => {
      event.preventDefault();
      done(false);
    };
    dialog.showModal();
    input.focus();
  });
  return asking;
}

// A call of the API; asks for a key when the broker does. Throws an Error whose message is for people.
export async function call(path, options = {}) {
  for (;;) {
    const response = await fetch(path, { ...options, headers: headers(options.headers), cache: "no-store" }).catch(() => {
      throw new Error("the broker does not answer");
    });
    if (response.ok) return response.json();
    const detail = await detailOf(response);
    if (response.status === 401 || response.status === 403) {
      if (await ask(key ? detail : "")) continue;
      throw new Error("that needs a key with the scope admin");
    }
    throw Object.assign(new Error(detail), { status: response.status });
  }
}
