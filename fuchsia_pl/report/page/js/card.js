"use strict";
// A rollout as a card: its figures, its text, its tool calls and their results.

function rolloutCard(row, view) {
  const { group } = row;
  const rank = row === group.best ? "best" : row === group.worst ? "worst" : null;
  const buttons = el("span", { class: "buttons" },
    el("button", { type: "button", title: "Copy the text of the rollout", onclick: (event) => copyText(rowText(row), event.currentTarget) }, "text"),
    el("button", { type: "button", class: "copy-link", title: "Copy a permanent link to this rollout (c)", onclick: (event) => copyText(linkTo(row), event.currentTarget) }, "link"));
  const title = el("div", { class: "card-title" },
    el("a", { href: hashOf(row), title: "Permanent link" }, `#${rowName(row)}`),
    el("span", { class: "reward" }, formatReward(row.reward)),
    rank ? el("span", { class: `badge ${rank}` }, rank === "best" ? "▲ best" : "▼ worst") : null, buttons);
  const head = el("div", { class: "card-head" }, title, el("div", { class: "card-facts" }, ...cardFacts(row, view)));
  const classes = ["card", rank, view.matches(row) ? null : "unmatched"].filter(Boolean).join(" ");
  return el("article", { class: classes, id: cardId(row), tabindex: -1, "aria-label": `Rollout ${rowName(row)}, reward ${formatNumber(row.reward)}${rank ? `, ${rank}` : ""}` }, head, partList(row, view));
}

/** Sibling and, of a rollout whose history was rewritten, the number of the row. */
const rowName = (row) => (row.row ? `${row.sibling}.${row.row}` : `${row.sibling}`);
const cardId = (row) => `card-${row.index}`;
const hashOf = (row) => `#r=${encodeURIComponent(row.id.toWellFormed?.() ?? row.id)}`;
const linkTo = (row) => location.href.split("#")[0] + hashOf(row);
const rowText = (row) => row.parts.map((part) => part.text).join("");

function cardFacts(row, { rewardNames }) {
  const facts = row.status === "completed" ? [] : [el("span", { class: "badge unusual" }, foreign(row.status))];
  if (rewardNames.length > 1 || row.turn_rewards) {
    rewardNames.forEach((name, i) => isNumber(row.rewards?.[i]) && facts.push(el("span", {}, foreign(name), ` ${formatNumber(row.rewards[i])}`, ofTurns(row, name))));
  }
  if (isNumber(row.advantage)) facts.push(el("span", {}, `advantage ${formatSigned(row.advantage)}`));
  const numTokens = row.parts.reduce((sum, part, i) => sum + (part.policy ? (tokenData(row)[i][0]?.length ?? 0) : 0), 0);
  facts.push(el("span", {}, numTokens ? plural(numTokens, "token") : plural(rowLength(row), "character")));
  if (isNumber(row.version)) facts.push(el("span", { title: "Version of the weights that sampled it" }, `weights ${row.version}`));
  return facts;
}

/** The rewards of the turns, after the reward of a function that scores turns. */
function ofTurns(row, name) {
  const has = row.turn_rewards && Object.hasOwn(row.turn_rewards, name);
  return has ? ` (turns ${row.turn_rewards[name].map(formatNumber).join(", ")})` : null;
}

function partList(row, view) {
  const several = row.parts.length > 1;
  const parts = row.parts.map((part, i) => partElement(row, part, tokenData(row)[i], several, view));
  const isEmpty = !row.parts.some((part) => part.text || part.call);
  return el("div", { class: "parts" }, ...parts, isEmpty ? el("p", { class: "empty" }, "empty completion") : null);
}

function partElement(row, part, columns, several, view) {
  const isResult = part.role === "tool";
  const kind = part.call ? "part block call" : isResult ? "part block result environment" : part.policy ? "part policy" : "part environment";
  const role = part.call ? el("div", { class: "role" }, "→ call ", foreign(part.call.name))
    : isResult ? el("div", { class: "role" }, "← result")
    : several ? el("div", { class: "role" }, foreign(part.role)) : null;
  const text = part.text || !part.call ? tokenBlock(row, part, columns, view) : null;
  return el("div", { class: kind }, role, text, part.call ? callArguments(part) : null);
}

/** Arguments of a call, unless the text shows them as they are. Code in them is shown with its lines. */
function callArguments(part) {
  const given = part.call.arguments ?? "";
  let values = null;
  try {
    values = JSON.parse(given);
  } catch {
    // A policy's JSON may be broken. It is then shown as it is.
  }
  const isObject = values !== null && typeof values === "object" && !Array.isArray(values);
  const isShown = part.text.includes(given);
  const lines = isObject ? Object.entries(values).filter(([, value]) => typeof value === "string" && (!isShown || value.includes("\n"))) : [];
  if (lines.length) return el("div", {}, ...lines.map(([name, value]) => el("div", {}, el("div", { class: "role" }, foreign(name)), textBlock(value))));
  return isShown ? null : textBlock(given);
}
