"""An experiment as tasks, each done once: one by one or side by side, and on resuming only what is left.

A task is a function of plain values that returns plain values. Its result is kept in a file of its own as
soon as it is done, so that an experiment that is killed loses at most the tasks that were running; those that
keep checkpoints in their folder (as :func:`bbb_fast.experiments.training.fit` does) lose an epoch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._files import atomic_write
from .document import Document
from .folder import OwnedFolder
from .options import MAX_SEED, MAX_THREADS, check_int

__all__ = ["Experiment", "Task", "experiment"]

SETTINGS, TASKS, RESULT = "settings.json", "tasks", "result.json"
# Of an orphaned worker, between two looks at who its parent is.
_WATCH_SECONDS = 1.0


class Task(NamedTuple):
    """``function(folder, **arguments)``, a module's own function, with plain arguments and a plain result.

    ``folder`` is the task's own, for files that others read. ``name`` is that of the folder.
    """

    name: str
    function: Callable[..., Mapping[str, Any]]
    arguments: Mapping[str, Any]


class Experiment:
    """A folder of tasks' results; made by :func:`experiment`."""

    def __init__(
        self, owned: OwnedFolder, command: str, settings: Mapping[str, Any], jobs: int, progress: bool
    ):
        self._owned, self.command, self.settings = owned, command, settings
        self._jobs, self._progress = jobs, progress
        self.seconds = 0.0

    @property
    def path(self) -> Path:
        """The folder."""
        return self._owned.path

    def folder(self, task: str) -> Path:
        """The folder of the task of this name."""
        return self.path / TASKS / task

    def run(self, tasks: Sequence[Task], title: str = "") -> dict[str, dict[str, Any]]:
        """Does what is left of the tasks; returns the results of all, by name, in the order of the tasks.

        The first error of a task is raised; what is done is kept.
        """
        names = [task.name for task in tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks must have different names, got {names}")
        left = [task for task in tasks if not self._done(task.name)]
        with _Progress(self._progress, title or self.command, len(tasks), len(tasks) - len(left)) as progress:
            for name, seconds in self._do(left):
                progress.step(name, seconds)
        results = {}
        for name in names:
            kept = json.loads((self.folder(name) / RESULT).read_text())
            results[name] = kept["result"]
            self.seconds += kept["seconds"]
        return results

    def _done(self, name: str) -> bool:
        return (self.folder(name) / RESULT).exists()

    def _do(self, tasks: Sequence[Task]) -> Iterator[tuple[str, float]]:
        calls = [(self.folder(task.name), task) for task in tasks]
        if self._jobs == 1 or len(tasks) < 2:
            for call in calls:
                yield _perform(*call)
            return
        from joblib import Parallel, delayed

        threads = max(1, torch.get_num_threads() // self._jobs)
        parallel = Parallel(n_jobs=self._jobs, return_as="generator_unordered")
        yield from parallel(delayed(_perform_as_worker)(*call, threads, os.getpid()) for call in calls)

    def finish(self, document: Document) -> list[Path]:
        """Writes the document and its figures; returns the files."""
        files = {figure.file: figure.png for figure in document.figures if figure.png}
        files[f"{self.command}.json"] = document.to_json().encode()
        for name, content in files.items():
            self._owned.write(name, content)
        return [self.path / name for name in files]


@contextmanager
def experiment(
    out: str | os.PathLike[str],
    command: str,
    settings: Mapping[str, Any],
    *,
    jobs: int = 1,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Iterator[Experiment]:
    """The folder of an experiment, which no other run writes to meanwhile.

    Args:
        out: the folder; made if needed.
        command: names the experiment and its JSON file.
        settings: all that its results depend on, plain values. A resumed run must have the same.
        jobs: tasks at a time, each in a process of its own (joblib's; its back ends carry them elsewhere).
        threads: of the CPU, shared by the jobs; None leaves PyTorch's number. The caller's comes back.
        resume: keep the results of tasks that are done.
        overwrite: remove them.
        progress: print what is done.

    Raises:
        ValueError: nothing to resume, other settings than those of the run to resume, or both options.
        FileExistsError: the folder holds a run, without ``resume`` or ``overwrite``.
        OSError: the folder cannot be written, or another run is writing to it.
        OptionError: ``jobs``, ``threads`` or ``settings["seed"]`` out of range.
    """
    check_int("jobs", jobs, most=MAX_THREADS)
    if threads is not None:
        check_int("threads", threads, most=MAX_THREADS)
    if "seed" in settings:
        check_int("seed", settings["seed"], 0, MAX_SEED)
    if resume and overwrite:
        raise ValueError("resume and overwrite contradict each other: give one of them")
    settings = json.loads(json.dumps({"command": command, **settings}, allow_nan=False))
    path = Path(out).expanduser()
    if resume and not (path / SETTINGS).exists():
        raise ValueError(f"nothing to resume: {path / SETTINGS} does not exist; start without --resume")
    before = torch.get_num_threads()
    with OwnedFolder(path, "experiment", (SETTINGS, f"{command}.json")) as owned:
        if (path / SETTINGS).exists():
            if resume:
                _check_settings(path, settings)
            elif not overwrite:
                raise FileExistsError(
                    f"{path} already holds a run: continue it with --resume, replace it with --overwrite, or "
                    "choose another folder with --out"
                )
            else:
                _remove(path)
        elif (path / TASKS).exists():
            raise FileExistsError(
                f"{path} holds a folder {TASKS} of something else: choose another with --out"
            )
        owned.write(SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
        torch.set_num_threads(threads or before)
        try:
            yield Experiment(owned, command, settings, jobs, progress)
        finally:
            torch.set_num_threads(before)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    file = path / SETTINGS
    try:
        was = json.loads(file.read_text(encoding="utf-8"))
        was.keys()
    except (ValueError, AttributeError):
        raise ValueError(f"{file} is damaged: replace the run with --overwrite") from None
    for key in (*settings, *was):
        if was.get(key) != settings.get(key):
            raise ValueError(
                f"cannot resume {path}: its {key} was {was.get(key)!r}, now it is {settings.get(key)!r}; "
                "give the same options, or choose another folder with --out"
            )


def _remove(path: Path) -> None:
    """Removes a run. Its settings go last: without them what is left would be nobody's."""
    if (path / TASKS).exists():
        shutil.rmtree(path / TASKS)
    (path / SETTINGS).unlink()


def _perform(folder: Path, task: Task) -> tuple[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # The caller's random state stays as it was, and what ran before changes nothing.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = task.function(folder, **task.arguments)
    seconds = time.perf_counter() - start
    content = json.dumps({"result": result, "seconds": seconds}, indent=1, allow_nan=False) + "\n"
    atomic_write(folder / RESULT, content.encode())
    return task.name, seconds


def _perform_as_worker(folder: Path, task: Task, threads: int, parent: int) -> tuple[str, float]:
    torch.set_num_threads(threads)
    _end_with(parent)
    return _perform(folder, task)


_watching: set[int] = set()


def _end_with(parent: int) -> None:
    """Ends this process when ``parent`` has: a resumed run must not meet workers of the killed one."""
    if os.getppid() != parent or parent in _watching:
        return  # a worker on another machine, or one that watches already
    _watching.add(parent)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Progress:
    """tqdm's bar on a terminal; elsewhere a line a task."""

    def __init__(self, wanted: bool, title: str, total: int, done: int) -> None:
        self._wanted, self._title, self._total, self._done = wanted, title, total, done
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if self._wanted and sys.stderr.isatty():
            with suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=self._total, initial=self._done, desc=self._title, unit="task")
        if self._wanted and self._done and self._bar is None:
            print(f"{self._title}: {self._done} of {self._total} tasks are done already", flush=True)
        return self

    def step(self, name: str, seconds: float) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(name, refresh=False)
            self._bar.update()
        elif self._wanted:
            print(f"{self._title}: {self._done}/{self._total} {name} ({seconds:.1f} s)", flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
