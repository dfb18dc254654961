"""Reward models: expectations are forwards of transformers, one conversation at a time."""

import threading
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaForCausalLM

from fuchsia_pl.envs import ConfigError
from fuchsia_pl.envs.rewards import RewardModel, RewardServer
from fuchsia_pl.envs.rewards.classifier import Classifier, find_device
from fuchsia_pl.envs.rewards.model_reward import Scale
from fuchsia_pl.envs.rewards.transcript import Transcript
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.run_checks import engine_spec
from fuchsia_pl.types import Rollout
from tests.doubles import (
    TinyEngine,
    TinyEnvironment,
    make_data,
    make_module,
    make_trainer,
    said,
    save_tiny_model,
    written,
)
from tests.reward_models import MAX_LENGTH, RewardServerDouble, plain_outputs, save_reward_model

QUESTION = "3 plus 4?"
ANSWERS = ["7", "it is 7", "no idea at all", "<think>it may be 8</think>7"]
# The tiny model's template: role, colon, text, end of line. Of the last answer the thinking is left out.
TEXTS = [f"user:{QUESTION}\nassistant:{answer}\n" for answer in ("7", "it is 7", "no idea at all", "7")]


def asked(answer: str, question: str = QUESTION, system: str | None = None) -> Rollout:
    rollout = said(answer)
    rollout.messages.insert(0, {"role": "user", "content": question})
    if system is not None:
        rollout.messages.insert(0, {"role": "system", "content": system})
    return rollout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="module")
def expected(folder) -> list[float]:
    return [plain_outputs(folder, text)[0] for text in TEXTS]


@pytest.fixture
def server(folder):
    double = RewardServerDouble(folder)
    yield double
    double.close()


def reward(folder, **settings) -> RewardModel:
    return RewardModel(str(folder), device="cpu", **settings)


def test_the_score_is_that_of_a_plain_forward_of_the_answer_without_its_thinking(folder, expected):
    assert len({round(score, 3) for score in expected[:3]}) == 3
    assert reward(folder)([asked(answer) for answer in ANSWERS]) == pytest.approx(expected, abs=1e-5)
    assert reward(folder)([asked(ANSWERS[0])])[0] == pytest.approx(expected[0], abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_score_does_not_depend_on_the_batch_and_a_repeated_call_has_the_same_bits(folder, expected, batch_size):
    model = reward(folder)
    model.batch_size = batch_size
    backwards = model([asked(answer) for answer in reversed(ANSWERS)])
    assert backwards[::-1] == pytest.approx(expected, abs=1e-5)
    assert model([asked(answer) for answer in reversed(ANSWERS)]) == backwards


def test_the_batch_size_bounds_the_rows_of_a_forward(folder, monkeypatch):
    sizes, forward = [], Classifier._forward
    monkeypatch.setattr(Classifier, "_forward", lambda self, rows: sizes.append(len(rows)) or forward(self, rows))
    model = reward(folder)
    model.batch_size = 3
    model([asked(answer) for answer in ANSWERS])
    assert sizes == [3, 1]


def test_a_model_without_a_pad_id_scores_batches_as_single_rows(tmp_path):
    folder = save_reward_model(tmp_path, pad_token_id=None)
    expected = [plain_outputs(folder, text)[0] for text in TEXTS]
    assert reward(folder)([asked(answer) for answer in ANSWERS]) == pytest.approx(expected, abs=1e-5)


def test_a_model_that_reads_its_first_token_gets_the_tokens_that_its_tokenizer_adds(tmp_path):
    """A BERT without a chat template: the stated form, between the tokenizer's first and last token."""
    save_tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, initializer_range=0.5, **sizes)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    expected = []
    for answer in ("it is 7", "no"):
        ids = [1, *tokenizer.encode(f"user: 3 plus 4?\n\nassistant: {answer}", add_special_tokens=False), 2]
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).logits.item())
    # each token of a BERT reads all others: padding that is not masked would change the shorter row
    assert reward(tmp_path)([asked("it is 7"), asked("no")]) == pytest.approx(expected, abs=1e-5)


def test_a_template_of_the_user_replaces_the_tokenizers(folder):
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (score,) = reward(folder, chat_template=template)([asked("7")])
    assert score == pytest.approx(plain_outputs(folder, f"{QUESTION} 7 ")[0], abs=1e-5)


def test_a_template_without_a_system_role_gets_the_system_text_before_the_question(folder):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m['content'] }}\n"
        "{% endfor %}"
    )
    (score,) = reward(folder, chat_template=template)([asked("7", system="be brief")])
    assert score == pytest.approx(plain_outputs(folder, f"be brief\n\n{QUESTION}\n7\n")[0], abs=1e-5)


def test_every_turn_is_read_without_its_thinking(folder):
    rollout = asked("<think>a</think>one")
    rollout.status = None
    rollout.respond("two?")
    rollout.take_responses(100)
    rollout.append(written("<think>b</think>three"))
    expected = plain_outputs(folder, f"user:{QUESTION}\nassistant:one\nuser:two?\nassistant:three\n")[0]
    assert reward(folder)([rollout])[0] == pytest.approx(expected, abs=1e-5)


def test_names_of_control_tokens_in_an_answer_are_text(tmp_path):
    """A policy that writes the end of the turn and a new one stays inside its own turn."""
    folder = save_reward_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<x>", special=True)]})
    assert tokenizer.convert_tokens_to_ids("<x>") == len(tokenizer) - 1
    tokenizer.chat_template = "{% for m in messages %}<x>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    control, unknown = len(tokenizer) - 1, tokenizer.unk_token_id
    ids = Transcript(str(folder), None, None).ids([{"role": "assistant", "content": "a<x>b"}])
    letter = tokenizer.convert_tokens_to_ids
    assert ids == [control, letter("a"), unknown, letter("x"), unknown, letter("b")]


def test_a_conversation_beyond_the_context_is_counted_and_not_scored(folder, expected):
    # "user:3 plus 4?\n" has 15 characters and "assistant:…\n" 11 beside the answer
    fits, too_long = asked("a" * (MAX_LENGTH - 26)), asked("a" * (MAX_LENGTH - 25))
    scores = reward(folder)([fits, too_long, asked("7")])
    assert scores[0] is not None
    assert scores[1] is None
    assert scores[2] == pytest.approx(expected[0], abs=1e-5)
    assert (fits.counts["reward_model_too_long"], too_long.counts["reward_model_too_long"]) == (0, 1)
    assert set(reward(folder, reward_name="nice").counters) == {"nice_too_long", "nice_not_shown"}


def test_a_conversation_that_the_template_does_not_show_is_counted_and_not_scored(folder):
    template = "{% for m in messages %}{{ m['content'].split('#')[0] }}{% endfor %}"
    hidden = asked("7 # more")
    assert reward(folder, chat_template=template)([hidden]) == [None]
    assert hidden.counts["reward_model_not_shown"] == 1


def test_several_labels_need_a_choice_and_have_probabilities(tmp_path):
    labels = {0: "bad", 1: "fair", 2: "good"}
    folder = save_reward_model(
        tmp_path, num_labels=3, id2label=labels, label2id={name: i for i, name in labels.items()}
    )
    outputs = torch.tensor(plain_outputs(folder, TEXTS[1]))
    for label, output, score in (
        ("good", "score", outputs[2]),
        (1, "score", outputs[1]),
        ("good", "probability", outputs.softmax(0)[2]),
    ):
        found = reward(folder, label=label, output=output)([asked(ANSWERS[1])])
        assert found == pytest.approx([score.item()], abs=1e-5)
    with pytest.raises(ConfigError, match=r"has 3 labels, .*good.*, and no label is chosen: give label"):
        reward(folder).prepare()
    with pytest.raises(ConfigError, match="label='nice' is none of them"):
        reward(folder, label="nice").prepare()


def test_probabilities_by_hand():
    # 1 / (1 + e^-ln 3) = 3/4, and 3 of 3 + 1 + 4
    ln3, ln4 = 1.0986122886681098, 1.3862943611198906
    assert Scale(0, 1, "probability").value([ln3]) == pytest.approx(0.75)
    assert Scale(1, 3, "probability").value([0.0, ln3, ln4]) == pytest.approx(3 / 8)
    assert Scale(1, 3, "probability", is_independent=True).value([0.0, ln3, ln4]) == pytest.approx(0.75)
    assert Scale(0, 1, "probability").value([-1e4]) == 0.0


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("org/there/is/none", {}, "has no tokenizer that can be loaded"),
        ("model", {"revision": "main"}, "revision='main' has no effect on the local folder"),
        ("model", {"output": "best"}, "requires an output of"),
        ("model", {"dtype": "int8"}, "requires a dtype of"),
        ("model", {"device": "tpu"}, 'requires a device of "auto", "cpu" or'),
        ("model", {"device": "cuda:99"}, r"device='cuda:99', and torch sees \d+ GPUs"),
        ("model", {"chat_template": "template.jinja"}, "has neither {{ nor {%"),
        (
            "model",
            {"chat_template": "{% if false %}{% endif %}hello"},
            "does not show the texts of a user and an assistant",
        ),
        ("model", {"label": "good"}, "label='good' is none of them"),
    ],
)
def test_a_bad_setting_is_one_line(folder, name, settings, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = str(folder) if name == "model" else name
    with pytest.raises(ConfigError, match=words) as caught:
        RewardModel(place, **{"device": "cpu", **settings}).prepare()
    assert "\n" not in str(caught.value)


def test_a_model_without_a_score_head_is_refused(tmp_path):
    """transformers only warns, and fills the head with random numbers."""
    save_tiny_model(tmp_path)
    with pytest.raises(
        ConfigError, match=r"is no reward model: its files lack 1 .* the first is score\.weight, and random"
    ):
        reward(tmp_path).prepare()


def test_files_that_do_not_match_the_model_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = load_file(folder / "model.safetensors")
    file, form = tmp_path / "model.safetensors", {"format": "pt"}
    save_file({**weights, "value.weight": torch.ones(2)}, file, form)
    with pytest.raises(ConfigError, match=r"1 tensors are none of its weights, the first is value\.weight"):
        reward(tmp_path).prepare()
    save_file({**weights, "score.weight": torch.ones(1, 2)}, file, form)
    with pytest.raises(ConfigError, match=r"1 tensors have another shape than its weights, the first is score\.weight"):
        reward(tmp_path).prepare()
    file.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        reward(tmp_path).prepare()


def test_bfloat16_rounds(folder, expected):
    (rounded,) = reward(folder, dtype="bfloat16")([asked("7")])
    assert rounded == pytest.approx(expected[0], abs=0.1)
    assert rounded != pytest.approx(expected[0], abs=1e-6)


def test_it_is_loaded_once_and_by_the_preparation_of_the_environment(folder, monkeypatch):
    loads, load = [], Classifier.__init__
    monkeypatch.setattr(Classifier, "__init__", lambda self, *a: loads.append(a) or load(self, *a))
    environment = TinyEnvironment()
    environment.reward_functions = [reward(folder)]
    threads = [threading.Thread(target=environment.prepare_rewards) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    environment.reward_functions[0]([asked("7")])
    assert len(loads) == 1
    assert environment.counter_names() == ["reward_model_too_long", "reward_model_not_shown"]


def test_a_model_that_cannot_score_ends_a_run_before_the_engine_starts(tiny_model, tmp_path):
    environment, engine, module = TinyEnvironment(), TinyEngine(), make_module(tiny_model)
    environment.reward_functions, environment.reward_weights = [reward(tiny_model)], {}
    with pytest.raises(ConfigError, match="is no reward model"):
        make_trainer(tmp_path, max_steps=1).fit(module, make_data(module, engine, environment))
    assert not hasattr(engine, "spec")


def test_an_engine_on_the_same_gpu_leaves_the_memory_of_a_reward_model(tiny_model, tmp_path):
    trainer, module = make_trainer(tmp_path), make_module(tiny_model)
    settings = trainer, module.learner.served_model, SamplingConfig(), 0, False
    assert engine_spec(*settings, rewards_gb=2.5).reserved_gb == 2.5
    assert engine_spec(*settings).reserved_gb == 0.0


def test_a_failed_preparation_is_repeated_and_never_scores(tmp_path):
    save_tiny_model(tmp_path)
    model = reward(tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match="no reward model"):
            model([asked("7")])


def test_groups_that_are_scored_at_the_same_time_have_their_own_scores(folder, expected):
    model, found = reward(folder), {}

    def score(number: int) -> None:
        found[number] = model([asked(ANSWERS[number])] * (1 + number))

    threads = [threading.Thread(target=score, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, scores in found.items():
        assert scores == pytest.approx([expected[number]] * (1 + number), abs=1e-5)
    assert len(found) == 4


def test_the_rank_chooses_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert find_device("auto") == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert (find_device("auto"), find_device("cuda:1"), find_device("cpu")) == ("cuda:0", "cuda:1", "cpu")


def test_memory_on_a_gpu_is_that_of_the_weights(folder):
    model = reward(folder)
    environment = TinyEnvironment()
    environment.reward_functions = [model]
    model.prepare()
    assert environment.rewards_gb(0) == 0.0
    model._classifier._device = torch.device("cuda:0")
    num_weights = sum(weight.numel() for weight in LlamaForCausalLM.from_pretrained(folder).model.parameters()) + 32
    assert environment.rewards_gb(0) == pytest.approx(4 * num_weights / 2**30)
    assert environment.rewards_gb(1) == environment.rewards_gb(None) == 0.0


@pytest.mark.parametrize("endpoint", ["classify", "pooling"])
def test_a_server_gets_ids_and_gives_the_same_scores(server, folder, expected, endpoint):
    model = RewardServer(server.url, str(folder), endpoint=endpoint)
    model.prepare()
    assert model([asked(answer) for answer in ANSWERS]) == pytest.approx(expected, abs=1e-4)
    path, body = server.asked[-1]
    assert path == f"/{endpoint}"
    assert body["use_activation"] is False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert body["input"] == [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    too_long = asked("a" * MAX_LENGTH)
    assert model([too_long]) == [None]
    assert too_long.counts["reward_model_too_long"] == 1


def test_a_server_that_fails_for_a_moment_is_asked_again_a_bounded_number_of_times(
    server, folder, expected, monkeypatch
):
    monkeypatch.setattr("fuchsia_pl.envs.rewards.reward_server.FIRST_WAIT_S", 0.01)
    model = RewardServer(server.url, str(folder))
    model.prepare()
    server.failures = [503, 500]
    assert model([asked("7")]) == pytest.approx(expected[:1], abs=1e-4)
    server.asked.clear()
    server.failures = [503] * 5
    with pytest.raises(RuntimeError, match=r"answered 503 .*on purpose.*\(try 3\)"):
        model([asked("7")])
    assert len(server.asked) == 3
    server.failures = [400]
    server.asked.clear()
    with pytest.raises(RuntimeError, match="answered 400"):
        model([asked("7")])
    assert len(server.asked) == 1


def test_a_server_that_does_not_answer_in_time_is_given_up(server, folder, monkeypatch):
    model = RewardServer(server.url, str(folder))
    model.prepare()
    model.timeout_s, model.max_retries = 0.2, 0
    monkeypatch.setattr(server, "answer", lambda path, body: (200, {"data": server.hangs.wait(30)}))
    with pytest.raises(RuntimeError, match="ReadTimeout"):
        model([asked("7")])
    server.hangs.set()


def test_a_server_that_cannot_score_is_one_line_before_the_run(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fuchsia_pl.envs.rewards.reward_server.FIRST_WAIT_S", 0.01)
    other = save_reward_model(tmp_path, num_labels=2)
    server.name = str(other)
    for model, words in (
        (RewardServer(server.url, str(folder)), "serves .* and not .*--served-model-name"),
        (
            RewardServer(server.url, str(other), label=0),
            "returns 1 outputs per conversation, and the config .* has 2 labels",
        ),
        (RewardServer("http://127.0.0.1:9", str(folder)), "does not answer: .*ConnectError"),
    ):
        with pytest.raises(ConfigError, match=words):
            model.prepare()
    server.failures, server.name = [404], str(folder)
    with pytest.raises(ConfigError, match=r"does not score a conversation: .*404"):
        RewardServer(server.url, str(folder)).prepare()
    monkeypatch.setattr(
        server, "answer", lambda path, body: (200, {"data": [{"id": str(folder), "index": 0, "probs": "x"}]})
    )
    with pytest.raises(ConfigError, match="answered in an unknown form"):
        RewardServer(server.url, str(folder)).prepare()
    with pytest.raises(ConfigError, match="requires a url such as"):
        RewardServer("localhost:1", str(folder))
    with pytest.raises(ConfigError, match="requires an endpoint of"):
        RewardServer(server.url, str(folder), endpoint="score")


def test_a_server_with_a_key_is_asked_with_it(folder, expected, monkeypatch):
    server = RewardServerDouble(folder, key="sesame")
    try:
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        with pytest.raises(ConfigError, match=r"401 .*: set the environment variable VLLM_API_KEY"):
            RewardServer(server.url, str(folder)).prepare()
        monkeypatch.setenv("VLLM_API_KEY", "sesame")
        assert RewardServer(server.url, str(folder))([asked("7")]) == pytest.approx(expected[:1], abs=1e-4)
    finally:
        server.close()
