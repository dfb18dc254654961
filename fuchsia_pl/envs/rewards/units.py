"""Units that may follow a number. Other words are rejected: "72 thousand", "72 short" and "72 dozen" are not 72."""

import re

# Canonical spelling of each unit, and its other spellings.
SPELLINGS = {
    "$": ("us$", "usd", "dollar", "dollars", "us dollars", "bucks"),
    "€": ("eur", "euro", "euros"),
    "£": ("gbp", "pounds sterling"),
    "¥": ("yen", "jpy"),
    "₹": ("rupee", "rupees", "inr"),
    "%": ("percent", "per cent"),
    "mm": ("millimeter", "millimeters", "millimetre", "millimetres"),
    "cm": ("centimeter", "centimeters", "centimetre", "centimetres"),
    "meter": ("meters", "metre", "metres"),
    "km": ("kilometer", "kilometers", "kilometre", "kilometres"),
    "inch": ("inches", "in"),
    "foot": ("feet", "ft"),
    "yard": ("yards", "yd"),
    "mile": ("miles", "mi"),
    "mg": ("milligram", "milligrams"),
    "gram": ("g", "grams"),
    "kg": ("kilogram", "kilograms"),
    "lb": ("lbs",),
    "pound": ("pounds",),
    "ounce": ("ounces", "oz"),
    "ml": ("milliliter", "milliliters", "millilitre", "millilitres"),
    "liter": ("liters", "litre", "litres"),
    "gallon": ("gallons",),
    "second": ("seconds", "s", "sec"),
    "minute": ("minutes", "min"),
    "hour": ("hours", "h", "hr", "hrs"),
    "day": ("days",),
    "week": ("weeks",),
    "month": ("months",),
    "year": ("years",),
    "°": ("degree", "degrees"),
    "°c": ("degrees celsius",),
    "°f": ("degrees fahrenheit",),
    "mile/hour": ("mph",),
    "meter/second": ("m/s",),
    "km/hour": ("kph", "kmh"),
}
# Words for several units, which are not equal to each other: "72 pounds" may be £72 or 72 lb.
AMBIGUOUS = {"pound": ("£", "lb")}
UNITS = {spelling: unit for unit, others in SPELLINGS.items() for spelling in (unit, *others)}
SIGNS = ("US$", "$", "€", "£", "¥", "₹", "USD", "EUR", "GBP")
CURRENCY = "|".join(re.escape(sign) for sign in SIGNS)
LENGTHS = ("mm", "cm", "meter", "km", "inch", "foot", "yard", "mile")
POWERS = {"square": 2, "sq": 2, "cubic": 3, "^2": 2, "^{2}": 2, "\u00b2": 2, "^3": 3, "^{3}": 3, "\u00b3": 3}
PER = re.compile(r"\s*/\s*|(?:^|\s+)(?:per|an?)\s+")


def canonical_unit(currency: str, written: str) -> str | None:
    """The unit of a number in canonical spelling; "" if there is none, None if it is unknown.

    Args:
        currency: Currency sign before the number; "" if there is none.
        written: Text after the number.

    >>> canonical_unit("$", ""), canonical_unit("", "Dollars"), canonical_unit("$", "per hour"), canonical_unit("", "dozen")
    ('$', '$', '$/hour', None)
    >>> canonical_unit("", "square feet"), canonical_unit("", "cm^2"), canonical_unit("", "^2"), canonical_unit("$", "million")
    ('foot^2', 'cm^2', None, None)
    """
    before, after = UNITS[currency.lower()] if currency else "", _unit(" ".join(written.lower().split()))
    if after is None or not before:
        return after
    if not after or same_unit(after, before):
        return before
    return before + after if after.startswith("/") else None


def same_unit(one: str, other: str) -> bool:
    """Whether two units in canonical spelling may be the same.

    >>> same_unit("pound", "£"), same_unit("lb", "pound"), same_unit("£", "lb"), same_unit("£/hour", "pound/hour")
    (True, True, False, True)
    """
    parts, others = one.split("/"), other.split("/")
    return len(parts) == len(others) and all(
        a == b or a in AMBIGUOUS.get(b, ()) or b in AMBIGUOUS.get(a, ()) for a, b in zip(parts, others, strict=True)
    )


def _unit(text: str) -> str | None:
    if not text or text in UNITS:
        return UNITS.get(text, "")
    for mark, power in POWERS.items():
        length = UNITS.get(text.removeprefix(f"{mark} ") if mark.isalpha() else text.removesuffix(mark).rstrip())
        if length in LENGTHS:
            return f"{length}^{power}"
    first, *others = PER.split(text)
    if len(others) != 1 or others[0] not in UNITS or (first and first not in UNITS):
        return None
    return f"{UNITS.get(first, '')}/{UNITS[others[0]]}"
