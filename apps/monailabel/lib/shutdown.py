# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The end of the server is the end of its background tasks.

MONAI Label waits for them at its exit: a server that is told to stop (Ctrl-C, systemd, docker) would hang until a
training ends, or be killed and leave it behind.
"""

from __future__ import annotations

import logging
import signal
from contextlib import suppress
from types import FrameType

import psutil
from monailabel.utils.async_tasks.utils import background_executors, background_processes, stop_background_task

__all__ = ["end_tasks", "end_tasks_with_the_server"]

logger = logging.getLogger(__name__)


def end_tasks() -> None:
    """Ends the running tasks with their child processes, and takes those that wait out of the queue."""
    for executor in background_executors.values():
        executor.shutdown(wait=False, cancel_futures=True)
    for method, running in background_processes.items():
        while running:
            logger.warning("the server ends, and the %s task with it", method)
            with suppress(StopIteration, psutil.NoSuchProcess):  # it has just ended by itself
                stop_background_task(method)


def end_tasks_with_the_server() -> None:
    """To be called in the main thread when the server has set its own handlers, which stay in force."""
    for number in (signal.SIGINT, signal.SIGTERM):
        of_the_server = signal.getsignal(number)

        def stop(number: int, frame: FrameType | None, then: object = of_the_server) -> None:
            end_tasks()
            if callable(then):
                then(number, frame)

        signal.signal(number, stop)
