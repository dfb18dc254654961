"""Several ranks: real processes over gloo, on the same rollouts in every process. `tests/ranks.py` contains the runs."""

import csv
import io
import json
import pickle
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fuchsia_pl.callbacks.recorded_step import read_step
from fuchsia_pl.cli.replay import replay_step
from fuchsia_pl.policy.checkpoint_files import read_checkpoint
from fuchsia_pl.policy.checksums import damaged_part
from fuchsia_pl.types import ConfigError
from tests.ranks import POLICIES, TEACHER
from tests.unit.policy.test_adapter import Touches
from tests.unit.policy.test_teacher_adapter import save_adapter

TIMEOUT_S = 300


@pytest.fixture(scope="module")
def run(forkserver) -> Callable[..., SimpleNamespace]:
    """Runs a task of `tests/ranks.py`, in as many processes as its first strategy has ranks."""

    def run(what: str, model: Path, root: Path, strategy: str, *numbers: int) -> SimpleNamespace:
        # Lightning starts the second rank of a run that fails, since it must end that rank too.
        num_ranks = 1 if strategy == "one" or what == "fails" else 2
        words = ["-m", "tests.ranks", what, model, root, strategy, *numbers]
        return forkserver.run(*words, num_ranks=num_ranks, timeout_s=TIMEOUT_S)

    return run


def errors_of(done: SimpleNamespace) -> str:
    """Output of all ranks without the frames of tracebacks; that of the first rank to fail is the relevant one."""
    return "\n".join(line for line in done.printed.splitlines() if not re.match(r"(\[rank\d\]:)?  ", line))


@pytest.fixture(scope="module")
def trained(run, tiny_model, tmp_path_factory) -> Path:
    """A folder per strategy, with one per policy in it."""
    root = tmp_path_factory.mktemp("ranks")
    save_adapter(tiny_model, root / TEACHER)
    for strategy in ("one", "ddp", "fsdp"):
        done = run("equal", tiny_model, root / strategy, strategy)
        assert done.returncode == 0, errors_of(done)
    return root


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_fsdp_ends_with_the_weights_of_ddp_and_both_with_those_of_one_rank(trained, tiny_model, policy):
    number = str(list(POLICIES).index(policy))
    one, ddp, fsdp = (weights_of(trained / strategy / number) for strategy in ("one", "ddp", "fsdp"))
    assert one.keys() == ddp.keys() == fsdp.keys()
    for name, tensor in one.items():
        # The norm of a gradient is added up in another order where it is sharded, and clipping multiplies by it; gradients of
        # all weights are added up over ranks before they are over micro-batches.
        exact = {"rtol": 0, "atol": 1e-6 if policy in ("adapter, clipped", "all weights") else 0}
        torch.testing.assert_close(fsdp[name], ddp[name], **exact)
        torch.testing.assert_close(fsdp[name], tensor, rtol=0, atol=1e-5)
    if policy == "all weights":
        start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
        moved = [(tensor - start[name.removeprefix("model.")]).abs().max() for name, tensor in one.items()]
    else:
        moved = [tensor.abs().max() for name, tensor in one.items() if "lora_B" in name]
    assert moved
    assert all(step > 1e-4 for step in moved)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_metrics_are_those_of_one_rank(trained, policy):
    number = str(list(POLICIES).index(policy))
    one, ddp, fsdp = (
        list(csv.DictReader((trained / strategy / number / "metrics.csv").open()))
        for strategy in ("one", "ddp", "fsdp")
    )
    assert len(one) == 5
    for rows in zip(one, ddp, fsdp, strict=True):
        assert rows[0].keys() == rows[1].keys() == rows[2].keys()
        for name in rows[0].keys() - {"epoch", "step", "sync/seconds", "perf/rollout_tokens_per_s"}:
            values = [float(row[name]) for row in rows]
            assert values == pytest.approx([values[0]] * 3, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_export_is_whole(trained, tiny_model, strategy):
    adapter = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), trained / strategy / "0/adapter"
    )
    learned = {name: p for name, p in adapter.named_parameters() if "lora_" in name}
    expected = {name.removeprefix("model."): tensor for name, tensor in weights_of(trained / strategy / "0").items()}
    assert learned.keys() == expected.keys()
    assert all(torch.equal(learned[name], tensor) for name, tensor in expected.items())
    number = str(list(POLICIES).index("all weights"))
    whole = AutoModelForCausalLM.from_pretrained(trained / strategy / number / "adapter").state_dict()
    for name, tensor in weights_of(trained / strategy / number).items():
        assert torch.equal(whole[name.removeprefix("model.")], tensor)


@pytest.mark.parametrize("strategy", ["one", "ddp", "fsdp"])
def test_a_checkpoint_holds_what_was_trained_and_no_more(trained, strategy):
    state = torch.load(trained / strategy / "0/end.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("policy.") for name in state} == weights_of(trained / strategy / "0").keys()


def check_that_a_folder_is_read_before_it_is_loaded(folder: Path, root: Path) -> None:
    """Its index and the parts that the index names; a pickle in either runs no code."""
    assert read_checkpoint(folder)["global_step"] == 5
    index, touched = pickle.loads((folder / ".metadata").read_bytes()), root / "touched"
    name = next(name for name in index.state_dict_metadata if name.startswith("state_dict."))
    fewer = {other: entry for other, entry in index.state_dict_metadata.items() if other != name}
    key = next(key for key in index.storage_data if key.fqn == "optimizer_0.param_groups.0.lr")
    part = folder / index.storage_data[key].relative_path
    whole, value = part.read_bytes(), io.BytesIO()
    torch.save(Touches(touched), value)
    moved = replace(index.storage_data[key], offset=len(whole), length=len(value.getvalue()))
    for words, changed, content in (
        ("missing or cut off", index, whole[: len(whole) // 2]),
        (f"{part.name} is damaged at ", index, whole[:8192] + bytes([7] * 4096) + whole[12288:]),
        ("cannot be read", Touches(touched), whole),
        (
            f"{name.removeprefix('state_dict.')} is missing",
            replace(index, state_dict_metadata=fewer),
            whole,
        ),
        ("would run code", replace(index, storage_data={**index.storage_data, key: moved}), whole + value.getvalue()),
    ):
        (folder / ".metadata").write_bytes(pickle.dumps(changed))
        part.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            read_checkpoint(folder)
        if "damaged" in words:
            assert re.search(words, damaged_part(folder, index) or "")  # what FSDP2Strategy refuses by in a script
    assert not touched.exists()


@pytest.mark.parametrize(
    ("strategies", "is_exact"),
    [
        ("fsdp-folder+fsdp-folder", True),
        ("fsdp+one", False),
        ("ddp+fsdp", True),
    ],
)
def test_a_run_resumes_with_another_strategy_or_number_of_ranks(run, tiny_model, tmp_path, strategies, is_exact):
    done = run("resume", tiny_model, tmp_path, strategies)
    assert done.returncode == 0, errors_of(done)
    rows = csv.DictReader((tmp_path / "after/metrics.csv").open())
    assert [int(row["step"]) for row in rows] == [2, 3, 4]
    left = [folder.name for folder in (tmp_path / "before").glob(".end.ckpt*")]
    assert left == ([".end.ckpt.older"] if strategies.startswith("fsdp-folder") else [])  # put there by the test
    if strategies == "fsdp-folder+fsdp-folder":
        check_that_a_folder_is_read_before_it_is_loaded(tmp_path / "after/end.ckpt", tmp_path)
    after, straight = weights_of(tmp_path / "after"), weights_of(tmp_path / "straight")
    for name, tensor in straight.items():
        exact = {"rtol": 0, "atol": 0 if is_exact else 1e-4}
        torch.testing.assert_close(after[name], tensor, **exact)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_is_skipped_or_stops_all_of_them_and_reaches_no_file(run, tiny_model, tmp_path, strategy):
    done = run("nonfinite", tiny_model, tmp_path, strategy)
    assert done.returncode == 0, errors_of(done)
    for what, last in (("gradient", 3), ("loss", 3), ("state", 1)):
        checkpoint = torch.load(tmp_path / what / "checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == last
        tensors = [*checkpoint["state_dict"].values()]
        tensors += [state["momentum_buffer"] for state in checkpoint["optimizer_states"][0]["state"].values()]
        assert tensors
        assert all(tensor.isfinite().all() for tensor in tensors)
        adapter = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / what / "adapter"
        )
        assert all(p.isfinite().all() for p in adapter.parameters())
        if last == 3:
            recorded = [read_step(tmp_path / what / f"recorded/step-2.pt.rank{rank}") for rank in (0, 1)]
            assert recorded[0].weights.keys() == recorded[1].weights.keys()
            assert [step.losses.isfinite().all().item() for step in recorded] == [True, what == "gradient"]
            # The NaN is injected after the loss, so each rank's own losses are reproduced.
            for step in recorded[: 2 if what == "gradient" else 1]:
                replayed = replay_step(step, tmp_path)
                assert (replayed.same_losses, replayed.same_gradients) == (True, None)
            rows = csv.DictReader((tmp_path / what / "metrics.csv").open())
            assert [float(row["train/nonfinite"]) for row in rows if row["train/grad_norm"]] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("strategy", "num_patterns"), [("ddp", 12), ("fsdp", 6)])
def test_ranks_that_drop_groups_by_chance_never_wait_for_each_other(run, tiny_model, tmp_path, strategy, num_patterns):
    done = run("uneven", tiny_model, tmp_path, strategy, num_patterns)
    assert done.returncode == 0, errors_of(done)


@pytest.mark.parametrize(
    ("where", "word"),
    [
        (1, "no room for version 1"),
        (10, "no more at version 1"),
    ],
    ids=["at a sync on rank 1", "while it samples on rank 0"],
)
def test_a_rank_that_fails_ends_all_of_them(run, tiny_model, tmp_path, where, word):
    start = time.perf_counter()
    done = run("fails", tiny_model, tmp_path, "ddp", where)
    assert done.returncode != 0
    assert word in done.printed
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_change_the_owner_of_their_devices_together(run, tiny_model, tmp_path, strategy):
    """On rank 1 the engine takes 0.3 s to sleep, and a micro-batch ends 0.3 s later than on rank 0."""
    done = run("turns", tiny_model, tmp_path, strategy)
    assert done.returncode == 0, errors_of(done)
    ranks = [json.loads((tmp_path / f"timeline-{rank}.json").read_text()) for rank in (0, 1)]
    order = ["asleep", "wakes", *["asleep", "forward", "trained", "wakes"] * 2]
    assert [[event for event, _ in rank] for rank in ranks] == [order, order]
    times = [[at for _, at in rank] for rank in ranks]
    for position, event in enumerate(order[1:], start=1):
        if event in ("forward", "wakes"):  # none of them starts before the event ahead has ended on both ranks
            earlier, later = [max(rank[position - 1] for rank in times), min(rank[position] for rank in times)]
            assert earlier <= later, (position, event)
    shared, plain = (torch.load(tmp_path / f"weights-{shared}.pt", weights_only=True) for shared in (True, False))
    assert all(torch.equal(tensor, plain[name]) for name, tensor in shared.items())


@pytest.fixture
def large_model(tiny_model, tmp_path) -> Path:
    """A model of 200 MB with many small layers, tied embeddings, and the tests' tokenizer."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_model, folder)
    config = LlamaConfig.from_pretrained(tiny_model)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 2048, 12
    config.head_dim, config.tie_word_embeddings = 128, True
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_only_the_first_rank_holds_the_whole_model(run, large_model, tmp_path):
    done = run("memory", large_model, tmp_path / "run", "fsdp")
    assert done.returncode == 0, errors_of(done)
    first, second = (json.loads((tmp_path / f"run/memory-{rank}.json").read_text()) for rank in (0, 1))
    size = first["shard"] + second["shard"]
    assert size > 180e6
    assert first["peak"] > size
    # Here, the memory of a rank's device is that of the host too.
    assert second["peak"] - second["shard"] < 0.25 * size
    assert second["shares_prefix"]
    assert first["shares_prefix"]
