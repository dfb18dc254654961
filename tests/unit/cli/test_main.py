"""The console script: one-line errors, tracebacks and exit codes."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from fuchsia_pl.callbacks.finite import NonFiniteError
from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.envs.tools.spec import ToolServerError
from fuchsia_pl.stopping import stopping
from tests.doubles import TINY

main_module = importlib.import_module("fuchsia_pl.cli.main")  # the package has a function of that name
run_module = importlib.import_module("fuchsia_pl.cli.run_command")


@pytest.fixture
def command(tiny_model, tmp_path, monkeypatch):
    """Runs `fuchsia …` in this process and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(run_module, "show_warnings", lambda: None)
    monkeypatch.setattr("fuchsia_pl.cli.app.chatter_to", lambda folder: None)
    (tmp_path / "tiny.yaml").write_text(TINY % tiny_model)

    def run(*words: str) -> object:
        monkeypatch.setattr(sys, "argv", ["fuchsia", *words])
        with pytest.raises(SystemExit) as caught:
            main_module.main()
        return caught.value.code

    return run


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict", "check-env", "serve"])
def test_a_refused_setting_is_one_line_and_debug_adds_the_traceback(command, capsys, tmp_path, name):
    words = [name, "--config", "tiny.yaml", "--data.batch_size", "0", *(["--port", "8191"] if name == "serve" else [])]
    assert command(*words) == 2
    first = capsys.readouterr().err
    assert first.startswith("error: data.batch_size must be 1 or more, got 0")
    assert "Traceback" not in first
    assert command(*words, "--debug") == 2
    second = capsys.readouterr().err
    assert second.startswith(first)
    assert "Traceback" in second
    assert "ConfigError: data.batch_size must be" in second
    assert not (tmp_path / "runs").exists()


def test_a_surrogate_in_the_working_directory_is_found_and_refused_in_one_line(command, capsys, tmp_path):
    (tmp_path / "my_losses.py").write_text("def two(one, other): ...")
    for name, words in {
        "my_losses.two": 'error: model.loss.surrogate "my_losses.two" must take (inputs): missing',
        "my_losses.none": 'error: model.loss.surrogate "my_losses.none" cannot be imported: AttributeError',
    }.items():
        assert command("fit", "--config", "tiny.yaml", "--model.loss.surrogate", name) == 2
        assert capsys.readouterr().err.startswith(words)


@pytest.mark.parametrize(
    "error", [EngineError("vLLM is gone"), ToolServerError("the tool is gone"), NonFiniteError("step 3")]
)
def test_another_process_or_numbers_that_failed_are_one_line(command, capsys, monkeypatch, error):
    def fail(words: list[str]) -> None:
        error.add_note("go on with last.ckpt")
        raise error

    monkeypatch.setattr(run_module, "FuchsiaCLI", fail)
    assert command("fit") == 1
    assert capsys.readouterr().err == f"error: {error}\ngo on with last.ckpt\n"
    with pytest.raises(type(error)):
        command("fit", "--debug")


def test_an_error_after_a_checkpoint_comes_with_the_command_that_continues(command, capsys, monkeypatch):
    def fail(words: list[str]) -> None:
        stopping.checkpoint, stopping.step = Path("runs/a/0/checkpoints/last.ckpt"), 3
        raise error

    monkeypatch.setattr(run_module, "FuchsiaCLI", fail)
    advice = (
        "runs/a/0/checkpoints/last.ckpt contains the run after step 3\n"
        "continue with: fuchsia fit --config a.yaml --ckpt_path runs/a/0/checkpoints/last.ckpt\n"
    )
    words = "fit", "--config", "a.yaml", "--ckpt_path", "last"
    error: Exception = EngineError("vLLM is gone")
    assert command(*words) == 1
    assert capsys.readouterr().err == f"error: vLLM is gone\n{advice}"
    error = ZeroDivisionError()  # a bug, whose traceback follows
    with pytest.raises(ZeroDivisionError):
        command(*words)
    assert capsys.readouterr().err == advice


def test_a_run_whose_engine_fails_names_its_own_checkpoint(command, capsys):
    engine = "--data.engine", "tests.doubles.RecordedEngine", "--data.engine.init_args.fails_at", "1"
    settings = "--checkpoint.every_n_steps", "1", "--adapter_sync.tolerance", "100"
    assert command("fit", "--config", "tiny.yaml", *engine, *settings) == 1
    captured = capsys.readouterr()
    assert "failed: 1 steps in" in captured.out
    assert "runs/tiny/0/checkpoints/last.ckpt contains the run after step 1\ncontinue with: fuchsia fit" in captured.err


def test_a_file_that_cannot_be_replayed_is_one_line_and_debug_adds_the_traceback(command, capsys):
    assert command("replay", "no.pt") == 2
    first = capsys.readouterr().err
    assert first == "error: no.pt does not exist or is no file: give a file that a run wrote to its recorded/\n"
    assert command("replay", "no.pt", "--debug") == 2
    second = capsys.readouterr().err
    assert second.startswith(first)
    assert "Traceback" in second


def test_a_bug_keeps_its_traceback(command, monkeypatch):
    def fail(words: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run_module, "FuchsiaCLI", fail)
    with pytest.raises(ZeroDivisionError):
        command("fit")


def test_no_code_of_a_command_ends_it_with_success(command, capsys, monkeypatch):
    def end(status: int) -> None:
        raise SystemExit(f"really ended with {status}")

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(run_module, "FuchsiaCLI", lambda words: os._exit(0))
    assert command("fit") == "really ended with 1"
    assert "called os._exit(0) before the run ended" in capsys.readouterr().err


def test_modules_of_the_working_directory_precede_installed_ones(tmp_path, monkeypatch):
    for folder in ("installed", "own"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a_name_of_both.py").touch()
    monkeypatch.chdir(tmp_path / "own")
    own = str(tmp_path / "own")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "installed"), "", own, *sys.path])
    main_module.put_working_directory_first()
    assert (sys.path[0], sys.path.count(own), "" in sys.path) == (own, 1, False)
    assert importlib.util.find_spec("a_name_of_both").origin == f"{own}/a_name_of_both.py"
