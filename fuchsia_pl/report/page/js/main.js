"use strict";
// Starts the page: what is quick at once, the rollouts after the first paint.

function start() {
  const summary = readSummary();
  const kept = takeKept();
  let redraw = () => {};
  startTheme(() => redraw());
  startKeys();
  showStatus(summary);
  redraw = startCurves(summary);
  showEvaluations(summary);
  startConfig(summary);
  startReload(summary);
  byId("shown-words").textContent = shownWords(summary);
  requestAnimationFrame(() => setTimeout(() => loadRollouts(kept), 0));
}

async function loadRollouts(kept) {
  try {
    startBrowser(await unpackRollouts(), kept);
    if (kept?.scroll) window.scrollTo(0, kept.scroll);
  } catch (error) {
    byId("rollout-browser").replaceChildren(el("p", { class: "notice", role: "alert" }, visible(`The rollouts cannot be shown: ${error.message}`)));
    throw error;
  } finally {
    document.documentElement.setAttribute("data-ready", "true");
    performance.mark("ready");
  }
}

/** Says that the page holds a sample, if it does. */
function shownWords({ num_rollouts: all, num_shown: shown, shown_words: words, runs }) {
  const count = shown < all ? `${shown.toLocaleString("en-US")} of ${plural(all, "rollout")}` : plural(all, "rollout");
  const of = runs.length > 1 ? ` of ${visible(runs[0].name)}` : "";
  return shown < all && words ? `${count}${of}: ${visible(words)}` : `${count}${of}`;
}

start();
