"use strict";
// The header: what the run is, how it stands, what is wrong, its main figures.

function showStatus(summary) {
  const [run] = summary.runs;
  byId("brand").replaceChildren(foreign(run.name));
  byId("status").replaceChildren(
    el("h1", {}, foreign(run.name)),
    statusLine(run.status),
    run.status.reason ? el("p", { class: "reason" }, foreign(run.status.reason)) : "",
    ...[progressBar(run.status), facts(run), warningList(run.warnings), tiles(run), otherRuns(summary.runs)].filter(Boolean),
  );
  byId("footer").replaceChildren(
    `Written ${formatTime(summary.generated_at)} by Fuchsia-PL `, foreign(summary.version), `. Folder of the run: `,
    foreign(run.folder, { class: "mono" }), ". Curves by uPlot (MIT licence, Leon Sorokin).",
  );
}

function statusLine(status) {
  const known = ["running", "finished", "stopped", "failed", "killed"].includes(status.outcome);
  const dot = el("span", { class: `dot ${known ? status.outcome : "unknown"}`, "aria-hidden": "true" });
  return el("p", { class: "status-line" }, dot, foreign(status.words || status.outcome));
}

function progressBar(status) {
  if (!isNumber(status.max_steps) || status.max_steps <= 0 || status.outcome === "finished") return null;
  const share = clamp(status.step / status.max_steps, 0, 1);
  const bar = el("div", {});
  bar.style.width = `${100 * share}%`;
  const words = `step ${status.step} of ${status.max_steps}`;
  return el("div", { class: "progress", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": status.max_steps, "aria-valuenow": status.step, "aria-label": words }, bar);
}

function facts(run) {
  const { status } = run;
  const words = [
    isNumber(status.step) ? `step ${status.step}${isNumber(status.max_steps) ? ` of ${status.max_steps}` : ""}` : null,
    isNumber(status.seconds) ? `${formatSeconds(status.seconds)}${status.outcome === "running" ? " so far" : ""}` : null,
    isNumber(status.seconds_left) ? `about ${formatSeconds(status.seconds_left)} left` : null,
    status.started_at ? `started ${formatTime(status.started_at)}` : null,
    status.ended_at ? `ended ${formatTime(status.ended_at)}` : null,
  ].filter(Boolean);
  return el("div", { class: "facts" }, ...words.map((word) => el("span", {}, word)));
}

function formatTime(iso) {
  const time = new Date(iso);
  if (Number.isNaN(time.getTime())) return visible(iso);
  return time.toLocaleString("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" });
}

function warningList(warnings) {
  if (!warnings.length) return null;
  return el("div", { class: "warnings", role: "region", "aria-label": plural(warnings.length, "warning") }, ...warnings.map(warningCard));
}

function warningCard(warning) {
  const where = el("span", { class: "where" }, `step ${formatNumber(warning.step)}`);
  if (warning.metric) where.append(" · ", el("a", { href: "#curves", onclick: (event) => goToChart(event, warning.metric) }, foreign(warning.metric)));
  return el("div", { class: "warning" },
    el("b", {}, foreign(warning.text)),
    warning.advice ? el("span", {}, foreign(warning.advice)) : null,
    where,
  );
}

function tiles(run) {
  const found = [...evaluationTiles(run.evaluations), rewardTile(run), gapTile(run)].filter(Boolean);
  return found.length ? el("div", { class: "tiles" }, ...found) : null;
}

/** First and last evaluation of each held-out split, by its accuracy or, without one, its reward. */
function evaluationTiles(evaluations) {
  const kinds = [...Map.groupBy(evaluations, (one) => `${one.split} ${one.environment}`).values()];
  return kinds.slice(0, 4).map((series) => {
    const name = ["rollout/accuracy", "reward/mean"].find((each) => series.some((one) => one.figures[each]));
    const having = series.filter((one) => one.figures[name]).sort((a, b) => a.step - b.step);
    if (!name || !having.length) return null;
    const [first, last] = [having[0], having[having.length - 1]];
    const environment = kinds.length > 1 ? [" · ", foreign(last.environment)] : [];
    const title = [`${name === "reward/mean" ? "reward" : "accuracy"}, `, foreign(last.split), ...environment];
    // Runs of earlier versions have neither intervals nor numbers of items.
    const note = [formatInterval(last.figures[name]), `at step ${last.step}`, isNumber(last.num_items) ? `(${plural(last.num_items, "item")})` : ""].filter(Boolean).join(" ");
    return tile(title, first === last ? null : first.figures[name].value, last.figures[name].value, note);
  });
}

function rewardTile(run) {
  const logged = (run.metrics["reward/mean"] ?? []).filter(isNumber);
  if (!logged.length) return null;
  const [first, last] = [logged[0], logged[logged.length - 1]];
  return tile(["reward, training"], logged.length > 1 ? first : null, last, `first and last of ${plural(logged.length, "step")}; best ${formatNumber(Math.max(...logged))}`);
}

function gapTile(run) {
  const logged = (run.metrics["train/logprob_gap"] ?? []).filter(isNumber);
  if (!logged.length) return null;
  return tile(["trainer/sampler gap"], null, logged[logged.length - 1], `mean |logprob difference| of a token; largest ${formatNumber(Math.max(...logged))}`);
}

function tile(title, from, to, note) {
  const figure = el("div", { class: "figure" });
  if (from !== null) figure.append(el("span", { class: "from" }, `${formatNumber(from)} → `));
  figure.append(formatNumber(to));
  return el("div", { class: "tile" }, el("h3", {}, ...title), figure, el("div", { class: "note" }, note));
}

/** Held-out accuracy of a run, from its first to its last evaluation. */
function heldOutWords(run) {
  const found = run.evaluations.filter((one) => one.figures["rollout/accuracy"]).sort((a, b) => a.step - b.step);
  if (!found.length) return null;
  const [first, last] = [found[0], found[found.length - 1]].map((one) => one.figures["rollout/accuracy"]);
  const words = found.length > 1 ? `${formatNumber(first.value)} → ${formatNumber(last.value)}` : formatNumber(last.value);
  return el("span", {}, `held-out accuracy ${words} ${formatInterval(last)}`);
}

/** One line for each run that is laid over the first. */
function otherRuns(runs) {
  if (runs.length < 2) return null;
  const lines = runs.map((run, i) => {
    const swatch = el("span", { class: "swatch area" });
    swatch.style.background = `var(--c${i % NUM_COLOURS})`;
    return el("div", { class: "run-line" }, swatch, el("b", {}, foreign(run.name)), el("span", { class: "muted" }, foreign(run.status.words)), heldOutWords(run));
  });
  return el("div", { class: "runs" }, ...lines);
}
