# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: ``output_root/run_name/``. A run never overwrites another and writes nowhere else.

```
output_root/run_name/
  config.json        the executed config, overrides included
  log.txt            what went to the console
  run.json           the manifest: versions, device, duration, result
  checkpoints/       full checkpoints for resuming          model.pt   the weights to use
  tensorboard/       scalars and images
```
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import pandas as pd
import torch
from monai.utils import set_determinism

from .guard import running_config
from .privacy import anonymous_path, anonymous_text, redact, redacted_logs

__all__ = ["RunFolder", "select_device", "use_amp", "whole_file", "write_atomically"]

logger = logging.getLogger(__name__)

PACKAGES = ("monai", "torch", "numpy", "timm", "pytorch-ignite", "pydicom", "highdicom", "nibabel", "scikit-learn")


def select_device(device: str | None = None) -> torch.device:
    """``None`` means CUDA where present; a device asked for by name must exist.

    Raises:
        ValueError: if ``cuda`` is asked for and absent.
    """
    if device is None:
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        chosen = torch.device(device)
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device: {device!r} was asked for, but torch {torch.__version__} finds no CUDA device here"
            )
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    logger.info("device: %s (%s)", chosen, name)
    return chosen


def use_amp(amp: bool | None, device: torch.device) -> bool:
    """Mixed precision: ``None`` means on a GPU and never on a CPU (without AVX-512 or AMX it is 8 to 24 times slower
    there).

    Raises:
        ValueError: if it is asked for on another device than CUDA, where MONAI's engines cannot apply it.
    """
    if amp and device.type != "cuda":
        raise ValueError(f"amp: mixed precision needs a CUDA device, the device is {device}")
    return device.type == "cuda" if amp is None else bool(amp)


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file (text as UTF-8) under a temporary name and rename it, so that a reader never sees half of it."""
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write to that has its name when all of it is on the disk; nothing is left of one that is not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # a cache may serve several users
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _is_of_a_run(entry: Path) -> bool:
    """Whether it says that a run was started. Savers and TensorBoard's writers make their folders when they are built:
    who checks a workflow's properties before running it has those already."""
    return entry.is_file() or (entry.name != "tensorboard" and any(entry.iterdir()))


class RunFolder:
    """Names the files of a run; `start` creates the folder, seeds the random generators and logs what runs where.

    Args:
        output_root: folder of all runs.
        run_name: name of this one; None for the date and time.
        resume: None for a new run, ``latest`` or a checkpoint file to go on with one.
        anonymise: name series in ``failed.csv`` by pseudonyms instead of paths, and keep UIDs out of ``config.json``
            and ``run.json`` as out of the logs.

    Raises:
        ValueError: if `run_name` is not a plain name, or ``resume="latest"`` comes without one.
    """

    def __init__(
        self,
        output_root: str | os.PathLike[str],
        run_name: str | None = None,
        resume: str | None = None,
        anonymise: bool = False,
    ) -> None:
        if resume == "latest" and run_name is None:
            raise ValueError("resume: 'latest' needs the run_name of the run to go on with")
        name = time.strftime("%Y%m%d-%H%M%S") if run_name is None else str(run_name)
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"run_name: expected a plain folder name, got {name!r}")
        self.path = Path(output_root).expanduser().absolute() / name
        self.resume = resume
        self.anonymise = anonymise
        self._started = time.time()
        self._until_finish = ExitStack()  # the log file, and what keeps UIDs out of logs

    @property
    def checkpoints(self) -> str:
        return str(self.path / "checkpoints")

    @property
    def tensorboard(self) -> str:
        return str(self.path / "tensorboard")

    @property
    def model(self) -> str:
        """The flat weights file that evaluation, inference and the other bundle read."""
        return str(self.path / "model.pt")

    def start(self, *, seed: int = 0, main_process: bool = True) -> None:
        """Create the folder, write the executed config, log to ``log.txt`` too and seed every random generator.

        Raises:
            FileExistsError: if the folder holds a run already and this one does not resume it.
            FileNotFoundError: if there is nothing to resume.
        """
        occupied = self.path.is_dir() and any(map(_is_of_a_run, self.path.iterdir()))
        # asked by the main process alone: the others may come when it has made the folder
        if main_process and occupied and self.resume is None:
            raise FileExistsError(
                f"{self.path} holds a run already: choose another run_name, or go on with it by --resume latest"
            )
        if main_process and self.resume == "latest" and not occupied:
            raise FileNotFoundError(f"resume: {self.path} holds no run to go on with")
        if not isinstance(seed, int):
            raise ValueError(f"seed: expected an integer, got {seed!r} (folds, order and crops are functions of it)")
        set_determinism(seed=seed)
        self._until_finish.enter_context(redacted_logs())
        if main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            self._log_to_file()
            config = {key: value for key, value in (running_config() or {}).items() if key != "_meta_"}
            self._write("config.json", json.dumps(config, indent=4, default=str))
            self._write_manifest(result="started")
            logger.info("run folder: %s", self.path)

    def finish(self, failed: Sequence[tuple[str, str]] = (), main_process: bool = True) -> None:
        """List the series that failed in ``failed.csv``, then complete the manifest.

        Args:
            failed: (path, reason) of each series that was left out.

        Raises:
            SystemExit: with status 1 if any failed, so that a script or scheduler notices.
        """
        if failed and main_process:  # before the manifest: a run that says it is completed has all its files
            named = failed
            if self.anonymise:
                named = [(anonymous_path(path), anonymous_text(reason, path)) for path, reason in failed]
            table = pd.DataFrame(named, columns=["image", "reason"])
            write_atomically(self.path / "failed.csv", table.to_csv(index=False))
            logger.error("%d series failed, listed in %s", len(failed), self.path / "failed.csv")
        if main_process:
            self._write_manifest(result=f"completed, {len(failed)} series failed" if failed else "completed")
            logger.info("finished after %.0f s, results in %s", time.time() - self._started, self.path)
        self._until_finish.close()  # the next run of this process has a log of its own
        if failed:
            raise SystemExit(1)

    def _log_to_file(self) -> None:
        log = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(log)
        self._until_finish.callback(log.close)
        self._until_finish.callback(root.removeHandler, log)
        root.setLevel(min(root.level or logging.INFO, logging.INFO))

    def _write_manifest(self, result: Any) -> None:
        manifest = {
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(self._started)),
            "duration_s": round(time.time() - self._started, 1),
            "result": result,
            "machine": {"platform": platform.platform(), "cpu_count": os.cpu_count(), "cuda": torch.version.cuda},
            "versions": _versions(),
        }
        self._write("run.json", json.dumps(manifest, indent=4))

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.path / name, (redact(text) if self.anonymise else text) + "\n")
