"""What an audit needs of a task: one function, which runs in a limited process, and the items that it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuchsia_pl.envs.base import is_finite_number
from fuchsia_pl.envs.user_code import reason

ANSWER = "{answer}"  # place of the answer in a form
# Forms of an answer for an environment without gold answers: alone, and between the marks that rewards read.
PLAIN_FORMS = (ANSWER, f"<answer>{ANSWER}</answer>\n\\boxed{{{ANSWER}}}")
MAX_ERROR_CHARS = 160


class ReplyError(ValueError):
    """A task's function returned something that its contract does not allow."""


@dataclass(frozen=True)
class AuditTask:
    """A task whose reward can be audited.

    Its function is called as `function(request)`, each time in a new limited process. A request is a mapping with `argument` and
    `do`, and the result is what JSON can express:

    - `"sample"`, with `split` ("train" or "validation") and `num`: the first `num` items of the split, as a list of mappings with
      the fields of `AuditItem`.
    - `"survey"`, with `split` and `num`: for each of the first `num` items `[question, score]`, the text of its prompt and the
      result of `score_each` for its gold answer, None if that is not known or not scored.
    - `"score"`, with `item` and `answers`, a list with the turns of each answer: a list with the result of `score_each`.

    Attributes:
        name: Name of the task in findings.
        function: Dotted path of a function at the top level of a module.
        argument: Passed to the function with every request.
        opening: If it is not None, the path is that of a function which gets it once and returns the function of the requests.
        repeats: Share of the held-out questions that may also be training questions.
        num_surveyed: Items of each split whose questions are compared, and whose gold answers are scored.

    >>> AuditTask("sums", "my_rewards.sums", argument={"largest": 9}).request("sample", split="train", num=2)
    {'argument': {'largest': 9}, 'do': 'sample', 'split': 'train', 'num': 2}
    """

    name: str
    function: str
    argument: Any = None
    opening: Any = None
    repeats: float = 0.0
    num_surveyed: int = 24

    def request(self, do: str, **values: Any) -> dict[str, Any]:
        """A request to the function."""
        return {"argument": self.argument, "do": do, **values}


@dataclass(frozen=True)
class AuditItem:
    """An item on which answers are played.

    Attributes:
        item: What the task's function needs to score an answer to it.
        question: Text of its prompt.
        gold: The answer that must be paid in full, without marks; None if it is not known.
        forms: Turns in which an answer is written; `{answer}` is its place. The gold answer is played in the first.
        before: The turns before the one with the answer.

    >>> item = AuditItem({"n": 3}, "2 plus 3?", gold="5", forms=("<answer>{answer}</answer>",))
    >>> item.turns(item.forms[0], "5")
    ('<answer>5</answer>',)
    """

    item: Any
    question: str
    gold: str | None
    forms: tuple[str, ...] = PLAIN_FORMS
    before: tuple[str, ...] = ()

    def turns(self, form: str, answer: str) -> tuple[str, ...]:
        """All turns of a policy that writes an answer in a form."""
        return (*self.before, form.replace(ANSWER, answer))


@dataclass(frozen=True)
class Score:
    """The score of an answer, or the error that the reward raised.

    >>> Score(0.5, is_correct=False).error is None
    True
    """

    reward: float | None
    is_correct: bool
    error: str | None = None


def score_each(score: Callable[[list[str]], tuple[float | None, bool]], answers: Sequence[list[str]]) -> list[Any]:
    """The result for "score": the score of each answer, or the error that it raised.

    Args:
        score: Returns the reward of some turns (None: not scored), and whether they are correct.
        answers: The turns of each answer.

    >>> score_each(lambda turns: (float(turns[-1]), float(turns[-1]) == 5), [["5"], ["five"]])
    [{'reward': 5.0, 'correct': True}, {'error': "ValueError: could not convert string to float: 'five'"}]
    """
    found: list[Any] = []
    for turns in answers:
        try:
            reward, is_correct = score(turns)
        except BaseException as error:  # a reward may call sys.exit
            found.append({"error": reason(error)[:MAX_ERROR_CHARS]})
        else:
            found.append({"reward": reward, "correct": bool(is_correct)})
    return found


def read_items(reply: Any) -> list[AuditItem]:
    """The items in the reply to "sample".

    Raises:
        ReplyError: The reply has another form.
    """
    if not isinstance(reply, list) or not reply or not all(isinstance(row, Mapping) for row in reply):
        raise ReplyError(f"the sampled items must be a list of one or more mappings, got {reply!r:.160}")
    return [_read_item(row) for row in reply]


def read_survey(reply: Any) -> list[tuple[str, Score | None]]:
    """Questions and scores of gold answers in the reply to "survey".

    Raises:
        ReplyError: The reply has another form.
    """
    are_pairs = isinstance(reply, list) and all(isinstance(one, list | tuple) and len(one) == 2 for one in reply)
    if not are_pairs or not all(isinstance(question, str) for question, _ in reply):
        raise ReplyError(f"the survey must be a list of pairs of a question and a score, got {reply!r:.160}")
    return [(question, None if score is None else _read_score(score)) for question, score in reply]


def read_scores(reply: Any, number: int) -> list[Score]:
    """The scores in the reply to "score".

    Raises:
        ReplyError: The reply has another form, or not one score for each answer.
    """
    if not isinstance(reply, list) or len(reply) != number:
        raise ReplyError(f"the scores must be a list with a mapping for each answer, got {reply!r:.160}")
    return [_read_score(one) for one in reply]


def _read_item(row: Mapping[str, Any]) -> AuditItem:
    gold, forms, before = row.get("gold"), row.get("forms", list(PLAIN_FORMS)), row.get("before", [])
    texts = [row.get("question"), *forms, *before, "" if gold is None else gold]
    if not all(isinstance(text, str) for text in texts) or not forms or not all(ANSWER in form for form in forms):
        raise ReplyError(f"'question', 'gold', 'forms' (with {ANSWER}) and 'before' must be texts, got {row!r:.160}")
    return AuditItem(row.get("item"), str(row["question"]), gold, tuple(forms), tuple(before))


def _read_score(one: Any) -> Score:
    if isinstance(one, Mapping) and isinstance(one.get("error"), str):
        return Score(None, is_correct=False, error=one["error"])
    if not isinstance(one, Mapping) or not isinstance(one.get("correct"), bool) or "reward" not in one:
        raise ReplyError(f"a score must be a mapping with 'reward' and 'correct', or with 'error', got {one!r:.160}")
    reward = one["reward"]
    if reward is None:
        return Score(None, is_correct=False)
    if not isinstance(reward, int | float) or not is_finite_number(reward):
        return Score(None, is_correct=False, error=f"the reward is {reward!r:.60}, which is not a finite number")
    return Score(float(reward), one["correct"])
