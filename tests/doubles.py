"""Test doubles of the unit tests: a tiny model folder, engines, environments, and small builders."""

import asyncio
import os
import random
from functools import partial
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fuchsia_pl.batch import Denominators
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.datamodule import RolloutDataModule
from fuchsia_pl.engines.base import Engine, EngineError, EngineSpec, SamplingParams, check_version_file
from fuchsia_pl.engines.merge import merged_weights
from fuchsia_pl.envs import SingleTurnEnvironment
from fuchsia_pl.envs.thinking import without_thinking
from fuchsia_pl.module import GRPOModule
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.samples import Sample
from fuchsia_pl.types import Completion, Rollout, RolloutStatus, Turn
from tests.tiny_llama import TinyLlama

ALPHABET = "0123456789 abcdefghijklmnopqrstuvwxyz:?\n"
EOS = 2
ADAM = partial(torch.optim.AdamW, lr=1e-2)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
# The config of a run of two steps, for `TINY % folder of the model`.
TINY = """
seed_everything: 3
trainer: {accelerator: cpu, max_epochs: 1, max_steps: 2, limit_val_batches: 0}
model:
  policy: {name: %s, dtype: float32, lora: {r: 4, alpha: 8}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  batch_size: 5
  steps_per_epoch: 2
  sampling: {group_size: 2, max_completion_tokens: 4, max_length: 40}
  environment: {class_path: tests.doubles.TinyEnvironment}
  engine: {class_path: tests.doubles.TinyEngine}
"""


def save_tiny_model(folder: Path) -> Path:
    """A two-layer Llama over single characters, with a tokenizer and a chat template."""
    torch.manual_seed(0)
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=EOS,
        bos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class TinyEngine(Engine):
    """Samples from a tiny Llama in this process. `applied` scales the effect of the adapter; 1 is correct.

    `score` computes with transformers, `generate` with `TinyLlama`, which is many times faster for single tokens. While it
    sleeps, it refuses every call. After that its weights are NaN until an adapter is loaded.
    """

    can_sleep = True

    def __init__(self, applied: float = 1.0) -> None:
        self.applied = applied
        self.calls: list[tuple[str, int]] = []
        self._version = -1
        self._is_asleep = False
        self._model: LlamaForCausalLM | None = None
        self._decoder: TinyLlama | None = None  # of the weights that are loaded

    @property
    def policy_version(self) -> int:
        return self._version

    def start(self, spec: EngineSpec) -> None:
        self.spec, self._is_asleep = spec, False
        self._model = LlamaForCausalLM.from_pretrained(spec.model.folder, dtype=getattr(torch, spec.model.dtype)).eval()
        self._base = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._decoder = None

    @torch.no_grad()
    async def generate(self, prompt_ids, sampling: SamplingParams) -> Completion:
        assert not self._is_asleep
        self.calls.append(("generate", self._version))
        generator = torch.Generator().manual_seed(sampling.seed)
        self._decoder = self._decoder or TinyLlama(self._model)
        logits, past = self._decoder.begin(tuple(prompt_ids))
        ids, logprobs = list(prompt_ids), []
        while len(logprobs) < sampling.max_tokens:
            if logprobs:
                logits = self._decoder.next((ids[-1],), past)
            distribution = torch.log_softmax(torch.from_numpy(logits) / (sampling.temperature or 1.0), dim=-1)
            greedy = sampling.temperature == 0
            token = int(
                distribution.argmax() if greedy else torch.multinomial(distribution.exp(), 1, generator=generator)
            )
            ids.append(token)
            logprobs.append(float(distribution[token]))
            if token in sampling.stop_token_ids:
                break
        ended = ids[-1] in sampling.stop_token_ids
        return Completion(
            tuple(ids[len(prompt_ids) :]), tuple(logprobs), "stop" if ended else "length", None, self._version
        )

    @torch.no_grad()
    async def score(self, token_ids) -> tuple[float, ...]:
        assert not self._is_asleep
        ids = torch.tensor([list(token_ids)])
        logprobs = torch.log_softmax(self._model(ids).logits[0, :-1].float(), dim=-1)
        return tuple(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())

    async def load_weights(self, path: Path, version: int) -> None:
        assert not self._is_asleep
        self.calls.append(("load", version))
        check_version_file(path, version)
        for name, tensor in merged_weights(Path(self.spec.model.folder), path):
            base = self._base[name]
            self._model.get_parameter(name).data.copy_(base + self.applied * (tensor - base))
        self._version, self._decoder = version, None

    async def sleep(self) -> None:
        assert not self._is_asleep
        self.calls.append(("sleep", self._version))
        self._is_asleep, self._version, self._decoder = True, -1, None
        for parameter in self._model.parameters():
            parameter.data.fill_(float("nan"))

    async def wake(self) -> None:
        assert self._is_asleep
        self.calls.append(("wake", self._version))
        self._is_asleep = False

    def close(self) -> None:
        self._model, self._decoder, self._version = None, None, -1


def even(rollouts: list[Rollout], *args, **kwargs) -> list[float]:
    """The share of even ids among the sampled ones: every group has spread, and a policy can learn it."""
    return [sum(t % 2 == 0 for t in r.turns[0].completion.token_ids) / r.num_sampled_tokens for r in rollouts]


def ended(rollouts: list[Rollout], *args, **kwargs) -> list[float]:
    return [float(r.status is RolloutStatus.COMPLETED) for r in rollouts]


class TinyEnvironment(SingleTurnEnvironment):
    def __init__(self, num_items: int = 20) -> None:
        super().__init__()
        self.reward_functions = [even, ended]
        self.reward_weights = {"ended": 0.5}
        self.num_items = num_items

    def train_items(self):
        return [{"n": n} for n in range(self.num_items)]

    def validation_items(self):
        return [{"n": 100 + n} for n in range(4)]

    def messages(self, item):
        return [{"role": "user", "content": f"{item['n']}?"}]


def constant(rollouts: list[Rollout], *args, **kwargs) -> list[float]:
    return [0.3 for _ in rollouts]


class Constant(TinyEnvironment):
    """All siblings have the same reward, so no group has spread."""

    def __init__(self) -> None:
        super().__init__()
        self.reward_functions, self.reward_weights = [constant], {}


def even_items(rollouts: list[Rollout], *args, **kwargs) -> list[float]:
    return [float(r.sibling if r.item["n"] % 2 == 0 else 0) for r in rollouts]


class Spread(TinyEnvironment):
    """Groups of items with an even number have spread, the others have none."""

    def __init__(self, num_items: int = 20) -> None:
        super().__init__(num_items)
        self.reward_functions, self.reward_weights = [even_items], {}


def tiny_config(model: Path, environment: str, engine: str, lr: float) -> str:
    """TINY with other classes and another learning rate."""
    settings = yaml.safe_load(TINY % model)
    settings["data"] |= {"environment": {"class_path": environment}, "engine": {"class_path": engine}}
    settings["model"]["optimizer"]["init_args"]["lr"] = lr
    return yaml.safe_dump(settings)


def make_module(folder: Path, loss: LossConfig | None = None, optimizer=ADAM, **lora) -> GRPOModule:
    policy = PolicyConfig(name=str(folder), dtype="float32", lora=LoRASettings(**{"r": 4, "alpha": 8, **lora}))
    return GRPOModule(policy, loss or LossConfig(), optimizer)


def make_data(module: GRPOModule, engine: Engine | None = None, environment=None, **settings) -> RolloutDataModule:
    sampling = SamplingConfig(
        **{"group_size": 4, "max_completion_tokens": 6, "max_length": 40, **settings.pop("sampling", {})}
    )
    return RolloutDataModule(
        environment or TinyEnvironment(),
        engine or TinyEngine(),
        module.learner,
        sampling,
        **{"batch_size": 5, "steps_per_epoch": 3, **settings},
    )


def make_trainer(root: Path, *callbacks: Callback, sync: AdapterSync | None = None, **settings) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(
        accelerator="cpu",
        default_root_dir=root,
        callbacks=[*callbacks, sync or AdapterSync(tolerance=1e-3)],
        **{"devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0, **quiet, **settings},
    )


def make_sample(prompt_ids: list[int], token_ids: list[int], advantage: float, logprob: float = -1.0) -> Sample:
    """A finished single-turn rollout as a trainable row."""
    rollout = Rollout({"n": 0}, item_index=0, sibling=0, temperature=1.0, prompt="")
    rollout.start(prompt_ids)
    completion = Completion(tuple(token_ids), (logprob,) * len(token_ids), "stop", None, policy_version=0)
    rollout.append(Turn(completion, "", "", "", ""))
    rollout.finish()
    return Sample(rollout, (advantage,) * len(token_ids))


def denominators(num_tokens: int, num_rollouts: int = 1, max_completion_tokens: int = 8) -> Denominators:
    return Denominators(num_tokens, num_rollouts, max_completion_tokens, num_tokens)


class SayingEngine(Engine):
    """Returns the ids and the finish reason that `say(prompt_ids, sampling)` computes; records requests and answers."""

    policy_version = 0

    def __init__(self, say) -> None:
        self.say = say
        self.requests: list[tuple[list[int], SamplingParams]] = []
        self.said: list[list[int]] = []

    def start(self, spec: EngineSpec) -> None: ...

    def close(self) -> None: ...

    async def load_weights(self, path: Path, version: int) -> None: ...

    async def generate(self, prompt_ids, sampling: SamplingParams) -> Completion:
        self.requests.append((list(prompt_ids), sampling))
        ids, finish_reason = self.say(list(prompt_ids), sampling)
        self.said.append(list(ids))
        logprobs = tuple(-0.1 * (1 + i) for i in range(len(ids)))
        return Completion(tuple(ids), logprobs, finish_reason, None, self.policy_version)


class RecordedEngine(Engine):
    """Returns the same ids for the same prompt and seed, with any weights and in any process. May be slow, or fail."""

    def __init__(self, seconds: float = 0.0, fails_at: int | None = None, on_rank: int = 0) -> None:
        self.seconds = seconds
        self.fails_at = fails_at if int(os.environ.get("LOCAL_RANK", "0")) == on_rank else None
        self._version = -1

    @property
    def policy_version(self) -> int:
        return self._version

    def start(self, spec: EngineSpec) -> None: ...

    def close(self) -> None: ...

    async def load_weights(self, path: Path, version: int) -> None:
        check_version_file(path, version)
        self._version = version

    async def generate(self, prompt_ids, sampling: SamplingParams) -> Completion:
        version = self._version
        if version == self.fails_at:
            raise EngineError(f"no more at version {version}")
        await asyncio.sleep(self.seconds)
        numbers = random.Random(f"{list(prompt_ids)} {sampling.seed}")
        ids = tuple(numbers.randrange(4, 40) for _ in range(numbers.randrange(1, sampling.max_tokens)))
        return Completion((*ids, EOS), (-1.5,) * (len(ids) + 1), "stop", None, version)

    async def score(self, token_ids) -> tuple[float, ...]:
        return (-1.5,) * (len(token_ids) - 1)


def written(text: str) -> Turn:
    """A turn that the policy wrote."""
    answer = without_thinking(text)
    return Turn(Completion((1,), (-0.1,), "stop", None, 0), text, text, answer, answer)


def said(text: str, item=None, counts=(), status: RolloutStatus = RolloutStatus.COMPLETED) -> Rollout:
    """A finished rollout of one turn with this text."""
    rollout = Rollout(item or {}, item_index=0, sibling=0, temperature=1.0, prompt="")
    rollout.append(written(text))
    rollout.counts.update(counts)
    rollout.finish(status)
    return rollout


class WritingEngine(Engine):
    """Returns given turns in order. Like vLLM it stops after a stop string, also in the middle of a turn.

    If a prompt ends with the ids that it returned last, it continues that turn. The policy version is the number of requests.
    """

    def __init__(self, chat: Chat, *turns: str) -> None:
        self.chat = chat
        self.turns = [chat.encode_turn(turn) for turn in turns]
        self.requests: list[tuple[list[int], SamplingParams]] = []
        self.said: list[list[int]] = []
        self._rest: list[int] = []

    @property
    def policy_version(self) -> int:
        return len(self.requests)

    def start(self, spec: EngineSpec) -> None: ...

    def close(self) -> None: ...

    async def load_weights(self, path: Path, version: int) -> None: ...

    async def generate(self, prompt_ids, sampling: SamplingParams) -> Completion:
        self.requests.append((list(prompt_ids), sampling))
        goes_on = self.said and list(prompt_ids[-len(self.said[-1]) :]) == self.said[-1]
        turn = self._rest if goes_on else self.turns.pop(0)
        length, reason = min(len(turn), sampling.max_tokens), None
        for end in range(1, length + 1):
            written = self.chat.text(turn[:end])
            reason = next((stop for stop in sampling.stop if stop in written), None)
            if reason is not None:
                length = end
                break
        ids, self._rest = turn[:length], turn[length:]
        self.said.append(ids)
        finish_reason = "length" if self._rest and reason is None else "stop"
        logprobs = tuple(-0.01 * (1 + i) for i in range(len(ids)))
        return Completion(tuple(ids), logprobs, finish_reason, reason, self.policy_version)
