"use strict";
// One chart: uPlot with our colours, cursor, zoom and keyboard. All charts share their x values, so that cursor and
// zoom match.

const CHART_HEIGHT = 170;
const SYNC = "steps";

/**
 * A chart as a figure.
 * spec: {title, hint, xs, series: [{label, values, colour, low, high, points, dash, width, run}], stacked, metrics}
 */
function makeChart(spec) {
  const at = el("span", { class: "at" });
  const plot = el("div", { class: "plot" });
  const legend = makeLegend(spec);
  const figure = el("figure", { class: "chart", tabindex: 0, role: "group", "aria-label": describe(spec) },
    el("figcaption", {}, foreign(spec.title), at),
    el("div", { class: "hint" }, spec.hint ?? ""), plot, legend.element);
  const chart = { figure, plot, spec, legend, at, u: null };
  figure.addEventListener("keydown", (event) => moveCursor(event, chart));
  return chart;
}

/** Draws charts whose figures are in the page. Their widths are read first: each later look would lay the page out again. */
function drawCharts(charts) {
  const widths = charts.map(({ plot }) => plot.clientWidth);
  charts.forEach((chart, i) => drawChart(chart, widths[i]));
}

function drawChart(chart, width) {
  chart.u?.destroy();
  const { spec, plot } = chart;
  const { data, series, bands } = columnsOf(spec);
  const options = {
    width: Math.max(width, 120), height: CHART_HEIGHT, series, bands, padding: [8, 8, 0, 0],
    legend: { show: false }, focus: { alpha: 1 }, axes: axes(),
    scales: { x: { time: false, range: xRange }, y: { range: (_, low, high) => yRange(low, high, spec) } },
    cursor: { sync: { key: SYNC, setSeries: false }, drag: { x: true, y: false }, y: false, points: { size: 6 } },
    hooks: { setCursor: [(u) => showCursor(chart, u)] },
  };
  chart.u = new uPlot(options, data, plot);
  chart.legend.connect(chart.u);
  showCursor(chart, chart.u);
}

function axes() {
  const [ink, line] = [colour("--muted"), colour("--line")];
  const common = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif", gap: 4 };
  return [
    { ...common, size: 24, grid: { show: false }, space: 50, incrs: [1, 2, 5].flatMap((base) => [0, 1, 2, 3, 4, 5, 6].map((power) => base * 10 ** power)).sort((a, b) => a - b) },
    { ...common, size: 50, space: 32, values: (_, splits) => splits.map(tickLabel) },
  ];
}

function tickLabel(value) {
  const size = Math.abs(value);
  if (size >= 1e4 || (size > 0 && size < 1e-3)) return value.toExponential(0).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

const xRange = (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]);

/** Limits of y: a little room, 0 where the data come near it, never a flat line at the edge. */
function yRange(low, high, spec) {
  if (!isNumber(low) || !isNumber(high)) return [0, 1];
  const room = high - low || Math.abs(high) || 1;
  const [bottom, top] = [low - 0.06 * room, high + 0.06 * room];
  return [spec.stacked || (low >= 0 && low < 0.5 * room) ? Math.min(0, low) : bottom, top];
}

/** uPlot's columns: one per curve, and two more for a confidence band. */
function columnsOf(spec) {
  const [data, series, bands] = [[spec.xs], [{}], []];
  if (spec.stacked) return stackedColumns(spec);
  for (const one of spec.series) {
    const stroke = one.colour;
    one.index = data.push(one.values) - 1;
    one.indices = [one.index];
    const isLonely = one.values.filter(isNumber).length < 2;
    series.push({ stroke, width: one.width ?? 1.75, dash: one.dash, spanGaps: true, points: { show: Boolean(one.points) || isLonely, size: 6, fill: stroke } });
    if (!one.low) continue;
    const edge = { stroke: "transparent", width: 0, spanGaps: true, points: { show: false } };
    const upper = data.push(one.high) - 1;
    const lower = data.push(one.low) - 1;
    series.push(edge, { ...edge });
    bands.push({ series: [upper, lower], fill: faint(stroke, 0.15) });
    one.indices.push(upper, lower);
  }
  return { data, series, bands };
}

/** Each area lies on the sum of those before it. A part that was not logged adds nothing. */
function stackedColumns(spec) {
  const [data, series, bands] = [[spec.xs], [{}], []];
  const sums = spec.xs.map(() => 0);
  spec.series.forEach((one, i) => {
    spec.xs.forEach((_, at) => (sums[at] += one.values[at] ?? 0));
    const isLogged = spec.xs.map((_, at) => spec.series.some((other) => isNumber(other.values[at])));
    one.index = data.push(sums.map((sum, at) => (isLogged[at] ? sum : null))) - 1;
    one.indices = [one.index];
    const fill = faint(one.colour, 0.45);
    series.push({ stroke: one.colour, width: 1, fill: i === 0 ? fill : undefined, spanGaps: true, points: { show: false } });
    if (i > 0) bands.push({ series: [one.index, one.index - 1], fill });
  });
  return { data, series, bands };
}

function showCursor(chart, u) {
  const at = u.cursor.idx;
  const isHeld = u.cursor.left >= 0 && at !== null && at !== undefined;
  chart.at.textContent = isHeld ? `step ${chart.spec.xs[at]}` : "";
  chart.legend.show(isHeld ? at : null);
}

/** Arrow keys move the cursor by a step; Home and End go to the ends; Escape releases it. */
function moveCursor(event, { u, spec, legend, figure }) {
  const last = spec.xs.length - 1;
  const now = u.cursor.left >= 0 ? (u.cursor.idx ?? last) : null;
  const to = { ArrowLeft: (now ?? last + 1) - 1, ArrowRight: (now ?? -1) + 1, Home: 0, End: last, Escape: -1 }[event.key];
  if (to === undefined || event.target !== figure) return;
  event.preventDefault();
  const left = event.key === "Escape" ? -10 : u.valToPos(spec.xs[clamp(to, 0, last)], "x");
  u.setCursor({ left, top: 10 });
  if (left >= 0) announce(`step ${spec.xs[clamp(to, 0, last)]}: ${legend.words()}`);
}

/** A chart in words, for those who cannot see it. */
function describe(spec) {
  const curves = spec.series.map((one) => {
    const found = one.values.filter(isNumber);
    return `${one.label} from ${formatNumber(found[0])} to ${formatNumber(found[found.length - 1])}`;
  });
  return visible(`${spec.title}: ${curves.join("; ")}. Arrow keys move through the steps.`);
}
