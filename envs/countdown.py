"""The numbers game: find an expression of the given numbers that equals the target.

item    {"numbers": [3, 25, 7, 4], "target": 96, "solution": "(25 - 4 + 3) * 4"}   (of 3, 25, 4 and so on)
prompt  Using the numbers 3, 25, 7, 4, make 96. …
gold    <thinking>…</thinking><answer>(25 - 4 + 3) * 4</answer>
"""

import ast
import operator
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from fuchsia_pl.envs import ConfigError, Item, Message, Rollout, SingleTurnEnvironment
from fuchsia_pl.envs.rewards import checks_gold, format_tags, last_answer, last_turn, parse_number, unwrapped

# Enough for an expression of 8 small numbers. Parsing and evaluating a text of this size takes microseconds.
MAX_CHARS = 200
MAX_NUMBER = 10_000
MAX_TRIES = 5
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
# Signs that a policy may write, and the operators of Python that they mean.
SIGNS = {"\u2212": "-", "\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\\times": "*", "\\cdot": "*", "\\div": "/"}
SYSTEM = (
    "Think inside <thinking> and </thinking>, then give one expression inside <answer> and </answer>, with + - * / and "
    "parentheses, without an equals sign."
)


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression of integers, and the numbers in it; None for any other text.

    Allowed are + - * / with the signs that people write for them, and parentheses. The expression may be in a LaTeX box,
    between dollar signs or in bold, and a correct result may follow it: "(25 + 7) * 3 = 96". The syntax tree is evaluated with
    rationals and nothing is executed. Powers are not allowed, so the size of a result is bounded by that of its expression.

    >>> evaluate("(1 + 2) / 4")
    (Fraction(3, 4), [1, 2, 4])
    >>> evaluate("9**9**9"), evaluate("1 / 0"), evaluate("__import__('os')"), evaluate("٣ + 1")
    (None, None, None, None)
    """
    if len(expression) > MAX_CHARS:
        return None
    plain = unwrapped(expression)
    for sign, operation in SIGNS.items():
        plain = plain.replace(sign, operation)
    left, equals, result = plain.partition("=")
    tree = _parsed(left.strip()) if plain.isascii() else None
    numbers: list[int] = []
    value = _value(tree.body, numbers) if tree is not None else None
    if value is None or (equals and parse_number(result) != value):
        return None
    return value, numbers


def gold_problem(item: Item) -> str | None:
    """Describes the first invalid field of an item; None if all are valid.

    >>> gold_problem({"numbers": [1, "2"], "target": 3, "use_all": False})
    "'numbers' is no list of whole numbers: [1, '2']"
    """
    numbers, target = item["numbers"], item["target"]
    if not isinstance(numbers, list) or not numbers or any(type(number) is not int for number in numbers):
        return f"'numbers' is no list of whole numbers: {numbers!r}"
    if type(target) is not int:
        return f"'target' is no whole number: {target!r}"
    return None if type(item["use_all"]) is bool else f"'use_all' is neither true nor false: {item['use_all']!r}"


@checks_gold(gold_problem)
def correct(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """1.0 if the last `<answer>` equals the target and uses each number at most once (exactly once with `use_all`)."""
    return [float(_is_right(r)) for r in rollouts]


class Countdown(SingleTurnEnvironment):
    """The numbers game. Each item is generated from an expression, so each has a solution.

    Args:
        num_numbers: Numbers per item.
        largest: The numbers are 1 to `largest`.
        use_all: Whether an answer must use every number. Otherwise it uses each at most once.
        num_train: Number of training items.
        num_validation: Number of held-out items.
        format_weight: Weight of the reward `format`. The weight of `correct` is 1.0.

    Raises:
        ConfigError: A number is out of range, or there are fewer distinct items than requested.
    """

    def __init__(
        self,
        num_numbers: int = 4,
        largest: int = 50,
        use_all: bool = False,
        num_train: int = 8192,
        num_validation: int = 128,
        format_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if not 2 <= num_numbers <= 8 or not 2 <= largest <= MAX_NUMBER or num_train < 1 or num_validation < 1:
            raise ConfigError(
                f"Countdown takes 2 to 8 numbers up to 2 to {MAX_NUMBER} and 1 or more items, got num_numbers={num_numbers}, "
                f"largest={largest}, num_train={num_train}, num_validation={num_validation}"
            )
        self.reward_functions = [correct, format_tags("thinking", "answer")]
        self.reward_weights = {"format": format_weight}
        rng = random.Random(0)  # the items do not depend on the seed of the run
        made: dict[tuple[Any, ...], Item] = {}
        for _ in range(100 * (num_train + num_validation)):
            item = _make_item(rng, num_numbers, largest, use_all)
            if item is not None:
                made.setdefault((*sorted(item["numbers"]), item["target"]), item)
            if len(made) == num_train + num_validation:
                break
        else:
            raise ConfigError(
                f"only {len(made)} different items exist with num_numbers={num_numbers} and largest={largest}: raise these, or "
                f"lower num_train={num_train}"
            )
        items = list(made.values())
        self._validation, self._train = items[:num_validation], items[num_validation:]

    def train_items(self) -> list[Item]:
        """The items that are not held out."""
        return self._train

    def validation_items(self) -> list[Item]:
        """The held-out items."""
        return self._validation

    def messages(self, item: Item) -> list[Message]:
        """The request, the numbers and the target."""
        numbers, once = ", ".join(map(str, item["numbers"])), "exactly once" if item["use_all"] else "at most once"
        question = f"Using each of the numbers {numbers} {once}, make {item['target']}."
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]

    def gold_turns(self, item: Item) -> list[str]:
        """The expression from which the item was generated."""
        thought = f"{item['solution']} is {item['target']}."
        return [f"<thinking>{thought}</thinking>\n<answer>{item['solution']}</answer>"]


def _parsed(expression: str) -> ast.Expression | None:
    for _ in range(MAX_TRIES):
        try:
            return ast.parse(expression, mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):  # errors of the parser on malformed text
            return None
        except SystemError:  # Python 3.11 miscounts recursion if another thread parses at the same time
            continue
    return None


def _value(node: ast.expr, numbers: list[int]) -> Fraction | None:
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= MAX_NUMBER:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, numbers)
        return None if value is None else -value
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
        return None
    left, right = _value(node.left, numbers), _value(node.right, numbers)
    if left is None or right is None or (isinstance(node.op, ast.Div) and right == 0):
        return None
    return OPERATORS[type(node.op)](left, right)


def _is_right(rollout: Rollout) -> bool:
    answer = last_answer(last_turn(rollout))
    found = evaluate(answer) if answer is not None else None
    if found is None:
        return False
    value, used = found
    given: Counter[int] = Counter(rollout.item["numbers"])
    fits = Counter(used) == given if rollout.item["use_all"] else Counter(used) <= given
    return fits and value == rollout.item["target"]


def _make_item(rng: random.Random, num_numbers: int, largest: int, use_all: bool) -> Item | None:
    """Random numbers and an expression of them. None if its value is not an integer from 1 to MAX_NUMBER, or is one of them."""
    numbers = [rng.randint(1, largest) for _ in range(num_numbers)]
    used = rng.sample(numbers, num_numbers if use_all else rng.randint(2, num_numbers))
    solution = str(used[0])
    for index, number in enumerate(used[1:], start=2):
        solution = f"{solution} {rng.choice('+-*/')} {number}"
        if index < len(used):
            solution = f"({solution})"
    found = evaluate(solution)
    if found is None or found[0].denominator != 1 or not 0 < found[0] <= MAX_NUMBER or found[0] in numbers:
        return None
    return {"numbers": numbers, "target": int(found[0]), "solution": solution, "use_all": use_all}
