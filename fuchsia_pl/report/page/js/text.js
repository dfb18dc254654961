"use strict";
// Text of models, datasets and users. It is hostile until proven otherwise.

const FOLD_AT = 6000; // characters of a part that are shown before `show all`

// Characters that are invisible, reorder their surroundings, or cannot be displayed. U+200C and U+200D stay: Persian
// and emoji need them, and neither reorders anything. The last range is tags, a way to hide text.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|\p{Cs}|[\u{e0000}-\u{e007f}]/gu;

function symbolOf(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** Text in which nothing is invisible: control characters, marks of direction and lone surrogates as symbols. */
function visible(text) {
  return String(text ?? "").replace(UNSEEN, symbolOf);
}

/** A short text on one line, such as a name. Its direction cannot leak into what surrounds it. */
function foreign(text, attributes = {}) {
  return el("bdi", { dir: "auto", ...attributes }, visible(text).replace(/\s+/g, " "));
}

/** The beginning of a text: at most `limit` UTF-16 units, never half a character. */
function beginning(text, limit) {
  const end = /[\ud800-\udbff]/.test(text[limit - 1] ?? "") ? limit - 1 : limit;
  return text.slice(0, end);
}

/** A block of text; a long one is folded. */
function textBlock(text, attributes = {}) {
  const block = el("div", { class: "text", dir: "auto", ...attributes });
  if (text.length <= FOLD_AT) {
    block.textContent = visible(text);
    return block;
  }
  block.textContent = visible(beginning(text, FOLD_AT));
  const button = showAllButton(text.length, "characters", () => {
    block.textContent = visible(text);
    button.remove();
  });
  return el("div", {}, block, button);
}

function showAllButton(count, noun, show) {
  const label = `… show all ${count.toLocaleString("en-US")} ${noun}`;
  return el("button", { type: "button", class: "more", onclick: show }, label);
}
