"use strict";
// The resolved configuration. At first only what differs from the defaults, or, of several runs, between them.

function startConfig(summary) {
  const { runs } = summary;
  const several = runs.length > 1;
  const state = { text: "", onlyChanged: true };
  const rows = configRows(runs);
  const words = several ? "only what differs between the runs" : "only what differs from the defaults";
  const check = el("input", { type: "checkbox", id: "only-changed", checked: true, onchange: (event) => { state.onlyChanged = event.target.checked; draw(); } });
  const filter = el("input", { type: "search", id: "config-filter", placeholder: "filter settings", "aria-label": "Filter settings",
    oninput: (event) => { state.text = event.target.value.toLowerCase(); draw(); } });
  const count = el("span", {});
  byId("config-controls").append(count, el("label", {}, check, words), filter);
  const body = el("tbody", {});
  const draw = () => {
    const shown = rows.filter((row) => (!state.onlyChanged || (several ? row.varies : row.differs)) && configText(row).includes(state.text));
    count.textContent = `${shown.length} of ${plural(rows.length, "setting")}`;
    body.replaceChildren(...shown.map((row) => configRow(row, several)));
  };
  const columns = several ? runs.map((run) => foreign(run.name)) : ["value"];
  const head = el("tr", {}, el("th", { class: "key", scope: "col" }, "setting"), ...[...columns, "default"].map((name) => el("th", { scope: "col" }, name)));
  const objective = runs[0].objective ? el("p", { class: "objective" }, el("b", {}, "Objective "), foreign(runs[0].objective)) : "";
  byId("config-table").replaceChildren(objective,
    el("div", { class: "table-wrap", tabindex: 0, role: "region", "aria-label": "Settings" }, el("table", { class: "data config" }, el("thead", {}, head), body)));
  draw();
}

/** A row per setting of any run: {key, values of the runs, default, differs, varies}. */
function configRows(runs) {
  const byKey = new Map();
  runs.forEach((run, i) => run.config.forEach(({ key, value, default: standard }) => {
    if (!byKey.has(key)) byKey.set(key, { key, values: runs.map(() => null), standard });
    byKey.get(key).values[i] = value;
  }));
  const rows = [...byKey.values()].map((row) => ({ ...row, differs: row.values.some((value) => value !== row.standard), varies: new Set(row.values).size > 1 }));
  return rows.sort((a, b) => (a.key < b.key ? -1 : 1));
}

const configText = (row) => `${row.key} ${row.values.join(" ")} ${row.standard ?? ""}`.toLowerCase();

function configRow(row, several) {
  const values = row.values.map((value) => el("td", { class: "value" }, value === null ? "–" : foreign(value)));
  const changed = several ? row.varies : row.differs;
  return el("tr", { class: changed ? "differs" : null }, el("th", { scope: "row", class: "key" }, foreign(row.key)), ...values,
    el("td", { class: "muted" }, row.standard === null ? "–" : foreign(row.standard)));
}
