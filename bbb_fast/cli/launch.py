"""A command that torchrun starts in several processes, and starts again when one of them has failed."""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import NoReturn

import torch
import torch.distributed as dist

from ..experiments.processes import Processes
from ..experiments.training import parse_device

__all__ = ["Launch"]

# For the launcher's store to answer, and for another process to print a message.
_TIMEOUT, _PATIENCE = timedelta(minutes=1), timedelta(seconds=5)


@dataclass
class Launch:
    """This process's place among those that torchrun started; without torchrun it is the only one.

    Attributes:
        rank, size: its number, from 0 on, and how many there are.
        attempt: how often the launcher has started all of them anew; None without torchrun.
    """

    rank: int = 0
    size: int = 1
    attempt: int | None = None
    _joined: bool = field(default=False, init=False)

    @classmethod
    def here(cls) -> Launch:
        """As the environment has it."""
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return cls()
        return cls(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")))

    @cached_property
    def _store(self) -> dist.TCPStore:
        """The launcher's own: it outlives the processes, and ends with the launcher."""
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        ours = not hosted and self.rank == 0
        return dist.TCPStore(*address, is_master=ours, timeout=_TIMEOUT, wait_for_workers=False)

    def run_name(self) -> str | None:
        """A name for the run of this launch: the same in all processes and attempts, and no other launch's.

        None without torchrun.
        """
        if self.attempt is None:
            return None
        return self._store.compare_set("bbb_fast/run", "", secrets.token_hex(8)).decode()

    def join(self, device: str) -> Processes:
        """Connects the processes, whose tensors are on ``device``: "cpu", or "cuda" for a GPU each.

        Those that are connected already stay as they are. Raises OptionError for a GPU that is not there.
        """
        if self.size > 1 and not dist.is_initialized():
            self._joined = True
            backend = "gloo"
            if device != "cpu":
                torch.cuda.set_device(parse_device(f"cuda:{os.environ['LOCAL_RANK']}"))
                backend = "cpu:gloo,cuda:nccl"
            # The launcher's store still holds where to find the processes of the attempts before.
            store = dist.PrefixStore(f"bbb_fast/{self.attempt}", self._store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
        return Processes()

    def is_first_to_say(self, what: str) -> bool:
        """Whether no other process has asked for this yet: what all of them know is told once."""
        if self.size == 1:
            return True
        try:
            return self._store.add(f"bbb_fast/{self.attempt}/{what}", 1) == 1
        except RuntimeError:
            return True  # better twice than never

    def report(self, text: str) -> None:
        """Prints to stderr why the processes end; of all reports the first, which is the cause."""
        told = f"bbb_fast/{self.attempt}/told"
        if self.is_first_to_say("end"):
            print(text, file=sys.stderr, flush=True)
            if self.size > 1:
                self._store.set(told, "")
        else:
            # When one process has ended the launcher ends the others, perhaps before they have printed it.
            with suppress(RuntimeError):
                self._store.wait([told], _PATIENCE)

    def leave(self) -> None:
        """Takes :meth:`join` back."""
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()
            self._joined = False

    def exit(self, code: int) -> NoReturn:
        """Ends this process, one of several; after success together with the others.

        Without :meth:`leave`, which may wait for a process that has failed, and in which gloo's threads now
        and then abort.
        """
        if code == 0:
            done = f"bbb_fast/{self.attempt}/done"
            with suppress(RuntimeError):
                if self._store.add(done, 1) == self.size:
                    self._store.set(f"{done}/all", "")
                self._store.wait([f"{done}/all"], _TIMEOUT)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
