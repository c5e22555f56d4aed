"""What the scripts of checks share: running commands, and checks side by side."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class CheckError(Exception):
    """A check that did not hold, or could not run, and why."""


def run(*command: object, cwd: Path = ROOT, **options: Any) -> str:
    """Runs a command and returns what it printed; raises CheckError with that if it fails."""
    words = [str(c) for c in command]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(words, text=True, check=False, cwd=cwd, **options)
    except OSError as error:
        raise CheckError(f"cannot run {words[0]}: {error}") from error
    if done.returncode:
        raise CheckError(f"{done.stdout}\nexit status {done.returncode}: {' '.join(words)}")
    return done.stdout


def run_checks(
    program: str, checks: Mapping[str, Callable[[], str]], chosen: Sequence[str], jobs: int | None
) -> None:
    """Runs the chosen checks, ``jobs`` at a time, and prints what each found; SystemExit if one fails."""
    start = time.monotonic()
    failed = []

    def check(name: str) -> None:
        begin = time.monotonic()
        try:
            result = checks[name]()
        except CheckError as error:
            failed.append(name)
            result = f"FAILED\n{error}"
        print(f"[{time.monotonic() - begin:4.0f} s] {name}: {result}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(check, chosen))
    if failed:
        raise SystemExit(f"{program}: failed: {', '.join(failed)}")
    print(f"{program}: {len(chosen)} checks hold ({time.monotonic() - start:.0f} s)")
