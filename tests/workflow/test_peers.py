# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What a process says that ends because another did (under torchrun itself: test_torchrun.py)."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys

import pytest
from workflow import peers
from workflow.peers import ADVICE, PeerEnded, Peers

CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:16605: Connection reset by peer")
UID = "1.2.840.113619.2.55.3.1234"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(peers, "PATIENCE", 0.2)


@pytest.fixture(autouse=True)
def shown(monkeypatch) -> list[tuple]:
    """What comes to the exception hook of before."""
    errors = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: errors.append(error))
    return errors


@pytest.fixture
def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def group(monkeypatch, shown):
    """Rank 0 of processes with these ids, watched."""
    made = []

    def make(*processes: int, host: str | None = None) -> Peers:
        ids = [os.getpid(), *processes]

        def gather(own):
            assert own == (socket.gethostname(), os.getpid())
            return [own, *((host or own[0], number) for number in ids[1:])]

        monkeypatch.setattr(peers, "of_each", gather)
        made.append(Peers())
        made[-1].watch()
        return made[-1]

    before = sys.excepthook, signal.getsignal(signal.SIGTERM)
    yield make
    for one in made:
        one.unwatch()
        one.unwatch()
    assert (sys.excepthook, signal.getsignal(signal.SIGTERM)) == before


def test_a_lost_connection_becomes_a_line_that_names_the_rank(group, dead_process, caplog, shown):
    group(os.getppid(), dead_process)
    sys.excepthook(RuntimeError, CLOSED, None)
    line = f"rank 2 of 3 ended, and rank 0 with it; {ADVICE}"
    assert caplog.messages == [line]
    assert caplog.records[0].levelno == logging.CRITICAL
    assert [(kind, str(error), traceback) for kind, error, traceback in shown] == [(PeerEnded, line, None)]


def test_a_rank_of_another_machine_is_lost_without_a_name(group, dead_process, caplog):
    group(dead_process, host="another")
    sys.excepthook(RuntimeError, CLOSED, None)
    assert caplog.messages == [f"rank 0 of 2 cannot go on: it lost another: RuntimeError: {CLOSED}; {ADVICE}"]


def test_sigterm_ends_the_process_with_the_same_line(group, dead_process, caplog, shown):
    group(dead_process)
    line = f"rank 1 of 2 ended, and rank 0 with it; {ADVICE}"
    with pytest.raises(PeerEnded) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # once is enough
    sys.excepthook(PeerEnded, caught.value, None)
    assert caplog.messages == [str(caught.value)] == [line]
    assert [error for _, error, _ in shown] == [caught.value]
    assert not isinstance(caught.value, Exception)  # no engine, dataset or config takes it for an error of its own


def test_a_cancelled_job_says_so(group):
    group(os.getppid())
    with pytest.raises(PeerEnded, match=r"^rank 0 of 2 cannot go on: it was told to stop \(SIGTERM\); go on with"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_forked_process_ends_without_a_word(group, caplog, monkeypatch):
    one = group(os.getppid())
    monkeypatch.setattr(peers.os, "getpid", lambda: -1)
    with pytest.raises(SystemExit):
        one._terminate(signal.SIGTERM, None)
    assert caplog.messages == []


def test_a_rank_that_waited_too_long_tells_torchrun(group, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    group(os.getppid())
    sys.excepthook(RuntimeError, RuntimeError("Application timeout caused pair closure"), None)
    assert "it waited for the others for timeout_minutes: RuntimeError: Application timeout" in caplog.messages[0]
    assert caplog.messages[0] in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_an_own_error_is_shown_in_full_and_told_to_torchrun_without_uids(group, monkeypatch, tmp_path, caplog, shown):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    group(os.getppid())
    error = ValueError(f"/data/gloo/{UID}/1.dcm: truncated")
    sys.excepthook(ValueError, error, None)
    assert shown == [(ValueError, error, None)]
    assert caplog.messages == []
    told = (tmp_path / "error.json").read_text()
    assert "ValueError: /data/gloo/uid-" in told
    assert UID not in told
