"use strict";
// A group: its prompt, its siblings side by side, the same item at other steps.

function groupView(group, context) {
  const colouring = context.colouring;
  const view = { colouring, scale: colourScale(group.rows, colouring), matches: context.matches, rewardNames: context.data.reward_names };
  view.hasEnvironmentText = group.rows.some((row) => row.parts.some((part) => !part.policy));
  const rows = context.order === "reward" ? [...group.rows].sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity)) : group.rows;
  const siblings = el("div", { class: "siblings" }, ...rows.map((row) => rolloutCard(row, view)));
  watchTokens(siblings);
  return [groupHead(group, context), promptBox(group, context), elsewhere(group, context) ?? "", colouringBar(view, context), siblings];
}

function groupHead(group, context) {
  const words = isNumber(group.mean)
    ? `mean reward ${formatReward(group.mean)}${group.size > 1 ? (group.spread > 0 ? `, spread ${formatReward(group.spread)}` : ", all equal: nothing to learn from") : ""}`
    : "not scored";
  const button = (label, title, onclick, disabled) => el("button", { type: "button", title, onclick, disabled }, label);
  return el("div", { class: "group-head" },
    el("h3", {}, ...groupTitle(group, context)), el("span", { class: "spread" }, `${plural(group.size, "sibling")}, ${words}`),
    el("div", { class: "moves" },
      button("▲ best", "Go to the best sibling (b)", () => goToCard(group.best), !group.best),
      button("▼ worst", "Go to the worst sibling (w)", () => goToCard(group.worst), !group.worst),
      button("previous", "Previous group (k)", () => context.move(-1)), button("next", "Next group (j)", () => context.move(1))));
}

/** Step, item, and what else tells a group from others on this page. */
function groupTitle(group, context) {
  const title = [`step ${group.step} · item ${group.item}`];
  if (context.splits.length > 1) title.push(" · ", foreign(group.split));
  if (context.data.environments.length > 1) title.push(" · ", foreign(context.data.environments[group.rows[0].environment]));
  return title;
}

function goToCard(row) {
  if (!row) return;
  const card = byId(cardId(row));
  document.querySelectorAll(".card.target").forEach((other) => other.classList.remove("target"));
  card.classList.add("target");
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "start" });
}

function promptBox(group, { data }) {
  const [row] = group.rows;
  const prompt = data.prompts[row.prompt] ?? "";
  const item = data.items[row.item_row] ?? "";
  return el("div", { class: "prompt-box" }, el("h3", {}, "prompt"), foldedLines(prompt),
    item ? el("details", {}, el("summary", {}, "item"), textBlock(item)) : null);
}

const PROMPT_LINES = 9;

/** A prompt may be long: its end is what tells items apart, so the middle is folded. */
function foldedLines(text) {
  const lines = text.split("\n");
  if (lines.length <= PROMPT_LINES + 2) return textBlock(text);
  const place = el("div", {}, textBlock(lines.slice(0, 3).join("\n")), moreButton(`… show all ${lines.length} lines`, () => place.replaceChildren(textBlock(text))),
    textBlock(lines.slice(-(PROMPT_LINES - 3)).join("\n")));
  return place;
}

/** Links to the same item at other steps: how its answers changed. */
function elsewhere(group, context) {
  const same = context.sameItem(group);
  if (same.length < 2) return null;
  const at = same.indexOf(group);
  const near = same.length > 14 ? same.slice(clamp(at - 6, 0, same.length - 13), clamp(at - 6, 0, same.length - 13) + 13) : same;
  return el("div", { class: "elsewhere" }, `this item at ${same.length} steps: `, ...near.map((other) =>
    el("button", { type: "button", "aria-current": other === group ? "true" : null, title: `mean reward ${formatNumber(other.mean)}`, onclick: () => context.select(other) }, `${other.step}`)));
}

function colouringBar(view, context) {
  const choose = (name, values, chosen, change) => el("select", { "aria-label": name, onchange: (event) => change(event.target.value) },
    ...Object.entries(values).map(([value, label]) => el("option", { value, selected: value === chosen }, label)));
  return el("div", { class: "colouring" },
    el("label", {}, "colour by ", choose("Colour tokens by", COLOURINGS, view.colouring, (value) => context.set("colouring", value))),
    colourLegend(view.scale, view.colouring),
    el("label", {}, "siblings ", choose("Order of the siblings", { sampled: "as sampled", reward: "by reward" }, context.order, (value) => context.set("order", value))),
    view.hasEnvironmentText ? el("span", {}, "grey: text of the environment") : null);
}
