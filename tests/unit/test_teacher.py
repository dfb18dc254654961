"""A teacher in whole runs: its advantages by transformers alone, resume, replay, and what is refused before an engine starts."""

import csv
import shutil
from statistics import fmean

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import LlamaForCausalLM

from fuchsia_pl.callbacks.finite import FiniteGuard
from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.hyperparameters import hyperparameters
from fuchsia_pl.callbacks.recorded_step import read_step
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.replay import replay_step
from fuchsia_pl.envs import MultiTurnEnvironment
from fuchsia_pl.envs.parts import Part
from fuchsia_pl.library.mixture import Mixture
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.teacher import Teacher, TeacherConfig
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import Completion, ConfigError, Rollout, Turn
from tests.doubles import TinyEngine, TinyEnvironment, make_data, make_module, make_trainer
from tests.unit.engines.test_vllm_teacher import served
from tests.unit.policy.test_teacher_adapter import save_adapter
from tests.unit.test_cli import config, refused
from tests.unit.test_mini_batches import Watch, final, row_logprobs, with_weights

__all__ = ["config"]  # the fixture
ALONE = LossConfig("ppo", advantage="teacher")
PROMPT = TeacherConfig(prompt="you add")
LONGER = "system:you add\n"  # what it puts in front, in the template of the tiny model


def fit(model, root, teacher, *callbacks, loss=ALONE, environment=None, lora=None, ckpt_path=None, **settings):
    torch.manual_seed(0)
    module, watch = make_module(model, loss, **(lora or {})), Watch()
    data_settings = settings.pop("data", {})
    trainer = make_trainer(root, watch, *callbacks, **{"max_epochs": -1, "max_steps": 2, **settings})
    data = make_data(
        module, None, environment, **{"batch_size": 2, "steps_per_epoch": 2, **data_settings}, teacher=teacher
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, watch, trainer


def logprobs_under(model, ids: list[int], mask: list[bool]) -> torch.Tensor:
    """Logprobs of the sampled tokens of one row, by transformers alone."""
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], dim=-1)
    return logprobs.gather(1, torch.tensor(ids)[1:, None])[:, 0][torch.tensor(mask[1:])]


def check_advantages(module, watch, of_teacher) -> None:
    """Compares every advantage of every step with teacher less policy, each computed by transformers alone."""
    for step in range(len(watch.weights)):
        for sample in watch.rows(step):
            policy = with_weights(module, watch.weights[step], lambda r=sample: row_logprobs(module, r).detach())
            expected = of_teacher(sample.rollout) - policy
            torch.testing.assert_close(torch.tensor(sample.advantages), expected, rtol=0, atol=5e-5)
            assert expected.abs().max() > 1e-3


def under_longer_prompt(model):
    base, chat = LlamaForCausalLM.from_pretrained(model), Chat(model)
    front = chat.tokenizer.encode(LONGER, add_special_tokens=False)

    def score(rollout: Rollout) -> torch.Tensor:
        return logprobs_under(base, [*front, *rollout.token_ids], [*[False] * len(front), *rollout.loss_mask])

    return score


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}], ids=["one micro-batch", "three"])
def test_a_prompts_advantages_are_those_of_the_base_under_the_longer_prompt(tiny_model, tmp_path, settings):
    module, watch, _ = fit(tiny_model, tmp_path, PROMPT, **settings)
    check_advantages(module, watch, under_longer_prompt(tiny_model))


class Asks(MultiTurnEnvironment, TinyEnvironment):
    """Asks for a second turn."""

    max_steps = 2

    def step_rollout(self, rollout):
        rollout.finish() if len(rollout.turns) == 2 else rollout.respond("more")


def test_with_several_turns_only_the_first_prompt_is_longer(tiny_model, tmp_path):
    sampling = {"sampling": {"max_completion_tokens": 30, "max_length": 60}}
    module, watch, _ = fit(tiny_model, tmp_path, PROMPT, environment=Asks(), data=sampling)
    rollouts = [sample.rollout for step in range(2) for sample in watch.rows(step)]
    assert any(len(rollout.turns) == 2 for rollout in rollouts)
    check_advantages(module, watch, under_longer_prompt(tiny_model))


def test_an_adapters_advantages_are_those_of_a_policy_with_it_and_the_policy_approaches_it(tiny_model, tmp_path):
    torch.manual_seed(
        1
    )  # of the new adapter: how far thirty steps get depends on it, 0.60 to 0.81 for the seeds 0 to 2
    save_adapter(tiny_model, tmp_path / "teacher")
    teacher = make_module(tiny_model, init_from=str(tmp_path / "teacher"))
    teacher.configure_model()

    def score(rollout: Rollout) -> torch.Tensor:
        return logprobs_under(teacher.policy.causal_lm, rollout.token_ids, rollout.loss_mask)

    log = CSVLogger(tmp_path / "log", name="", version="")
    given = {"max_steps": 30, "logger": log, "log_every_n_steps": 1, "data": {"batch_size": 4, "steps_per_epoch": 30}}
    module, watch, _ = fit(tiny_model, tmp_path, TeacherConfig(adapter=str(tmp_path / "teacher")), **given)
    check_advantages(module, watch, score)
    rows = list(csv.DictReader((tmp_path / "log/metrics.csv").open()))
    gaps = [float(row["teacher/kl"]) for row in rows]
    assert fmean(gaps[-8:]) < 0.9 * fmean(gaps[:8])
    assert all(float(row["teacher/advantage"]) >= abs(gap) for row, gap in zip(rows, gaps, strict=True))


def test_a_teacher_equal_to_the_policy_changes_nothing(tiny_model, tmp_path):
    save_adapter(tiny_model, tmp_path / "teacher")
    folder = str(tmp_path / "teacher")
    start = make_module(tiny_model, init_from=folder)
    start.configure_model()
    module, watch, trainer = fit(tiny_model, tmp_path, TeacherConfig(adapter=folder), lora={"init_from": folder})
    assert trainer.global_step == 2
    assert hyperparameters(trainer)["data"]["teacher"] == {
        **dict.fromkeys(("name", "url", "prompt")),
        "adapter": folder,
        "weight": 1.0,
    }
    assert torch.equal(final(module), final(start))
    assert all(not any(sample.advantages) for step in range(2) for sample in watch.rows(step))
    assert all(batches[0].step.metrics["teacher/kl"] == 0.0 for batches in watch.batches)
    assert all("teacher" in batches[0].step.skip_reason for batches in watch.batches)


def test_a_teacher_on_a_server_scores_the_rows_that_were_sampled(tiny_model, tmp_path):
    with served(model="big", tokenizer=Chat(tiny_model).tokenizer) as server:
        module, watch, _ = fit(tiny_model, tmp_path, TeacherConfig(name="big", url=server.url))
        num_rows = 2 * 2 * 4  # steps, items, siblings
        assert len(server.bodies) == 1 + num_rows  # the first is a row of the check at the start

    def score(rollout: Rollout) -> torch.Tensor:
        sampled = [token for token, kept in zip(rollout.token_ids, rollout.loss_mask, strict=True) if kept]
        return -torch.tensor(sampled) / 100

    check_advantages(module, watch, score)


def test_what_an_environment_writes_after_the_last_token_is_not_sent():
    """It may be longer than the server's rows."""
    rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="")
    rollout.start([1, 2])
    rollout.append(Turn(Completion((7, 8), (-0.5, -0.5), "stop", None, policy_version=0), "", "", "", ""))
    rollout.append_environment([9] * 1000)
    sent = []

    def score(rows):
        sent.extend(rows)
        return [[-token / 100 for token in row[1:]] for row in rows]

    found = Teacher(1.0, score=score).scores([RolloutGroup((rollout,), has_spread=False)])
    assert sent == [[1, 2, 7, 8]]
    torch.testing.assert_close(found, torch.tensor([[-0.07, -0.08]]))


def test_the_weight_and_the_kind_of_the_teacher_change_what_is_learned(tiny_model, tmp_path):
    save_adapter(tiny_model, tmp_path / "teacher")
    loss = LossConfig("grpo")
    teachers = [
        None,
        PROMPT,
        TeacherConfig(prompt="you add", weight=3.0),
        TeacherConfig(adapter=str(tmp_path / "teacher")),
    ]
    ends = [final(fit(tiny_model, tmp_path, teacher, loss=loss)[0]) for teacher in teachers]
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])


@pytest.mark.parametrize("kind", ["prompt", "adapter"])
def test_four_steps_are_two_steps_saved_loaded_and_two_more(tiny_model, tmp_path, kind):
    save_adapter(tiny_model, tmp_path / "teacher")
    teacher = PROMPT if kind == "prompt" else TeacherConfig(adapter=str(tmp_path / "teacher"))

    def run(name, max_steps, ckpt_path=None):
        given = {"lora": {"dropout": 0.1}, "max_steps": max_steps, "enable_checkpointing": True, "ckpt_path": ckpt_path}
        callback = RunCheckpoint(every_n_steps=2)
        return fit(tiny_model, tmp_path / name, teacher, callback, loss=LossConfig("grpo"), **given)[0]

    straight = run("straight", 4)
    run("first", 2)
    saved = tmp_path / "first/checkpoints/last.ckpt"
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert state.keys() == {f"policy.{name}" for name, p in straight.policy.named_parameters() if p.requires_grad}
    assert torch.equal(final(run("second", 4, saved)), final(straight))


def test_a_recorded_step_needs_no_teacher(tiny_model, tmp_path):
    save_adapter(tiny_model, tmp_path / "teacher")
    fit(tiny_model, tmp_path, TeacherConfig(adapter=str(tmp_path / "teacher")), FiniteGuard(record_steps=(2,)))
    shutil.rmtree(tmp_path / "teacher")
    replayed = replay_step(read_step(tmp_path / "recorded/step-2.pt"), tmp_path)
    assert (replayed.same_losses, replayed.same_gradients) == (True, True)


class NeverStarted(TinyEngine):
    def start(self, spec) -> None:
        raise AssertionError("the engine was started")


class Forgetful(TinyEnvironment):
    """Returns another question each time."""

    def messages(self, item):
        self.asked = getattr(self, "asked", 0) + 1
        return [{"role": "user", "content": f"{item['n']} {self.asked}?"}]


@pytest.mark.parametrize(
    ("teacher", "settings", "words"),
    [
        (None, {"loss": ALONE}, 'advantage is "teacher" and there is none: set data.teacher'),
        (PROMPT, {"lora": {"enabled": False}}, "data.teacher.prompt needs frozen base weights"),
        (TeacherConfig(adapter="x"), {"lora": {"enabled": False}}, "data.teacher.adapter needs frozen base weights"),
        (TeacherConfig(adapter="x"), {}, "data.teacher.adapter='x' is not the folder of a PEFT adapter"),
        (TeacherConfig(prompt="a" * 2040), {}, r"its prompt has 2\d+ tokens, and with 6 tokens .* context of 2048"),
        (
            TeacherConfig(name="big", url="http://127.0.0.1:9"),
            {"sampling": {"temperature": 0.7}},
            "a server scores at temperature 1, and data.sampling.temperature is 0.7",
        ),
        (
            PROMPT,
            {"loss": LossConfig("gspo")},
            'of data.teacher differ from token to token of a row, and model.loss.ratio_level "sequence" gives all',
        ),
        (PROMPT, {"loss": LossConfig("dapo")}, "model.loss.max_refills=3 replaces groups without spread"),
        (
            PROMPT,
            {"environment": Mixture({"a": Part(TinyEnvironment())})},
            "and Mixture leaves prompts to agents or to other",
        ),
        (PROMPT, {"callbacks": [HotSwap(enabled=True)]}, "hotswap.enabled is true, but the objective .*a teacher"),
    ],
)
def test_what_a_teacher_cannot_do_is_one_line_before_the_engine_starts(tiny_model, tmp_path, teacher, settings, words):
    module = make_module(tiny_model, settings.get("loss"), **settings.get("lora", {}))
    data = make_data(
        module, NeverStarted(), settings.get("environment"), teacher=teacher, sampling=settings.get("sampling", {})
    )
    with pytest.raises(ConfigError, match=words) as error:
        make_trainer(tmp_path, *settings.get("callbacks", []), max_steps=1).fit(module, datamodule=data)
    assert "\n" not in str(error.value)


def test_a_prompt_that_changes_at_every_call_is_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"item \d+: messages\(item\) does not return the prompt again"):
        fit(tiny_model, tmp_path, PROMPT, environment=Forgetful())


def test_the_command_reads_a_teacher_from_files_and_options(config, tmp_path, capsys):
    overlay = tmp_path / "teacher.yaml"
    overlay.write_text(
        "data: {teacher: {weight: 0.5, prompt: [{role: user, content: '1'}, {role: assistant, content: '2'}]}}\n"
        "model: {loss: {advantage: teacher}}\n"
    )
    words = ["fit", "--config", str(config)]
    cli = FuchsiaCLI([*words, "--config", str(overlay), "--data.teacher.weight", "2.0"])
    assert cli.trainer.global_step == 2
    assert cli.datamodule.teacher.weight == 2.0
    assert len(cli.datamodule.teacher.prompt) == 2
    again = FuchsiaCLI(["fit", "--config", str(cli.run_folder / "config.yaml")])
    assert again.datamodule.teacher == cli.datamodule.teacher
    assert torch.equal(final(again.model), final(cli.model))
    text = FuchsiaCLI([*words, "--data.teacher.prompt", "you add"])
    assert text.datamodule.teacher == PROMPT
    assert "data.teacher needs one of name, adapter and prompt" in refused(
        capsys, *words, "--data.teacher.weight", "2.0"
    )
    assert 'advantage is "teacher" and there is none' in refused(capsys, *words, "--model.loss.advantage", "teacher")
