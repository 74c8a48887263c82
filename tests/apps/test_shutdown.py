# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A server that is told to stop does, whatever it is doing."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.apps.conftest import ROOT, Server


def words(process: psutil.Process) -> list[str]:
    """Of its command line; none of a process that has ended since it was listed."""
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_ends_with_the_server(
    start_server: Callable[..., Server], tmp_path: Path, number: signal.Signals
) -> None:
    for patient in range(4):
        shutil.copyfile(ROOT / "tests" / "data" / "lidc_idri_0001.nii.gz", tmp_path / f"{patient}.nii.gz")
    server = start_server(tmp_path)
    assert server.post("/train/voco2d_pretrain", json={"max_epochs": 100_000}).ok
    assert server.post("/train/voco2d_pretrain?enqueue=true", json={"max_epochs": 100_000}).ok
    me = psutil.Process(server.process.pid)
    end = time.time() + 120
    while not any("monai.bundle" in words(child) for child in me.children(recursive=True)):
        assert time.time() < end, server.log.read_text()[-3000:]
        time.sleep(0.5)
    children = me.children(recursive=True)
    server.process.send_signal(number)
    server.process.wait(60)  # raises if it hangs: nobody ends it
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert gone
    assert not alive
    log = server.log.read_text()
    assert "the train task with it" in log
    assert log.count("pretraining on 4 images") == 1  # the second one never began
