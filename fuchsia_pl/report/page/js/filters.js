"use strict";
// Which rollouts match, and in which order their groups are listed.

const NO_FILTER = { split: "", environment: "", status: "", stepFrom: "", stepTo: "", reward: "", rewardFrom: "", rewardTo: "", text: "", sort: "last" };

const by = (value, direction = 1) => (a, b) => direction * ((value(a) ?? -Infinity) - (value(b) ?? -Infinity));
const longest = (group) => Math.max(...group.rows.map(rowLength));
const largestGap = (group) => Math.max(...group.rows.map((row) => meanGap(row) ?? -Infinity));
const SORTS = {
  last: ["last step first", by((group) => group.step, -1)],
  first: ["first step first", by((group) => group.step)],
  high: ["highest mean reward", by((group) => group.mean, -1)],
  low: ["lowest mean reward", (a, b) => (a.mean ?? Infinity) - (b.mean ?? Infinity)],
  spread: ["widest spread of rewards", by((group) => group.spread, -1)],
  long: ["longest completion", by(longest, -1)],
  gap: ["largest mean gap", by(largestGap, -1)],
};

/** The form. It changes `state` and calls `changed`. */
function filterForm(state, data, changed) {
  const later = debounced(120, changed);
  const take = (name) => (event) => {
    state[name] = event.target.value;
    (event.type === "input" ? later : changed)();
  };
  const choice = (name, label, entries) => el("label", {}, label, el("select", { name, onchange: take(name) }, ...entries.map(([value, text]) => el("option", { value, selected: value === state[name] }, visible(text)))));
  const number = (name, label) => el("input", { type: "number", step: "any", name, value: state[name], "aria-label": label, placeholder: label.split(" ").pop(), oninput: take(name) });
  const range = (label, ...inputs) => el("div", { class: "field", role: "group", "aria-label": label }, label, el("div", { class: "range" }, ...inputs));
  const rewards = [["", "total"], ...data.reward_names.map((name, i) => [String(i), name])];
  const reward = el("select", { name: "reward", "aria-label": "Which reward", onchange: take("reward") }, ...rewards.map(([value, text]) => el("option", { value, selected: value === state.reward }, visible(text))));
  const search = el("input", { type: "search", id: "search", name: "text", value: state.text, placeholder: "in prompts, items and completions ( / )", oninput: take("text") });
  const form = el("form", { class: "filters", role: "search", "aria-label": "Filter rollouts", onsubmit: (event) => event.preventDefault() },
    el("label", { class: "search" }, "text", search),
    counted("split", data) ? choice("split", "split", counted("split", data)) : null,
    counted("environment", data) ? choice("environment", "environment", counted("environment", data)) : null,
    counted("status", data) ? choice("status", "status", counted("status", data)) : null,
    range("steps", number("stepFrom", "steps from"), number("stepTo", "steps to")),
    range("reward", ...(data.reward_names.length > 1 ? [reward] : []), number("rewardFrom", "reward min"), number("rewardTo", "reward max")),
    choice("sort", "order", Object.entries(SORTS).map(([key, [label]]) => [key, label])),
    el("button", { type: "reset", onclick: (event) => { event.preventDefault(); changed("reset"); } }, "clear"));
  return form;
}

/** Choices of a field with the number of rollouts of each; null if all rollouts have the same. */
function counted(name, data) {
  const groups = Map.groupBy(data.rows, (row) => String(row[name]));
  if (groups.size < 2) return null;
  const label = (value) => (name === "environment" ? data.environments[value] : value);
  return [["", "all"], ...[...groups].map(([value, rows]) => [value, `${label(value)} (${rows.length.toLocaleString("en-US")})`])];
}

/** Whether a row matches. */
function predicate(state, data) {
  const tests = [];
  const limit = (text) => (text.trim() === "" || Number.isNaN(Number(text)) ? null : Number(text));
  const [from, to, least, most] = [state.stepFrom, state.stepTo, state.rewardFrom, state.rewardTo].map(limit);
  const rewardOf = state.reward === "" ? (row) => row.reward : (row) => row.rewards?.[Number(state.reward)];
  for (const name of ["split", "environment", "status"]) if (state[name] !== "") tests.push((row) => String(row[name]) === state[name]);
  if (from !== null) tests.push((row) => row.step >= from);
  if (to !== null) tests.push((row) => row.step <= to);
  if (least !== null) tests.push((row) => isNumber(rewardOf(row)) && rewardOf(row) >= least);
  if (most !== null) tests.push((row) => isNumber(rewardOf(row)) && rewardOf(row) <= most);
  const wanted = searchPattern(state.text);
  if (wanted) tests.push(textTest(wanted, data));
  return (row) => tests.every((test) => test(row));
}

function searchPattern(text) {
  return text === "" ? null : new RegExp(text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "i");
}

/** Prompts and items are shared by many rows, so each is searched once. */
function textTest(wanted, data) {
  const prompts = data.prompts.map((text) => wanted.test(text));
  const items = data.items.map((text) => wanted.test(text));
  return (row) => prompts[row.prompt] || items[row.item_row] || row.parts.some((part) => wanted.test(part.text) || (part.call && (wanted.test(part.call.name) || wanted.test(part.call.arguments))));
}
