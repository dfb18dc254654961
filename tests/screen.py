"""A terminal for tests: what a person sees after a text was written to it."""

import re
import unicodedata

TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07]*\x07|[\r\n]|[^\x1b\r\n]+")


def screen_of(written: str, width: int = 80) -> list[str]:
    """The lines that a terminal of a width shows, of a text with the sequences that rich writes. Others raise."""
    lines, row, column = [""], 0, 0
    for token in TOKEN.finditer(written):
        text, number = token[0], token[1]
        if text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif token[2] == "m":
            continue
        elif token[2] == "K":
            lines[row] = "" if number == "2" else lines[row][:column]
        elif token[2] == "A":
            row = max(row - int(number or 1), 0)
        elif token[2] is not None:
            raise ValueError(f"unexpected {text!r}")
        else:
            for char in text:
                assert not unicodedata.category(char).startswith("C"), repr(char)
                if column == width:
                    row, column = row + 1, 0
                    lines += [""] * (row + 1 - len(lines))
                lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
                column += 1
    return [line.rstrip() for line in lines]
