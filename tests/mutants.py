"""Changes signs, masks, shifts and denominators of objectives and of held-out figures one at a time and runs their unit tests.

Run as `python -m tests.mutants` from the root of the repository, and do not edit the code meanwhile. Code that only
validates input is not mutated, nor are constants of a module, defaults, annotations and messages.
"""

import argparse
import ast
import gc
import importlib.util
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

OBJECTIVES, EVALUATION = Path("fuchsia_pl/objectives"), Path("fuchsia_pl/evaluation")
# The files of `evaluation` with formulas.
FIGURES = ("intervals.py", "item_table.py", "paired.py", "passes.py")
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:anyio"]
# The first takes ten seconds, so it runs last. The second needs half a minute for its imports, so it never runs.
SLOW, LEFT_OUT = "test_exact_gradient.py", "test_trl_parity.py"
# Libraries that the tests' doubles import. The parent process imports them, so that no child process has to.
WARM = ("pytest", "torch", "torchmetrics", "lightning.pytorch.cli", "peft", "transformers.models.llama.modeling_llama")
TIME_LIMIT_S = 120
# Exit codes for a detected mutant: a test failed, a module could not be imported, or the time limit was exceeded.
KILLED = {1, 2, -signal.SIGALRM}

# Mutants that are equivalent to the original, with the reason.
EQUIVALENT: dict[str, str] = {
    "returns.py:gae:zeros_like:1": "every position is written before the tensor is read",
    "turns.py:turn_returns:cumsum:2": "it turns the siblings around and back, over which nothing is summed",
}

VALIDATION = ("_check", "check_", "__post_init__")
DROPPED = {"abs", "cumsum", "detach", "exp", "flip", "masked_fill", "nan_to_num", "sqrt", "square"}
RENAMES = [("amax", "amin"), ("max", "min"), ("maximum", "minimum"), ("mean", "sum"), ("nanmean", "nansum")]
RENAMES += [("num_rollouts", "num_tokens"), ("ones_like", "zeros_like")]
RENAMED = dict(RENAMES) | {new: old for old, new in RENAMES}
TURNS = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.Gt), (ast.LtE, ast.GtE)]
TURNS += [(ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)]
TURNED = dict(TURNS) | {new: old for old, new in TURNS}
Changes = Iterator[tuple[str, ast.expr]]


@dataclass(frozen=True)
class Mutant:
    """One mutation: its id file:function:operator:nth, the changed lines before and after, and the whole mutated file."""

    id: str
    line: int
    before: str
    after: str
    source: str


def mutants_of(source: str, file: str) -> list[Mutant]:
    """Every mutant of one file, in the order of its source."""
    found, seen = [], Counter()
    for function, body in _functions(ast.parse(source).body):
        for node in (node for statement in body for node in _formulas(statement)):
            for operator, replacement in _changes(node):
                place = f"{file}:{function}:{operator}"
                seen[place] += 1
                found.append(Mutant(f"{place}:{seen[place]}", node.lineno, *_spliced(source, node, replacement)))
    return found


def _functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, list[ast.stmt]]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith(VALIDATION):
            yield prefix + node.name, node.body


def _formulas(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions of a statement that affect its result, outer ones first."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.arguments):
        return
    if isinstance(node, ast.expr):
        yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                yield from _formulas(child)


def _changes(node: ast.expr) -> Changes:
    """Each operator that applies to this expression itself, with the replacement."""
    match node:
        case ast.UnaryOp(ast.USub() | ast.Invert() | ast.Not() as op, operand):
            yield _name(op), operand
        case ast.BinOp():
            yield from _changes_of_two(node)
        case ast.BoolOp(op, [left, right]):
            yield from ((_name(op), side) for side in (left, right))
        case ast.Compare(left, operators, others):
            for index, op in enumerate(operators):
                if type(op) in TURNED:
                    turned = [*operators[:index], TURNED[type(op)](), *operators[index + 1 :]]
                    yield _name(op), ast.Compare(left, turned, others)
        case ast.Attribute(value, "num_tokens" | "num_rollouts" as name, context):
            yield name, ast.Attribute(value, RENAMED[name], context)
        case ast.Call(ast.Name("max" | "min" as name), arguments):
            yield name, ast.Call(ast.Name(RENAMED[name]), arguments, [])
        case ast.Call(ast.Name("range") as name, [start, stop, step]):
            yield "range", ast.Call(name, [start, ast.BinOp(stop, ast.Add(), ast.Constant(1)), step], [])
        case ast.Call(ast.Name("token_mean") as name, [values, mask, ast.Name("num_tokens")]):
            yield "num_tokens", ast.Call(name, [values, mask, ast.Name("batch.step.denominators.num_rollouts")], [])
        case ast.Call(ast.Attribute(receiver, name)):
            yield from _changes_of_method(node, receiver, name)


def _changes_of_two(node: ast.BinOp) -> Changes:
    left, op, right = node.left, node.op, node.right
    if type(op) in TURNED:
        yield _name(op), ast.BinOp(left, TURNED[type(op)](), right)
    if isinstance(op, ast.Div):
        yield "divisor", left
    if isinstance(op, ast.BitAnd | ast.BitOr):
        yield from ((_name(op), side) for side in (left, right))
    if isinstance(op, ast.Add | ast.Sub) and isinstance(right, ast.Constant) and type(right.value) is int:
        yield "shift", left
    for side in (left, right):
        if isinstance(side, ast.Constant) and type(side.value) is float:
            other = ast.Constant(side.value / 2 if side.value >= 1 else side.value * 2)
            yield "constant", ast.BinOp(other if side is left else left, op, other if side is right else right)


def _changes_of_method(node: ast.Call, receiver: ast.expr, name: str) -> Changes:
    if name in RENAMED:
        yield name, ast.Call(ast.Attribute(receiver, RENAMED[name]), node.args, node.keywords)
    if name in DROPPED:
        yield name, receiver
    # A bound that only raises a count to 1, or a rounding error to 0, often has no effect.
    if name == "clamp" and [keyword.arg for keyword in node.keywords] != ["min"]:
        yield name, receiver
    if name == "where":
        chosen, other = node.args[1:]
        yield name, chosen
        if not isinstance(other, ast.Constant | ast.UnaryOp | ast.Attribute):
            yield name, other
    if name == "cumsum":
        flipped = ast.Call(ast.Attribute(receiver, "flip"), [ast.Constant(1)], [])
        summed = ast.Call(ast.Attribute(flipped, name), node.args, node.keywords)
        yield name, ast.Call(ast.Attribute(summed, "flip"), [ast.Constant(1)], [])


def _name(op: ast.AST) -> str:
    return type(op).__name__.lower()


def _spliced(source: str, node: ast.expr, replacement: ast.expr) -> tuple[str, str, str]:
    """The changed lines before and after, and the whole mutated source."""
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
    first, last = node.lineno - 1, node.end_lineno
    head, tail = lines[first][: node.col_offset], lines[last - 1][node.end_col_offset :]
    text = ast.unparse(replacement)
    binds = isinstance(replacement, ast.BinOp | ast.BoolOp | ast.Compare | ast.IfExp | ast.UnaryOp)
    if binds and not (head.endswith(b"(") and tail.startswith(b")")):
        text = f"({text})"
    changed = head + text.encode() + tail
    before, after = (b" ".join(part.split()).decode() for part in (b"".join(lines[first:last]), changed))
    return before, after, b"".join([*lines[:first], changed, *lines[last:]]).decode()


def is_killed(mutant: Mutant | None) -> bool:
    """Whether the unit tests fail in a child process that imports the mutant as its module; None is the original."""
    assert not {_package(folder) for folder in (OBJECTIVES, EVALUATION)} & set(sys.modules), (
        "children would inherit them"
    )
    child = os.fork() or _run_tests_and_exit(mutant)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0 and code not in KILLED:
        raise RuntimeError(f"pytest could not run on {mutant.id if mutant else 'the original'}: exit code {code}")
    return code != 0


def _run_tests_and_exit(mutant: Mutant | None) -> NoReturn:
    import pytest

    code = 1
    gc.freeze()  # otherwise pytest collects the garbage of all of torch
    try:
        signal.alarm(TIME_LIMIT_S)
        if mutant is None:
            code = pytest.main([*PYTEST, *_tests("")])
        else:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            stem = mutant.id.split(".py:")[0]
            module = _installed(mutant, stem)
            code = pytest.main([*PYTEST, *_tests(stem)])
            if sys.modules[module.__name__] is not module:  # read from the disk again, so the original was tested
                code = pytest.ExitCode.INTERNAL_ERROR
    finally:
        os._exit(code)


def _installed(mutant: Mutant, stem: str) -> ModuleType:
    """The mutated module, installed where imports and pytest's doctests look first."""
    package = _package(_folder(stem))
    spec = importlib.util.find_spec(f"{package}.{stem}")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    setattr(sys.modules[package], stem, module)
    exec(compile(mutant.source, spec.origin, "exec"), module.__dict__)
    return module


def _folder(stem: str) -> Path:
    return EVALUATION if f"{stem}.py" in FIGURES else OBJECTIVES


def _package(folder: Path) -> str:
    return ".".join(folder.parts)


def _tests(stem: str) -> list[str]:
    """The doctests and the unit tests; first those that are fast and likely to detect a mutant of this module."""
    if stem and _folder(stem) == EVALUATION:  # the test of two ranks starts processes, which do not inherit the mutant
        return [str(EVALUATION / f"{stem}.py"), f"tests/unit/evaluation/test_{stem}.py", "-k", "not two_ranks"]
    files = [file for file in Path("tests/unit/objectives").glob("test_*.py") if file.name != LEFT_OUT]
    files.sort(key=lambda file: (file.stem != f"test_{stem}", file.name == SLOW, file))
    others = [] if stem else [str(EVALUATION), "tests/unit/evaluation", "-k", "not two_ranks"]  # of the original
    return [str(OBJECTIVES), *map(str, files), *map(str, Path("tests/unit/rollouts").glob("test_credit.py")), *others]


def main() -> int:
    """Runs the mutants of the command line; returns 1 if a mutant survived, or one listed as equivalent was killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--list", action="store_true", help="say what each mutant changes, and run nothing")
    parser.add_argument("--only", default="", help="only mutants with this in their id, file:function:operator:nth")
    parser.add_argument("--start-at", type=int, default=1, help="number of the first mutant to run")
    arguments = parser.parse_args()
    files = [*sorted(OBJECTIVES.glob("*.py")), *(EVALUATION / name for name in FIGURES)]
    mutants = [mutant for file in files for mutant in mutants_of(file.read_text(), file.name)]
    gone = EQUIVALENT.keys() - {mutant.id for mutant in mutants}
    assert not gone, f"no mutant has the ids {sorted(gone)} any more: correct EQUIVALENT"
    chosen = [(n, m) for n, m in enumerate(mutants, 1) if n >= arguments.start_at and arguments.only in m.id]
    if arguments.list:
        sys.stdout.writelines(f"{m.id} (line {m.line})\n  - {m.before}\n  + {m.after}\n" for _, m in chosen)
        return 0
    assert chosen, "no mutant has such an id or number"
    sys.stdout.reconfigure(line_buffering=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in WARM:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    assert not is_killed(None), "the tests fail without a mutant"
    counts, start = Counter(), time.monotonic()
    for number, mutant in chosen:
        verdicts = ("equivalent", "KILLED, SO NOT EQUIVALENT") if mutant.id in EQUIVALENT else ("SURVIVED", "killed")
        counts[verdict := verdicts[is_killed(mutant)]] += 1
        sys.stdout.write(f"{number:4} {mutant.id} {verdict}\n")
    summary = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    sys.stdout.write(f"{len(chosen)} mutants in {time.monotonic() - start:.0f} s: {summary}\n")
    return 0 if counts.keys() <= {"killed", "equivalent"} else 1


if __name__ == "__main__":
    sys.exit(main())
