"""Functions that `LimitedWorkers` calls in tests: each does one thing that ends or disturbs a process."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable

_seen: list[object] = []


def same(argument):
    return argument


def spins(argument):
    while True:
        argument += 1


def sleeps(argument):
    time.sleep(argument)


def exits(argument):
    sys.exit(argument)


def exits_at_once(argument):
    os._exit(argument)


def kills_itself(argument):
    os.kill(os.getpid(), argument)


def takes_memory(argument):
    return len(bytearray(argument * 2**20))


def nests(argument):
    return nests(argument)


def returns_text(argument):
    return "a" * argument


def returns_no_json(argument):
    return object()


def draws(argument):
    return [random.random(), hash("a text")]


def numpy_draws(argument) -> Callable:
    import numpy.random

    return lambda _: numpy.random.random()


def remembers(argument):
    _seen.append(argument)
    return len(_seen)


def writes_file(argument):
    with open(argument, "w") as stream:
        stream.write("text")


def prints(argument):
    sys.stdout.write(argument)
    sys.stdout.flush()
    os.write(2, argument.encode())
    return [os.fstat(descriptor).st_rdev for descriptor in (0, 1, 2)] == [os.stat(os.devnull).st_rdev] * 3


def forks_or_sleeps(argument):
    return sleeps(argument) if argument else forks(True)


def forks(argument):
    """Returns the id of a process that it leaves behind, in a session of its own if `argument`."""
    pid = os.fork()
    if pid == 0:
        if argument:
            os.setsid()
        time.sleep(60)
        os._exit(0)
    time.sleep(0.2)
    return pid


def forges(argument):
    """Writes bytes to everything that is open."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, bytes.fromhex(argument))
        except OSError:
            continue
    os._exit(0)


def ends_its_server(argument):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def slow_server(argument):
    """Ends the server if a file exists, which it removes: the first call fails, the next one works."""
    if os.path.exists(argument):
        os.remove(argument)
        ends_its_server(argument)
    return "done"


def pids(argument):
    time.sleep(argument)
    return [os.getpid(), os.getppid()]


def opened(argument) -> Callable:
    return lambda number: number * argument


def modules(argument):
    return sorted(sys.modules)
