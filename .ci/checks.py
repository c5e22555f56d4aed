"""What the scripts here share: running commands, saying how long things took, and checks side by side."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class CheckError(SystemExit):
    """A check that did not hold, or could not run, and why; a script that lets it pass ends with that.

    Not one that lets it pass in a thread: who starts one looks for it.
    """


def run(*command: object, cwd: Path = ROOT, shown: bool = False, **options: Any) -> str:
    """Runs a command and returns what it printed, unless that is ``shown`` as it comes.

    Raises CheckError, with what it printed, if it fails.
    """
    words = [str(c) for c in command]
    options |= {"stdout": None if shown else subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(words, text=True, check=False, cwd=cwd, **options)
    except OSError as error:
        raise CheckError(f"cannot run {words[0]}: {error}") from error
    if done.returncode:
        raise CheckError(f"{done.stdout or ''}\nexit status {done.returncode}: {' '.join(words)}")
    return done.stdout or ""


def long_run(title: str, *command: object, **options: Any) -> None:
    """Runs a command that takes long, and says what it does meanwhile."""
    run(sys.executable, ROOT / ".ci" / "progress.py", title, *command, shown=True, **options)


def stopwatch(subject: str) -> Callable[[str], None]:
    """What prints what was done with the subject, and the seconds until then."""
    start = time.monotonic()

    def done(what: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {subject}: {what}", flush=True)

    return done


def run_checks(
    program: str, checks: Mapping[str, Callable[[], str]], chosen: Sequence[str], jobs: int | None
) -> None:
    """Runs the chosen checks, ``jobs`` at a time, and prints what each found; SystemExit if one fails."""
    start = time.monotonic()
    failed = []

    def check(name: str) -> None:
        done = stopwatch(name)
        try:
            done(checks[name]())
        except CheckError as error:
            failed.append(name)
            done(f"FAILED\n{error}")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(check, chosen))
    if failed:
        raise SystemExit(f"{program}: failed: {', '.join(failed)}")
    print(f"{program}: {len(chosen)} checks hold ({time.monotonic() - start:.0f} s)")
