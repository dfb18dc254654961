"""`fuchsia serve RUN` on a real vLLM server: the openai client gets the answers of the trained weights, and of the base."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

import httpx
import openai
import peft
import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.test_engine import make_policy, perturb
from tests.machine import DTYPE

pytestmark = pytest.mark.engine
KEY = "a key of this test"
QUESTIONS = ["What is 27 plus 45?", "Name a colour.", "Where is Paris?", "Write a short poem about rain."]
NUM_TOKENS = 12
START_S = 480.0


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder) -> Path:
    """The folder of a run whose adapter changes most answers."""
    folder = tmp_path_factory.mktemp("root") / "runs" / "story" / "0"
    policy = make_policy(model_folder, r=8)
    perturb(policy, seed=1)
    policy.save_trained(folder / "adapter")
    settings = {"name": str(model_folder), "hub_id": "someone/smollm2", "dtype": DTYPE, "lora": {"r": 8, "alpha": 16}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"policy": settings}}))
    return folder


@pytest.fixture(scope="module")
def client(run):
    """A client of the server of that run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [Path(sys.executable).parent / "fuchsia", "serve", "story", "--port", str(port), "--api_key", KEY]
    log = run / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen([*words, "--kv_cache_gb", "0.5"], cwd=run.parents[2], stdout=stream, stderr=stream)
    try:
        end = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.5)
            else:
                break
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, timeout=120)
    finally:
        parts = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for part in parts:
            part.kill()
        psutil.wait_procs(parts, 30)


def expected(run: Path, model_folder: Path) -> dict[str, list[str]]:
    """Greedy answers by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found: dict[str, list[str]] = {}
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, DTYPE))
    for name in ("someone/smollm2", "story-0"):
        model = base if name == "someone/smollm2" else peft.PeftModel.from_pretrained(base, str(run / "adapter"))
        found[name] = []
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            ids = inputs["input_ids"]
            for _ in range(NUM_TOKENS):
                with torch.no_grad():
                    token = model.eval()(ids).logits[0, -1].argmax()
                ids = torch.cat([ids, token.view(1, 1)], dim=1)
                if token == tokenizer.eos_token_id:
                    break
            found[name].append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def shared(texts: list[str], others: list[str]) -> float:
    """Share of the words of some texts that the others have too, up to the first difference in each."""
    pairs = [(one.split(" "), other.split(" ")) for one, other in zip(texts, others, strict=True)]
    same = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*pair, strict=False))) for pair in pairs]
    return sum(same) / sum(len(words) for words, _ in pairs)


def test_the_openai_client_gets_the_trained_answers_beside_those_of_the_base(client, run, model_folder):
    assert {model.id for model in client.models.list()} == {"someone/smollm2", "story-0"}
    wanted = expected(run, model_folder)

    def ask(name: str, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        answer = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=NUM_TOKENS)
        return answer.choices[0].message.content or ""

    pairs = [(name, question) for name in wanted for question in QUESTIONS]
    with ThreadPoolExecutor(len(pairs)) as pool:  # all at once: rows of both models share a batch
        answers = list(pool.map(lambda pair: ask(*pair), pairs))
    found = dict(zip(pairs, answers, strict=True))
    for name, texts in wanted.items():
        answers = [found[name, question] for question in QUESTIONS]
        others = next(texts for other, texts in wanted.items() if other != name)
        # Two implementations round differently in bfloat16, also by batch with AMX, and a text goes on differently after a near
        # tie. In float32 no answer differs.
        assert answers == texts or DTYPE != "float32", (answers, texts)
        assert shared(texts, answers) >= 0.5, (name, texts, answers)
        assert shared(others, answers) < 0.5, (name, others, answers)
    assert sum(found["someone/smollm2", q] != found["story-0", q] for q in QUESTIONS) >= 2  # most answers are changed


def test_a_long_request_is_served(client):
    """Longer than the 128 tokens that a quickstart trains with."""
    text = "one two three four five six seven eight " * 60
    answer = client.completions.create(model="story-0", prompt=text, max_tokens=4, seed=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 400


def test_the_key_is_required(client):
    other = openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        other.models.list()
