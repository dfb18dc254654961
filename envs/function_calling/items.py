"""Generated questions that require a computation, each with code that computes the answer."""

import math
import random
from typing import Literal

from fuchsia_pl.envs import Item

Kind = Literal["product", "digit_sum", "remainder", "primes", "gcd"]
KINDS: tuple[Kind, ...] = ("product", "digit_sum", "remainder", "primes", "gcd")


def make_item(rng: random.Random, kind: Kind) -> Item:
    """A question with its gold answer and code that computes it.

    >>> item = make_item(random.Random(0), "product")
    >>> sorted(item)
    ['answer', 'code', 'question']
    """
    match kind:
        case "product":
            a, b = rng.randint(1000, 99_999), rng.randint(1000, 99_999)
            return _item(f"What is {a} times {b}?", a * b, f"{a} * {b}")
        case "digit_sum":
            base, power = rng.randint(3, 99), rng.randint(40, 99)
            answer = sum(int(digit) for digit in str(base**power))
            code = f"sum(int(digit) for digit in str({base}**{power}))"
            return _item(f"What is the sum of the digits of {base} to the power of {power}?", answer, code)
        case "remainder":
            base, power, modulus = rng.randint(100, 9999), rng.randint(50, 999), rng.randint(100, 9999)
            question = f"What is the remainder of {base} to the power of {power}, divided by {modulus}?"
            return _item(question, pow(base, power, modulus), f"pow({base}, {power}, {modulus})")
        case "primes":
            low = rng.randint(1000, 50_000)
            high = low + rng.randint(200, 2000)
            answer = sum(all(n % d for d in range(2, math.isqrt(n) + 1)) for n in range(low, high + 1))
            code = f"sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range({low}, {high} + 1))"
            return _item(f"How many prime numbers are there from {low} to {high}?", answer, code)
        case "gcd":
            factor, a, b = (rng.randint(100, 99_999) for _ in range(3))
            question = f"What is the greatest common divisor of {factor * a} and {factor * b}?"
            return _item(
                question, math.gcd(factor * a, factor * b), f"import math\nmath.gcd({factor * a}, {factor * b})"
            )


def make_items(seed: int, number: int, kinds: tuple[Kind, ...]) -> list[Item]:
    """Distinct items, with the kinds in rotation."""
    rng = random.Random(seed)
    found: dict[str, Item] = {}
    while len(found) < number:
        item = make_item(rng, kinds[len(found) % len(kinds)])
        found.setdefault(item["question"], item)
    return list(found.values())


def _item(question: str, answer: int, code: str) -> Item:
    return {"question": question, "answer": str(answer), "code": code}
