"use strict";
// The legend of a chart: a button per curve, with its value at the cursor, or else its last one.

function makeLegend(spec) {
  const entries = spec.series.map((one) => legendEntry(one, spec));
  const element = el("div", { class: "legend" }, ...entries.map((entry) => entry.button));
  let plot = null;
  entries.forEach((entry, i) => entry.button.addEventListener("click", () => {
    if (spec.stacked || spec.series.length < 2) return; // a stack without one of its parts would be wrong
    showSeries(plot, spec.series[i], entry.button.getAttribute("aria-pressed") !== "true");
    entry.button.setAttribute("aria-pressed", String(spec.series[i].shown));
  }));
  return {
    element,
    connect(u) {
      plot = u;
      for (const one of spec.series) if (one.shown === false) showSeries(u, one, false);
    },
    show(at) {
      for (const entry of entries) entry.value.textContent = entry.text(at);
    },
    words: () => entries.map((entry) => `${visible(entry.label)} ${entry.value.textContent}`).join(", "),
  };
}

function legendEntry(one, spec) {
  const swatch = el("span", { class: spec.stacked ? "swatch area" : "swatch" });
  swatch.style.background = one.colour;
  const value = el("span", { class: "value" });
  const fixed = spec.stacked || spec.series.length < 2;
  const button = el("button", { type: "button", class: fixed ? "fixed" : null, "aria-pressed": fixed ? null : String(one.shown !== false), tabindex: fixed ? -1 : null },
    swatch, foreign(one.label, { class: "name" }), value);
  return { button, value, label: one.label, text: (at) => valueAt(one, at ?? lastIndex(one.values)) };
}

function valueAt(one, at) {
  const value = formatNumber(one.values[at]);
  return one.low && isNumber(one.values[at]) ? `${value} ${formatInterval({ low: one.low[at], high: one.high[at] })}`.trim() : value;
}

function lastIndex(values) {
  return values.findLastIndex(isNumber);
}

function showSeries(u, one, show) {
  one.shown = show;
  for (const index of one.indices) u.setSeries(index, { show }, false);
}
