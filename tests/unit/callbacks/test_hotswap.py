"""One device for engine and trainer: the order of moves, equal results, and the settings that are refused."""

from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from fuchsia_pl.callbacks import hotswap
from fuchsia_pl.callbacks.hotswap import (
    DeviceOwner,
    HotSwap,
    leaves_device,
    move_to_device,
    move_to_host,
    moves_trained,
)
from fuchsia_pl.callbacks.preflight import Preflight
from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.host_copies import HostCopies
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.policy.sharding import FSDP2Strategy
from fuchsia_pl.types import ConfigError
from tests.doubles import SayingEngine, TinyEngine, make_data, make_module, make_trainer

HOST, META = torch.device("cpu", 0), torch.device("meta")
TO_ENGINE, TO_TRAINER = ["leave", "wake", "save"], ["sleep", "return", "forward"]
TWO_UPDATES = LossConfig(num_policy_updates=2)


@pytest.fixture
def calls(monkeypatch):
    """The calls of engine and policy, in order. The CPU has two names here, one for the host and one for the device."""
    calls: list[str] = []
    monkeypatch.setattr(hotswap, "HOST", HOST)
    for name in ("to_device", "output", "save_trained"):
        monkeypatch.setattr(Policy, name, spied(calls, name))
    for name in ("sleep", "wake", "load_weights", "generate"):
        monkeypatch.setattr(TinyEngine, name, spied(calls, name))
    return calls


def spied(calls: list[str], name: str):
    original = getattr(Policy if hasattr(Policy, name) else TinyEngine, name)
    labels = {"output": "forward", "save_trained": "save"}

    def call(self, *arguments):
        label = labels.get(name, name)
        if name == "to_device":
            label = "leave" if arguments[0] == HOST else "return"
        elif name == "load_weights":
            label = f"load {arguments[1]}"
        calls.append(label)
        return original(self, *arguments)

    return call


def fit(tiny_model, root, *callbacks, loss=None, steps=3, engine=None, ckpt_path=None, **settings):
    torch.manual_seed(0)
    module = make_module(tiny_model, loss, dropout=0.2)
    trainer = make_trainer(root, *callbacks, max_steps=steps, max_epochs=-1, **settings)
    data = make_data(module, engine or TinyEngine(), steps_per_epoch=2)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, trainer


def weights(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.policy.trainable_parameters()]


def assert_equal(first, second) -> None:
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def in_order(calls: list[str]) -> list[str]:
    return [call for call, _ in groupby(calls)]


def test_one_side_is_moved_off_before_the_other_is_loaded(tiny_model, tmp_path, calls):
    """Two phases of two updates in two micro-batches, and a held-out split after each."""
    settings = {"accumulate_grad_batches": 2, "limit_val_batches": 1.0}
    fit(tiny_model, tmp_path, HotSwap(True), loss=TWO_UPDATES, steps=4, **settings)
    assert in_order(calls) == [
        "sleep",  # before Lightning moves the model to the device
        *(*TO_ENGINE, "load 0", "generate", *TO_TRAINER),
        *(*TO_ENGINE, "load 2", "generate", *TO_TRAINER),  # samples held-out items here, then items to train on
        *(*TO_ENGINE, "load 4", "generate"),
    ]


def test_the_preflight_runs_while_the_trainer_owns_the_device(tiny_model, tmp_path, calls):
    fit(tiny_model, tmp_path, Preflight(), HotSwap(True), steps=1)
    assert in_order(calls) == ["sleep", "forward", *TO_ENGINE, "load 0", "generate", *TO_TRAINER, *TO_ENGINE, "load 1"]


def test_after_held_out_figures_before_training_the_preflight_gets_the_device(tiny_model, tmp_path, calls):
    settings = {"num_sanity_val_steps": -1, "limit_val_batches": 1.0}
    fit(tiny_model, tmp_path, Preflight(), HotSwap(True), steps=1, **settings)
    first = ["sleep", *TO_ENGINE, "load 0", "generate", *TO_TRAINER, *TO_ENGINE, "load 0", "generate"]
    assert in_order(calls)[: len(first)] == first


def test_a_resumed_run_begins_with_the_engine_asleep(tiny_model, tmp_path, calls):
    _, trainer = fit(tiny_model, tmp_path, HotSwap(True), steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")  # from the host
    calls.clear()
    module, _ = fit(tiny_model, tmp_path, HotSwap(True), steps=4, ckpt_path=tmp_path / "x.ckpt")
    assert in_order(calls)[:6] == ["sleep", *TO_ENGINE, "load 2", "generate"]
    straight, _ = fit(tiny_model, tmp_path, steps=4)
    assert_equal(weights(module), weights(straight))


@pytest.mark.parametrize("loss", [None, TWO_UPDATES], ids=["one update", "two updates"])
def test_what_is_learned_is_the_same_bit_for_bit(tiny_model, tmp_path, monkeypatch, loss):
    """With held-out splits between the phases. The trainer's tensors are in the host copies from the first turn on."""
    monkeypatch.setattr(hotswap, "HOST", HOST)
    settings = {"accumulate_grad_batches": 2, "limit_val_batches": 1.0, "steps": 4}
    runs = [fit(tiny_model, tmp_path, HotSwap(enabled), loss=loss, **settings) for enabled in (True, False)]
    assert_equal(*(weights(module) for module, _ in runs))
    states = [list(trainer.optimizers[0].state.values()) for _, trainer in runs]
    for one, other in zip(*states, strict=True):
        assert_equal(one.values(), other.values())


def test_used_gradients_are_freed(tiny_model, tmp_path):
    kept = [fit(tiny_model, tmp_path, HotSwap(enabled), steps=1)[0] for enabled in (False, True)]
    gradients = [[p.grad for p in module.policy.trainable_parameters() if p.grad is not None] for module in kept]
    assert len(gradients[0]) > 0 == len(gradients[1])


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_held_out_splits_are_sampled_while_the_engine_owns_the_device(tiny_model, tmp_path, calls, verb):
    module, swap = make_module(tiny_model), HotSwap(True)
    trainer = make_trainer(tmp_path, swap, limit_val_batches=1.0)
    getattr(trainer, verb)(module, datamodule=make_data(module))
    assert in_order(calls) == ["sleep", *TO_ENGINE, "load 0", "generate"]
    assert swap.owner is DeviceOwner.ENGINE


def test_turned_off_it_does_nothing(tiny_model, tmp_path, calls):
    engine = TinyEngine()
    fit(tiny_model, tmp_path, HotSwap(), steps=1, engine=engine)
    assert not {"sleep", "wake", "leave", "return"} & set(calls)
    assert not engine.spec.sleeps
    fit(tiny_model, tmp_path, HotSwap(True), steps=1, engine=engine)
    assert engine.spec.sleeps


def test_a_side_that_owns_the_device_is_not_moved_again(tiny_model, tmp_path, calls):
    swap = HotSwap(True)
    _, trainer = fit(tiny_model, tmp_path, steps=1)
    trainer.datamodule.setup("fit")
    calls.clear()
    for give_to, expected in ((swap.to_engine, []), (swap.to_trainer, TO_TRAINER[:2]), (swap.to_engine, TO_ENGINE[:2])):
        give_to(trainer)
        give_to(trainer)
        assert calls == expected
        calls.clear()
    trainer.datamodule.teardown("fit")


def test_a_run_that_fails_with_either_owner_closes_the_engine(tiny_model, tmp_path, monkeypatch):
    class Failing(TinyEngine):
        async def wake(self):
            raise EngineError("no memory")

    engine = Failing()
    with pytest.raises(EngineError, match="no memory"):
        fit(tiny_model, tmp_path, HotSwap(True), engine=engine)
    assert engine._model is None  # closed
    monkeypatch.setattr("fuchsia_pl.module.GRPOModule.training_step", lambda self, batch, batch_idx: 1 / 0)
    engine = TinyEngine()
    with pytest.raises(ZeroDivisionError):
        fit(tiny_model, tmp_path, HotSwap(True), engine=engine)
    assert engine._model is None


@pytest.mark.parametrize(
    ("loss", "engine", "max_staleness", "reason"),
    [
        (None, SayingEngine(None), 0, "SayingEngine cannot sleep"),
        (None, None, 2, "data.sampling.max_staleness is 2: sampling beside training needs both"),
        (LossConfig("ppo", advantage="gae"), None, 0, "advantage gae, a KL in the reward, or a teacher"),
        (LossConfig("rloo", beta=0.1), None, 0, "advantage gae, a KL in the reward, or a teacher"),
    ],
    ids=["engine", "staleness", "critic", "KL in the reward"],
)
def test_settings_without_a_shared_device_are_refused_before_the_engine_starts(
    tiny_model, tmp_path, monkeypatch, loss, engine, max_staleness, reason
):
    started = []
    monkeypatch.setattr(TinyEngine, "start", lambda self, spec: started.append(spec))
    module = make_module(tiny_model, loss)
    trainer = make_trainer(tmp_path, HotSwap(True))
    with pytest.raises(ConfigError, match=f"hotswap.enabled is true, but .*{reason}.*: set it to false"):
        trainer.fit(
            module, datamodule=make_data(module, engine, batch_size=4, sampling={"max_staleness": max_staleness})
        )
    assert not started


def trained_policy(tiny_model, **settings) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy with gradients, and an optimizer with state of it."""
    policy = Policy(PolicyConfig(str(tiny_model), dtype="float32", **settings), tiny_model, with_reference=True)
    optimizer = torch.optim.AdamW(policy.trainable_parameters())
    for parameter in policy.trainable_parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return policy, optimizer


class Moves(HostCopies):
    """Records what is moved, as (name, whether it changes), and the tensors that take its place."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: dict[str, bool] = {}
        self.made: dict[str, torch.Tensor] = {}

    def moved(self, name, tensor, device, changes):
        assert name not in self.changes, "two tensors have one name"
        self.changes[name], self.made[name] = changes, tensor.clone()
        return self.made[name]


@pytest.mark.parametrize("with_lora", [True, False], ids=["LoRA", "all weights"])
def test_all_weights_and_optimizer_states_are_moved_and_the_frozen_ones_as_unchanged(tiny_model, with_lora):
    policy, optimizer = trained_policy(tiny_model, lora=LoRASettings(enabled=with_lora, r=4, alpha=8))
    for state in optimizer.state.values():
        state["elsewhere"] = torch.ones(1, device=META)
        state["number"] = 3
    before = [id(parameter) for parameter in policy.parameters()]
    policy.host_copies = moves = Moves()
    places = move_to_host(policy, [optimizer], HOST)
    assert len(policy._frozen) == (not with_lora)
    weights = [*policy.parameters(), *(weight for model in policy._frozen for weight in model.parameters())]
    trained = policy.trainable_parameters()
    states = [state[name] for state in optimizer.state.values() for name in ("step", "exp_avg", "exp_avg_sq")]
    pointers = {tensor.data_ptr() for tensor in moves.made.values()}
    assert {tensor.data_ptr() for tensor in [*weights, *(p.grad for p in trained), *states]} == pointers
    assert sum(moves.changes.values()) == 5 * len(trained)  # weight, gradient, and three of the optimizer
    assert len(moves.changes) - sum(moves.changes.values()) == len(weights) - len(trained)
    assert [id(parameter) for parameter in policy.parameters()] == before
    policy.host_copies = back = Moves()
    move_to_device(policy, places, HOST)
    assert back.changes == moves.changes


def test_with_other_ranks_the_trained_weights_stay(tiny_model):
    """DDP's hooks are bound to a weight on its device: a move would end the exchange of gradients without an error."""
    policy, optimizer = trained_policy(tiny_model, lora=LoRASettings(r=4, alpha=8))
    policy.host_copies = moves = Moves()
    move_to_host(policy, [optimizer], HOST, with_trained=False)
    frozen = {f"0.{name}" for name, weight in policy.named_parameters() if not weight.requires_grad}
    assert {name for name in moves.changes if not name.startswith("optimizer.")} == frozen
    assert sum(name.startswith("optimizer.") for name in moves.changes) == 3 * len(optimizer.state)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [(SingleDeviceStrategy(), (True, True)), (DDPStrategy(), (True, False)), (FSDP2Strategy(), (False, False))],
    ids=["one rank", "ddp", "fsdp"],
)
def test_what_leaves_the_device_depends_on_the_strategy(strategy, expected):
    trainer = SimpleNamespace(strategy=strategy)
    assert (leaves_device(trainer), moves_trained(trainer)) == expected


def test_the_adapter_to_start_from_moves_once(tiny_model, tmp_path):
    first, _ = trained_policy(tiny_model, lora=LoRASettings(r=4, alpha=8))
    first.save_trained(tmp_path)
    policy, _ = trained_policy(tiny_model, lora=LoRASettings(r=4, alpha=8, init_from=str(tmp_path)))
    policy.host_copies = moves = Moves()
    policy.to_device(HOST)
    initial = [name for name in moves.changes if name.startswith("initial.")]
    assert len(initial) == len(policy.trainable_parameters())
    assert not any(moves.changes[name] for name in initial)
    assert all(isinstance(parameter, nn.Parameter) for parameter in policy.parameters())
