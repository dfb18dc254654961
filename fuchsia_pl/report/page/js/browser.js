"use strict";
// The browser of rollouts: joins filters, list and group, and opens permanent links.

let browser = null; // set once the rollouts are unpacked

function startBrowser(data, kept) {
  data.rows.forEach((row, i) => (row.index = i));
  const groups = groupRows(data.rows);
  const context = {
    data, groups, shown: groups, group: null, matches: () => true, filter: { ...NO_FILTER, ...kept?.filter },
    colouring: kept?.colouring ?? "advantage", order: kept?.order ?? "sampled", splits: [...new Set(groups.map((group) => group.split))],
    rewardRange: rewardRange(data.rows), excerpt: excerptOf(data),
  };
  const byItem = Map.groupBy(groups, itemKey);
  context.sameItem = (group) => byItem.get(itemKey(group)).sort((a, b) => a.step - b.step);
  context.byId = new Map(data.rows.map((row) => [row.id, row]));
  browser = context;
  layOut(context);
  applyFilter(context);
  window.addEventListener("hashchange", () => openLink(context));
  const wanted = kept?.group ? context.shown.find((group) => group.key === kept.group) : null;
  if (wanted) context.select(wanted);
  openLink(context);
}

const itemKey = (group) => `${group.split} ${group.item} ${group.rows[0].environment}`;

function rewardRange(rows) {
  let [low, high] = [Infinity, -Infinity];
  for (const { reward } of rows) {
    if (!isNumber(reward)) continue;
    low = Math.min(low, reward);
    high = Math.max(high, reward);
  }
  return low <= high ? [low, high] : [0, 1];
}

/** What a list row quotes: the prompt from where prompts begin to differ. */
function excerptOf(data) {
  const start = sharedBeginning(data.prompts);
  return (group) => {
    const prompt = data.prompts[group.rows[0].prompt] ?? "";
    return (start ? "… " : "") + beginning(prompt.slice(start, start + 200), 160).trim();
  };
}

function layOut(context) {
  const view = el("div", { class: "group-view", id: "group-view", role: "region", "aria-label": "Group of siblings", tabindex: -1 });
  const count = el("p", { class: "count", id: "count", role: "status" });
  context.list = groupList(context, (index) => context.select(context.shown[index]));
  context.select = (group) => selectGroup(context, view, group);
  context.move = (by) => context.shown.length && context.select(context.shown[clamp(context.list.selected + by, 0, context.shown.length - 1)]);
  context.set = (name, value) => {
    context[name] = value;
    context.select(context.group);
  };
  context.count = count;
  const form = el("div", {});
  context.drawForm = () => form.replaceChildren(filterForm(context.filter, context.data, (how) => changeFilter(context, how)));
  context.drawForm();
  const wide = matchMedia("(min-width: 641px)");
  const box = el("details", { class: "filter-box", open: wide.matches }, el("summary", {}, "Filters and order"), form);
  wide.addEventListener("change", () => (box.open = wide.matches));
  context.filterBox = box;
  byId("rollout-browser").replaceChildren(box, el("div", { class: "panes" }, el("div", { class: "list-pane" }, count, context.list.element), view));
}

function changeFilter(context, how) {
  if (how === "reset") {
    Object.assign(context.filter, NO_FILTER);
    context.drawForm();
  }
  applyFilter(context);
}

/** Lists the groups that have a matching rollout. The one that is shown stays if it is among them. */
function applyFilter(context) {
  const { filter, data } = context;
  context.matches = predicate(filter, data);
  const matching = data.rows.filter(context.matches);
  const isAll = matching.length === data.rows.length;
  // Equal groups stay in the order of the last step.
  context.shown = [...new Set(matching.map((row) => row.group))].sort(SORTS.last[1]).sort(SORTS[filter.sort][1]);
  context.count.textContent = isAll
    ? `${plural(context.groups.length, "group")}, ${plural(data.rows.length, "rollout")}`
    : `${context.shown.length.toLocaleString("en-US")} of ${plural(context.groups.length, "group")}, ${matching.length.toLocaleString("en-US")} of ${plural(data.rows.length, "rollout")} match`;
  context.list.element.scrollTop = 0;
  context.list.show(context.shown);
  context.select(context.shown.includes(context.group) ? context.group : context.shown[0]);
}

function selectGroup(context, view, group) {
  hideReadout();
  context.group = group ?? null;
  context.list.select(context.shown.indexOf(group));
  if (!group) view.replaceChildren(el("p", { class: "notice" }, context.data.rows.length ? "No rollout matches these filters." : "There are no rollouts yet."));
  else view.replaceChildren(...groupView(group, context));
  markFound(view, context.filter.text);
}

/** Opens the rollout that the address names, and lifts filters that hide it. */
function openLink(context) {
  if (!location.hash.startsWith("#r=")) return;
  const row = context.byId.get(linkedId(location.hash));
  byId("link-missing")?.remove();
  if (!row) {
    const words = "The linked rollout is not in this report: the report holds a sample of a long run's rollouts, or it is of another run.";
    byId("rollout-browser").prepend(el("p", { class: "notice", id: "link-missing", role: "alert" }, words));
    byId("browser").scrollIntoView();
    return;
  }
  if (!context.shown.includes(row.group)) changeFilter(context, "reset");
  context.select(row.group);
  goToCard(row);
}

function linkedId(hash) {
  try {
    return decodeURIComponent(hash.slice(3));
  } catch {
    return "";
  }
}

/** Marks what the search found. It adds ranges, not elements, where the browser has highlights. */
function markFound(view, text) {
  if (!window.CSS?.highlights) return;
  CSS.highlights.delete("found");
  const wanted = searchPattern(text);
  if (!wanted) return;
  const ranges = [];
  for (const block of view.querySelectorAll(".text")) ranges.push(...rangesIn(block, new RegExp(wanted.source, "gi")));
  if (ranges.length) CSS.highlights.set("found", new Highlight(...ranges));
}

const MOST_RANGES = 200;

/** Ranges of the matches in an element, over the borders of its tokens. */
function rangesIn(block, wanted) {
  const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
  const [nodes, starts] = [[], []];
  let length = 0;
  while (walker.nextNode()) {
    nodes.push(walker.currentNode);
    starts.push(length);
    length += walker.currentNode.data.length;
  }
  const place = (at) => {
    const i = starts.findLastIndex((start) => start <= at);
    return [nodes[i], at - starts[i]];
  };
  return [...block.textContent.matchAll(wanted)].slice(0, MOST_RANGES).map((match) => {
    const range = new Range();
    range.setStart(...place(match.index));
    const [node, offset] = place(match.index + match[0].length - 1);
    range.setEnd(node, offset + 1);
    return range;
  });
}
