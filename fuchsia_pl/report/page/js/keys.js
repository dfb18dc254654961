"use strict";
// The keyboard. Single keys act only outside of fields, and never with Ctrl, Alt or Meta.

const KEYS = [
  [["j"], "next group", () => browser?.move(1)],
  [["k"], "previous group", () => browser?.move(-1)],
  [["n"], "next sibling", () => moveSibling(1)],
  [["p"], "previous sibling", () => moveSibling(-1)],
  [["b"], "best sibling", () => goToCard(browser?.group?.best)],
  [["w"], "worst sibling", () => goToCard(browser?.group?.worst)],
  [["a"], "colour by advantage, gap, nothing", () => nextColouring()],
  [["c"], "copy a link to the rollout", () => copyLink()],
  [["/"], "search the rollouts", () => focusSearch()],
  [["t"], "light or dark", () => byId("theme-toggle").click()],
  [["?"], "this list", () => toggleHelp()],
];
const MORE_KEYS = [
  [["↑", "↓", "Page", "Home", "End"], "move in the list, when it has the focus"],
  [["←", "→"], "steps of a chart, tokens of a text, when it has the focus"],
  [["Esc"], "leave the search, close this list"],
];

function startKeys() {
  const names = (keys) => el("dt", {}, ...keys.flatMap((key, i) => (i ? [" ", el("kbd", {}, key)] : [el("kbd", {}, key)])));
  const close = el("button", { type: "button", onclick: () => byId("help").close() }, "close");
  byId("help").replaceChildren(el("h2", { id: "help-title" }, "Keyboard"),
    el("dl", {}, ...[...KEYS, ...MORE_KEYS].flatMap(([keys, words]) => [names(keys), el("dd", {}, words)])), close);
  byId("help-button").addEventListener("click", toggleHelp);
  document.addEventListener("keydown", onKey);
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  const isField = event.target.closest?.("input, select, textarea");
  if (event.key === "Escape" && isField) byId("group-list")?.focus();
  if (isField || (byId("help").open && event.key !== "?")) return;
  const entry = KEYS.find(([keys]) => keys.includes(event.key));
  if (!entry) return;
  event.preventDefault();
  entry[2]();
}

function toggleHelp() {
  const help = byId("help");
  if (help.open) help.close();
  else help.showModal();
}

function focusSearch() {
  if (!browser) return;
  browser.filterBox.open = true;
  byId("search").focus();
  byId("search").select();
}

/** The sibling that has the focus or was the last target. */
function currentCard() {
  return document.activeElement?.closest?.(".card") ?? document.querySelector(".card.target");
}

function moveSibling(by) {
  const cards = [...document.querySelectorAll(".siblings .card")];
  if (!cards.length) return;
  const index = clamp(cards.indexOf(currentCard()) + by, 0, cards.length - 1);
  goToCard(browser.data.rows[Number(cards[index].id.slice("card-".length))]);
}

function nextColouring() {
  if (!browser?.group) return;
  const names = Object.keys(COLOURINGS);
  browser.set("colouring", names[(names.indexOf(browser.colouring) + 1) % names.length]);
  announce(`coloured by ${COLOURINGS[browser.colouring]}`);
}

function copyLink() {
  const card = currentCard() ?? document.querySelector(".siblings .card");
  card?.querySelector(".copy-link").click();
}
