"use strict";
// Tokens of a part, coloured by a value of each, and the value at the pointer or the keyboard's cursor.

const COLOURINGS = { advantage: "advantage", gap: "trainer − sampler gap", none: "nothing" };
const NUM_LEVELS = 5;
const SMALLEST_SCALE = { advantage: 1e-6, gap: 0.01, none: 1 }; // below it a gap is rounding, not worth a colour
const LONGEST_TOKEN = 1000; // characters; longer than any of a tokenizer

const tokenFacts = new WeakMap(); // text element -> {tokens, advantages, gaps, row}

/** The values by which a part is coloured: one per token, one for all, or null. */
function colourValues(row, part, [, advantages, gaps], colouring) {
  if (colouring === "gap") return gaps;
  if (colouring === "advantage" && part.policy) return advantages ?? row.advantage;
  return null;
}

/** Largest absolute value of a group, which gets the strongest colour. */
function colourScale(rows, colouring) {
  let largest = 0;
  for (const row of rows) {
    row.parts.forEach((part, i) => {
      const values = colourValues(row, part, tokenData(row)[i], colouring);
      for (const value of Array.isArray(values) ? values : [values]) {
        if (isNumber(value)) largest = Math.max(largest, Math.abs(value));
      }
    });
  }
  return largest > 0 ? Math.max(largest, SMALLEST_SCALE[colouring]) : 0;
}

function colourClass(value, scale) {
  if (!isNumber(value) || !scale) return "";
  const share = Math.abs(value) / scale;
  if (share < 0.02) return "";
  return `${value > 0 ? "p" : "n"}${clamp(Math.ceil(NUM_LEVELS * share), 1, NUM_LEVELS)}`;
}

/** The text of a part, with a span per token where the tokens are there. */
function tokenBlock(row, part, columns, { colouring, scale }) {
  const [tokens, advantages, gaps] = columns;
  const values = colourValues(row, part, columns, colouring);
  if (!tokens?.length) return plainBlock(part.text, values, scale);
  return folded(tokens.length, "token", (start, limit) => {
    const block = el("div", { class: "text", dir: "auto", tabindex: 0, role: "group", "aria-label": `${plural(tokens.length, "token")}. Left and right arrow keys show the values of each.` });
    tokenFacts.set(block, { tokens, advantages, gaps, row });
    const end = appendTokens(block, tokens, values, scale, start, limit);
    markUnbroken(block, block.textContent);
    return { block, end };
  });
}

function plainBlock(text, values, scale) {
  const tint = Array.isArray(values) ? "" : colourClass(values, scale);
  return text.trim() || !tint ? textBlock(text, { class: `text ${tint}` }) : textBlock(text);
}

/** Appends tokens until `limit` characters, at least one, and returns where they end. */
function appendTokens(block, tokens, values, scale, start, limit) {
  let room = limit;
  let i = start;
  for (; i < tokens.length && room > 0; i++) {
    block.append(tokenSpan(tokens[i], i, Array.isArray(values) ? values[i] : values, scale));
    room -= tokens[i].length || 1;
  }
  return i;
}

function tokenSpan(token, index, value, scale) {
  const span = document.createElement("span");
  const tint = colourClass(value, scale);
  span.className = `t${tint ? ` ${tint}` : ""}${token === "\n" ? " newline" : ""}`;
  span.textContent = visible(token.length > LONGEST_TOKEN ? `${beginning(token, LONGEST_TOKEN)}…` : token);
  span.tokenIndex = index;
  return span;
}

/** Listeners for all tokens inside an element. */
function watchTokens(element) {
  element.addEventListener("pointerover", (event) => event.target.tokenIndex === undefined ? hideReadout() : showReadout(event.target));
  element.addEventListener("pointerleave", hideReadout);
  element.addEventListener("focusout", hideReadout);
  element.addEventListener("keydown", moveToken);
}

function moveToken(event) {
  const block = event.target;
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!move || !tokenFacts.has(block)) return;
  event.preventDefault();
  const active = block.querySelector(".t.active");
  const children = [...block.children];
  const span = children[clamp(children.indexOf(active) + move, 0, children.length - 1)];
  active?.classList.remove("active");
  span.classList.add("active");
  span.scrollIntoView({ block: "nearest" });
  showReadout(span);
  announce(byId("readout").textContent);
}

function showReadout(span) {
  const { tokens, advantages, gaps, row } = tokenFacts.get(span.parentElement);
  const i = span.tokenIndex;
  const spelled = beginning(tokens[i], 40).replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  const values = [["advantage", advantages ? advantages[i] : row.advantage], ["gap", gaps?.[i]]].filter(([, value]) => isNumber(value));
  const readout = byId("readout");
  readout.replaceChildren(`token ${i + 1}: `, foreign(spelled, { class: "mono" }), ...values.map(([name, value]) => ` · ${name} ${formatSigned(value)}`));
  readout.hidden = false;
  const [box, own] = [span.getBoundingClientRect(), readout.getBoundingClientRect()];
  readout.style.left = `${clamp(box.left, 4, innerWidth - own.width - 4)}px`;
  readout.style.top = `${box.top > own.height + 8 ? box.top - own.height - 5 : box.bottom + 5}px`;
}

function hideReadout() {
  byId("readout").hidden = true;
}

/** Colours and what they stand for. */
function colourLegend(scale, colouring) {
  if (colouring === "none") return null;
  if (!scale) return el("span", {}, colouring === "gap" ? "no gaps were recorded for these rollouts" : "these rollouts have no advantages, or all are 0");
  const names = [...[5, 4, 3, 2, 1].map((level) => `n${level}`), "", ...[1, 2, 3, 4, 5].map((level) => `p${level}`)];
  const steps = el("span", { class: "steps", "aria-hidden": "true" }, ...names.map((name) => el("i", { class: name || null })));
  const meaning = colouring === "gap" ? "blue: more likely for the trainer" : "blue: made more likely";
  return el("span", { class: "scale" }, formatNumber(-scale), steps, formatSigned(scale), el("span", {}, `(${meaning})`));
}
