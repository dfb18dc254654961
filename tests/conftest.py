"""Fixtures shared by many tests."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuchsia_pl.cli.launch import RUN_FOLDER_VARIABLE
from tests.doubles import save_tiny_model
from tests.forked import Forkserver
from tests.machine import FLOAT32_VARIABLE, HAS_BFLOAT16

# Under `unit/`: files whose tests train, start processes or load tokenizers. `make fast` leaves them out.
SLOW_FILES = {
    *(f"test_{name}.py" for name in ("bandit", "chaos", "check_env", "checkpoints", "cli", "datamodule")),
    *(f"test_{name}.py" for name in ("engine_restarts", "faults", "fuzz", "killed", "launch", "leaving", "module")),
    *(f"test_{name}.py" for name in ("mutants", "orphans", "own_objective", "phases", "ranks", "resume", "script")),
    *(f"test_{name}.py" for name in ("serve", "server_ranks", "staleness", "stopping")),
    *(
        f"callbacks/test_{name}.py"
        for name in ("adapter_sync", "finite", "hotswap", "memory", "preflight", "run_files")
    ),
    *("callbacks/test_evaluation_log.py", "cli/test_evaluate.py"),
    *("evaluation/test_intervals.py", "evaluation/test_item_table.py"),
    *("callbacks/test_completions_table.py", "callbacks/test_health.py", "callbacks/test_hyperparameters.py"),
    *("cli/test_run_loggers.py", "rollouts/test_curriculum.py"),
    *("callbacks/test_weight_average.py", "cli/test_help.py", "cli/test_main.py", "cli/test_replay.py"),
    *(f"engines/test_{name}.py" for name in ("pool", "vllm_colocated", "vllm_guard", "vllm_server", "vllm_transfer")),
    *("envs/test_limited.py", "envs/test_audit.py", "cli/test_audit_table.py"),
    *("envs/test_tool_servers.py", "envs/test_tool_environment.py", "envs/test_rewards.py", "envs/test_bounded.py"),
    "envs/test_reward_models.py",
    *("objectives/test_exact_gradient.py", "objectives/test_trl_parity.py"),
    *(f"policy/test_{name}.py" for name in ("adapter", "checkpoint_files", "checkpointing", "loading", "logprobs")),
    *("policy/test_policy.py", "policy/test_shared_prefix.py", "policy/test_sharding.py"),
    *(f"rollouts/test_{name}.py" for name in ("ahead", "chat", "collector", "continued_turns", "flags", "multi_turn")),
    *("envs/test_spelling.py", "rollouts/test_template.py"),
    *("callbacks/test_outcome.py", "cli/test_class_change.py", "envs/test_reading.py", "policy/test_schedules.py"),
    *("test_library.py", "test_prompts.py", "callbacks/test_card_facts.py"),
    *("cli/test_export.py", "cli/test_serve_run.py", "cli/test_upload.py"),
    *(f"cli/test_{name}.py" for name in ("chat", "doctor", "predict", "report", "run_json", "runs")),
    *("callbacks/test_console.py", "callbacks/test_console_progress.py", "callbacks/test_live_report.py"),
    *("callbacks/test_rollout_log.py", "evaluation/test_health.py", "report/test_run_data.py"),
    *("gateway/test_agent_fit.py", "gateway/test_gateway.py", "rollouts/test_rows.py"),
    *("cli/test_plan.py", "policy/test_plan_simulation.py", "policy/test_planner.py", "policy/test_prefix_kernels.py"),
    *("rollouts/test_filled.py", "rollouts/test_bins.py", "test_filled_steps.py", "test_mini_batches.py"),
    *("test_gpu_check.py", "test_recipes.py", "test_teacher.py", "policy/test_teacher_adapter.py"),
    *("engines/test_vllm_teacher.py", "test_turn_rewards.py"),
    *("rollouts/test_progress.py", "rollouts/test_in_order.py", "cli/test_unknown_keys.py", "envs/test_thinking.py"),
}
TESTS_OF_HEALTH = ("test_health.py",)
LIGHTNINGS_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
    "RANK",
    "NODE_RANK",
    "LOCAL_RANK",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
)
UNIT = Path(__file__).with_name("unit")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def forkserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forkserver]:
    """Starts processes that have imported everything."""
    server = Forkserver(tmp_path_factory.mktemp("forked"))
    yield server
    server.close()


@pytest.fixture
def command_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test that runs commands in this process."""
    from transformers.utils.logging import disable_progress_bar

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fuchsia"])
    monkeypatch.delenv(RUN_FOLDER_VARIABLE, raising=False)
    # It would redirect the loggers of all later tests to a file of this test.
    monkeypatch.setattr("fuchsia_pl.cli.app.chatter_to", lambda folder: disable_progress_bar())
    return tmp_path


@pytest.fixture(autouse=True)
def no_run_of_weights_and_biases_goes_on() -> Iterator[None]:
    """Closes a run that a test has left open: the next logger of this process would continue it."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


@pytest.fixture(autouse=True)
def no_variable_of_lightning_is_left() -> Iterator[None]:
    """Removes the variables that Lightning sets: a process started later would take the same port, and the same seed."""
    before = {name: os.environ.get(name) for name in LIGHTNINGS_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class KeepMessages(logging.Handler):
    """Keeps the messages of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_healthy_run_is_called_ill(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test whose run gets a warning of its health, except in the tests of these warnings."""
    if request.path.name in TESTS_OF_HEALTH:
        yield
        return
    kept, logger = KeepMessages(), logging.getLogger("fuchsia_pl.callbacks.health")
    logger.addHandler(kept)
    yield
    logger.removeHandler(kept)
    # Tests of other things train with rates that no one would choose.
    allowed = ["the learning rate is", *(mark.args[0] for mark in request.node.iter_markers("may_warn"))]
    assert [message for message in kept.messages if not any(part in message for part in allowed)] == []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seeds torch before a test and its fixtures, so that initial adapter weights do not depend on earlier tests."""
    import torch

    torch.manual_seed(0)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves slow files out before they are imported, which takes half a minute, if none of their tests is wanted."""
    is_slow = collection_path.is_relative_to(UNIT) and str(collection_path.relative_to(UNIT)) in SLOW_FILES
    return True if is_slow and "not slow" in config.option.markexpr else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that this machine cannot run, with the reason, and orders the rest.

    Slow files come first, so that two processes that take a file at a time end together, and tests that start engines last.
    """
    import torch

    runs_engines = HAS_BFLOAT16 or os.environ.get(FLOAT32_VARIABLE) == "1"
    for item in items:
        if item.path.is_relative_to(UNIT) and str(item.path.relative_to(UNIT)) in SLOW_FILES:
            item.add_marker("slow")
        if item.get_closest_marker("engine") and not runs_engines:
            reason = f"this CPU has no bfloat16 instructions; {FLOAT32_VARIABLE}=1 runs it in float32, slowly"
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
    items.sort(key=lambda item: (item.get_closest_marker("engine") is not None, _is_quick(item)))


def _is_quick(item: pytest.Item) -> bool:
    is_outside = not item.path.is_relative_to(UNIT) and item.path.is_relative_to(UNIT.parent)
    return not is_outside and item.get_closest_marker("slow") is None
