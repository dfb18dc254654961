"use strict";
// Every held-out evaluation with its intervals.

const FIGURE_ORDER = ["rollout/accuracy", "reward/mean"];
const HIGHER_IS_BETTER = /^(rollout\/accuracy|reward\/|pass@|maj@|mean@)/;

function showEvaluations(summary) {
  const rows = summary.runs.flatMap((run, i) => run.evaluations.map((evaluation) => ({ ...evaluation, run: run.name, runIndex: i })));
  const place = byId("evaluation-table");
  if (!rows.length) {
    place.replaceChildren(el("p", { class: "notice" }, "No evaluation on held-out items has been made."));
    return;
  }
  const names = figureNames(rows);
  const several = summary.runs.length > 1;
  const head = el("tr", {},
    several ? el("th", { scope: "col" }, "run") : null,
    el("th", { scope: "col", class: "number" }, "step"), el("th", { scope: "col" }, "split"), el("th", { scope: "col" }, "environment"),
    el("th", { scope: "col", class: "number" }, "items × samples"),
    ...names.map((name) => el("th", { scope: "col", class: "number" }, foreign(name.replace(/^rollout\//, "")))));
  const best = bestRows(rows, names[0]);
  const body = rows.map((row) => evaluationRow(row, names, several, best.has(row)));
  const table = el("table", { class: "data" }, el("thead", {}, head), el("tbody", {}, ...body));
  const note = el("p", { class: "muted" }, "95 % intervals in brackets", best.size ? "; the best step of each split is bold." : ".");
  place.replaceChildren(note, el("div", { class: "table-wrap", tabindex: 0, role: "region", "aria-label": "Held-out evaluations" }, table));
}

function figureNames(rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.figures)))];
  const rank = (name) => (FIGURE_ORDER.indexOf(name) + 1 || (HIGHER_IS_BETTER.test(name) ? 10 : 20));
  return names.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b, "en", { numeric: true }));
}

/** The best evaluation of each run, split and environment that was evaluated more than once. */
function bestRows(rows, name) {
  if (!HIGHER_IS_BETTER.test(name)) return new Set();
  const kinds = Map.groupBy(rows.filter((row) => isNumber(row.figures[name]?.value)), (row) => `${row.runIndex} ${row.split} ${row.environment}`);
  const best = [...kinds.values()].filter((same) => same.length > 1);
  return new Set(best.map((same) => same.reduce((a, b) => (b.figures[name].value > a.figures[name].value ? b : a))));
}

function evaluationRow(row, names, several, isBest) {
  const figures = names.map((name, i) => {
    const figure = row.figures[name];
    const cell = el("td", { class: i === 0 ? "number main-figure" : "number" }, figure ? formatNumber(figure.value) : "–");
    if (figure && formatInterval(figure)) cell.append(el("span", { class: "interval" }, formatInterval(figure)));
    return cell;
  });
  return el("tr", { class: isBest ? "best" : null },
    several ? el("td", {}, foreign(row.run)) : null,
    el("td", { class: "number" }, formatNumber(row.step)), el("td", {}, foreign(row.split)), el("td", {}, foreign(row.environment)),
    el("td", { class: "number" }, `${formatNumber(row.num_items)} × ${formatNumber(row.num_samples)}`), ...figures);
}
