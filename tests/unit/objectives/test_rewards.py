import pytest
import torch

from fuchsia_pl.objectives.rewards import overlong_penalty


@pytest.mark.parametrize(
    ("length", "penalty"),
    # max 20 with a slope of 4: nothing up to 16, then a quarter per token, -1 at 20 and beyond
    [(0, 0.0), (16, 0.0), (17, -0.25), (19, -0.75), (20, -1.0), (25, -1.0)],
)
def test_both_ends_of_the_slope_by_hand(length, penalty):
    assert overlong_penalty(torch.tensor(length), max_tokens=20, buffer_tokens=4).item() == penalty
