"""Settings that a resume uses from the checkpoint, and those from the config."""

from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from transformers import get_linear_schedule_with_warmup

from fuchsia_pl.policy.optimization import Recipe, ResumeChoice, resumed
from fuchsia_pl.types import ConfigError

ADAM = partial(torch.optim.AdamW, lr=0.4, weight_decay=0.0)
TENTH = partial(LinearLR, start_factor=1.0, end_factor=0.1)


def saved(recipe: Recipe, step: int) -> dict:
    """Optimizer and schedule in the checkpoint of a run with one weight and a gradient that is always 1."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = recipe.optimizer([weight])
    scheduler = recipe.scheduler(optimizer) if recipe.scheduler else None
    for _ in range(step):
        weight.grad = torch.ones(1)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {
        "global_step": step,
        "optimization": recipe.described(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()] if scheduler else [],
    }


def after(checkpoint: dict, recipe: Recipe, choice: ResumeChoice) -> tuple[dict, list]:
    """Optimizer state and schedules that Lightning would restore."""
    resumed(checkpoint, recipe, choice).put_into(checkpoint)
    return checkpoint["optimizer_states"][0], checkpoint["lr_schedulers"]


def test_what_is_the_same_passes_untouched_whatever_was_chosen():
    recipe = Recipe(ADAM, partial(TENTH, total_iters=25))
    for choice in (ResumeChoice(), ResumeChoice("config", "config"), ResumeChoice("checkpoint", "checkpoint")):
        decision = resumed(saved(recipe, 7), recipe, choice)
        assert decision.settings is None
        assert decision.scheduler_state is None
        assert decision.optimization == recipe.described()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            Recipe(partial(ADAM, lr=0.2), partial(TENTH, total_iters=25)),
            "optimizer.*lr is 0.4 in the checkpoint and 0.2 in the",
        ),
        (
            Recipe(partial(ADAM, betas=(0.8, 0.9)), partial(TENTH, total_iters=25)),
            r"betas is \[0.9, 0.999\] in the check",
        ),
        (
            Recipe(partial(torch.optim.SGD, lr=0.4), partial(TENTH, total_iters=25)),
            "class is torch.optim.adamw.AdamW in .*SGD",
        ),
        (
            Recipe(ADAM, partial(TENTH, total_iters=50)),
            "scheduler.*total_iters is 25 in the checkpoint and 50 in the config",
        ),
        (
            Recipe(ADAM, None),
            "scheduler.*class is torch.optim.lr_scheduler.LinearLR in the checkpoint and None in the config",
        ),
        (
            Recipe(ADAM, partial(CosineAnnealingLR, T_max=25)),
            "class is torch.*LinearLR in the checkpoint and .*CosineAnnealingLR",
        ),
    ],
)
def test_a_difference_is_refused_with_both_values_until_one_is_chosen(recipe, words):
    checkpoint = saved(Recipe(ADAM, partial(TENTH, total_iters=25)), 5)
    with pytest.raises(ConfigError, match=words) as caught:
        resumed(checkpoint, recipe, ResumeChoice())
    part = "optimizer" if "optimizer" in str(caught.value).partition(" than ")[0] else "scheduler"
    assert f"--resume.{part} checkpoint, to continue" in str(caught.value)
    assert f"--resume.{part} config" in str(caught.value)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (partial(LambdaLR, lr_lambda=lambda step: 0.5**step), partial(LambdaLR, lr_lambda=lambda step: 0.9**step)),
        (
            partial(get_linear_schedule_with_warmup, num_warmup_steps=2, num_training_steps=25),
            partial(get_linear_schedule_with_warmup, num_warmup_steps=2, num_training_steps=50),
        ),
        (partial(OneCycleLR, max_lr=1.0, total_steps=30), partial(OneCycleLR, max_lr=2.0, total_steps=30)),
        (
            lambda o: SequentialLR(o, [LinearLR(o, total_iters=3), CosineAnnealingLR(o, T_max=9)], milestones=[3]),
            lambda o: SequentialLR(o, [LinearLR(o, total_iters=3), CosineAnnealingLR(o, T_max=8)], milestones=[3]),
        ),
    ],
    ids=["functions", "transformers", "one cycle", "in sequence"],
)
def test_no_difference_of_schedules_goes_unnoticed(before, now):
    with pytest.raises(ConfigError, match=r"Decide with --resume\.scheduler checkpoint"):
        resumed(saved(Recipe(ADAM, before), 2), Recipe(ADAM, now), ResumeChoice())
    assert resumed(saved(Recipe(ADAM, now), 2), Recipe(ADAM, now), ResumeChoice()).settings is None


def test_the_configs_schedule_continues_where_it_would_be():
    # Of 50 steps from 0.4 to 0.04, 25 are done: 0.4 * (1 - 0.9 * 25 / 50) = 0.22. The checkpoint's 25 have ended at 0.04.
    checkpoint = saved(Recipe(ADAM, partial(TENTH, total_iters=25)), 25)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.04)
    longer = Recipe(ADAM, partial(TENTH, total_iters=50))
    optimizer, (schedule,) = after(checkpoint, longer, ResumeChoice(scheduler="config"))
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.22)
    assert (schedule["last_epoch"], schedule["total_iters"]) == (25, 50)
    assert optimizer["state"][0]["step"] == 25  # the momenta are kept
    rates = longer.outlook(optimizer["param_groups"][0], schedule, 25)
    assert rates[0] == pytest.approx(0.22)
    assert rates[25] == pytest.approx(0.04)


def test_the_checkpoints_settings_continue_where_they_are_chosen():
    recipe = Recipe(ADAM, partial(TENTH, total_iters=25))
    checkpoint = saved(recipe, 5)
    expected = checkpoint["optimizer_states"][0]
    other = Recipe(partial(ADAM, lr=0.2), partial(TENTH, total_iters=50))
    decision = resumed(checkpoint, other, ResumeChoice("checkpoint", "checkpoint"))
    decision.put_into(checkpoint)
    assert checkpoint["optimizer_states"][0] is expected
    assert decision.optimization == recipe.described()  # the next checkpoint contains the same


def test_the_configs_learning_rate_is_scheduled_from_the_first_step_on():
    # 0.2 * (1 - 0.9 * 5 / 25) = 0.164
    checkpoint = saved(Recipe(ADAM, partial(TENTH, total_iters=25)), 5)
    optimizer, _ = after(
        checkpoint, Recipe(partial(ADAM, lr=0.2), partial(TENTH, total_iters=25)), ResumeChoice(optimizer="config")
    )
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.164)
    assert optimizer["param_groups"][0]["initial_lr"] == 0.2
    assert optimizer["param_groups"][0]["params"] == [0]


def test_another_class_of_optimizer_starts_without_momenta_and_cannot_be_the_checkpoints():
    checkpoint = saved(Recipe(ADAM, None), 5)
    sgd = Recipe(partial(torch.optim.SGD, lr=0.1, momentum=0.9), None)
    with pytest.raises(ConfigError, match=r"--resume.optimizer checkpoint is impossible.*another class"):
        resumed(checkpoint, sgd, ResumeChoice(optimizer="checkpoint"))
    decision = resumed(checkpoint, sgd, ResumeChoice(optimizer="config"))
    decision.put_into(checkpoint)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = sgd.optimizer([weight])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    assert not optimizer.state
    assert optimizer.param_groups[0]["momentum"] == 0.9
    restored = ADAM([weight])  # as after FSDP2
    restored.load_state_dict(saved(Recipe(ADAM, None), 5)["optimizer_states"][0])
    decision.apply(restored)
    assert not restored.state
    assert "betas" not in restored.param_groups[0]
    assert restored.param_groups[0]["params"] == [weight]


def test_a_function_of_a_schedule_cannot_be_the_checkpoints():
    checkpoint = saved(Recipe(ADAM, partial(LambdaLR, lr_lambda=lambda step: 0.5**step)), 2)
    with pytest.raises(ConfigError, match="does not hold the functions of a schedule"):
        resumed(
            checkpoint,
            Recipe(ADAM, partial(LambdaLR, lr_lambda=lambda step: 0.9**step)),
            ResumeChoice(scheduler="checkpoint"),
        )


def test_a_schedule_with_fewer_steps_than_the_run_is_refused():
    short = Recipe(ADAM, partial(OneCycleLR, max_lr=1.0, total_steps=4))
    with pytest.raises(ConfigError, match=r"model\.lr_scheduler has fewer steps than the run"):
        resumed(saved(Recipe(ADAM, None), 9), short, ResumeChoice(scheduler="config"))


def test_a_plateau_keeps_what_it_has_seen_and_takes_the_new_learning_rate():
    checkpoint = saved(Recipe(ADAM, None), 3)
    recipe = Recipe(ADAM, ReduceLROnPlateau)
    scheduler = recipe.build()[1]
    scheduler.step(5.0)
    checkpoint |= {"optimization": recipe.described(), "lr_schedulers": [scheduler.state_dict()]}
    optimizer, (state,) = after(checkpoint, Recipe(partial(ADAM, lr=0.2), ReduceLROnPlateau), ResumeChoice("config"))
    assert state["best"] == 5.0
    assert optimizer["param_groups"][0]["lr"] == 0.2
