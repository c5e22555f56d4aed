"""Runs a command whose output is too long to show and which takes too long to show nothing.

    python .ci/progress.py TITLE COMMAND ...

Prints the title, a line for each file that ninja compiles, and every so many seconds that it goes on;
if the command fails, all that it printed. The exit status is the command's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

SILENT_SECONDS = 15
COMPILED = re.compile(r"(\[\d+/\d+\]) .* -c \S*?((?:csrc/)[\w/.]+) ")


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    title, *command = sys.argv[1:]
    start = time.monotonic()
    spoken = start
    print(f"{title} ...", flush=True)
    try:
        # Whatever bytes a compiler prints: what reads them must not stop.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        print(f"{title}: cannot run {command[0]}: {error}", file=sys.stderr)
        return 127
    lines: list[str] = []

    def read() -> None:
        nonlocal spoken
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := COMPILED.search(line):
                print(f"  {found[1]} {found[2]}", flush=True)
                spoken = time.monotonic()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while True:
        try:
            status = process.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            if now - spoken >= SILENT_SECONDS:
                print(f"  {title}: {now - start:.0f} s", flush=True)
                spoken = now
    reader.join(timeout=5)
    if status < 0:  # a signal, as shells tell it
        status = 128 - status
    if status:
        print("".join(lines), f"{title}: failed with exit status {status}", sep="", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
