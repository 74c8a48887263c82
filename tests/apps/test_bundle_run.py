# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run of a bundle says while it lasts and when it fails. A shell script stands for Python: what it prints and
leaves is what a run would."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from apps.monailabel.lib.bundle_run import RunFailed, alone, run_bundle
from apps.monailabel.lib.errors import Conflict

COMPLETED = """mkdir -p "{run}"; echo '{{"result": "completed"}}' > "{run}/run.json" """


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Runs a bundle whose command is this script."""
    bundle, folder = tmp_path / "bundle", tmp_path / "out" / "runs" / "one"
    bundle.mkdir()
    folder.mkdir(parents=True)

    def call(script: str) -> Path:
        file = tmp_path / "python"
        file.write_text("#!/bin/sh\n" + script.format(run=folder / "training", folder=folder, bundle=bundle))
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))
        return run_bundle(bundle, ("train.json",), {"max_epochs": 3, "device": None}, folder, "training", [tmp_path])

    return call


def test_a_run_gets_its_overrides_and_its_place(run: Callable[[str], Path], tmp_path: Path) -> None:
    done = run(f'echo "$@" > "{{folder}}/arguments"; pwd > "{{folder}}/cwd"; {COMPLETED}')
    assert done == tmp_path / "out" / "runs" / "one" / "training"
    overrides = json.loads(done.with_suffix(".json").read_text())
    assert overrides == {"max_epochs": 3, "device": None, "output_root": str(done.parent), "run_name": "training",
                         "bundle_root": str(tmp_path / "bundle")}  # fmt: skip
    arguments = (done.parent / "arguments").read_text()
    assert arguments == f"-m monai.bundle run --config_file ['configs/train.json', '{done.with_suffix('.json')}']\n"
    assert (done.parent / "cwd").read_text().strip() == str(tmp_path / "bundle")


def test_lines_come_as_they_are_said_without_paths(
    run: Callable[[str], Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.INFO):
        run(f"""echo "run folder: {{run}}"; echo "read {tmp_path}/case/a.nii.gz" >&2; {COMPLETED}""")
    assert "run folder: training" in caplog.messages
    assert "read case/a.nii.gz" in caplog.messages
    assert str(tmp_path) not in caplog.text


def test_a_bar_that_is_drawn_again_does_not_push_the_rest_away(
    run: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    bar = "i=0; while [ $i -lt 300 ]; do printf 'preparing: %s%%| | [00:01<00:01]\\r' $i; i=$((i+1)); done"
    with caplog.at_level(logging.INFO):
        run(f"echo before; {bar}; echo; echo after; {COMPLETED}")
    assert sum("preparing" in line for line in caplog.messages) == 1
    assert caplog.messages[-1] == "after"


FAILURES = [
    ("echo '{{}}'; mkdir -p {run}; echo '{{\"result\": \"failed\", \"error\": {{\"class\": \"ValueError\","
     " \"message\": \"device: no\"}}}}' > {run}/run.json; exit 1", "training failed: device: no"),
    ("echo \"unknown override 'max_epoch': did you mean max_epochs?\" >&2; exit 2",
     "training failed: unknown override 'max_epoch': did you mean max_epochs?"),
    ("echo 'error: OSError: {run}/model.pt could not be written' >&2; exit 1",
     "training failed: OSError: training/model.pt could not be written"),
    ("kill -9 $$", "training failed: it was ended by signal 9, as the system does when memory is short"),
    ("exit 3", "training failed: it ended with status 3"),
    ("mkdir -p {run}; echo '{{' > {run}/run.json; exit 0", "training failed: it ended with status 0"),
    ("mkdir -p {run}; echo '{{\"result\": \"started\"}}' > {run}/run.json; exit 0", "training failed"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "message"), FAILURES, ids=range(len(FAILURES)))
def test_a_failure_is_said_in_its_own_words(run: Callable[[str], Path], script: str, message: str) -> None:
    with pytest.raises(RunFailed) as raised:
        run(script)
    assert str(raised.value).startswith(message)


def test_a_traceback_is_in_the_file_and_not_in_the_log(
    run: Callable[[str], Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    lines = ["Traceback (most recent call last):", '  File "x.py", line 1', "    run()", "ValueError: bad", "",
             "error: ValueError: bad"]  # fmt: skip
    with caplog.at_level(logging.INFO), pytest.raises(RunFailed, match="training failed: ValueError: bad"):
        run("echo begins\n" + "\n".join(f"echo '{line}'" for line in lines) + "\nexit 1")
    assert "begins" in caplog.messages
    assert "error: ValueError: bad" in caplog.messages
    assert "Traceback" not in caplog.text
    assert "Traceback" in (tmp_path / "out" / "runs" / "one" / "training.txt").read_text()


def test_series_that_were_left_out_are_no_failure(run: Callable[[str], Path]) -> None:
    script = """mkdir -p {run}; echo '{{"result": "completed, 2 series failed"}}' > {run}/run.json; exit 1"""
    assert run(script).name == "training"


def test_nothing_is_left_running_when_it_is_interrupted(
    run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(process: subprocess.Popen[str], *_: object) -> str:
        process.stdout.readline()
        started.extend([psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)])
        raise KeyboardInterrupt

    started: list[psutil.Process] = []
    monkeypatch.setattr("apps.monailabel.lib.bundle_run._follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("sleep 600 & echo started; wait")
    assert len(started) == 2
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive


def test_another_training_is_told_of(tmp_path: Path) -> None:
    inside, end = threading.Event(), threading.Event()

    def hold() -> None:
        with alone(tmp_path / "model"):
            inside.set()
            end.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    try:
        with pytest.raises(Conflict, match="another training of model is running"), alone(tmp_path / "model"):
            pytest.fail("two at once")
    finally:
        end.set()
        thread.join()
    with alone(tmp_path / "model"):
        pass


def test_a_killed_training_blocks_nobody(tmp_path: Path) -> None:
    code = f"""if True:
        import time, filelock, pathlib
        pathlib.Path({str(tmp_path)!r}, "model").mkdir()
        with filelock.FileLock({str(tmp_path / "model" / ".training.lock")!r}):
            print("held", flush=True); time.sleep(600)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(Conflict), alone(tmp_path / "model"):
            pytest.fail("two at once")
        process.kill()
    with alone(tmp_path / "model"):
        pass
