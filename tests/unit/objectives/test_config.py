from dataclasses import asdict, fields, replace

import pytest

from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.corrections import SamplerCorrection
from fuchsia_pl.objectives.credit import CriticSettings
from fuchsia_pl.objectives.presets import PRESETS, Parts
from fuchsia_pl.objectives.surrogates import SAPOSettings

# Copied from the papers by hand: advantage, surrogate, level of the ratio, bounds, reduction.
PUBLISHED = {
    "reinforce": ("reward", "reinforce", None, None, "constant"),
    "ppo": ("group_norm", "clip", "token", (0.2, 0.2), "token_mean"),
    "grpo": ("group_norm", "clip", "token", (0.2, 0.2), "sequence_mean"),
    "dr_grpo": ("group_mean", "clip", "token", (0.2, 0.2), "constant"),
    "dapo": ("group_norm", "clip", "token", (0.2, 0.28), "token_mean"),
    "rloo": ("leave_one_out", "reinforce", None, None, "constant"),
    "reinforce_pp": ("batch_norm", "clip", "token", (0.2, 0.2), "token_mean"),
    "gspo": ("group_norm", "clip", "sequence", (3e-4, 4e-4), "sequence_mean"),
    "cispo": ("group_norm", "cispo", "token", (1.0, 4.0), "token_mean"),
    "sapo": ("group_norm", "sapo", "token", None, "sequence_mean"),
    # e^-0.4 = 0.67032 and e^0.4 = 1.491825
    "gmpo": ("group_norm", "gmpo", None, (0.32968, 0.491825), "sequence_mean"),
}


@pytest.mark.parametrize("loss_type", sorted(PRESETS))
def test_a_preset_is_what_its_paper_states(loss_type):
    parts = LossConfig(loss_type).parts
    advantage, surrogate, level, bounds, reduction = PUBLISHED[loss_type]
    assert (parts.advantage, parts.surrogate, parts.reduction) == (advantage, surrogate, reduction)
    assert level is None or parts.ratio_level == level
    assert bounds is None or (parts.clip_low, parts.clip_high) == bounds
    assert (parts.truncated, parts.max_refills) == (("penalise", 3) if loss_type == "dapo" else ("keep", 0))
    summed = loss_type in ("reinforce", "rloo")
    assert parts.constant_length == (1 if summed else None)
    assert parts.kl_in == ("reward" if summed or loss_type == "reinforce_pp" else "loss")


OVERRIDES = {
    "advantage": "group_mean",
    "surrogate": "cispo",
    "reduction": "constant",
    "clip_low": 0.11,
    "clip_high": 0.33,
    "dual_clip": 3.0,
    "ratio_level": "sequence_token",
    "constant_length": 7,
    "kl_estimator": "k1",
    "kl_in": "reward",
    "truncated": "mask",
    "reward_aggregation": "normalize_then_sum",
    "max_refills": 9,
}


def test_every_part_can_be_overridden_by_itself():
    assert OVERRIDES.keys() == {part.name for part in fields(Parts)}
    for name, value in OVERRIDES.items():
        together = {"reduction": "constant"} if name == "constant_length" else {}
        changed = asdict(LossConfig("grpo", **{name: value}, **together).parts)
        moved = {"kl_estimator": "k1"} if name == "kl_in" else {}
        expected = {**asdict(PRESETS["grpo"]), **together, **moved, name: value}
        assert changed == expected


@pytest.mark.parametrize("loss_type", sorted(PRESETS))
def test_the_resolved_settings_taken_as_a_config_give_the_same_objective(loss_type):
    config = LossConfig(loss_type, beta=0.1)
    resolved = config.resolved()
    nested = {"sampler_correction": SamplerCorrection, "critic": CriticSettings, "sapo": SAPOSettings}
    again = LossConfig(**resolved | {name: kind(**resolved[name]) for name, kind in nested.items()})
    assert again.parts == config.parts
    assert again.correction_mode == config.correction_mode
    # every part is pinned, so another preset changes none of those that have an effect
    assert again.given.keys() >= {"advantage", "surrogate", "reduction", "kl_in"}


def test_the_correction_is_on_with_the_trainers_ratio_and_off_with_the_samplers():
    assert LossConfig().correction_mode == "truncate"
    assert (LossConfig().sampler_correction.low, LossConfig().sampler_correction.high) == (0.0, 2.0)
    assert LossConfig(old_logprobs="sampler").correction_mode == "disabled"


def test_where_the_kl_goes():
    without, in_loss, in_reward = LossConfig("grpo"), LossConfig("grpo", beta=0.1), LossConfig("rloo", beta=0.1)
    assert [(c.kl_in_loss, c.kl_in_reward) for c in (without, in_loss, in_reward)] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    assert [c.needs_signals for c in (without, in_loss, in_reward)] == [False, False, True]
    assert LossConfig("ppo", advantage="gae").needs_signals
    free = LossConfig("rloo", beta=0.0)  # without a weight the reference is not computed
    assert not free.kl_in_reward
    assert not free.needs_signals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clip_low": 0.0}, "clip_low must be above 0 and at most 1, got 0"),
        ({"clip_low": 1.5}, "clip_low must be above 0 and at most 1, got 1.5"),
        ({"clip_high": 0.0}, "clip_high must be above 0, got 0"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, got 1"),
        ({"beta": -0.1}, "beta must be 0 or more, got -0.1"),
        ({"entropy_weight": -0.1}, "entropy_weight must be 0 or more, got -0.1"),
        ({"num_policy_updates": 0}, "num_policy_updates must be 1 or more, got 0"),
        ({"mini_batches": 0}, "model.loss.mini_batches must be 1 or more, got 0"),
        ({"max_refills": -1}, "max_refills must be 0 or more, got -1"),
        ({"overlong_buffer": 0.0}, "overlong_buffer must be above 0 and at most 1, got 0"),
        ({"reduction": "constant", "constant_length": 0}, "constant_length must be 1 or more, got 0"),
        ({"constant_length": 3}, 'constant_length has no effect with reduction "sequence_mean"'),
        ({"surrogate": "reinforce", "clip_low": 0.1}, 'clip_low has no effect with surrogate "reinforce"'),
        ({"surrogate": "reinforce", "ratio_level": "token"}, 'ratio_level has no effect with surrogate "reinforce"'),
        ({"surrogate": "sapo", "clip_high": 0.1}, 'clip_high has no effect with surrogate "sapo"'),
        ({"surrogate": "gmpo", "ratio_level": "sequence"}, 'ratio_level has no effect with surrogate "gmpo"'),
        ({"surrogate": "cispo", "dual_clip": 3.0}, 'dual_clip has no effect with surrogate "cispo"'),
        ({"surrogate": "clip", "sapo": SAPOSettings(2.0)}, 'sapo has no effect with surrogate "clip"'),
        (
            {"surrogate": "tanh"},
            'surrogate must be one of reinforce, clip, cispo, sapo.*, or the dotted path .* got "tanh"',
        ),
        ({"advantage": "group_nrom"}, 'advantage must be one of reward, group_mean, .* got "group_nrom"'),
        ({"surrogate": "reinforce", "old_logprobs": "sampler"}, "old_logprobs has no effect with surrogate"),
        (
            {"surrogate": "reinforce", "num_policy_updates": 2},
            'num_policy_updates=2 needs a surrogate with a ratio: "reinforce" has',
        ),
        (
            {"surrogate": "reinforce", "mini_batches": 4},
            'mini_batches=4 needs a surrogate with a ratio: "reinforce" has',
        ),
        (
            {"old_logprobs": "sampler", "sampler_correction": SamplerCorrection(mode="truncate")},
            "it would be corrected twice",
        ),
        ({"kl_estimator": "k3_unbiased", "kl_in": "reward"}, "corrects a gradient"),
        ({"advantage": "batch_norm", "max_refills": 1}, 'like all others with advantage "batch_norm"'),
        (
            {"reward_aggregation": "normalize_then_sum", "advantage": "group_mean"},
            'needs advantage "group_norm", got "group_mean"',
        ),
        (
            {"reward_aggregation": "normalize_then_sum", "advantage": "turn_group"},
            'needs advantage "group_norm", got "turn_group"',
        ),
        ({"reward_aggregation": "normalize_then_sum", "kl_in": "reward", "beta": 0.1}, "set kl_in: loss"),
        (
            {"loss_type": "gspo", "advantage": "turn_group"},
            'and ratio_level "sequence" gives all of them the same credit',
        ),
        (
            {"loss_type": "gspo", "advantage": "gae"},
            '"gae" differs from token to token of a row, and ratio_level "sequence"',
        ),
        ({"loss_type": "gspo", "advantage": "teacher"}, "set ratio_level: sequence_token"),
        (
            {"loss_type": "gmpo", "advantage": "gae"},
            'surrogate "gmpo" gives all of them the same credit: set surrogate: clip',
        ),
        (
            {"loss_type": "sapo", "ratio_level": "sequence", "advantage": "reward", "kl_in": "reward", "beta": 0.1},
            '"reward" differs from token to token of a row',
        ),
        ({"critic": CriticSettings(gamma=0.9)}, 'critic has no effect with advantage "group_norm": leave it out'),
        ({"overlong_buffer": 0.5}, 'overlong_buffer has no effect with truncated "keep": leave it out'),
        ({"beta": float("nan")}, "has beta=nan: it must be finite"),
        ({"clip_high": float("inf")}, "has clip_high=inf: it must be finite"),
    ],
)
def test_settings_that_turn_the_objective_around_or_do_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LossConfig(**{"loss_type": "grpo", **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gamma": 1.1}, "gamma must be at least 0 and at most 1, got 1.1"),
        ({"lam": -0.1}, "lam must be at least 0 and at most 1, got -0.1"),
        ({"value_clip": 0.0}, "value_clip must be above 0, got 0"),
        ({"value_weight": 0.0}, "value_weight must be above 0, got 0"),
    ],
)
def test_what_is_no_critic_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        CriticSettings(**settings)


def test_a_temperature_of_sapo_that_is_not_positive_is_refused():
    for settings in ({"temperature_positive": 0.0}, {"temperature_negative": -1.0}):
        with pytest.raises(ValueError, match=rf"sapo\.{next(iter(settings))} must be above 0, got"):
            SAPOSettings(**settings)


def test_a_config_can_be_changed_by_its_preset_alone():
    assert replace(LossConfig("grpo"), loss_type="rloo").parts == PRESETS["rloo"]
