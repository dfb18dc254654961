"use strict";
// Which charts there are. A chart whose metrics were not logged is left out; what no chart names is under `more`.

const CHARTS = [
  ["Learning", [
    { title: "reward", metrics: ["reward/mean"] },
    { title: "rewards by name", hint: "unweighted means", pattern: /^reward\/(?!mean$)/, strip: "reward/" },
    { title: "accuracy", hint: "held out, with 95 % intervals; training as a thin line", heldOut: /^rollout\/accuracy$/, metrics: ["rollout/accuracy"] },
    { title: "held-out reward", hint: "with 95 % intervals", heldOut: /^reward\// },
    { title: "reward by part", hint: "of a mixture", pattern: /^[^/]+\/reward\/mean$/ },
    { title: "accuracy by part", hint: "of a mixture", pattern: /^[^/]+\/rollout\/accuracy$/ },
    { title: "held-out accuracy by part", hint: "of a mixture, with 95 % intervals", heldOut: /^[^/]+\/rollout\/accuracy$/ },
    { title: "levels", hint: "drawn now, by kind of item", pattern: /^curriculum\/level_/, strip: "curriculum/level_" },
    { title: "items by success", hint: "share of the training items", pattern: /^curriculum\/(inside|below|above|unseen)$/, strip: "curriculum/" },
    { title: "pass@k, maj@k, mean@k", hint: "held out, with 95 % intervals", heldOut: /^(pass|maj|mean)@\d+$/ },
  ]],
  ["Policy", [
    { title: "KL to the reference", metrics: ["train/kl"] },
    { title: "entropy", metrics: ["train/entropy"] },
    { title: "clip fraction", hint: "share of tokens at which a bound of the ratio acted", metrics: ["train/clip_fraction"] },
    { title: "trainer/sampler gap", hint: "mean |logprob difference| of a token", metrics: ["train/logprob_gap"] },
    { title: "sampler weight and ratio", hint: "trainer / sampler probability, after and before the bounds", metrics: ["train/sampler_weight", "train/sampler_ratio"] },
    { title: "gradient norm", hint: "before clipping", metrics: ["train/grad_norm"] },
    { title: "learning rate", pattern: /^(lr-|train\/learning_rate)/ },
  ]],
  ["Rollouts", [
    { title: "tokens of a completion", metrics: ["rollout/completion_tokens", "rollout/environment_tokens"], strip: "rollout/" },
    { title: "truncated", hint: "share of completions that ran out of tokens or turns", metrics: ["rollout/truncated_fraction"] },
    { title: "turns and tool use", metrics: ["rollout/turns", "rollout/tool_use"], strip: "rollout/" },
    { title: "groups without a signal", metrics: ["rollout/zero_variance_groups", "rollout/refilled_groups", "rollout/dropped_groups"], strip: "rollout/" },
    { title: "staleness", hint: "steps between sampling and training of a token", metrics: ["rollout/staleness"] },
  ]],
  ["Machine", [
    { title: "seconds of a step", stack: true },
    { title: "seconds of a step", metrics: ["perf/step_seconds"], several: true },
    { title: "tokens per second", metrics: ["perf/rollout_tokens_per_s", "perf/train_tokens_per_s"], strip: "perf/" },
    { title: "memory", hint: "GiB", pattern: /^perf\/.*memory|_gb$/ },
  ]],
];
const SECONDS = /^(perf\/(?!step_seconds$).*_(seconds|s)|sync\/seconds)$/;
const RATES = /_per_s$/; // tokens per second are no seconds

let shownCharts = [];
const hiddenRuns = new Set();
let smoothing = 0;

function startCurves(summary) {
  const redraw = () => showCurves(summary);
  const names = { 0: "none", 0.6: "light", 0.9: "strong" };
  const select = el("select", { id: "smoothing", onchange: (event) => { smoothing = Number(event.target.value); redraw(); } },
    ...Object.entries(names).sort().map(([value, name]) => el("option", { value }, name)));
  byId("curve-controls").append(el("label", {}, "smoothing ", select), el("span", { class: "pointer-only" }, "drag to zoom, double-click to reset"));
  redraw();
  const observer = new ResizeObserver(debounced(60, () => shownCharts.forEach(fitChart)));
  observer.observe(byId("charts"));
  return redraw;
}

function fitChart({ u, plot }) {
  const width = plot.clientWidth;
  if (u && width > 0 && width !== u.width) u.setSize({ width, height: CHART_HEIGHT });
}

function showCurves(summary) {
  const isMoreOpen = Boolean(document.querySelector("#charts details[open]"));
  shownCharts.forEach(({ u }) => u?.destroy());
  shownCharts = [];
  const frame = { runs: summary.runs, xs: allSteps(summary.runs), colours: palette(), used: new Set() };
  const parts = CHARTS.map(([title, specs]) => chartGroup(title, specs.flatMap((spec) => resolveSpec(spec, frame))));
  const more = resolveSpecs(unnamedMetrics(frame), frame);
  byId("charts").replaceChildren(runLegend(summary) ?? "", ...parts.filter(Boolean), moreGroup(more, isMoreOpen) ?? "");
  if (!byId("charts").querySelector(".chart")) byId("charts").append(el("p", { class: "notice" }, "No step has been logged yet."));
  drawCharts(shownCharts.filter(({ figure }) => figure.checkVisibility()));
}

/** Buttons that hide a run in all charts. */
function runLegend({ runs }) {
  if (runs.length < 2) return null;
  return el("div", { class: "run-legend", role: "group", "aria-label": "Runs" }, ...runs.map((run, i) => {
    const swatch = el("span", { class: "swatch area" });
    swatch.style.background = `var(--c${i % NUM_COLOURS})`;
    const toggle = (event) => {
      if (!hiddenRuns.delete(i)) hiddenRuns.add(i);
      event.currentTarget.setAttribute("aria-pressed", String(!hiddenRuns.has(i)));
      for (const { u, spec } of shownCharts) if (u) spec.series.filter((one) => one.run === i).forEach((one) => showSeries(u, one, !hiddenRuns.has(i)));
    };
    return el("button", { type: "button", "aria-pressed": String(!hiddenRuns.has(i)), onclick: toggle }, swatch, foreign(run.name));
  }));
}

function chartGroup(title, specs) {
  if (!specs.length) return null;
  return el("div", { class: "chart-group" }, el("h3", {}, title), chartGrid(specs));
}

function moreGroup(specs, isOpen) {
  if (!specs.length) return null;
  const drawAll = (event) => event.target.open && drawCharts(shownCharts.filter(({ u }) => !u));
  return el("details", { class: "chart-group", open: isOpen, ontoggle: drawAll }, el("summary", {}, `more (${specs.length})`), chartGrid(specs));
}

function chartGrid(specs) {
  const charts = specs.map(makeChart);
  shownCharts.push(...charts);
  return el("div", { class: "chart-grid" }, ...charts.map(({ figure }) => figure));
}

function allSteps(runs) {
  const steps = new Set(runs.flatMap((run) => [...run.steps, ...run.evaluations.map((one) => one.step)]));
  return [...steps].sort((a, b) => a - b);
}

/** Charts of one entry of CHARTS: several where several runs would make one unreadable. */
function resolveSpec(spec, frame) {
  const isOne = frame.runs.length === 1;
  if (spec.stack) return isOne ? stackSpec(spec, frame) : [];
  if (spec.several && isOne) return [];
  const curves = [...heldOutCurves(spec, frame), ...metricNames(spec, frame).flatMap((name) => metricCurves(name, spec, frame))];
  if (!curves.length) return [];
  if (isOne) return [finishSpec(spec.title, spec, paint(curves, frame), frame)];
  const byMetric = Map.groupBy(curves, (one) => one.chart);
  if (byMetric.size === 1) return [finishSpec(spec.title, spec, curves, frame)];
  return [...byMetric].map(([title, series]) => finishSpec(title, { hint: series[0].low ? "with 95 % intervals" : null }, series, frame));
}

const resolveSpecs = (specs, frame) => specs.flatMap((spec) => resolveSpec(spec, frame));

function finishSpec(title, spec, series, frame) {
  return { title, hint: spec.hint, xs: frame.xs, series, stacked: false, metrics: series.map((one) => one.metric) };
}

/** One colour per curve; the thin line of training keeps that of the first. */
function paint(curves, frame) {
  return curves.map((one, i) => ({ ...one, colour: frame.colours[i % NUM_COLOURS], dash: i < NUM_COLOURS ? undefined : [5, 4] }));
}

function metricNames(spec, frame) {
  const logged = [...new Set(frame.runs.flatMap((run) => Object.keys(run.metrics)))];
  const wanted = spec.metrics ? spec.metrics.filter((name) => logged.includes(name)) : logged.filter((name) => spec.pattern?.test(name)).sort();
  const found = wanted.filter((name) => frame.runs.some((run) => run.metrics[name]?.some(isNumber)));
  found.forEach((name) => frame.used.add(name));
  return found;
}

/** The curve of a metric in each run that logged it. */
function metricCurves(name, spec, frame) {
  return frame.runs.flatMap((run, i) => {
    const logged = run.metrics[name];
    if (!logged?.some(isNumber)) return [];
    const values = smooth(aligned(run.steps, logged, frame.xs));
    const several = frame.runs.length > 1;
    const short = spec.strip && name.startsWith(spec.strip) ? name.slice(spec.strip.length) : name;
    const label = several ? run.name : spec.heldOut ? "training" : short;
    return [runCurve({ chart: name, metric: name, label, values, width: spec.heldOut ? 1 : 1.75 }, i, frame)];
  });
}

/** Curves of the held-out figures that a chart names, each with its interval. */
function heldOutCurves(spec, frame) {
  if (!spec.heldOut) return [];
  return frame.runs.flatMap((run, i) => {
    const kinds = Map.groupBy(run.evaluations, (one) => `${one.split}\n${one.environment}`);
    return [...kinds.values()].flatMap((series) => {
      const names = [...new Set(series.flatMap((one) => Object.keys(one.figures)))].filter((name) => spec.heldOut.test(name));
      return names.map((name) => heldOutCurve(name, series, kinds.size, i, frame));
    });
  });
}

function heldOutCurve(name, series, numKinds, runIndex, frame) {
  const having = series.filter((one) => one.figures[name]);
  const steps = having.map((one) => one.step);
  const [values, low, high] = ["value", "low", "high"].map((key) => aligned(steps, having.map((one) => one.figures[name][key]), frame.xs));
  const { split, environment } = having[0];
  frame.used.add(`${split}/${name}`);
  const kind = numKinds > 1 ? `${split}, ${environment}` : split;
  const short = name === "rollout/accuracy" ? kind : `${name.replace(/^reward\//, "")}${numKinds > 1 ? ` (${kind})` : ""}`;
  const label = frame.runs.length > 1 ? `${frame.runs[runIndex].name}${numKinds > 1 ? ` (${kind})` : ""}` : short;
  return runCurve({ chart: `${name.replace(/^rollout\//, "")}, held out`, metric: name, label, values, low, high, points: true }, runIndex, frame);
}

function runCurve(curve, runIndex, frame) {
  const shown = !hiddenRuns.has(runIndex);
  return { ...curve, run: runIndex, shown, colour: frame.colours[runIndex % NUM_COLOURS], dash: runIndex < NUM_COLOURS ? undefined : [5, 4] };
}

/** Values at the page's x values, null where a run has none. */
function aligned(steps, values, xs) {
  const at = new Map(steps.map((step, i) => [step, values[i]]));
  return xs.map((x) => (isNumber(at.get(x)) ? at.get(x) : null));
}

/** Exponential moving average without its start at zero. Held-out figures stay as they are. */
function smooth(values) {
  if (!smoothing) return values;
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    sum = smoothing * sum + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return sum / weight;
  });
}

/** The parts of a step's duration as areas, and the rest of the step. */
function stackSpec(spec, frame) {
  const [run] = frame.runs;
  const names = Object.keys(run.metrics).filter((name) => SECONDS.test(name) && !RATES.test(name) && run.metrics[name].some(isNumber)).sort();
  const totals = run.metrics["perf/step_seconds"];
  const hasTotals = Boolean(totals?.some(isNumber));
  if (!names.length && !hasTotals) return [];
  [...names, "perf/step_seconds"].forEach((name) => frame.used.add(name));
  const parts = names.map((name) => ({ label: partLabel(name), metric: name, values: smooth(aligned(run.steps, run.metrics[name], frame.xs)) }));
  if (hasTotals) parts.push(restOf(parts, smooth(aligned(run.steps, totals, frame.xs))));
  const series = parts.map((one, i) => ({ ...one, run: 0, colour: frame.colours[(i + 1) % NUM_COLOURS] }));
  return [{ title: spec.title, hint: null, xs: frame.xs, series, stacked: true, metrics: [...names, "perf/step_seconds"] }];
}

const partLabel = (name) => (name === "sync/seconds" ? "sync" : name.replace(/^perf\//, "").replace(/_(seconds|s)$/, ""));

function restOf(parts, totals) {
  const rest = totals.map((total, at) => (total === null ? null : Math.max(0, total - parts.reduce((sum, one) => sum + (one.values[at] ?? 0), 0))));
  return { label: parts.length ? "other" : "whole step", metric: "perf/step_seconds", values: rest };
}

/** Charts of the metrics that no other chart shows. */
function unnamedMetrics(frame) {
  const names = [...new Set(frame.runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => !frame.used.has(name)).sort();
  return names.map((name) => ({ title: name, metrics: [name] }));
}

/** From a warning to the chart of its metric. */
function goToChart(event, metric) {
  const chart = shownCharts.find(({ spec }) => spec.metrics.includes(metric));
  if (!chart) return;
  event.preventDefault();
  document.querySelectorAll(".chart.marked").forEach((figure) => figure.classList.remove("marked"));
  const details = chart.figure.closest("details");
  if (details) details.open = true;
  chart.figure.classList.add("marked");
  chart.figure.focus();
  chart.figure.scrollIntoView({ block: "center" });
}
