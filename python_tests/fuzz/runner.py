"""Runs cases in processes of their own, so that a crash or a hang is one failure among others."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch._dynamo  # here, or every child would import it with its first op

from . import malformed, valid
from .choices import Case
from .outcome import Outcome, Status, shown

# Above what the process has at its start; a call that asks for more is refused.
MEMORY = 4 << 30
DRAFTS: dict[str, type[valid.Draft] | type[malformed.Draft]] = {
    "valid": valid.Draft,
    "malformed": malformed.Draft,
}
OPS: dict[str, Callable[[Case], str]] = {"valid": valid.op_of, "malformed": malformed.op_of}


def _run_here(cases: Sequence[Case], say: Callable[[Outcome], None]) -> None:
    """Runs cases in this process and says of each what was drawn, and then what became of it."""
    for case in cases:
        outcome = Outcome(Status.STARTED, OPS[case.kind](case))
        try:
            draft = DRAFTS[case.kind](case)
            outcome.drawn = shown(draft.choices.taken)
            say(outcome)
            outcome = draft.run()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome.status = Status.FAULT
            outcome.what = f"the fuzz itself: {type(error).__name__}: {error}"
            outcome.detail = f"{where.filename}:{where.lineno}"
        say(outcome)


def _limit_memory() -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


@dataclass
class _Child:
    """A process that runs cases in order and tells the outcome of each."""

    pid: int
    pipe: int
    text: bytes = b""

    @staticmethod
    def start(cases: Sequence[Case]) -> _Child:
        # Nothing has run in parallel here yet, so the child can start threads of its own.
        read, write = os.pipe()
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid:
            os.close(write)
            return _Child(pid, read)
        status = 1
        try:
            os.close(read)
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)
            _limit_memory()
            with os.fdopen(write, "w", buffering=1) as out:
                _run_here(cases, lambda outcome: print(json.dumps(outcome.to_json()), file=out))
            status = 0
        finally:
            os._exit(status)

    def lines(self, timeout: float) -> Iterator[str]:
        """What it says; TimeoutError where it says nothing for so many seconds."""
        while True:
            *whole, self.text = self.text.split(b"\n")
            yield from (line.decode() for line in whole)
            if not select.select([self.pipe], [], [], timeout)[0]:
                raise TimeoutError
            got = os.read(self.pipe, 1 << 16)
            if not got:
                return
            self.text += got

    def end(self) -> str:
        """How it ended: a signal's name, an exit status, or nothing where all was well."""
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return f"exit status {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else ""


def _run_until_death(cases: Sequence[Case], timeout: float) -> Iterator[Outcome]:
    """The outcomes of the cases, the last of them that of the case the process did not survive."""
    child = _Child.start(cases)
    finished, last, hung = 0, None, False
    try:
        for line in child.lines(timeout):
            last = Outcome.from_json(json.loads(line))
            if last.status is not Status.STARTED:
                yield last
                finished += 1
    except TimeoutError:
        hung = True
    finally:
        os.kill(child.pid, signal.SIGKILL)  # which changes nothing where it has ended
        ended = child.end()
    if finished < len(cases):
        if last is None or last.status is not Status.STARTED:
            last = Outcome(Status.STARTED, OPS[cases[finished].kind](cases[finished]))
        last.status = Status.FAULT
        last.what = f"no answer for {timeout:g} seconds" if hung else f"died of {ended}"
        yield last


def run(cases: Sequence[Case], timeout: float = 60.0, batch: int = 200) -> Iterator[tuple[Case, Outcome]]:
    """Every case and its outcome, in order."""
    start = 0
    while start < len(cases):
        part = cases[start : start + batch]
        done = 0
        for outcome in _run_until_death(part, timeout):
            yield part[done], outcome
            done += 1
        start += done


def alone(case: Case, timeout: float = 60.0) -> Outcome:
    """One case in a process of its own."""
    return next(iter(run([case], timeout)))[1]


def culprit(cases: Sequence[Case], timeout: float = 60.0) -> list[Case]:
    """The shortest end of a list of cases whose last one killed its process, that still does.

    A call that damages the heap may kill a later one.
    """

    def dies(part: Sequence[Case]) -> bool:
        *_, last = _run_until_death(part, timeout)
        return last.status is Status.FAULT

    low, high = 0, len(cases) - 1  # cases[low:] dies
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if dies(cases[middle:]) else (low, middle - 1)
    return list(cases[low:])


def smallest(case: Case, outcome: Outcome, timeout: float = 60.0) -> tuple[Case, Outcome]:
    """The same fault with as many choices as possible at their plainest."""
    for name in sorted(outcome.drawn):
        tried = alone(case.plainer(name), timeout)
        if tried.status is Status.FAULT and tried.group() == outcome.group():
            case, outcome = case.plainer(name), tried
    return case, outcome
