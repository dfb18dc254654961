r"""Two readers of numbers: a strict one for rewards of the form, and a lenient one for the value.

Texts that each of them reads as the number 1072:

| written                                                                  | strict | lenient |
|--------------------------------------------------------------------------|--------|---------|
| `1072`, `+1072`, `1072.`, `1072.00`, `1,072`, `$1072`, `€1072`, `1072%`   | yes    | yes     |
| `1 072` (also narrow and LaTeX spaces), `1{,}072`, `1,\!072`              | no     | yes     |
| `£1072`, `\$1072`, `US$1072`, `1072€`, `1072 dollars`, `1072\text{ km}`   | no     | yes     |
| `$1072$`, `\(1072\)`, `\boxed{1072}`, `$\boxed{1072}$`, `\text{1072}`     | no     | yes     |
| `**1072**`, `_1072_`, one or two marks of code, `= 1072`, `#### 1072`     | no     | yes     |
| `"1072"`, `'1072'` and typographic quotes; invisible marks around it       | no     | yes     |
| `1.072e3`, `1.072 \times 10^3`; for 1.5 `3/2`, `1 1/2`, `1\frac{1}{2}`    | no     | yes     |
| `1072 clips`, `about 1072`, `x = 1072`, `1072 or 1073`, `1000 + 72`       | no     | no      |
| `2144/2` (a division to compute), `10,72`, `0,072`, `(1072)`, `1072...`   | no     | no      |
| digits of other scripts, numbers in words, `0x430`, `nan`                 | no     | no      |

Units are allowed if they are in `units.py`. A minus sign is `-` or U+2212. Both readers are exact: 0.3333 is not 1/3.
"""

import re
from fractions import Fraction
from typing import Literal, NamedTuple

from fuchsia_pl.envs.rewards.units import CURRENCY, canonical_unit, same_unit
from fuchsia_pl.envs.rewards.wrappers import unwrapped

Scorer = Literal["lenient", "strict"]

# Longer digit strings are not answers, and Python converts them slowly or not at all.
MAX_NUMBER_CHARS = 60
MAX_CHARS = 200
MAX_EXPONENT = 300
NUMBER = re.compile(r"[+-]?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+|\.(?=$))?", flags=re.ASCII)

# Replacements of LaTeX commands and of signs of other alphabets, applied before a number is read.
SPELLINGS = (
    (re.compile(r"\\!|\{\}"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile("[\u00a0\u2007\u2009\u202f~]" + r"|\\[,;: ]|\\quad"), " "),
    (re.compile("\u2212"), "-"),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree"), "°"),
    (re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r" \1/\2 "),
    (re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])"), r" \1/\2 "),
    (
        re.compile(r"\s*(?:\\times|\\cdot|[\u00d7\u00b7*])\s*10\s*\^\s*(?:\{\s*(-?[0-9]{1,3})\s*\}|(-?[0-9]{1,3}))"),
        r"e\1\2",
    ),
)
AMOUNT = re.compile(
    rf"""
    (?P<sign>[+-]?) \s* (?P<currency>{CURRENCY})? \s* (?P<inner_sign>[+-]?)
    (?: (?P<whole> [0-9]+ )? (?(whole)\s+) (?P<over> [1-9][0-9]* ) \s* / \s* (?P<under> [1-9][0-9]* )
      | (?P<integer> [1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+ | [1-9][0-9]{{0,2}}(?:[ ][0-9]{{3}})+ | [0-9]* )
        (?P<decimals> \.[0-9]* )? (?: [eE] (?P<exponent> [+-]?[0-9]{{1,3}} ) )?
    )
    \s* (?P<unit> .* )
    """,
    flags=re.ASCII | re.VERBOSE | re.IGNORECASE,
)


class Amount(NamedTuple):
    """A number with its unit.

    Attributes:
        value: Exact value.
        unit: Unit in its canonical spelling; "" if there is none.

    >>> Amount(Fraction(50), "km/hour").unit
    'km/hour'
    """

    value: Fraction
    unit: str


def parse_number(text: str) -> Fraction | None:
    """The strict reader: the exact value of a bare decimal number; None for any other text, including digits of other scripts.

    Commas may separate groups of three digits. A dollar or euro sign before the number, and a percent sign or one final full
    stop after it, are ignored.

    >>> parse_number("$1,234.50"), parse_number("-3"), parse_number("1,23"), parse_number("three")
    (Fraction(2469, 2), Fraction(-3, 1), None, None)
    """
    stripped = text.strip()
    if len(stripped) > MAX_NUMBER_CHARS:
        return None
    sign = stripped[:1] if stripped[:1] in ("+", "-") else ""
    body = stripped[len(sign) :].strip().removeprefix("$").removeprefix("€").removesuffix(".").removesuffix("%").strip()
    number = (sign + body) if not body.startswith(("+", "-")) else body if not sign else ""
    if not any(character in "0123456789" for character in number) or not NUMBER.fullmatch(number):
        return None
    return Fraction(number.replace(",", ""))


def read_number(text: str) -> Amount | None:
    r"""The lenient reader: a number in any form of the table above; None for any other text.

    >>> read_number("50 km/h"), read_number("72 or 73")
    (Amount(value=Fraction(50, 1), unit='km/hour'), None)
    >>> [str(read_number(text).value) for text in (r"$\boxed{1{,}072}$", "1 1/2", "**72**", "1e-07")]
    ['1072', '3/2', '72', '1/10000000']
    """
    plain = unwrapped(text) if len(text) <= MAX_CHARS else ""
    for pattern, spelling in SPELLINGS:
        plain = pattern.sub(spelling, plain)
    found = AMOUNT.fullmatch(plain.strip())
    if found is None or (found["sign"] and found["inner_sign"]):
        return None
    value = _fraction(found) if found["over"] else _decimal(found)
    unit = canonical_unit(found["currency"] or "", found["unit"])
    if value is None or unit is None:
        return None
    return Amount(-value if "-" in (found["sign"], found["inner_sign"]) else value, unit)


def same_number(answer: str, gold: Amount, scorer: Scorer) -> bool:
    """Whether an answer is a number with the gold value. If both have units, the units must agree.

    Args:
        answer: Text of the answer.
        gold: The correct number.
        scorer: Reader of the answer.

    >>> same_number("$72", Amount(Fraction(72), ""), "lenient"), same_number("72%", Amount(Fraction(72), "$"), "lenient")
    (True, False)
    """
    if scorer == "strict":
        return parse_number(answer) == gold.value
    amount = read_number(answer)
    return (
        amount is not None
        and amount.value == gold.value
        and (not amount.unit or not gold.unit or same_unit(amount.unit, gold.unit))
    )


def _fraction(found: re.Match[str]) -> Fraction | None:
    """A fraction or a mixed number. A division with an integer result is not computed yet, so it is not an answer."""
    part = Fraction(int(found["over"]), int(found["under"]))
    if part.denominator == 1 or (found["whole"] and (part > 1 or len(found["over"]) > 2)):
        return None  # "1 100/300" may be 1 1/3 or 1100/300
    return part + int(found["whole"] or 0)


def _decimal(found: re.Match[str]) -> Fraction | None:
    digits = re.sub("[, ]", "", found["integer"]) + (found["decimals"] or "")
    exponent = int(found["exponent"] or 0)
    if not 0 < len(digits.strip(".")) <= MAX_NUMBER_CHARS or abs(exponent) > MAX_EXPONENT:
        return None
    return Fraction(f"0{digits}0" if "." in digits else digits) * Fraction(10) ** exponent
