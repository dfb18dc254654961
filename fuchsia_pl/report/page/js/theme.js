"use strict";
// Light and dark. Without a choice the page follows the system.

const THEMES = ["auto", "light", "dark"];

function startTheme(onChange) {
  const button = byId("theme-toggle");
  let theme = memory.get(localStorageOrNull(), "theme");
  if (!THEMES.includes(theme)) theme = "auto";
  const apply = () => {
    if (theme === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.setAttribute("data-theme", theme);
    button.textContent = { auto: "◐ auto", light: "○ light", dark: "● dark" }[theme];
    button.setAttribute("aria-label", `Colour theme: ${theme}. Change`);
  };
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    memory.set(localStorageOrNull(), "theme", theme);
    apply();
    onChange();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
  apply();
}

function localStorageOrNull() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

const resolvedColours = new Map(); // of the present theme; each look-up would make the browser style the page again

/** The colour that a variable stands for in the present theme, as a canvas takes it. */
function colour(name) {
  if (!resolvedColours.has(name)) resolvedColours.set(name, resolveColour(name));
  return resolvedColours.get(name);
}

function resolveColour(name) {
  const probe = el("span", {});
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const resolved = getComputedStyle(probe).color;
  probe.remove();
  return resolved;
}

/** The same colour, translucent. */
function faint(resolved, alpha) {
  const [red, green, blue] = resolved.match(/[\d.]+/g);
  return `rgba(${red}, ${green}, ${blue}, ${alpha})`;
}

const NUM_COLOURS = 8;

/** Colours of curves, in the theme of now. */
function palette() {
  resolvedColours.clear();
  return Array.from({ length: NUM_COLOURS }, (_, i) => colour(`--c${i}`));
}
