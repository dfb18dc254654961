"use strict";
// Elements, numbers and small helpers. Data reaches the page as text nodes only: nothing here parses markup.

const byId = (id) => document.getElementById(id);

/** An element. Functions become listeners of the event that their key names, `true` an empty attribute, null nothing. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** A number with three significant digits, as short as it can be. */
function formatNumber(value) {
  if (!isNumber(value)) return "–";
  return digits(value).replace(/^-/, "−");
}

function digits(value) {
  const size = Math.abs(value);
  if (Number.isInteger(value)) return size < 1e7 ? value.toLocaleString("en-US") : value.toExponential(2);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return size >= 1 ? value.toPrecision(3) : value.toFixed(3);
}

/** A reward: always three decimals, so that those of siblings are compared at a glance. */
const formatReward = (value) => (isNumber(value) && Math.abs(value) < 1000 ? value.toFixed(3).replace("-", "−") : formatNumber(value));

const formatSigned = (value) => (isNumber(value) && value > 0 ? "+" : "") + formatNumber(value);

/** A figure with its interval, such as `0.656 [0.53, 0.77]`. */
function formatInterval(figure) {
  return isNumber(figure.low) && isNumber(figure.high)
    ? `[${formatNumber(figure.low)}, ${formatNumber(figure.high)}]`
    : "";
}

function formatSeconds(seconds) {
  if (!isNumber(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

const plural = (count, noun) => `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** Calls a function once its calls have paused. */
function debounced(milliseconds, call) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...given), milliseconds);
  };
}

/** Text for screen readers. */
function announce(text) {
  byId("announcer").textContent = text;
}

/** Copies a text. A page opened from a file may lack the clipboard's interface, hence the older way. */
async function copyText(text, button) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    const area = el("textarea", { "aria-hidden": "true", class: "visually-hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button?.focus({ preventScroll: true });
  }
  announce(done ? "Copied" : "The browser refused to copy");
  if (!button) return;
  const label = button.textContent;
  button.textContent = done ? "copied" : "refused";
  button.disabled = true;
  setTimeout(() => {
    button.textContent = label;
    button.disabled = false;
  }, 1200);
}

/** A value that outlives the page, where the browser keeps any for files. */
const memory = {
  get(store, key) {
    try {
      return store.getItem(`fuchsia-report-${key}`);
    } catch {
      return null;
    }
  },
  set(store, key, value) {
    try {
      store.setItem(`fuchsia-report-${key}`, value);
    } catch {
      // Private windows refuse. The page works without.
    }
  },
};
