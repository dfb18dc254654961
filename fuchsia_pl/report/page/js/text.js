"use strict";
// Text of models, datasets and users. It is hostile until proven otherwise.

const FOLD_AT = 6000; // characters of a part that are shown at first
const PIECE = 20_000; // characters of each further block
const PIECES_PER_CLICK = 5;

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
  if (text.length <= limit) return text;
  const end = /[\ud800-\udbff]/.test(text[limit - 1] ?? "") ? limit - 1 : limit;
  return text.slice(0, end);
}

/** A block of text; a long one is folded. */
function textBlock(text, attributes = {}) {
  return folded(text.length, "character", (start, limit) => {
    const piece = beginning(text.slice(start, start + limit + 1), limit);
    const block = el("div", { class: "text", dir: "auto", ...attributes }, visible(piece));
    markUnbroken(block, piece);
    return { block, end: start + piece.length };
  });
}

/**
 * Blocks of which the first is shown, and a button that appends more. A browser lays out one huge block in minutes, and
 * many small ones at once. `makePiece(start, limit)` gives a block of about `limit` characters, and where it ends.
 */
function folded(size, noun, makePiece) {
  const { block, end } = makePiece(0, FOLD_AT);
  if (end >= size) return block;
  const place = el("div", {}, block);
  let at = end;
  const button = moreButton("", () => {
    for (let i = 0; i < PIECES_PER_CLICK && at < size; i++) {
      const next = makePiece(at, PIECE);
      button.before(next.block);
      at = next.end;
    }
    label();
  });
  const label = () => (at < size ? (button.textContent = `… show more of ${plural(size, noun)}`) : button.remove());
  label();
  place.append(button);
  return place;
}

/** A word of thousands of letters is broken anywhere, which is quick, instead of where it first does not fit. */
function markUnbroken(block, text) {
  if (/\S{1000}/.test(text)) block.classList.add("unbroken");
}

function moreButton(label, show) {
  return el("button", { type: "button", class: "more", onclick: show }, label);
}
