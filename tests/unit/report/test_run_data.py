"""The data of a report, from run folders of all kinds."""

import base64
import gzip
import json
import os
import random
import re
import socket
import subprocess
import time
import tracemalloc
from datetime import UTC, datetime, timedelta

import pytest

from fuchsia_pl.report.metrics import curves
from fuchsia_pl.report.run_data import RolloutReader, run_summary, write_report
from fuchsia_pl.report.selection import Selection
from fuchsia_pl.report.settings import _masked, settings_of
from fuchsia_pl.report.status import Progress, status_of
from fuchsia_pl.run_record import RunRecord
from tests.run_folders import make_run, record, rollout_line, write_lines

SUMMARY = re.compile(r'<script[^>]*id="summary"[^>]*>(.*?)</script>', re.DOTALL)
ROLLOUTS = re.compile(r'<script[^>]*id="rollouts"[^>]*>(.*?)</script>', re.DOTALL)


def report_of(*folders, **settings) -> tuple[dict, dict, str]:
    """Summary and rollouts as a browser reads them from the page, and the text of the page."""
    reader = RolloutReader(folders[0], **settings)
    reader.read()
    write_report(folders[0] / "report.html", reader, [run_summary(folder) for folder in folders])
    page = (folders[0] / "report.html").read_text(encoding="utf-8")
    packed = base64.b64decode(ROLLOUTS.search(page)[1])
    return json.loads(SUMMARY.search(page)[1]), json.loads(gzip.decompress(packed)), page


def rows_of(folder, **settings) -> list[dict]:
    reader = RolloutReader(folder, **settings)
    reader.read()
    return reader.data()["rows"]


def test_a_finished_run_has_its_figures_in_the_page(tmp_path):
    folder = make_run(tmp_path / "quickstart" / "0")
    summary, rollouts, _ = report_of(folder)
    (run,) = summary["runs"]
    assert run["name"] == "quickstart/0"
    assert run["status"]["words"] == "finished after 25 steps in 3 min 20 s"
    assert run["steps"] == [1, 2]
    assert run["metrics"]["perf/step_seconds"] == [8, 8]
    assert {"key": "data.batch_size", "value": "8", "default": "8"} in run["config"]
    # 2 steps of 2 groups of 2, and 2 held-out items before and after.
    assert summary["num_rollouts"] == summary["num_shown"] == len(rollouts["rows"]) == 12
    assert summary["shown_words"] == "all 12 rollouts are shown"
    assert len({row["id"] for row in rollouts["rows"]}) == 12
    row = next(row for row in rollouts["rows"] if row["id"] == "train-1-0-1")
    line, gaps = (json.loads((folder / name).read_text().splitlines()[1]) for name in ("rollouts.jsonl", "gaps.jsonl"))
    assert rollouts["prompts"][row["prompt"]] == line["prompt"]
    assert json.loads(rollouts["items"][row["item_row"]]) == line["item"]
    assert rollouts["environments"][row["environment"]] == "Arithmetic"
    assert row["parts"] == [{"role": "assistant", "policy": True, "text": line["completion"]}]
    ((tokens, advantages, found),) = json.loads(row["token_data"])
    assert tokens == line["tokens"][0]
    assert advantages == pytest.approx(line["advantages"], rel=1e-3)
    assert found == pytest.approx(gaps["gaps"], rel=1e-3)


def test_the_report_of_the_quickstart_is_below_a_megabyte(tmp_path):
    folder = make_run(tmp_path, num_steps=25, num_items=8, group_size=8, num_held_out=64)
    _, rollouts, _ = report_of(folder)
    assert len(rollouts["rows"]) == 25 * 64 + 2 * 64
    assert (folder / "report.html").stat().st_size <= 1_000_000


def test_each_part_of_a_conversation_has_its_own_tokens(tmp_path):
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    messages = [
        {"role": "user", "content": "for example"},
        {"role": "assistant", "content": "of the prompt"},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": call + call},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    line = rollout_line(0, 5, 0, [], messages=messages, completion=call + call + "two")
    line |= {"tokens": [[call, call], ["t", "wo", "<end>"]], "advantages": [1, 2, 3, 4, 5]}
    write_lines(tmp_path / "rollouts.jsonl", [line])
    write_lines(
        tmp_path / "gaps.jsonl", [{"step": 0, "item_index": 5, "sibling": 0, "gaps": [0.1, 0.2, 0.3, None, 0.5]}]
    )
    (row,) = rows_of(tmp_path)
    assert [(part["role"], part["policy"], part["text"]) for part in row["parts"]] == [
        ("assistant", True, call + call),
        ("assistant", True, ""),
        ("tool", False, "2"),
        ("assistant", True, "two"),
    ]
    assert [part.get("call") for part in row["parts"]] == [{"name": "add", "arguments": '{"a": 1}'}] * 2 + [None] * 2
    assert json.loads(row["token_data"]) == [
        [[call, call], [1, 2], [0.1, 0.2]],
        [None, None, None],
        [None, None, None],
        [["t", "wo", "<end>"], [3, 4, 5], [0.3, None, 0.5]],
    ]


def test_a_log_of_an_older_version_has_its_turns_by_their_texts(tmp_path):
    messages = [
        {"role": "assistant", "content": "example"},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    line = rollout_line(3, 5, 0, [], messages=messages, completion="oneyes")
    write_lines(
        tmp_path / "rollouts.jsonl", [{name: line[name] for name in line if name not in ("tokens", "logprobs")}]
    )
    (row,) = rows_of(tmp_path)
    assert [part["text"] for part in row["parts"]] == ["one", "sure?", "yes"]
    assert (row["id"], row["step"], row["version"]) == ("train-4-5-0", 4, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "finished after 25 steps in 3 min 20 s"),
        ({"outcome": "stopped", "reason": "SIGTERM", "step": 7}, "stopped by SIGTERM after step 7"),
        (
            {"outcome": "failed", "reason": "EngineError: gone", "step": 0},
            "failed before the first step: EngineError: gone",
        ),
        (
            {"outcome": "running", "ended_at": None, "step": 12, "pid": os.getpid()},
            "step 12 of 25, about 1 min 18 s left",
        ),
        ({"outcome": "running", "ended_at": None, "step": 0, "pid": os.getpid()}, "starting, no step is done yet"),
        ({"outcome": "running", "ended_at": None, "step": 3, "max_steps": None}, "step 3, without a limit of steps"),
        ({"command": "validate", "step": 25}, "validate: finished in 3 min 20 s"),
    ],
)
def test_the_state_of_a_run_is_a_sentence(changes, words):
    facts = {
        "command": "fit",
        "ended_at": "2026-01-02T03:07:25+00:00",
        "outcome": "finished",
        "step": 25,
        "max_steps": 25,
    }
    facts |= {"started_at": "2026-01-02T03:04:05+00:00", "version": "", "host": "elsewhere", "pid": 1, **changes}
    # 13 steps are left, and the median of a step is 6 s.
    assert status_of(RunRecord(**facts), Progress(0, [100.0, None, 6, 6]))["words"] == words


def test_a_run_whose_process_is_gone_was_killed_at_the_last_logged_step(tmp_path):
    folder = make_run(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    record(folder, outcome="running", ended_at=None, step=1)
    facts = json.loads((folder / "run.json").read_text()) | {"host": socket.gethostname(), "pid": gone.pid}
    (folder / "run.json").write_text(json.dumps(facts))
    status = run_summary(folder)["status"]
    assert (status["outcome"], status["words"], status["step"]) == ("killed", "killed after step 2", 2)


def test_the_time_of_a_running_run_is_up_to_now():
    now = datetime.now(UTC)  # a process that began later than the run is another one
    started = RunRecord("fit", now.isoformat(), "", socket.gethostname(), os.getpid())
    assert status_of(started, Progress(1), now + timedelta(seconds=60))["seconds"] == 60


def test_an_empty_or_damaged_folder_has_a_report_too(tmp_path):
    summary, rollouts, _ = report_of(tmp_path)
    assert rollouts["rows"] == summary["runs"][0]["steps"] == []
    assert summary["runs"][0]["status"]["outcome"] == "unknown"
    for name in (
        "rollouts.jsonl",
        "gaps.jsonl",
        "metrics.csv",
        "config.yaml",
        "run.json",
        "held_out.jsonl",
        "objective.yaml",
    ):
        (tmp_path / name).write_bytes(b'\xff\x00{]\n[1]\n{"step": "x", "messages": 3, "rewards": [], "tokens": [3]}\n')
    summary, rollouts, _ = report_of(tmp_path)
    assert [row["id"] for row in rollouts["rows"]] == ["train-1-0-0"]


def test_a_line_that_is_being_written_is_read_when_it_is_complete(tmp_path):
    lines = [json.dumps(rollout_line(0, item, 0, ["a"])) + "\n" for item in range(3)]
    log, reader = tmp_path / "rollouts.jsonl", RolloutReader(tmp_path)
    log.write_text(lines[0] + lines[1][:50])
    reader.read()
    assert [row["item"] for row in reader.data()["rows"]] == [0]
    log.write_text("".join(lines))
    reader.read()
    assert [row["item"] for row in reader.data()["rows"]] == [0, 1, 2]


def test_all_ranks_are_read(tmp_path):
    for rank in range(2):
        write_lines(tmp_path / f"rollouts.jsonl.rank{rank}", [rollout_line(0, rank, 0, ["a"])])
        write_lines(tmp_path / f"rollouts-validation.jsonl.rank{rank}", [rollout_line(0, rank, 0, ["a"])])
        write_lines(
            tmp_path / f"gaps.jsonl.rank{rank}", [{"step": 0, "item_index": rank, "sibling": 0, "gaps": [rank]}]
        )
    rows = rows_of(tmp_path)
    assert [row["id"] for row in rows] == ["train-1-0-0", "train-1-1-0", "validation-0-0-0", "validation-0-1-0"]
    assert [json.loads(row["token_data"])[0][2] for row in rows] == [[0], [1], None, None]


def test_steps_that_were_repeated_count_once(tmp_path):
    lines = [rollout_line(step, 0, 0, [str(number)]) for number, step in enumerate([0, 1, 1])]
    write_lines(tmp_path / "rollouts.jsonl", lines)
    reader = RolloutReader(tmp_path)
    reader.read()
    assert [row["parts"][0]["text"] for row in reader.data()["rows"]] == ["0", "2"]
    assert reader.selection.num_rollouts == 2


HOSTILE = "</script><script>alert(1)</script>{{js}}&<!--\u2028\u2029\u202e\ud800\x00\x1b[2J"


def test_hostile_texts_stay_texts(tmp_path):
    line = rollout_line(0, 0, 0, [HOSTILE], rewards={HOSTILE: float("nan")}, reward=float("inf"))
    line |= {
        "item": {HOSTILE: HOSTILE},
        "prompt": HOSTILE,
        "status": HOSTILE,
        "advantage": float("nan"),
        "messages": [{"role": HOSTILE, "content": "x"}],
    }
    write_lines(tmp_path / "rollouts.jsonl", [line])
    write_lines(tmp_path / "warnings.jsonl", [{"step": 1, "name": HOSTILE, "text": HOSTILE}])
    write_lines(
        tmp_path / "held_out.jsonl", [{"step": 0, "split": HOSTILE, "figures": {HOSTILE: {"value": float("nan")}}}]
    )
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"prompt": HOSTILE.replace("\ud800", "")}}))
    summary, rollouts, page = report_of(tmp_path)
    assert summary["runs"][0]["warnings"][0]["text"] == HOSTILE
    assert summary["runs"][0]["evaluations"][0]["figures"][HOSTILE]["value"] is None
    (row,) = rollouts["rows"]
    assert row["parts"][0]["text"] == rollouts["prompts"][0] == row["status"] == HOSTILE
    assert (row["reward"], row["rewards"], row["advantage"]) == (None, [None], None)
    assert "alert(1)" not in page.replace("\\u003c", "<").split('id="summary"')[0]
    data = SUMMARY.search(page)[1]
    assert not re.search("[<\u2028\u2029\u202e\x00\x1b]", data)


def test_a_text_of_a_megabyte_is_cut_and_the_page_states_it(tmp_path):
    write_lines(tmp_path / "rollouts.jsonl", [rollout_line(0, 0, 0, ["x" * 1_000_000])])
    (row,) = rows_of(tmp_path)
    assert "… (950000 characters left out) …" in row["parts"][0]["text"]
    assert len(row["parts"][0]["text"]) < 50_100
    assert json.loads(row["token_data"]) == [[None, None, None]]


def make_log(folder, num_steps: int, num_items: int = 4, group_size: int = 4) -> None:
    """Rewards of a group are all its number / 1000, so that the first group is the worst and the last one the best."""
    lines = []
    for group in range(num_steps * num_items):
        for sibling in range(group_size):
            reward = {"reward": group / 1000}
            lines.append(rollout_line(group // num_items, group, sibling, ["a"], **reward))
    write_lines(folder / "rollouts.jsonl", lines)
    held_out = [rollout_line(step, item, 0, ["a"], reward=0.0) for step in (0, num_steps) for item in range(10)]
    write_lines(folder / "rollouts-validation.jsonl", held_out)


def test_a_long_run_is_sampled_by_whole_groups(tmp_path):
    make_log(tmp_path, num_steps=100)
    summary, rollouts, _ = report_of(tmp_path, max_rollouts=200)
    rows = rollouts["rows"]
    assert summary["num_rollouts"] == 100 * 16 + 20
    assert 190 < summary["num_shown"] == len(rows) <= 200
    assert summary["shown_words"].startswith(f"{len(rows)} of 1,620 rollouts are shown: all held-out ones of the last")
    groups: dict[tuple, int] = {}
    for row in rows:
        key = (row["split"], row["step"], row["item"])
        groups[key] = groups.get(key, 0) + 1
    assert {size for (split, *_), size in groups.items() if split == "train"} == {4}
    assert sum(1 for split, step, _ in groups if (split, step) == ("validation", 100)) == 10
    trained = {item for split, _, item in groups if split == "train"}
    assert {399, 398, 0, 1} <= trained  # the best and the worst
    assert len({item // 40 for item in trained}) >= 8  # the others come from everywhere


def test_the_sample_does_not_depend_on_when_the_log_was_read(tmp_path):
    make_log(tmp_path, num_steps=60)
    whole = (tmp_path / "rollouts.jsonl").read_text().splitlines(keepends=True)
    expected = rows_of(tmp_path, max_rollouts=150)
    (tmp_path / "rollouts.jsonl").write_text("")
    reader = RolloutReader(tmp_path, max_rollouts=150)
    for step in range(60):
        with (tmp_path / "rollouts.jsonl").open("a") as log:
            log.write("".join(whole[step * 16 : (step + 1) * 16]))
        reader.read()
        reader.data()
    assert reader.data()["rows"] == expected


def test_the_size_of_the_page_is_bounded_too():
    selection = Selection(max_rollouts=1000, max_bytes=200_000)
    for item in range(100):
        selection.add(rollout_line(0, item, 0, ["x" * 10_000]), "train")
    rows = selection.rows()["rows"]
    assert 5 <= len(rows) <= 10  # a text and its tokens are 20 kB
    assert f"{len(rows)} of 100 rollouts" in selection.shown_words


def test_a_long_log_is_read_in_linear_time_and_bounded_memory(tmp_path):
    def read(num_steps: int) -> tuple[float, int]:
        make_log(tmp_path, num_steps)
        tracemalloc.start()
        started = time.process_time()
        rows_of(tmp_path, max_rollouts=200)
        seconds = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return seconds, peak

    (short, small), (long, large) = read(50), read(400)
    assert long < 8 * short * 2.5
    assert large < 2 * small


def test_held_out_figures_come_from_their_file_else_from_the_metrics(tmp_path):
    # As Lightning logs them: before training, after step 1 and after step 2 of 2.
    table = "step,reward/mean,validation/rollout/accuracy\n0,,0.1\n0,0.5,\n0,,0.2\n1,0.6,\n1,,0.3\n1,"
    (tmp_path / "metrics.csv").write_text(table)
    found = run_summary(tmp_path)["evaluations"]
    assert [(one["step"], one["figures"]["rollout/accuracy"]["value"]) for one in found] == [
        (0, 0.1),
        (1, 0.2),
        (2, 0.3),
    ]
    figure = {"value": 0.15625, "low": 0.08, "high": 0.25}
    line = {"step": 0, "split": "validation", "environment": "A", "num_items": 64, "num_samples": 1}
    write_lines(tmp_path / "held_out.jsonl", [{**line, "figures": {"rollout/accuracy": figure}}])
    assert run_summary(tmp_path)["evaluations"] == [
        {**line, "figures": {"rollout/accuracy": {"value": 0.1562, "low": 0.08, "high": 0.25}}}
    ]


def test_metrics_of_one_step_are_joined_and_numbers_that_are_not_finite_are_left_out():
    rows = [{"step": "3", "a": "nan", "b": "1", "epoch": "0"}, {"step": "3", "c": "1e400"}, {"step": "", "a": "2"}]
    found = curves([*rows, {"step": "4", "a": "0.123456"}])
    assert found.steps == [4, 5]
    assert found.metrics == {"a": [None, 0.1235], "b": [1, None], "c": [None, None]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.environment.init_args.command", ["x", "--api-key", "s3cret"]),
        ("data.environment.init_args.headers", {"X-Auth": "s3cret"}),
        ("data.environment.init_args.auth", "Bearer s3cret"),
        ("data.engine.init_args.hub", "hf_s3cretdefghijkl"),
        ("trainer.logger.init_args.access_key", "s3cret"),
        ("data.environment.init_args.servers", [{"env": {"MY_KEY": "s3cret"}}]),
        ("data.environment.init_args.url", "https://me:s3cret@host/x"),
    ],
)
def test_what_may_be_secret_is_hidden(key, value):
    shown = str(_masked(key, value))
    assert "s3cret" not in shown
    assert "(hidden)" in shown


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.sampling.max_completion_tokens", 32),
        ("data.engine.init_args.max_num_batched_tokens", 512),
        ("data.environment.init_args.train_file", ["a.jsonl", "key.jsonl"]),
        ("model.policy.lora.target_modules", ["q_proj", "k_proj"]),
    ],
)
def test_other_values_are_shown(key, value):
    assert _masked(key, value) == value


def test_settings_have_their_defaults_and_no_secrets(tmp_path):
    (tmp_path / "config.yaml").write_text(
        """
seed_everything: 3
trainer: {logger: [{class_path: WandbLogger, init_args: {anonymous: null, settings: {api_key: s3cret}}}]}
model:
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01, eps: 1.0e-08}}
  lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3, gamma: 0.5}}
data:
  sampling: {max_completion_tokens: 256}
  environment: {class_path: my.Own, init_args: {n: 1, judge_token: s3cret, env: {HF_TOKEN: s3cret}}}
  engine: {class_path: fuchsia_pl.engines.vllm_server.VLLMServerEngine, init_args: {urls: ['http://me:s3cret@host:1'],
           api_key: s3cret, timeout_s: 600}}
"""
    )
    found = {one["key"]: (one["value"], one["default"]) for one in settings_of(tmp_path)}
    assert "s3cret" not in str(found)
    assert found["seed_everything"] == ("3", "0")
    assert found["model.optimizer.init_args.lr"] == ("0.01", "0.001")
    assert found["model.optimizer.init_args.eps"] == ("1.0e-08", "1.0e-08")
    assert found["model.lr_scheduler.init_args.gamma"] == ("0.5", "0.1")
    assert found["data.sampling.max_completion_tokens"] == ("256", "256")
    assert found["data.environment.init_args.n"] == ("1", None)
    assert found["data.engine.init_args.timeout_s"] == ("600", "600")  # the default is 600.0
    assert found["data.engine.init_args.api_key"] == ("(hidden)", "null")
    assert "(hidden)@host:1" in found["data.engine.init_args.urls"][0]
    assert found["data.environment.init_args.env.HF_TOKEN"] == ("(hidden)", None)


def test_runs_are_laid_over_each_other(tmp_path):
    first, second = make_run(tmp_path / "a" / "0"), make_run(tmp_path / "a" / "1", num_steps=3)
    summary, rollouts, _ = report_of(first, second)
    assert [run["name"] for run in summary["runs"]] == ["a/0", "a/1"]
    assert [len(run["steps"]) for run in summary["runs"]] == [2, 3]
    assert max(row["step"] for row in rollouts["rows"]) == 2


@pytest.mark.parametrize("seed", range(20))
def test_any_json_line_gives_a_page(tmp_path, seed):
    """Random values in place of each field: no line of a damaged or foreign log ends the report."""
    numbers = random.Random(seed)
    values = [None, True, -1, 1e400, "x", "\ud800", [], [None], {}, [[1]], {"a": {}}, [{"role": 1}], 10**30, "9" * 400]
    line = rollout_line(0, 0, 0, ["a"])
    lines = [{name: numbers.choice([value, *values]) for name, value in line.items()} for _ in range(50)]
    write_lines(tmp_path / "rollouts.jsonl", lines)
    write_lines(
        tmp_path / "gaps.jsonl", [{"step": numbers.choice(values), "gaps": numbers.choice(values)} for _ in lines]
    )
    for name in ("held_out.jsonl", "warnings.jsonl"):
        fields = ("step", "split", "figures", "text", "num_items")
        write_lines(tmp_path / name, [{field: numbers.choice(values) for field in fields} for _ in lines])
    report_of(tmp_path)


def test_rewards_of_turns_are_in_the_row_that_has_them(tmp_path):
    lines = [
        rollout_line(0, 0, 0, ["a"], turn_rewards={"correct": [1.0, float("nan"), 0.123456]}),
        rollout_line(0, 0, 1, ["b"]),
    ]
    write_lines(tmp_path / "rollouts.jsonl", lines)
    with_turns, without = rows_of(tmp_path)
    assert with_turns["turn_rewards"] == {"correct": [1, None, 0.1235]}
    assert "turn_rewards" not in without
    write_lines(tmp_path / "rollouts.jsonl", [rollout_line(0, 0, 0, ["a"], turn_rewards=[HOSTILE])])
    assert "turn_rewards" not in rows_of(tmp_path)[0]
