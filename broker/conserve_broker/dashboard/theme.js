// Light or dark: as the system has it, until somebody chooses; the choice is this browser's.

import { byId } from "./dom.js";

const system = matchMedia("(prefers-color-scheme: dark)");
const NAME = "conserve-theme";

let chosen = remembered();

export function wireTheme() {
  show();
  system.addEventListener("change", show);
  byId("theme").addEventListener("click", () => {
    chosen = current() === "dark" ? "light" : "dark";
    remember(chosen);
    show();
  });
}

const current = () => chosen ?? (system.matches ? "dark" : "light");

function show() {
  const theme = current();
  document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
}

function remembered() {
  try {
    return localStorage.getItem(NAME);
  } catch {
    return null; // storage is forbidden: the choice lasts as long as the page
  }
}

function remember(theme) {
  try {
    localStorage.setItem(NAME, theme);
  } catch {
    // see above
  }
}
