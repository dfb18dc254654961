"use strict";
// Data of the page: the summary at once, the rollouts after the first paint.

function readSummary() {
  return JSON.parse(byId("summary").textContent);
}

/** Rollouts, unpacked from base64 of gzip of JSON. */
async function unpackRollouts() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old to unpack them (it lacks DecompressionStream)");
  const element = byId("rollouts");
  const packed = element.textContent.trim();
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(packed) : bytesOf(atob(packed));
  element.textContent = ""; // frees a copy
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function bytesOf(binary) {
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** Groups of siblings, in the order of the rows. Each row refers to its group. */
function groupRows(rows) {
  const groups = new Map();
  for (const row of rows) {
    const key = `${row.split} ${row.step} ${row.item} ${row.environment}`;
    let group = groups.get(key);
    if (!group) groups.set(key, (group = { key, split: row.split, step: row.step, item: row.item, rows: [] }));
    group.rows.push(row);
    row.group = group;
  }
  for (const group of groups.values()) finishGroup(group);
  return [...groups.values()];
}

function finishGroup(group) {
  group.rows.sort((a, b) => a.sibling - b.sibling || a.row - b.row);
  group.size = new Set(group.rows.map((row) => row.sibling)).size;
  const rewards = group.rows.filter((row) => !row.row).map((row) => row.reward).filter(isNumber);
  group.mean = rewards.length ? rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length : null;
  const ranked = group.rows.filter((row) => isNumber(row.reward)).sort(byRewardThenAdvantage);
  const [best, worst] = [ranked[0], ranked[ranked.length - 1]];
  group.spread = best ? best.reward - worst.reward : null;
  // Equal siblings are neither best nor worst.
  const differs = best && byRewardThenAdvantage(best, worst) !== 0;
  group.best = differs ? best : null;
  group.worst = differs ? worst : null;
}

function byRewardThenAdvantage(a, b) {
  return b.reward - a.reward || (b.advantage ?? 0) - (a.advantage ?? 0);
}

/** Columns of a row's parts: tokens, advantages, gaps. They stay packed until the row is shown. */
function tokenData(row) {
  if (!row.token_columns) row.token_columns = JSON.parse(row.token_data);
  return row.token_columns;
}

/** Mean absolute trainer/sampler gap of a row, null without gaps. */
function meanGap(row) {
  if (row.mean_gap !== undefined) return row.mean_gap;
  const gaps = JSON.parse(row.token_data).flatMap(([, , gaps]) => gaps ?? []).filter(isNumber);
  row.mean_gap = gaps.length ? gaps.reduce((sum, gap) => sum + Math.abs(gap), 0) / gaps.length : null;
  return row.mean_gap;
}

const rowLength = (row) => row.parts.reduce((sum, part) => sum + (part.policy ? part.text.length : 0), 0);

/** Length of the beginning that all texts share, cut at a word: a template's head says nothing about an item. */
function sharedBeginning(texts) {
  if (texts.length < 2) return 0;
  let [first, last] = [texts[0], texts[0]];
  for (const text of texts) {
    if (text < first) first = text;
    if (text > last) last = text;
  }
  let length = 0;
  while (length < first.length && first[length] === last[length]) length++;
  return length === first.length ? 0 : first.slice(0, length).search(/\S*$/);
}
