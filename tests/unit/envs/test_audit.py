"""The audit of rewards: each fault is found by its kind, and sound rewards have none."""

import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuchsia_pl.envs.audit import AuditItem, AuditSettings, AuditTask, Finding, FindingKind, audit, refuse_unsound
from fuchsia_pl.envs.audit.findings import Outcome, judge
from fuchsia_pl.envs.audit.player import Audited
from fuchsia_pl.envs.audit.probes import CONSTANTS, HEAVY, Probe, ProbeKind, is_gold, probes
from fuchsia_pl.envs.audit.task import ReplyError, Score, read_items, read_scores, read_survey
from fuchsia_pl.types import ConfigError
from tests import unsound

LIMITS = AuditSettings(num_items=3, timeout_s=0.5, sample_timeout_s=2.0)
FAULTS = {
    "pays_any_text": FindingKind.PAYS_JUNK,
    "pays_nan": FindingKind.PAYS_JUNK,
    "pays_zero": FindingKind.PAYS_JUNK,
    "pays_empty": FindingKind.PAYS_JUNK,
    "pays_half": FindingKind.PAYS_JUNK,
    "evaluates": FindingKind.EVALUATES,
    "evaluates_words": FindingKind.EVALUATES,
    "raises": FindingKind.RAISES,
    "exits": FindingKind.RAISES,
    "not_a_number": FindingKind.RAISES,
    "takes_memory": FindingKind.RAISES,
    "hangs": FindingKind.HANGS,
    "dies": FindingKind.DIES,
    "never_pays_gold": FindingKind.GOLD_UNPAID,
    "pays_few_golds": FindingKind.GOLD_UNPAID,
    "other_each_time": FindingKind.NOT_REPEATABLE,
    "other_hash": FindingKind.NOT_REPEATABLE,
    "other_items": FindingKind.NOT_REPEATABLE,
    "repeats": FindingKind.REPEATS,
    "cannot_be_made": FindingKind.NOT_MADE,
}


def task(name: str) -> AuditTask:
    return AuditTask(name, "tests.unsound.answer_request", name)


@pytest.fixture(scope="module")
def temporary(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def findings(temporary) -> dict[str, tuple[Finding, ...]]:
    """The findings of all tasks, from one audit, whose processes are started once."""
    names = ["sound", "sound_with_credit", *FAULTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        return {one.task: one.findings for one in audit([task(name) for name in names], LIMITS)}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_by_its_kind(findings, name):
    assert FAULTS[name] in [found.kind for found in findings[name]]
    assert all(found.task == name and "\n" not in found.evidence for found in findings[name])


@pytest.mark.parametrize("name", ["sound", "sound_with_credit"])
def test_sound_rewards_have_no_findings(findings, name):
    assert findings[name] == ()


def only(findings: dict[str, tuple[Finding, ...]], name: str) -> Finding:
    (found,) = findings[name]
    return found


def test_a_finding_names_the_text_and_what_it_earned(findings):
    # exp(-|nan - 1011|) is nan, and min(1.0, nan) is 1.0; inf earns exp(-inf) = 0.
    assert str(only(findings, "pays_nan")) == (
        "pays_nan pays for junk ('nan'): earns 1, the gold answer 1, on 3 of 3 items"
    )
    assert only(findings, "pays_empty").probe == "empty turn, empty answer"
    assert only(findings, "exits").probe == "'None'"
    assert only(findings, "exits").evidence == "SystemExit: 0"
    # Half of the four digits of each of the golds 1011, 1012, 1013.
    assert only(findings, "pays_half").probe == "cut-off answer"
    # Three items of the audit, and 24 of each split, among which 11 to 34 of the training split.
    assert only(findings, "never_pays_gold").evidence == "earns 0, and is not correct on 51 of 51 items"
    assert only(findings, "pays_few_golds").evidence == "earns 0.5, and is not correct on 1 of 51 items"
    assert only(findings, "hangs").probe == "huge exponent"
    assert "ValueError: no such task" in only(findings, "cannot_be_made").evidence


def test_code_that_is_executed_after_splitting_is_found_by_its_effect(findings):
    found = only(findings, "evaluates_words")
    assert found.probe.startswith("call, call in a list")
    assert found.evidence == "the code in the answer was executed"


def test_the_folder_of_the_markers_is_removed(findings, temporary):
    assert list(temporary.iterdir()) == []


def test_items_that_are_not_made_in_time_are_a_finding():
    limits = AuditSettings(sample_timeout_s=0.05)  # ten times that and two seconds of wall-clock time
    (one,) = audit([AuditTask("asleep", "tests.unsound.asleep")], limits)
    assert [found.kind for found in one.findings] == [FindingKind.NOT_MADE]


SETTINGS = st.fixed_dictionaries(
    {
        "credit": st.floats(0.0, 0.1),
        "near": st.floats(0.0, 1.0),
        "tolerance": st.integers(1, 10),
        "scale": st.sampled_from([0.01, 1.0, 50.0]),
        "reads_numbers": st.booleans(),
    }
)


@settings(derandomize=True, deadline=None, max_examples=1)
@given(st.lists(SETTINGS, min_size=12, max_size=12))
def test_generated_sound_rewards_have_no_findings(drawn):
    """The golds are 1011 to 1013: no constant is within the tolerance of one, except as the cut-off of a longer number."""
    tasks = [AuditTask(f"task {index}", "tests.unsound.generated", one) for index, one in enumerate(drawn)]
    limits = AuditSettings(num_items=2)
    assert {one.task: one.findings for one in audit(tasks, limits)} == {one.name: () for one in tasks}


def test_unsound_tasks_are_refused_with_the_reason(caplog):
    tasks = [task("sound"), task("pays_nan")]
    with pytest.raises(ConfigError) as caught:
        refuse_unsound("ReasoningGym", tasks, allow_unsound=False, settings=LIMITS)
    assert "faults in pays_nan: pays_nan pays for junk ('nan'): earns 1" in str(caught.value)
    assert "allow_unsound: true" in str(caught.value)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        refuse_unsound("ReasoningGym", tasks, allow_unsound=True, settings=LIMITS)
    assert "pays_nan pays for junk" in caplog.text
    caplog.clear()
    refuse_unsound("ReasoningGym", tasks[:1], allow_unsound=False, settings=LIMITS)
    assert caplog.text == ""


def test_what_was_not_checked_is_a_warning(caplog, monkeypatch):
    incomplete = Audited("sums", (), ("sums: its gold answers: it took more than 20 s",), num_played=3, seconds=1.0)
    monkeypatch.setattr("fuchsia_pl.envs.audit.runner.audit", lambda tasks, settings: [incomplete])
    with caplog.at_level(logging.WARNING):
        refuse_unsound("ReasoningGym", [task("sound")], allow_unsound=False, settings=LIMITS)
    assert "ReasoningGym: the audit did not check: sums: its gold answers: it took more than 20 s" in caplog.text


ITEM = AuditItem(7, "What is 7 plus 1000?", gold="1", forms=(unsound.FORM,))


def test_answers_that_equal_the_gold_answer_are_not_played_as_junk(tmp_path):
    names = [probe.name for probe in probes(ITEM, tmp_path)]
    assert "gold" in names
    # 1 as a text, as a word of yes and no, and as a number.
    assert not {"'1'", "'yes'", "'True'"} & set(names)
    assert {repr(text) for text in CONSTANTS if text not in ("1", "yes", "True")} <= set(names)
    assert set(HEAVY) <= set(names)
    unknown = [probe.kind for probe in probes(AuditItem(7, "?", gold=None), tmp_path)]
    assert ProbeKind.GOLD not in unknown
    assert ProbeKind.CUT not in unknown


def test_probes_are_written_in_the_forms_of_the_item_after_earlier_turns(tmp_path):
    item = AuditItem(7, "?", gold="12", forms=("a {answer} b", "{answer}"), before=("first",))
    played = {probe.name: probe.turns for probe in probes(item, tmp_path)}
    assert played["gold"] == ("first", "a 12 b")
    assert played["'nan'"] == ("first", "a nan b")
    assert played["'nan' (form 2)"] == ("first", "nan")
    assert played["cut-off answer"] == ("first", "a 1 b")
    assert played["cut-off turn"] == ("first", "a 1")
    assert played["empty turn"] == ("first", "")


SAME = [("0.50", "1/2"), ("FALSE", "no"), ("(A)", "a"), ("1.0", "1")]
OTHER = [("10", "1"), ("1/0", "0"), ("\u00b2", "2"), ("nan", "1"), ("", "0")]


@pytest.mark.parametrize(("answer", "right", "same"), [*((*p, True) for p in SAME), *((*p, False) for p in OTHER)])
def test_equal_answers_are_equal_texts_or_numbers(answer, right, same):
    assert is_gold(answer, right) is same


def outcomes(kind: ProbeKind, rewards: list[float], golds: float = 1.0) -> list[Outcome]:
    gold = [
        Outcome(i, Probe("gold", ProbeKind.GOLD, ("",)), Score(golds, is_correct=True)) for i in range(len(rewards))
    ]
    return gold + [Outcome(i, Probe("p", kind, ("",)), Score(r, is_correct=False)) for i, r in enumerate(rewards)]


@pytest.mark.parametrize(
    ("kind", "rewards", "golds", "is_paid"),
    [
        (ProbeKind.JUNK, [0.5, 0.5], 1.0, False),
        (ProbeKind.JUNK, [0.51, 0.51], 1.0, True),
        (ProbeKind.JUNK, [0.51, 0.51], 2.0, False),
        (ProbeKind.EMPTY, [0.1, 0.1], 1.0, False),
        (ProbeKind.EMPTY, [0.11, 0.11], 1.0, True),
        (ProbeKind.CUT, [0.9, 0.9], 1.0, False),
        (ProbeKind.CUT, [1.0, 1.0], 1.0, True),
        (ProbeKind.WITH_GOLD, [1.0, 1.0], 1.0, False),
        # A text that is right by chance is right on few items.
        (ProbeKind.JUNK, [1.0, 0.0, 0.0, 0.0], 1.0, False),
        (ProbeKind.JUNK, [1.0, 1.0, 0.0, 0.0], 1.0, True),
    ],
)
def test_the_bars_of_what_a_text_may_earn(kind, rewards, golds, is_paid):
    assert [found.kind for found in judge("t", outcomes(kind, rewards, golds))] == [FindingKind.PAYS_JUNK] * is_paid


@pytest.mark.parametrize("reply", [None, [], [1], [{"question": 1}], [{"question": "?", "forms": ["no place"]}]])
def test_items_of_another_form_are_refused(reply):
    with pytest.raises(ReplyError):
        read_items(reply)


@pytest.mark.parametrize("reply", [None, [], ["1"], [{"reward": 1.0}], [{"reward": "1", "correct": 1}]])
def test_scores_of_another_form_are_refused(reply):
    with pytest.raises(ReplyError):
        read_scores(reply, 1)
    with pytest.raises(ReplyError):
        read_survey({"a": 1})
