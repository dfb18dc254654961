"""The connection to a teacher's server: what is checked at the start, what is asked, and what a failure does."""

import asyncio
import json
from contextlib import contextmanager

import pytest

from fuchsia_pl.engines import vllm_teacher
from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.engines.vllm_teacher import TeacherServer, probe_text
from fuchsia_pl.rollouts.chat import load_tokenizer
from fuchsia_pl.types import ConfigError
from tests.doubles import save_tiny_model
from tests.server_double import FakeServer


class TeacherDouble(FakeServer):
    """Serves a model without adapters. Each id's logprob is id x `scale`; `tokenizer` tokenizes."""

    def __init__(self, tokenizer=None, **settings) -> None:
        super().__init__(**settings)
        self.tokenizer = tokenizer
        self.scale = -0.01  # of an id's logprob
        self.failures = 0  # requests that get a server error first

    def respond(self, method, path, body, key):
        if path == "/tokenize" and self.tokenizer is not None:
            assert body["model"] == self.model
            return 200, {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])}
        if path == "/v1/completions" and body["model"] == self.model:
            self.bodies.append(body)
            if self.failures:
                self.failures -= 1
                return 503, {"error": "busy"}
            (last,) = body["logprob_token_ids"]
            entries = [None, *({str(token): {"logprob": token * self.scale}} for token in body["prompt"][1:])]
            choice = {
                "finish_reason": "length",
                "prompt_logprobs": entries,
                "logprobs": {"top_logprobs": [{f"token_id:{last}": last * self.scale}]},
            }
            return 200, {"model": self.model, "choices": [choice]}
        return super().respond(method, path, body, key)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(vllm_teacher, "BACKOFF_S", 0.001)


@contextmanager
def served(**settings):
    server = TeacherDouble(**settings)
    try:
        yield server
    finally:
        server.kill()


def asked(server: FakeServer, name: str, call):
    """What `call(connection)` returns."""

    async def connected():
        teacher = TeacherServer(f"{server.url}/v1/", name)
        try:
            return await call(teacher)
        finally:
            await teacher.close()

    return asyncio.run(connected())


def test_rows_are_scored_in_order_by_the_named_model(tokenizer):
    with served(model="big", tokenizer=tokenizer) as server:
        rows = [[5, 6, 7], [8, 9], [4, 4, 4, 4]]
        found = asked(server, "big", lambda teacher: teacher.score(rows))
        assert found == [(-0.06, -0.07), (-0.09,), (-0.04,) * 3]
        assert {body["model"] for body in server.bodies} == {"big"}
        assert {body["temperature"] for body in server.bodies} == {1.0}


def test_a_teacher_with_the_same_tokenizer_and_long_rows_passes(tokenizer):
    with served(model="big", tokenizer=tokenizer, max_model_len=64) as server:
        asked(server, "big", lambda teacher: teacher.check(tokenizer, 64))


def test_every_mismatch_of_a_server_is_one_line(tokenizer, tmp_path):
    def refusal(server, name, max_length=64) -> str:
        with pytest.raises(ConfigError) as error:
            asked(server, name, lambda teacher: teacher.check(tokenizer, max_length))
        assert "\n" not in str(error.value)
        return str(error.value)

    with served(model="big", tokenizer=tokenizer) as server:
        assert "has no model 'small': set its name to one of ['big']" in refusal(server, "small")
        assert "was started for 64 tokens, and data.sampling.max_length is 65" in refusal(server, "big", 65)
    file = save_tiny_model(tmp_path / "moved") / "tokenizer.json"
    written = json.loads(file.read_text())
    vocabulary = written["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(written))
    moved = load_tokenizer(file.parent)
    with served(model="big", tokenizer=moved) as server:
        assert "has another tokenizer than the policy" in refusal(server, "big")
    with served(model="big", tokenizer=tokenizer) as server:
        server.scale = 1.0  # logits
        assert "does not score rows: vLLM returned " in refusal(server, "big")
    with served(model="big", api_key="secret") as server:
        words = "of data.teacher refused the API key: set the environment variable VLLM_API_KEY to that of the server"
        assert refusal(server, "big").endswith(words)


def test_a_text_of_the_whole_vocabulary_is_compared(tokenizer):
    text = probe_text(tokenizer)
    assert set(range(len(tokenizer))) <= set(tokenizer.encode(text, add_special_tokens=False))


def test_a_server_that_fails_is_asked_again_a_bounded_number_of_times(tokenizer):
    with served(model="big", tokenizer=tokenizer) as server:
        server.failures = vllm_teacher.MAX_TRIES - 1
        assert asked(server, "big", lambda teacher: teacher.score([[5, 6]])) == [(-0.06,)]
        server.failures = vllm_teacher.MAX_TRIES
        with pytest.raises(EngineError, match=r"did not return the logprobs of a row in 5 attempts .*503"):
            asked(server, "big", lambda teacher: teacher.score([[5, 6]]))
    with pytest.raises(EngineError, match="did not return the list of its models in 5 attempts"):
        asked(server, "big", lambda teacher: teacher.check(tokenizer, 64))
