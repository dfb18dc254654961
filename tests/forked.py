"""Processes forked from one that has imported everything: their start costs a fraction of a second, not of a minute.

`python -m tests.forked` reads requests from standard input, one JSON value per line, and answers each with a line. Tests whose
subject is the start of Python or of the command itself use `subprocess`.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
IMPORTED = ("fuchsia_pl.cli.run_command", "tests.doubles")


def free_port() -> int:
    """A port of this machine that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Forked:
    """A process of a `Forkserver`.

    Attributes:
        pid: Its number.
        output: File with its standard output and standard error.
    """

    def __init__(self, server: "Forkserver", pid: int, output: Path) -> None:
        self._server, self.pid, self.output = server, pid, output
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self._code is None:
            self._code = self._server.request({"poll": self.pid})
        return self._code

    def wait(self, timeout_s: float = 300) -> int:
        """The exit code. A process that takes longer is killed."""
        end = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"longer than {timeout_s} s: {self.printed[-3000:]}")
            time.sleep(0.02)
        return code

    @property
    def printed(self) -> str:
        """All that it has printed."""
        return self.output.read_text(errors="replace")


class Forkserver:
    """Starts processes by forking one that has imported torch, Lightning, transformers, PEFT and this package."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "tests.forked"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)

    def request(self, request: Mapping[str, object]) -> int | None:
        """Sends a request; returns the answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: int | None = json.loads(self._process.stdout.readline())
        return answer

    def start(self, *words: object, cwd: Path | None = None, **environment: str) -> Forked:
        """Starts `python WORDS`, where the words begin with `-m MODULE`, `-c CODE` or a script."""
        self._number += 1
        output = self._folder / f"{self._number}.txt"
        inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        pid = self.request(
            {
                "words": [str(word) for word in words],
                "cwd": str(cwd or Path.cwd()),
                "environment": {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
                "output": str(output),
            }
        )
        assert pid is not None
        return Forked(self, pid, output)

    def start_ranks(self, num_ranks: int, *words: object, cwd: Path | None = None, **environment: str) -> list[Forked]:
        """Starts a process per rank with the variables that torchrun sets."""
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
        common = {**sizes, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "forked"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
        return [self.start(*words, cwd=cwd, **common, **rank) for rank in ranks]

    def run(
        self, *words: object, num_ranks: int = 1, timeout_s: float = 300, cwd: Path | None = None
    ) -> SimpleNamespace:
        """Runs a process, or one per rank, to its end; returns `returncode`, of the first that failed, and `printed`."""
        started = self.start_ranks(num_ranks, *words, cwd=cwd) if num_ranks > 1 else [self.start(*words, cwd=cwd)]
        codes = [process.wait(timeout_s) for process in started]
        return SimpleNamespace(
            returncode=next((code for code in codes if code), 0),
            printed="".join(process.printed for process in started),
        )

    def close(self) -> None:
        """Ends the server. Processes that still run are not touched."""
        self._process.communicate(timeout=60)


def run(words: list[str]) -> None:
    """Does in this process what `python WORDS` does."""
    sys.path[:0] = [os.getcwd()]
    if words[0] == "-m":
        sys.argv = [words[1], *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[:0] = [str(Path(words[0]).parent)]
        runpy.run_path(words[0], run_name="__main__")


def fork(request: Mapping[str, object]) -> int:
    """Starts a process for a request; returns its number."""
    child = os.fork()
    if child:
        return child
    code: object = 1
    try:
        log = os.open(str(request["output"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source, target)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(str(request["cwd"]))
        os.environ.clear()
        os.environ.update(dict(request["environment"]))
        run(list(request["words"]))
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())  # torch's, which names the rank
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def serve() -> None:
    """Answers requests until standard input ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            done, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        else:
            answer = fork(request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
