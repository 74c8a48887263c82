# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run say when one of them ends before the others.

None can go on alone: its next collective fails, or torchrun, which has noticed, sends it SIGTERM. Either way it would
end with a page about sockets, or without a word. Here it says in one line which rank has ended and how to go on; the
rank where it began shows its error, and torchrun's summary repeats it.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from types import FrameType, TracebackType

from torch.distributed.elastic.multiprocessing.errors import record

from .errors import root_cause
from .gather import of_each, ranks
from .privacy import redact

__all__ = ["PeerEnded", "Peers", "RankError"]

logger = logging.getLogger(__name__)

# what a process gets whose partner is gone, or does not come
LOST = re.compile(r"Dist\w*Error: |RuntimeError: .*(gloo|nccl|by peer|broken pipe)", re.IGNORECASE | re.DOTALL)
TIMED_OUT = re.compile(r"(Runtime|Dist\w*)Error: .*(timed out waiting|timeout)", re.IGNORECASE | re.DOTALL)
ADVICE = "go on with --resume latest, with as many processes as you like"
# torchrun looks after its processes every 0.1 s. One that ended because of another waits for it, so that the summary
# names the other.
PATIENCE = 10.0


class RankError(RuntimeError):
    """The error of a rank, as torchrun's summary shows it."""


class PeerEnded(BaseException):
    """This process cannot go on, through no fault of its own. Like a KeyboardInterrupt it is nobody's to catch."""


class Peers:
    """The processes of the group that this one has joined: it tells who is missing when it has to end."""

    def __init__(self) -> None:
        self.rank, _ = ranks()
        self.processes = of_each((socket.gethostname(), os.getpid()))
        self._told_to_stop = self._ending = False
        self._before: tuple = ()

    def watch(self) -> None:
        """From now on this process explains how it ends, to those too that have put themselves in the way of an
        exception before (`RunFolder` for its manifest)."""
        self._before = (sys.excepthook, signal.signal(signal.SIGTERM, self._terminate))
        sys.excepthook = self._explain

    def unwatch(self) -> None:
        if self._before:
            sys.excepthook, handler = self._before
            signal.signal(signal.SIGTERM, handler)
            self._before = ()

    def missing(self) -> list[int]:
        """Ranks on this machine whose process is no more."""
        host, gone = socket.gethostname(), []
        for rank, (name, process) in enumerate(self.processes):
            if name == host:
                try:
                    os.kill(process, 0)
                except ProcessLookupError:
                    gone.append(rank)
        return gone

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """torchrun sends SIGTERM to the others when one ends, and to all when the job is cancelled."""
        self._told_to_stop = True
        if os.getpid() != self.processes[self.rank][1]:  # a process forked from this one
            raise SystemExit(128 + number)
        if not self._ending:
            self._ending = True
            raise PeerEnded(self._line("it was told to stop (SIGTERM)"))

    def _explain(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        """Exception hook: an own error in full, one that another rank caused in a line."""
        self._ending = True
        what = root_cause(error)
        if isinstance(error, PeerEnded):
            self._end_with(error)
        elif TIMED_OUT.match(what):
            line = self._line(f"it waited for the others for timeout_minutes: {what.splitlines()[0]}")
            self._end_with(PeerEnded(line))
            _tell_torchrun(line)
        elif LOST.match(what):
            limit = time.monotonic() + PATIENCE
            while not self._told_to_stop and not self.missing() and time.monotonic() < limit:
                time.sleep(0.05)
            self._end_with(PeerEnded(self._line(f"it lost another: {what.splitlines()[0]}")))
            while not self._told_to_stop and time.monotonic() < limit:
                time.sleep(0.05)
        else:
            self._before[0](kind, error, traceback)
            _tell_torchrun(redact(what))

    def _end_with(self, error: PeerEnded) -> None:
        logger.critical("%s", error)
        self._before[0](type(error), error, None)

    def _line(self, why: str) -> str:
        size = len(self.processes)
        gone = ", ".join(map(str, self.missing()))
        first = f"rank {gone} of {size} ended" if gone else f"rank {self.rank} of {size} cannot go on: {redact(why)}"
        ends = f", and rank {self.rank} with it" if gone else ""
        return f"{first}{ends}; {ADVICE}"


def _tell_torchrun(what: str) -> None:
    """Put an error where torchrun takes its summary from."""

    @record
    def fail() -> None:
        raise RankError(what)

    with suppress(RankError):
        fail()
