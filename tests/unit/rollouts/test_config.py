import pytest

from fuchsia_pl.rollouts.config import SamplingConfig


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"group_size": 0}, "group_size must be 1 or more, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"validation_temperature": -1.0}, "validation_temperature must be 0 or more, got -1.0"),
        ({"validation_samples": 0}, "validation_samples must be 1 or more, got 0"),
        (
            {"validation_samples": 4},
            "validation_samples is 4 and validation_temperature is 0: greedy samples are all alike",
        ),
        (
            {"validation_max_completion_tokens": 0},
            "validation_max_completion_tokens must be above 0 and below max_length=1024",
        ),
        ({"validation_max_completion_tokens": 1024}, "below max_length=1024, got 1024"),
        ({"max_completion_tokens": 0}, "max_completion_tokens must be above 0 and below max_length=1024, got 0"),
        ({"max_completion_tokens": 64, "max_length": 64}, "below max_length=64, got 64"),
    ],
)
def test_what_cannot_be_sampled_or_learned_from_is_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        SamplingConfig(**setting)


def test_the_held_out_split_has_its_own_limit():
    assert SamplingConfig(max_completion_tokens=64).held_out.max_completion_tokens == 64
    own = SamplingConfig(max_completion_tokens=64, validation_max_completion_tokens=128).held_out
    assert (own.max_completion_tokens, own.max_length) == (128, 1024)
