"""`fuchsia chat`: what a conversation is with, its answers, its tools and its commands."""

import asyncio
import io
import json
import os
import signal
import time

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from fuchsia_pl.cli.chat import chat, find_target
from fuchsia_pl.cli.chat_session import ChatSettings, Session, conversation_environment
from fuchsia_pl.engines.base import SamplingParams
from fuchsia_pl.envs.tool_environment import ToolEnvironment
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.local_engine import LocalEngine
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.stopping import stopping
from fuchsia_pl.types import Completion, ConfigError
from tests.doubles import EOS, TINY

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, seed=1, stop_token_ids=(EOS,))
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """An adapter that changes every logit."""
    policy = Policy(PolicyConfig(str(tiny_model), dtype="float32", lora=LoRASettings(r=4, alpha=64)), tiny_model, False)
    torch.manual_seed(3)
    for parameter in policy.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    policy.save_trained(folder)
    return folder


def greedy(model, steps):
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
    return tuple(ids[len(PROMPT) :])


def test_the_adapter_is_on_and_off(tiny_model, adapter):
    engine = LocalEngine(tiny_model, torch.float32, adapter, "tiny")
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    with_adapter = run_blocking(engine.generate(PROMPT, GREEDY)).token_ids
    engine.uses_adapter = False
    without = run_blocking(engine.generate(PROMPT, GREEDY)).token_ids
    assert without == greedy(base, 6)
    from peft import PeftModel

    assert with_adapter == greedy(PeftModel.from_pretrained(base, adapter), 6)
    assert with_adapter != without


def test_sampling_is_repeatable_and_the_seed_and_the_temperature_count(tiny_model):
    engine = LocalEngine(tiny_model, torch.float32, None, "tiny")

    def sample(temperature, seed):
        sampling = SamplingParams(temperature, max_tokens=20, seed=seed)
        return run_blocking(engine.generate(PROMPT, sampling)).token_ids

    assert sample(1.0, 1) == sample(1.0, 1) != sample(1.0, 2)
    assert sample(0.001, 1) == greedy(engine.model, 20) != sample(5.0, 1)


def test_an_answer_ends_at_an_end_id_at_the_limit_and_when_it_is_stopped(tiny_model):
    engine = LocalEngine(tiny_model, torch.float32, None, "tiny")
    first = run_blocking(engine.generate(PROMPT, SamplingParams(0.0, 6, 1))).token_ids
    ended = run_blocking(engine.generate(PROMPT, SamplingParams(0.0, 6, 1, stop_token_ids=(first[0],))))
    assert (ended.token_ids, ended.finish_reason) == (first[:1], "stop")
    limited = run_blocking(engine.generate(PROMPT, SamplingParams(0.0, 3, 1)))
    assert (len(limited.token_ids), limited.finish_reason) == (3, "length")
    seen = []

    def stop(token_id):
        seen.append(token_id)
        engine.is_stopped = len(seen) >= 2

    engine.on_token = stop
    stopped = run_blocking(engine.generate(PROMPT, SamplingParams(0.0, 50, 1)))
    assert len(seen) in (2, 3)
    assert (stopped.token_ids, stopped.finish_reason) == (tuple(seen), "length")


class Scripted:
    """Writes given answers, one character an id, in place of a model."""

    has_adapter, max_length, uses_adapter, is_stopped, policy_version = True, 2000, True, False, 0

    def __init__(self, chat, *answers):
        self.chat, self.answers, self.prompts, self.adapters = chat, list(answers), [], []

    async def generate(self, prompt_ids, sampling):
        self.prompts.append(self.chat.raw_text(prompt_ids))
        self.adapters.append(self.uses_adapter)
        ids = self.chat.encode_turn(self.answers.pop(0))
        for token_id in ids:
            self.on_token(token_id)
        return Completion(tuple(ids), (0.0,) * len(ids), "stop", None, 0)


def made(tiny_model, *answers, environment=None):
    chat_ = Chat(tiny_model)
    text = io.StringIO()
    console = Console(file=text, highlight=False, width=200)
    engine = Scripted(chat_, *answers)
    return Session(engine, chat_, conversation_environment(environment), ChatSettings(), console), engine, text


def test_answers_are_printed_and_the_conversation_grows(tiny_model):
    session, engine, text = made(tiny_model, "four", "five")
    with session.open():
        assert session.take("2 plus 2?\n")
        assert session.take("and 1 more?")
        assert not session.take("/quit")
    assert text.getvalue() == "four\nfive\n"
    assert engine.prompts[1].startswith("user:2 plus 2?\nassistant:four\nuser:and 1 more?")


def test_base_answers_the_last_question_and_leaves_the_conversation(tiny_model):
    session, engine, text = made(tiny_model, "four", "fish", "five")
    with session.open():
        session.take("/base")
        session.take("2 plus 2?")
        session.take("/base")
        session.take("and 1 more?")
    assert engine.adapters == [True, False, True]
    assert engine.prompts[0] == engine.prompts[1]
    assert "fish" not in engine.prompts[2]
    assert text.getvalue().splitlines() == ["there is no question yet", "four", "base model:", "fish", "five"]


def test_system_and_reset_begin_a_new_conversation(tiny_model):
    session, engine, _ = made(tiny_model, *["yes"] * 4)
    with session.open():
        for line in ("one", "/system be kind", "two", "/reset", "three", "/system", "four"):
            session.take(line)
    assert engine.prompts[1].startswith("system:be kind\nuser:two")
    assert engine.prompts[2].startswith("system:be kind\nuser:three")
    assert engine.prompts[3].startswith("user:four")


def test_an_unknown_command_is_no_question(tiny_model):
    session, engine, text = made(tiny_model)
    with session.open():
        session.take("/bass")
        session.take("   ")
    assert text.getvalue().startswith("/bass is no command:")
    assert not engine.prompts


def test_tools_of_the_environment_are_called(tiny_model):
    class Adding(ToolEnvironment):
        def __init__(self):
            super().__init__()
            self.functions = [add]
            self.max_steps = 3

    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    call = '<tool_call>{"name": "add", "arguments": {"a": 17, "b": 25}}</tool_call>'
    session, engine, _text = made(tiny_model, call, "it is 42", environment=Adding())
    # The tiny tokenizer has no such characters, so the calls are read from the script.
    session.chat.turn_text = lambda ids: [call, "it is 42"][len(engine.prompts) - 1]
    with session.open():
        assert [tool.name for tool in session.environment.tools] == ["add"]
        session.take("17 plus 25?")
    assert [message["role"] for message in session.messages] == ["user", "assistant", "user", "assistant"]
    assert "42" in session.messages[2]["content"]


def test_a_conversation_that_is_too_long_is_told(tiny_model):
    session, _engine, text = made(tiny_model, "never")
    with session.open():
        session.take("a" * 1600)
    assert "exceed the model's context" in text.getvalue()
    assert session.messages == []


def test_control_characters_are_shown_and_never_sent(tiny_model):
    session, engine, text = made(tiny_model)

    async def generate(prompt_ids, sampling):
        engine.on_token(7)
        return Completion((7,), (0.0,), "stop", None, 0)

    engine.generate = generate
    session.chat.text = lambda ids: "a\x1b[2J\r\u202e[red]b" if ids else ""
    with session.open():
        session.take("hello")
    assert text.getvalue() == "a\\x1b[2J\\r\\u202e[red]b\n"


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"temperature": -0.1}, "--temperature must be 0 or more"), ({"max_tokens": 0}, "--max_tokens must be 1 or more")],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        ChatSettings(**settings)


def test_targets(tmp_path, monkeypatch, adapter):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/a/0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with pytest.raises(
        ConfigError, match="has no trained weights: runs/a/0/adapter is written with the first checkpoint"
    ):
        find_target("a/0", None)
    (run / "adapter").symlink_to(adapter)
    found = find_target("a/0", None)
    assert (found.model, found.adapter.resolve(), found.config) == (None, adapter, "runs/a/0/config.yaml")
    assert find_target("a/0", "other.yaml").config == "other.yaml"
    alone = find_target(str(adapter), None)
    assert (alone.adapter, alone.config) == (adapter, None)
    assert alone.model == json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert find_target("Qwen/Qwen3-0.6B", None).model == "Qwen/Qwen3-0.6B"


def test_the_command_answers_standard_input(tiny_model, tmp_path, monkeypatch, capsys, adapter):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/a/0"
    run.mkdir(parents=True)
    resumed = (
        "\nckpt_path: runs/a/9/checkpoints/last.ckpt\nresume: {optimizer: config}\n"  # as in a resumed run's config
    )
    (run / "config.yaml").write_text(TINY % tiny_model + resumed)
    (run / "adapter").symlink_to(adapter)
    monkeypatch.setattr("sys.stdin", io.StringIO("2 plus 2?\n/base\n"))
    assert chat(["a/0", "--temperature", "0", "--max_tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "with the adapter of runs/a/0, on cpu in" in lines[0]
    assert "base model:" in lines
    with pytest.raises(SystemExit) as end:
        chat(["no/such"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "'no/such' is neither a run, nor an adapter, nor a model" in error
    assert "Traceback" not in error


def test_ctrl_c_ends_an_answer_and_not_the_program(tiny_model):
    """With the handlers of the command, whose thread would otherwise begin the end of the program."""
    session, engine, text = made(tiny_model, "four")

    async def generate(prompt_ids, sampling):
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while not engine.is_stopped and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return Completion((7,), (0.0,), "length", None, 0)

    answering = engine.generate
    engine.generate = generate
    with stopping.handled(), session.open():
        session.take("2 plus 2?")
        assert engine.is_stopped
        engine.generate = answering
        session.take("again")
        time.sleep(0.2)  # the thread would act by now
        assert stopping.signum is None
    assert text.getvalue().splitlines() == ["stopped", "four"]


def test_a_conversation_that_cannot_be_rendered_is_told_and_the_next_line_is_answered(tiny_model):
    session, engine, text = made(tiny_model, "four")
    with session.open():
        session.take("a half \ud800")
        session.take("2 plus 2?")
    assert "half of a surrogate pair" in text.getvalue()
    assert text.getvalue().endswith("\nfour\n")
    assert len(engine.prompts) == 1
