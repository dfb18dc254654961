"use strict";
// A report of a running run is rewritten in place. The page loads it again now and then, unless someone is reading.

const RELOAD_SECONDS = 20;

function startReload(summary) {
  if (summary.runs[0].status.outcome !== "running") return;
  const button = byId("reload-toggle");
  let isOn = memory.get(sessionStorageOrNull(), "reload") !== "off";
  let lastInput = Date.now();
  const label = () => {
    button.textContent = isOn ? "live" : "paused";
    button.setAttribute("aria-label", `Load the report again every ${RELOAD_SECONDS} seconds: ${isOn ? "on" : "off"}. Change`);
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    isOn = !isOn;
    memory.set(sessionStorageOrNull(), "reload", isOn ? "on" : "off");
    label();
  });
  for (const name of ["pointerdown", "pointermove", "keydown", "wheel", "touchstart"]) {
    document.addEventListener(name, () => (lastInput = Date.now()), { passive: true });
  }
  setInterval(() => {
    const isRead = Date.now() - lastInput < RELOAD_SECONDS * 1000 || document.hidden || byId("help").open;
    if (isOn && !isRead) reloadPage();
  }, RELOAD_SECONDS * 1000);
  label();
}

function reloadPage() {
  const kept = { scroll: window.scrollY };
  if (browser) Object.assign(kept, { filter: browser.filter, colouring: browser.colouring, order: browser.order, group: browser.group?.key });
  memory.set(sessionStorageOrNull(), "kept", JSON.stringify(kept));
  location.reload();
}

/** What the page showed before it loaded itself again, once. */
function takeKept() {
  const store = sessionStorageOrNull();
  const text = memory.get(store, "kept");
  memory.set(store, "kept", "null");
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function sessionStorageOrNull() {
  try {
    return window.sessionStorage;
  } catch {
    return null;
  }
}
