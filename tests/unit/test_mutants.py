import pytest

from tests.mutants import mutants_of

SOURCE = '''
TOLERANCE = 0.5 - 1

class Settings:
    """A default is 1 - 2."""
    low: float = 1.0 - 0.5

    def __post_init__(self): self.low = -self.low

    def high(self) -> float | None: return {body}

def _checked(x): return -x

def after(mask: int | None = -1):
    assert mask < 0, f"{{-mask}}"
    y: int | None = mask
    if y:
        raise ValueError(f"{{y - 1}} is below {{-y}}")
'''


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("a - b + c", {"add:1": "(a - b - c)", "sub:1": "(a + b) + c"}),
        ("(n - 1).x", {"sub:1": "(n + 1).x", "shift:1": "(n).x"}),
        ("-(a * b)", {"usub:1": "(a * b)", "mult:1": "-(a / b)"}),
        ("'é', a / b", {"div:1": "'é', (a * b)", "divisor:1": "'é', a"}),
        ("(4.0 * a)", {"mult:1": "(4.0 / a)", "constant:1": "(2.0 * a)"}),
        ("a < b == c", {"lt:1": "(a > b == c)", "eq:1": "(a < b != c)"}),
        ("not a and b", {"and:1": "(not a)", "and:2": "b", "not:1": "a and b"}),
        ("~a | b", {"bitor:1": "(~a)", "bitor:2": "b", "invert:1": "a | b"}),
        ("x.exp().detach()", {"detach:1": "x.exp()", "exp:1": "x.detach()"}),
        ("x.clamp(a, b).clamp(min=1)", {"clamp:1": "x.clamp(min=1)"}),
        ("x.masked_fill(a, 0)", {"masked_fill:1": "x"}),
        ("torch.where(m, x, 0.0)", {"where:1": "x"}),
        ("torch.where(m, x, y)", {"where:1": "x", "where:2": "y"}),
        (
            "torch.minimum(x.amax(0), y)",
            {"minimum:1": "torch.maximum(x.amax(0), y)", "amax:1": "torch.minimum(x.amin(0), y)"},
        ),
        ("max(x.sum(dim=1), 1)", {"max:1": "min(x.sum(dim=1), 1)", "sum:1": "max(x.mean(dim=1), 1)"}),
        ("range(n, -1, s)", {"range:1": "range(n, -1 + 1, s)", "usub:1": "range(n, 1, s)"}),
        ("x.cumsum(1)", {"cumsum:1": "x", "cumsum:2": "x.flip(1).cumsum(1).flip(1)"}),
        ("d.num_tokens", {"num_tokens:1": "d.num_rollouts"}),
        ("token_mean(x, m, num_tokens)", {"num_tokens:1": "token_mean(x, m, batch.step.denominators.num_rollouts)"}),
    ],
)
def test_each_operator_is_applied_once_and_one_at_a_time(body, expected):
    mutants = mutants_of(SOURCE.format(body=body), "tiny.py")
    after = {mutant.id: mutant.after.partition("return ")[2] for mutant in mutants}
    assert after == {f"tiny.py:Settings.high:{name}": text for name, text in expected.items()}
    assert [mutant.source for mutant in mutants] == [SOURCE.format(body=text) for text in after.values()]
