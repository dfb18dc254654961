"""A class that replaces another gets none of its arguments: optimizers, schedulers, environments, engines, loggers."""

import inspect
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from fuchsia_pl.cli.class_change import fresh_arguments
from fuchsia_pl.cli.parser import SuggestingParser

OPTIMIZERS = [
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD", "SparseAdam"),
]
# Each with its required arguments.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "torch.optim.lr_scheduler.StepLR": {"step_size": 7},
    "torch.optim.lr_scheduler.MultiStepLR": {"milestones": [3, 5]},
    "torch.optim.lr_scheduler.ExponentialLR": {"gamma": 0.5},
    "torch.optim.lr_scheduler.CosineAnnealingLR": {"T_max": 9},
    "torch.optim.lr_scheduler.LinearLR": {},
    "torch.optim.lr_scheduler.ConstantLR": {},
    "torch.optim.lr_scheduler.PolynomialLR": {},
    "lightning.pytorch.cli.ReduceLROnPlateau": {"monitor": "loss"},
}


class Trained:
    """Has the two Callable parameters of the module."""

    def __init__(
        self, optimizer: OptimizerCallable = torch.optim.AdamW, lr_scheduler: LRSchedulerCallable | None = None
    ) -> None: ...


@pytest.fixture(scope="module")
def parser() -> SuggestingParser:
    made = SuggestingParser(exit_on_error=False)
    made.add_argument("--config", action="config")
    made.add_class_arguments(Trained, "model")
    return made


def spec(class_path: str, arguments: dict[str, Any]) -> str:
    return str({"class_path": class_path, "init_args": arguments})


def result(parser: SuggestingParser, key: str, old: str, new: str, way: str) -> tuple[str, dict[str, Any]]:
    """The settings after a second config or option changes a first config."""
    second = ["--config", f"{{model: {{{key}: {new}}}}}"] if way == "config" else [f"--model.{key}", new]
    with fresh_arguments():
        value = parser.parse_args(["--config", f"{{model: {{{key}: {old}}}}}", *second]).model[key]
    return value.class_path, value.init_args.as_dict()


def defaults(class_path: str) -> dict[str, Any]:
    module, _, name = class_path.rpartition(".")
    parameters = inspect.signature(getattr(__import__(module, fromlist=[name]), name)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def listed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


ways = st.sampled_from(["config", "option"])
values = st.fixed_dictionaries({"lr": st.floats(0.02, 0.9), "weight_decay": st.floats(0.1, 0.9)})


@settings(derandomize=True, deadline=None, max_examples=60)
@given(old=st.sampled_from(["AdamW", "SGD", "RMSprop"]), new=st.sampled_from(OPTIMIZERS), set_=values, way=ways)
def test_an_optimizer_starts_from_its_own_defaults(parser, old, new, set_, way):
    path = f"torch.optim.{new}"
    class_path, arguments = result(parser, "optimizer", spec(f"torch.optim.{old}", set_), path, way)
    assert class_path == path
    expected = defaults(path) | (set_ if new == old else {})
    assert listed(arguments) == listed(expected)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(old=st.sampled_from(sorted(SCHEDULERS)), new=st.sampled_from(sorted(SCHEDULERS)), way=ways)
def test_a_scheduler_starts_from_its_own_defaults(parser, old, new, way):
    given_ = SCHEDULERS[old] | {"last_epoch": 4} | ({"gamma": 0.9} if old.endswith("StepLR") else {})
    given_ = {name: value for name, value in given_.items() if "Plateau" not in old or name != "last_epoch"}
    class_path, arguments = result(parser, "lr_scheduler", spec(old, given_), spec(new, SCHEDULERS[new]), way)
    assert class_path == new
    kept = given_ if new == old else {}
    assert {n: v for n, v in listed(arguments).items() if n in defaults(new) or n in SCHEDULERS[new]} == listed(
        {**defaults(new), **kept, **SCHEDULERS[new]}
    )


def test_the_examples_by_hand(parser, caplog):
    adamw = spec("torch.optim.AdamW", {"lr": 0.01, "weight_decay": 0.5, "eps": 0.001})
    for way in ("config", "option"):
        _, sgd = result(parser, "optimizer", adamw, "torch.optim.SGD", way)
        assert (sgd["lr"], sgd["weight_decay"], sgd["momentum"]) == (0.001, 0.0, 0.0)
        _, adafactor = result(parser, "optimizer", adamw, "torch.optim.Adafactor", way)
        assert (adafactor["lr"], adafactor["weight_decay"], adafactor["eps"]) == (0.01, 0.0, (None, 0.001))
        _, same = result(parser, "optimizer", adamw, "torch.optim.AdamW", way)
        assert (same["lr"], same["weight_decay"], same["eps"]) == (0.01, 0.5, 0.001)


def test_what_does_not_count_any_more_is_told(parser, caplog):
    old = spec("torch.optim.AdamW", {"lr": 0.01, "weight_decay": 0.5})
    with caplog.at_level(logging.WARNING):
        result(parser, "optimizer", old, "torch.optim.SGD", "option")
    assert set(caplog.messages) == {
        "torch.optim.SGD replaces torch.optim.AdamW, whose settings are dropped: lr=0.01, weight_decay=0.5"
    }
    caplog.clear()
    result(parser, "optimizer", "torch.optim.AdamW", "torch.optim.SGD", "option")
    assert not caplog.messages  # nobody has set the defaults


def test_what_is_set_after_the_change_counts(parser):
    words = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.weight_decay", "0.5"]
    words += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.3"]
    with fresh_arguments():
        arguments = parser.parse_args(words).model.optimizer.init_args
    assert (arguments.lr, arguments.weight_decay) == (0.3, 0.0)
