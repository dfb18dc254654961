"use strict";
// The list of groups. Only the rows in view exist, so that ten thousand scroll like ten.

const ROW_HEIGHT = 64;
const MARGIN_ROWS = 4;
const MOST_DOTS = 24;

/** A list box: `show(groups)` fills it, `select(index)` marks and reveals one. */
function groupList(context, onSelect) {
  const spacer = el("div", { class: "spacer" });
  const element = el("div", { class: "list", id: "group-list", role: "listbox", tabindex: 0, "aria-label": "Groups of rollouts" }, spacer);
  const list = { element, groups: [], selected: -1 };
  const draw = () => drawWindow(list, spacer, context, onSelect);
  let frame = 0;
  element.addEventListener("scroll", () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(draw);
  }, { passive: true });
  element.addEventListener("keydown", (event) => listKey(event, list, onSelect));
  new ResizeObserver(draw).observe(element);
  list.show = (groups) => {
    list.groups = groups;
    spacer.style.height = `${groups.length * ROW_HEIGHT}px`;
    draw();
  };
  list.select = (index) => {
    list.selected = index;
    if (index >= 0) reveal(element, index);
    draw();
  };
  return list;
}

function reveal(element, index) {
  const [top, bottom] = [index * ROW_HEIGHT, (index + 1) * ROW_HEIGHT];
  if (top < element.scrollTop) element.scrollTop = top;
  else if (bottom > element.scrollTop + element.clientHeight) element.scrollTop = bottom - element.clientHeight;
}

function drawWindow(list, spacer, context, onSelect) {
  const { element, groups, selected } = list;
  const first = Math.max(0, Math.floor(element.scrollTop / ROW_HEIGHT) - MARGIN_ROWS);
  const last = Math.min(groups.length, Math.ceil((element.scrollTop + element.clientHeight) / ROW_HEIGHT) + MARGIN_ROWS);
  const options = [];
  for (let i = first; i < last; i++) options.push(option(groups[i], i, groups.length, i === selected, context, onSelect));
  spacer.replaceChildren(...options);
  if (selected >= first && selected < last) element.setAttribute("aria-activedescendant", `option-${selected}`);
  else element.removeAttribute("aria-activedescendant");
}

function option(group, index, count, isSelected, context, onSelect) {
  const top = el("div", { class: "top" }, el("span", {}, ...groupTitle(group, context)), el("span", { class: "mean" }, formatReward(group.mean)));
  const element = el("div", { class: "option", id: `option-${index}`, role: "option", "aria-selected": String(isSelected), "aria-setsize": count, "aria-posinset": index + 1, onclick: () => onSelect(index) },
    top, foreign(context.excerpt(group), { class: "excerpt" }), dots(group, context));
  element.style.transform = `translateY(${index * ROW_HEIGHT}px)`;
  return element;
}

/** A square per sibling, darker for a higher reward. */
function dots(group, { matches, rewardRange: [low, high] }) {
  const squares = group.rows.slice(0, MOST_DOTS).map((row) => {
    const level = isNumber(row.reward) ? Math.round((4 * (row.reward - low)) / (high - low || 1)) : "n";
    return el("i", { class: `q${level}${matches(row) ? "" : " unmatched"}` });
  });
  return el("div", { class: "dots", "aria-hidden": "true" }, ...squares);
}

function listKey(event, list, onSelect) {
  const page = Math.max(1, Math.floor(list.element.clientHeight / ROW_HEIGHT) - 1);
  const last = list.groups.length - 1;
  const to = { ArrowDown: list.selected + 1, ArrowUp: list.selected - 1, PageDown: list.selected + page, PageUp: list.selected - page, Home: 0, End: last }[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  onSelect(clamp(to, 0, last));
}
