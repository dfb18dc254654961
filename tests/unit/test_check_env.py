"""`fuchsia check-env` as a command, with correct and faulty environments."""

import asyncio
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.cli import played
from fuchsia_pl.cli.check_env import check_env
from fuchsia_pl.cli.examination import Examiner, Run
from fuchsia_pl.envs import MCPServer, SingleTurnEnvironment, ToolEnvironment
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.types import ConfigError
from tests.doubles import RecordedEngine, TinyEngine, TinyEnvironment, make_data, make_module, make_trainer

GOLD_RIGHT = "the answer is 4"  # characters in the vocabulary of the tiny tokenizer
SHORT = {name: played.HOSTILE[name] for name in ("empty", "code", "special tokens")}
WHOLE_RUN = Run(num_ranks=1, max_tokens=None, held_out=1.0)


def right(rollouts, *args, **kwargs):
    return [float(GOLD_RIGHT in r.completion) for r in rollouts]


class Right(TinyEnvironment):
    def __init__(self, reward=right, gold: bool = True) -> None:
        super().__init__()
        self.reward_functions, self.reward_weights, self.gold = [reward], {}, gold
        self.timeout_s = 5.0

    def gold_turns(self, item):
        return [GOLD_RIGHT] if self.gold else None


class PaysForLength(Right):
    """A common mistake: every long text gets a reward."""

    def __init__(self) -> None:
        def long(rollouts, *args, **kwargs):
            return [min(len(r.completion), 100) / 10 for r in rollouts]

        super().__init__(long)


class Evaluates(Right):
    """The mistake of the original: the answer is evaluated, and an answer that is not a number ends the run."""

    def __init__(self) -> None:
        def value(rollouts, *args, **kwargs):
            return [float(r.completion.removeprefix("the answer is ")) for r in rollouts]

        super().__init__(value)


class EvaluatesUnscored(Evaluates):
    def __init__(self) -> None:
        super().__init__()
        self.on_error = "unscored"


class NoGold(Right):
    def __init__(self) -> None:
        super().__init__(gold=False)


class GoldIsText(Right):
    def gold_turns(self, item):
        return GOLD_RIGHT


class OneNumber(Right):
    """Correct for a single rollout, wrong for a group."""

    def __init__(self) -> None:
        def alone(rollouts, *args, **kwargs):
            return [float(GOLD_RIGHT in rollouts[0].completion)]

        super().__init__(alone)


class OtherHeldOut(Right):
    """The held-out items lack the field that the reward reads."""

    def __init__(self) -> None:
        def known(rollouts, *args, **kwargs):
            return [float(r.item["n"] >= 0 and r.item["answer"] in r.completion) for r in rollouts]

        super().__init__(known)

    def train_items(self):
        return [{"n": n, "answer": GOLD_RIGHT} for n in range(20)]


class NoHeldOut(Right):
    def validation_items(self):
        return []


class OpensNothing(Right):
    def validation_items(self):
        raise FileNotFoundError("there is no held-out file")


class Empty(Right):
    def train_items(self):
        return []


class Generates(Right):
    def train_items(self):
        yield {"n": 1}


class Texts(Right):
    def train_items(self):
        return ["3 plus 4?"] * 20


class NoConstructor(Right):
    def __init__(self) -> None:
        self.reward_functions = [right]


class NoConstructorEarly(Right):
    def __init__(self) -> None:
        self.reward_weights["right"] = 1.0


class NoMessages(Right):
    def messages(self, item):
        return None


class MessagesAreText(Right):
    def messages(self, item):
        return f"{item['n']}?"


class MessagesEmpty(Right):
    def messages(self, item):
        return []


class MessagesRaise(Right):
    def messages(self, item):
        return [{"role": "user", "content": item["question"]}]


class WritesMessages(Right):
    """A list of messages in a field that is treated as text."""

    def messages(self, item):
        return [{"role": "user", "content": str([{"role": "user", "content": item["n"]}])}]


class Wordy(Right):
    def messages(self, item):
        return [{"role": "user", "content": "x" * (500 if item["n"] == 13 else 5)}]


class NoReward(SingleTurnEnvironment):
    """Has items but no reward function."""


class NoScript(ToolEnvironment):
    def __init__(self) -> None:
        super().__init__()
        self.reward_functions = [right]
        self.servers = [MCPServer(command=[sys.executable, "no_such_server.py"])]

    train_items = TinyEnvironment.train_items
    validation_items = TinyEnvironment.validation_items
    messages = TinyEnvironment.messages
    num_items = 20


@pytest.fixture
def run(tmp_path, tiny_model, monkeypatch, capsys):
    """Runs the command with the tiny model and a few of the texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fuchsia"])
    monkeypatch.setattr(played, "HOSTILE", SHORT)

    def call(name: str, *more: str, all_texts: bool = False):
        if all_texts:
            monkeypatch.undo()
            monkeypatch.chdir(tmp_path)
        words = ["--config", "quickstart.yaml", "--data.sampling.group_size", "3"]
        words += [] if all_texts else ["--model.policy.name", str(tiny_model)]
        words += ["--data.environment.class_path", f"tests.unit.test_check_env.{name}"]
        try:
            code = check_env([*words, *more, "--num-items", "2"])
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def wrong(out: str) -> list[str]:
    return [line.removeprefix("does not hold: ") for line in out.splitlines() if line.startswith("does not hold: ")]


def test_an_environment_that_holds(run):
    code, out, _ = run("Right", all_texts=True)
    assert code == 0
    assert out.endswith("Right: holds\n")
    assert "prompt of item" in out
    rows = [line.split("  ")[0].strip() for line in out.splitlines()]
    assert [name for name in rows if name in ("gold", "truncated", *played.HOSTILE)] == [
        "gold",
        "truncated",
        *played.HOSTILE,
    ]
    # Two training items in groups of three, and one held-out item alone.
    assert "20 training items, 4 held-out items; played on 3 of them, in groups of 3" in out
    assert not Path("runs").exists()  # nothing has run, so no files are left


def test_an_environment_that_pays_for_something_else_is_found_out(run):
    code, out, _ = run("PaysForLength")
    assert code == 1
    # 15 characters of gold get 1.5. The tiny tokenizer has no signs: of "code" it keeps answer, import, os, system, true
    # and answer, 30 characters, which get 3.
    assert wrong(out) == ["on 2 of 5 texts ('code', 'special tokens'): earns 3, no less than the gold answer's 1.5"]
    assert out.endswith("PaysForLength: 1 finding\n")


@pytest.mark.parametrize("name", ["Evaluates", "EvaluatesUnscored"])
def test_an_environment_that_hostile_text_stops_is_found_out(run, name):
    code, out, _ = run(name)
    assert code == 1
    (sentence,) = wrong(out)
    assert sentence.startswith(
        "on 4 of 5 texts ('truncated', 'empty', 'code', …): stops the run: RewardError: the reward"
    )
    assert "raised ValueError" in sentence
    assert len(sentence) < 500


def test_a_reward_that_returns_one_number_is_found_out_once(run):
    code, out, _ = run("OneNumber")
    assert code == 1
    (sentence,) = wrong(out)
    assert sentence.startswith(
        "on all 5 texts: stops the run: RewardError: the reward function 'alone' returned a list of 1 for 3 rollouts"
    )
    assert "(item " in sentence  # a held-out rollout is alone, so there it is scored


def test_the_held_out_split_is_loaded_and_played(run):
    code, out, _ = run("OtherHeldOut")
    assert code == 1
    (sentence,) = wrong(out)
    assert "raised KeyError: 'answer'" in sentence
    assert sentence.endswith("(held-out item 0)")
    code, out, _ = run("NoHeldOut")
    assert code == 1
    assert wrong(out) == [
        "NoHeldOut.validation_items has 0 items for 1 rank(s): add some, or set trainer.limit_val_batches to 0"
    ]
    code, out, _ = run("OpensNothing")
    assert code == 1
    (sentence,) = wrong(out)
    assert sentence.startswith("OpensNothing.validation_items raised FileNotFoundError: there is no held-out file (")
    code, out, _ = run("NoHeldOut", "--trainer.limit_val_batches", "0")
    assert code == 0
    assert (
        "not checked: the held-out split, which trainer.limit_val_batches=0 leaves out: NoHeldOut.validation_items has 0"
        in out
    )


def test_a_prompt_that_is_a_written_object_is_found_out(run):
    code, out, _ = run("WritesMessages")
    assert code == 1
    first, held_out = wrong(out)
    assert first.startswith(
        "20 prompts look like a Python object that was made a text, first that of item 0: [{'role': 'user',"
    )
    assert held_out.startswith("4 prompts look like")


def test_an_unknown_gold_answer_is_said(run):
    code, out, _ = run("NoGold")
    assert code == 0
    assert "not checked: that the gold answer earns most, since it is not known (override gold_turns)" in out
    code, out, _ = run("GoldIsText")
    assert code == 1
    assert "GoldIsText.gold_turns returned 'the answer is 4': it must return a list of texts" in wrong(out)[0]


REFUSED = {
    "NoReward": "NoReward.reward_functions is empty",
    "Empty": "Empty.train_items has no items: there is nothing to train on",
    "Generates": "Generates.train_items returned a generator: it must return a list of items, each a mapping",
    "Texts": "training item 0: it is a text, but an item must be a mapping",
    "NoConstructor": "NoConstructor.__init__ does not call super().__init__()",
    "NoConstructorEarly": "NoConstructorEarly.__init__ does not call super().__init__()",
    "NoMessages": "training item 0: messages(item) returned null",
    "MessagesAreText": "training item 0: messages(item) returned a text",
    "MessagesEmpty": "training item 0: messages(item) returned an empty list",
    "MessagesRaise": "training item 0: messages(item) raised KeyError: 'question'",
    "Wordy": "has 508 tokens",
    "NoScript": "there is no file",
}


def fit(environment, engine, tiny_model, root, **settings) -> None:
    module = make_module(tiny_model)
    data = make_data(module, engine, environment(), batch_size=4, steps_per_epoch=1, **settings)
    sync = AdapterSync(tolerance=100.0)  # the logprobs of `RecordedEngine` are not those of a model
    make_trainer(root, sync=sync, max_steps=1, limit_val_batches=1.0).fit(module, datamodule=data)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_would_refuse_is_one_sentence_here_and_there(run, name, tiny_model, tmp_path):
    code, out, err = run(name)
    assert code == 2
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert REFUSED[name] in sentence
    assert "Traceback" not in out + err
    engine = TinyEngine()
    with pytest.raises(ConfigError) as caught:
        fit(globals()[name], engine, tiny_model, tmp_path)
    assert REFUSED[name] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hasattr(engine, "spec")


def test_a_missing_file_of_a_tool_server_is_named(run):
    _, _, err = run("NoScript")
    assert f"the tool server '{sys.executable} no_such_server.py' did not start: there is no file " in err
    assert str(Path("no_such_server.py").absolute()) in err


def test_long_prompts_are_left_out_where_the_run_leaves_them_out(run):
    code, out, _ = run("Wordy", "--data.sampling.long_prompts", "drop")
    assert code == 0
    assert "19 training items (1 more left out as too long), 4 held-out items" in out


def test_sizes_that_a_run_would_refuse_are_refused(run):
    code, _, err = run("Right", "--trainer.devices", "3")
    assert code == 2
    assert "data.batch_size=8 is no multiple of the 3 ranks" in err
    code, _, err = run("Right", "--model.policy.max_tokens_per_micro_batch", "9")
    assert code == 2
    assert "model.policy.max_tokens_per_micro_batch=9 is less than the longest row has" in err
    code, _, err = run("Right", "--data.batch_sise", "3")
    assert code == 2
    assert "Did you mean 'data.batch_size'?" in err
    with pytest.raises(SystemExit) as caught:
        check_env(["--num-items", "0"])
    assert caught.value.code == 2


def test_gold_answers_that_the_rewards_cannot_use_are_told(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "what is 3 plus 4?"}\n' * 20)
    more = ["--data.environment.class_path", "fuchsia_pl.library.gsm8k.GSM8K", "--data.sampling.max_length", "400"]
    more += ["--data.environment.init_args.train_file", str(rows)]
    more += ["--data.environment.init_args.validation_file", str(rows)]
    code, out, err = run("Right", *more)
    assert code != 0
    assert "'answer'" in out + err
    assert "Traceback" not in out + err


def test_it_works_where_an_event_loop_runs(run):
    async def in_a_notebook_cell():
        return run("Right")

    code, out, _ = asyncio.run(in_a_notebook_cell())
    assert code == 0
    assert out.endswith("Right: holds\n")


def examine(environment, tiny_model, **settings):
    data = make_data(make_module(tiny_model), RecordedEngine(), environment, batch_size=4, **settings)
    return run_blocking(Examiner(data, WHOLE_RUN, num_items=1).examine())


def test_turns_are_played_in_order_to_every_sibling(tiny_model, monkeypatch):
    monkeypatch.setattr(played, "HOSTILE", {})

    class Guess(TinyEnvironment):
        max_steps = 3

        def step_rollout(self, rollout):
            if rollout.turns[-1].text == "b":
                rollout.finish()
            else:
                rollout.respond(f"no {rollout.sibling}")

        def gold_turns(self, item):
            return ["a", "b"]

    found = examine(Guess(), tiny_model)
    groups = [one for one in found.played if one.name == played.GOLD]
    assert [len(one.rollouts) for one in groups] == [4, 1]
    assert all([turn.text for turn in r.turns] == ["a", "b"] for one in groups for r in one.rollouts)
    cut = [one for one in found.played if one.name == played.TRUNCATED]
    assert all(r.status == "truncated" for one in cut for r in one.rollouts)


DEFECTS = {
    "one number": lambda rollouts: [1.0],
    "None": lambda rollouts: [None for _ in rollouts],
    "too many": lambda rollouts: [1.0] * (len(rollouts) + 1),
    "text": lambda rollouts: ["1.0" for _ in rollouts],
    "infinite": lambda rollouts: [float("inf") for _ in rollouts],
    "raises": lambda rollouts: [1.0 / 0.0 for _ in rollouts],
    "fine": lambda rollouts: [float(r.sibling) for r in rollouts],
}
CONVERSATIONS = {
    "fine": lambda item: [{"role": "user", "content": f"{item['n']}?"}],
    "None": lambda item: None,
    "text": lambda item: f"{item['n']}?",
    "long": lambda item: [{"role": "user", "content": "x" * (60 if item["n"] % 2 else 5)}],
    "field": lambda item: [{"role": "user", "content": item["question"]}],
    "number": lambda item: [{"role": "user", "content": item["n"]}],
}
ITEMS = {
    "fine": [{"n": n} for n in range(6)],
    "few": [{"n": 0}],
    "empty": [],
    "None": None,
    "texts": ["a"] * 6,
    "raises": ZeroDivisionError("no rows"),
}


class Generated(TinyEnvironment):
    def __init__(self, reward: str, conversation: str, train: str, held_out: str) -> None:
        def made(rollouts, *args, **kwargs):
            return DEFECTS[reward](rollouts)

        super().__init__()
        self.reward_functions, self.reward_weights = [made], {}
        self.conversation, self.rows = CONVERSATIONS[conversation], {"train": ITEMS[train], "held out": ITEMS[held_out]}

    def messages(self, item):
        return self.conversation(item)

    def train_items(self):
        return self.split("train")

    def validation_items(self):
        return self.split("held out")

    def split(self, name):
        if isinstance(self.rows[name], Exception):
            raise self.rows[name]
        return self.rows[name]


def mostly_fine(choices):
    return st.one_of(st.just("fine"), st.sampled_from(sorted(choices)))


@settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {
            "reward": mostly_fine(DEFECTS),
            "conversation": mostly_fine(CONVERSATIONS),
            "train": mostly_fine(ITEMS),
            "held_out": mostly_fine(ITEMS),
        }
    ),
    st.sampled_from(["refuse", "drop"]),
)
@example({"reward": "fine", "conversation": "fine", "train": "fine", "held_out": "few"}, "refuse")
@example({"reward": "fine", "conversation": "long", "train": "fine", "held_out": "fine"}, "drop")
def test_what_it_passes_a_run_accepts(tiny_model, tmp_path_factory, monkeypatch, choices, long_prompts):
    monkeypatch.setattr(played, "HOSTILE", SHORT)
    sampling = {"long_prompts": long_prompts}
    try:
        found = examine(Generated(**choices), tiny_model, sampling=sampling)
        told = found.wrong
    except ConfigError as error:
        told = [str(error)]
    assert all(sentence and "\n" not in sentence for sentence in told)
    if told:
        return
    root = tmp_path_factory.mktemp("run")
    fit(lambda: Generated(**choices), RecordedEngine(), tiny_model, root, sampling=sampling)


def test_it_shows_the_prompts_that_the_chat_template_of_the_config_makes(run, tmp_path):
    _, out, _ = run("Right")
    assert "user:" in out
    code, out, _ = run("Right", "--model.policy.chat_template", "none")
    assert code == 0
    assert "user:" not in out.partition("total")[0]  # the table below contains the names of the texts
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}question: {{ m['content'] }}{% endfor %} a:")
    code, out, _ = run("Right", "--model.policy.chat_template", "chat.jinja")
    assert code == 0
    assert "question: " in out
    code, _, err = run("Right", "--model.policy.chat_template", "other.jinja")
    assert code == 2
    assert "'other.jinja' is not a template" in err


@pytest.mark.parametrize("config", ["quickstart.yaml", "countdown.yaml", "function_calling.yaml", "reasoning_gym.yaml"])
def test_the_environments_that_come_with_it_hold(forkserver, config, tmp_path):
    words = ["-m", "fuchsia_pl", "check-env", "--config", config, "--config", "overlays/cpu.yaml", "--num-items", "2"]
    done = forkserver.run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.printed
    assert ": holds\n" in done.printed
    assert list(tmp_path.iterdir()) == []


def test_a_setting_of_the_environment_is_as_it_was_afterwards(tiny_model, monkeypatch):
    monkeypatch.setattr(played, "HOSTILE", SHORT)
    environment = TinyEnvironment()
    environment.on_error = "unscored"
    examine(environment, tiny_model)
    assert environment.on_error == "unscored"
