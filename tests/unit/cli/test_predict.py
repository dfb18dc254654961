"""`fuchsia predict` on the tiny model, in this process."""

import asyncio
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from fuchsia_pl.callbacks.answer_log import answer_line
from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.help_page import help_page, packaged_table
from fuchsia_pl.cli.predict import predict
from fuchsia_pl.engines.base import EngineError, SamplingParams
from fuchsia_pl.envs import MultiTurnEnvironment, SingleTurnEnvironment
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.rollouts.in_order import Answers
from fuchsia_pl.types import Completion, Rollout, RolloutStatus, Turn
from tests.doubles import EOS, TinyEngine, tiny_config

HERE = "tests.unit.cli.test_predict"
ENVIRONMENT = "--data.environment.class_path"


class WatchedEngine(TinyEngine):
    """Counts starts, keeps prompts; may fail after some completions, or delay those of a prompt."""

    starts = 0
    prompts: list[tuple[int, ...]] = []  # noqa: RUF012
    fails_after = 10**6
    slow: tuple[int, ...] = ()

    def start(self, spec):
        WatchedEngine.starts += 1
        super().start(spec)

    async def generate(self, prompt_ids, sampling):
        if len(WatchedEngine.prompts) >= WatchedEngine.fails_after:
            raise EngineError("no more")
        WatchedEngine.prompts.append(tuple(prompt_ids))
        completion = await super().generate(prompt_ids, sampling)
        if tuple(prompt_ids) == WatchedEngine.slow:
            await asyncio.sleep(0.3)
        return completion


class Unrewarded(SingleTurnEnvironment):
    def train_items(self):
        return [{"prompt": f"{n}?"} for n in range(20)]

    def validation_items(self):
        return [{"prompt": "7?"}, {"prompt": "8?"}]

    async def open_rollout(self, rollout):
        if rollout.item["prompt"] == "bad":
            raise ValueError("a bad one")


class Twice(MultiTurnEnvironment):
    max_steps = 2

    def step_rollout(self, rollout):
        rollout.respond("more")


@pytest.fixture
def config(tiny_model, command_folder, monkeypatch) -> Path:
    for name, value in {"starts": 0, "prompts": [], "fails_after": 10**6, "slow": ()}.items():
        monkeypatch.setattr(WatchedEngine, name, value)
    file = command_folder / "tiny.yaml"
    file.write_text(tiny_config(tiny_model, "tests.doubles.TinyEnvironment", f"{HERE}.WatchedEngine", lr=0.3))
    return file


def write(path: str, *rows) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answered(path="out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(config, *options) -> int:
    return predict(["--config", str(config), *options])


def file_run(config, *options, rows=("1?", "2?", "3?", "4?"), output="out.jsonl") -> int:
    write("in.jsonl", *[{"prompt": row} for row in rows])
    return run(config, "--input", "in.jsonl", "--output", output, *options)


def ids_of(tiny_model, text: str) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(tiny_model).encode(text, add_special_tokens=False))


def greedy(tiny_model, text: str, steps: int) -> tuple[str, int]:
    """The most likely continuation of a prompt's text and its number of tokens, without the code under test."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    ids, start = list(ids_of(tiny_model, text)), len(ids_of(tiny_model, text))
    with torch.no_grad():
        while len(ids) < start + steps and (len(ids) == start or ids[-1] != EOS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True), len(ids) - start


def test_rows_are_answered_in_order_with_their_ids(config, tiny_model, capsys):
    Path("in.jsonl").write_text(
        '{"prompt": "1?", "id": "a"}\n\n{"messages": [{"role": "system", "content": "b"}, '
        '{"role": "user", "content": "2?"}], "id": 7}\n{"prompt": "3?"}\n'
    )
    # The first row takes longest.
    WatchedEngine.slow = ids_of(tiny_model, "user:1?\na:")
    assert run(config, "--input", "in.jsonl", "--output", "out.jsonl") == 0
    found = answered()
    assert [row["id"] for row in found] == ["a", 7, 4]  # without an id, the line
    texts = ["user:1?\na:", "system:b\nuser:2?\na:", "user:3?\na:"]
    for row, text in zip(found, texts, strict=True):
        (completion,) = row["completions"]
        assert (completion["text"], completion["tokens"]) == greedy(tiny_model, text, 4)
        assert completion["finish_reason"] in ("stop", "length")
        assert (completion["finish_reason"] == "length") <= (completion["tokens"] == 4)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "answers to 3 rows: out.jsonl; whole rollouts: runs/tiny/" in printed.err


def test_a_seed_reproduces_its_completion(config, tiny_model):
    file_run(config, "--samples", "3", "--temperature", "0.8", "--max_completion_tokens", "3")
    found = answered()
    seeds = [completion["seed"] for row in found for completion in row["completions"]]
    assert len(seeds) == len(set(seeds)) == 12
    from fuchsia_pl.engines.base import EngineSpec
    from fuchsia_pl.types import ServedModel

    engine = TinyEngine()
    engine.start(EngineSpec(ServedModel("tiny", "float32", 0, lambda name: tiny_model), 40, 0, Path("log")))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for row, number in zip(found, "1234", strict=True):
        for completion in row["completions"]:
            sampling = SamplingParams(0.8, 3, completion["seed"], stop_token_ids=(EOS,))
            again = run_blocking(engine.generate(ids_of(tiny_model, f"user:{number}?\na:"), sampling))
            assert tokenizer.decode(again.token_ids, skip_special_tokens=True) == completion["text"]
            assert completion["tokens"] == len(again.token_ids) <= 3


def test_several_samples_have_the_temperature_of_training(config):
    file_run(config, "--samples", "8", rows=["1?"])
    (row,) = answered()
    assert len({completion["text"] for completion in row["completions"]}) > 1


def test_the_same_command_continues_after_a_failure(config, capsys):
    options = ["--samples", "2", "--temperature", "1.0"]
    file_run(config, *options, output="whole.jsonl")
    WatchedEngine.prompts, WatchedEngine.fails_after = [], 5
    with pytest.raises(EngineError):
        file_run(config, *options)
    assert answered() == answered("whole.jsonl")[:2]
    with Path("out.jsonl").open("a") as stream:
        stream.write('{"id": 3, "compl')  # a killed process left this
    WatchedEngine.prompts, WatchedEngine.fails_after = [], 10**6
    capsys.readouterr()
    assert file_run(config, *options) == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert len(WatchedEngine.prompts) == 4  # two rows of two samples
    assert "answers to 4 rows: out.jsonl, 2 of them from an earlier call" in capsys.readouterr().err


def test_nothing_runs_when_all_rows_are_answered(config, capsys):
    file_run(config)
    folders, starts = sorted(Path("runs/tiny").iterdir()), WatchedEngine.starts
    before = Path("out.jsonl").read_bytes()
    capsys.readouterr()
    assert file_run(config) == 0
    assert (sorted(Path("runs/tiny").iterdir()), WatchedEngine.starts) == (folders, starts)
    assert Path("out.jsonl").read_bytes() == before
    assert "has the answers to all 4 rows: nothing is left to do" in capsys.readouterr().err


def test_answers_of_other_settings_are_not_continued(config, capsys):
    file_run(config)
    before = Path("out.jsonl").read_bytes()
    for options, rows, message in (
        (["--temperature", "0.5"], "1234", "temperature was 0.0 and is 0.5"),
        (["--samples", "2"], "1234", "samples was 1 and is 2"),
        (["--max_completion_tokens", "2"], "1234", "max_completion_tokens was 4 and is 2"),
        (["--seed_everything", "4"], "1234", "seed was 3 and is 4"),
        (["--data.environment.init_args.num_items", "21"], "1234", "environment differs"),
        (["--as_items"], "1234", "as_items was false and is true"),
        ([], "1235", "input differs"),
    ):
        with pytest.raises(SystemExit) as end:
            file_run(config, *options, rows=[f"{row}?" for row in rows])
        assert end.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "--output out.jsonl was begun with other settings: " in line
        assert message in line
        assert Path("out.jsonl").read_bytes() == before
    assert WatchedEngine.starts == 1


def test_other_weights_at_the_same_place_are_not_continued(config, capsys):
    FuchsiaCLI(["fit", "--config", str(config)])
    file_run(config, "--run", "tiny/0")
    trained = answered()
    checkpoint = Path("runs/tiny/0/checkpoints/last.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"] = {name: tensor + 0.1 for name, tensor in content["state_dict"].items()}
    torch.save(content, checkpoint)
    with pytest.raises(SystemExit):
        file_run(config, "--run", "tiny/0")
    assert "weights_digest differs" in capsys.readouterr().err
    file_run(config, output="base.jsonl")
    assert answered("base.jsonl") != trained
    file_run(config, "--adapter", "runs/tiny/0/adapter", output="adapter.jsonl")
    assert answered("adapter.jsonl") == trained


def test_files_that_are_no_answers_are_refused(config, capsys):
    def refused(*options) -> str:
        with pytest.raises(SystemExit):
            file_run(config, *options)
        return capsys.readouterr().err

    write("out.jsonl", {"mine": 1})
    assert "out.jsonl exists, and out.jsonl.settings.json is not beside it" in refused()
    assert answered() == [{"mine": 1}]
    Path("out.jsonl").unlink()
    file_run(config)
    write("out.jsonl", {"id": 2, "completions": []})
    assert "out.jsonl, line 1 is not the answer to row 1" in refused()
    Path("out.jsonl.settings.json").write_text("[]")
    assert "out.jsonl.settings.json has no settings" in refused()
    Path("out.jsonl").unlink()
    Path("out.jsonl").mkdir()
    assert "is not a regular file" in refused()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", [], "in.jsonl has no rows"),
        ("[1]", [], "in.jsonl is a JSON array"),
        ('{"prompt": "1?"}\n{"prompt"\n', [], "in.jsonl, line 2"),
        ('{"prompt": "1?"}\n3\n', [], "in.jsonl, line 2 cannot be read: it is a int"),
        ('\n{"question": "1?"}\n', [], "in.jsonl, line 2 has neither 'prompt' nor 'messages', it has ['question']"),
        ('{"prompt": "1?", "messages": []}', [], "in.jsonl, line 1 has both 'prompt' and 'messages'"),
        ('{"prompt": " "}', [], "in.jsonl, line 1: field 'prompt' is empty"),
        ('{"messages": "1?"}', [], "in.jsonl, line 1: 'messages' must be a list"),
        ('{"messages": [{"role": "user"}]}', [], "in.jsonl, line 1: field 'messages', message 0 has no 'content'"),
        ('{"prompt": "1?", "id": 1.5}', [], "in.jsonl, line 1: its id is 1.5"),
        ('{"prompt": "1?", "id": 2}\n{"prompt": "2?"}', [], "in.jsonl, line 2: its id 2 is that of line 1 too"),
        (f'{{"prompt": "1?"}}\n{{"prompt": "{"2" * 40}"}}', [], "(in.jsonl, line 2) has 48 tokens"),
        ('{"n": 1}\n{"m": 1}', ["--as_items"], "item 1 (in.jsonl, line 2): messages(item) raised KeyError: 'n'"),
    ],
)
def test_bad_rows_are_refused_before_an_engine_starts(config, capsys, text, options, message):
    Path("in.jsonl").write_text(text)
    try:
        code = run(config, "--input", "in.jsonl", "--output", "out.jsonl", *options)
    except SystemExit as end:
        code = end.code
    assert code == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert WatchedEngine.starts == 0
    assert not answered() if Path("out.jsonl").exists() else True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "out.jsonl"], "--output needs --input FILE"),
        (["--as_items"], "--as_items needs --input FILE"),
        (["--input", "in.jsonl"], "--input needs --output"),
        (["--input", "in.jsonl", "--output", "./in.jsonl"], "is the input"),
        (["--input", "none.jsonl", "--output", "out.jsonl"], "--input none.jsonl cannot be read: No such file"),
        (["--run", "tiny/0", "--ckpt_path", "last"], "--run and --ckpt_path both choose the weights"),
    ],
)
def test_options_that_do_not_fit_are_refused(config, capsys, options, message):
    write("in.jsonl", {"prompt": "1?"})
    assert run(config, *options) == 2
    assert message in capsys.readouterr().err


def test_rows_may_be_items_of_the_environment(config, tiny_model):
    write("in.jsonl", {"n": 5, "id": "five"}, {"n": 6})
    run(config, "--input", "in.jsonl", "--output", "out.jsonl", "--as-items")
    assert set(WatchedEngine.prompts) == {ids_of(tiny_model, f"user:{n}?\na:") for n in (5, 6)}
    assert [row["id"] for row in answered()] == ["five", 2]


def test_an_error_of_the_environment_ends_one_rollout(config):
    write("in.jsonl", {"prompt": "bad"}, {"prompt": "1?"})
    options = [ENVIRONMENT, f"{HERE}.Unrewarded", "--as_items"]
    run(config, "--input", "in.jsonl", "--output", "out.jsonl", *options)
    bad, good = answered()
    assert bad["completions"][0]["finish_reason"] == "env_error"
    assert good["completions"][0]["finish_reason"] in ("stop", "length")


def test_prompts_that_are_too_long_may_be_left_out(config):
    file_run(config, "--data.sampling.long_prompts", "drop", rows=["1?", "2" * 40, "3?"])
    first, dropped, last = answered()
    assert dropped == {"id": 2, "completions": [], "error": "the prompt is too long"}
    assert (first["id"], last["id"]) == (1, 3)
    assert first["completions"]
    assert last["completions"]


def test_limit_predict_batches_takes_the_first_rows(config, capsys):
    file_run(config, "--trainer.limit_predict_batches", "2")
    assert "answers to 2 of 4 rows: out.jsonl" in capsys.readouterr().err
    assert [row["id"] for row in answered()] == [1, 2]
    file_run(config)  # continues
    assert [row["id"] for row in answered()] == [1, 2, 3, 4]
    assert len(WatchedEngine.prompts) == 4


def test_standard_input_and_output(config, capsys, monkeypatch):
    lines = b'{"prompt": "1?", "id": "a"}\n{"prompt": "2?"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert run(config, "--input", "-", "--output", "-") == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["id"] for line in printed.out.splitlines()] == ["a", 2]
    assert "answers to 2 rows: standard output" in printed.err
    assert "starting WatchedEngine" in printed.err


def test_held_out_items_without_rewards(config, capsys):
    options = [ENVIRONMENT, f"{HERE}.Unrewarded"]
    assert run(config, *options, "--samples", "2") == 0
    (file,) = Path("runs/tiny").glob("*/rollouts-predict.jsonl")
    found = answered(file)
    assert [(line["item"]["prompt"], line["reward"]) for line in found] == [("7?", None)] * 2 + [("8?", None)] * 2
    assert f"completions of the held-out items: {file}" in capsys.readouterr().out
    for command in ("fit", "validate", "test"):
        with pytest.raises(SystemExit):
            FuchsiaCLI([command, "--config", str(config), *options, "--trainer.limit_val_batches", "1.0"])
        assert "Unrewarded.reward_functions is empty" in capsys.readouterr().err
    assert WatchedEngine.starts == 1


def test_an_output_in_use_is_refused(config, capsys):
    import fcntl

    WatchedEngine.fails_after = 0
    with pytest.raises(EngineError):
        file_run(config)
    with Path("out.jsonl.settings.json").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            file_run(config)
    assert "--output out.jsonl is being written by another process" in capsys.readouterr().err


def rollout(*turns: tuple[str, str], status=RolloutStatus.COMPLETED, responses=()) -> Rollout:
    made = Rollout(
        {}, 0, 0, 1.0, "", messages=[{"role": "assistant", "content": "hi"}, {"role": "user", "content": "?"}]
    )
    made.start([1])
    for number, (text, reason) in enumerate(turns):
        made.append(Turn(Completion((5, 6), (-0.1, -0.1), reason, None, 0), text, text, text, text))
        if number < len(responses):
            made.respond(responses[number])
            made.take_responses(100)
    made.finish(status)
    return made


@pytest.mark.parametrize(
    ("made", "max_turns", "reason"),
    [
        (rollout(("a", "stop")), 1, "stop"),
        (rollout(("a", "length"), status=RolloutStatus.TRUNCATED), 3, "length"),
        (rollout(("a", "stop"), status=RolloutStatus.TRUNCATED), 3, "length"),  # no tokens for a second turn
        (rollout(("a", "stop"), ("b", "stop"), status=RolloutStatus.TRUNCATED), 2, "turns"),
        (rollout(status=RolloutStatus.ENV_ERROR), 1, "env_error"),
        (rollout(("a", "stop"), status=RolloutStatus.TOOL_ERROR), 1, "tool_error"),
    ],
)
def test_finish_reasons(made, max_turns, reason):
    (completion,) = json.loads(answer_line(1, Answers((made,), {}, 0, (9,), max_turns)))["completions"]
    assert (completion["finish_reason"], completion["seed"], completion["tokens"]) == (reason, 9, 2 * len(made.turns))


def test_a_conversation_with_several_turns_has_its_messages():
    made = rollout(("call", "stop"), ("done", "stop"), responses=["result"])
    (completion,) = json.loads(answer_line(1, Answers((made,), {}, 0, (9,), 4)))["completions"]
    assert completion["text"] == "done"
    assert [(m["role"], m["content"]) for m in completion["messages"]] == [
        ("assistant", "call"),
        ("user", "result"),
        ("assistant", "done"),
    ]


def test_hostile_text_stays_one_line_of_json():
    text = '\x1b[2J"\n\u2028\ud800'
    line = answer_line("\n", Answers((rollout((text, "stop")),), {}, 0, (9,)))
    assert line.count("\n") == 1
    assert json.loads(line)["completions"][0]["text"] == text


def test_the_help_page_has_the_options():
    page = help_page("predict", packaged_table(), with_all=False)
    for option in ("--input FILE", "--output FILE", "--as_items", "--samples INT", "--run RUN", "--adapter FOLDER"):
        assert f"\n  {option}\n" in page
    assert page.count("--ckpt_path") == 1
    assert "--input" not in help_page("validate", packaged_table(), with_all=True)


def test_turns_of_an_environment_are_bounded(config):
    write("in.jsonl", {"prompt": "1?"})
    options = [ENVIRONMENT, f"{HERE}.Twice", "--as_items", "--max_completion_tokens", "20"]
    run(config, "--input", "in.jsonl", "--output", "out.jsonl", *options)
    assert answered()[0]["completions"][0]["finish_reason"] in ("turns", "length")
