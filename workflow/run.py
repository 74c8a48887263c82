# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: ``output_root/run_name/``. A run never overwrites another and writes nowhere else.

```
output_root/run_name/
  config.json        the executed config, overrides included
  log.txt            what went to the console
  run.json           the manifest: versions, arguments, data, duration, result (`workflow.manifest`)
  checkpoints/       full checkpoints for resuming          model.pt   the weights to use
  tensorboard/       scalars and images
```
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd
import torch
from monai.utils import set_determinism

from .guard import running_config
from .manifest import Manifest, notice_failure, parameters
from .privacy import anonymous_path, anonymous_text, redact, redacted_logs
from .tracking import TrackedRun, is_tracked

__all__ = ["DISK_FULL", "RunFolder", "select_device", "use_amp", "whole_file", "write_atomically"]

logger = logging.getLogger(__name__)

# disk, quota or largest size of a file
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
            raise ValueError(f"device: {device!r} was asked for, but torch {torch.__version__} finds no CUDA device")
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
    """A file to write to that has its name when all of it is on the disk; nothing is left of one that is not, but for a
    ``<name>.*.tmp`` where the process was killed.

    Raises:
        OSError: naming the file and what to do, where there is no room for it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {"dir": path.parent, "prefix": f"{path.name}.", "suffix": ".tmp"}
    try:
        with tempfile.NamedTemporaryFile("wb", delete=False, **named) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)  # a cache may serve several users
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)
    except OSError as error:  # closing the file, too, fails where there is no room
        if error.errno not in DISK_FULL:
            raise
        what = f"{path} could not be written: {error.strerror}"
        advice = "what was written before is whole: make room there, then start again (a training by --resume latest)"
        room = f"{shutil.disk_usage(path.parent).free / 1e6:.0f} MB free"
        raise OSError(error.errno, f"{what} ({room}); {advice}") from error


class RunFolder:
    """Names the files of a run; `start` creates the folder, seeds the random generators and logs what runs where.

    Args:
        output_root: folder of all runs.
        run_name: name of this one; None for the date and time.
        resume: None for a new run, ``latest`` or a checkpoint file to go on with one.
        anonymise: name series in ``failed.csv`` by pseudonyms instead of paths, and keep UIDs out of ``config.json``
            and the settings, as out of ``run.json`` and the logs.
        tracking_uri: MLflow's store, where the config is run with ``--tracking mlflow``.
        experiment_name: MLflow's experiment.
        deterministic: whether cuDNN is held to algorithms that repeat bit for bit; otherwise it times those that do not
            as well and takes the fastest. Says nothing on a CPU.

    `config` (the executed config), `metrics` (the last figures) and `data` (what they are of) go into the manifest.

    Raises:
        ValueError: if `run_name` is not a plain name, or ``resume="latest"`` comes without one.
    """

    def __init__(
        self,
        output_root: str | os.PathLike[str],
        run_name: str | None = None,
        resume: str | None = None,
        anonymise: bool = False,
        tracking_uri: str = "",
        experiment_name: str = "",
        deterministic: bool = True,
    ) -> None:
        if resume == "latest" and run_name is None:
            raise ValueError("resume: 'latest' needs the run_name of the run to go on with")
        name = time.strftime("%Y%m%d-%H%M%S") if run_name is None else str(run_name)
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"run_name: expected a plain folder name, got {name!r}")
        self.path = Path(output_root).expanduser().absolute() / name
        self.resume = resume
        self.anonymise = anonymise
        self.config: dict[str, Any] = {}
        self.metrics: dict[str, float | None] = {}
        self.data: dict[str, dict[str, Any]] = {}
        self._store = (tracking_uri, experiment_name)
        self._tracked: TrackedRun | None = None
        self._manifest: Manifest | None = None
        self.deterministic = deterministic
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

    def settings(self) -> dict[str, bool | int | float | str]:
        """What TensorBoard and MLflow get of the executed config; without UIDs where `anonymise`."""
        found = parameters(self.config)
        return {k: redact(v) if self.anonymise and isinstance(v, str) else v for k, v in found.items()}

    def start(self, *, seed: int = 0, main_process: bool = True) -> None:
        """Create the folder, write the executed config, log to ``log.txt`` too and seed every random generator.

        Raises:
            FileExistsError: if the folder holds a run already and this one does not resume it.
            FileNotFoundError: if there is nothing to resume.
        """
        occupied = self.path.is_dir() and any(self.path.iterdir())
        # asked by the main process alone: the others may come when it has made the folder
        if main_process and occupied and self.resume is None:
            advice = "choose another run_name, or go on with it by --resume latest"
            raise FileExistsError(f"{self.path} holds a run already: {advice}")
        if main_process and self.resume == "latest" and not occupied:
            raise FileNotFoundError(f"resume: {self.path} holds no run to go on with")
        if not isinstance(seed, int):
            raise ValueError(f"seed: expected an integer, got {seed!r} (folds, order and crops are functions of it)")
        set_determinism(seed=seed)
        if not self.deterministic:  # the seed holds, the last digits of a GPU's sums do not
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
        self._until_finish.enter_context(redacted_logs())
        if not main_process:  # what all say alike is said once; warnings may be its own
            for handler in logging.getLogger().handlers:
                self._until_finish.callback(handler.setLevel, handler.level)
                handler.setLevel(max(handler.level, logging.WARNING))
        if main_process:
            self._begin()

    def _begin(self) -> None:
        """The folder and its first files, and somebody who notices when the run does not reach its end."""
        self.config = {key: value for key, value in (running_config() or {}).items() if key != "_meta_"}
        self.path.mkdir(parents=True, exist_ok=True)
        if is_tracked(self.config):
            self._tracked = TrackedRun(*self._store, self.path.name, self.config.get("run_name"), self.settings())
        self._log_to_file()
        self._manifest = Manifest(self.path, self._started, self.resume)
        config = json.dumps(self.config, indent=4, default=str)
        write_atomically(self.path / "config.json", (redact(config) if self.anonymise else config) + "\n")
        self._write_manifest(result="started")
        self._until_finish.callback(notice_failure(self.path, self._fail))
        logger.info("run folder: %s", self.path)

    def finish(self, failed: Sequence[tuple[str, str]] = (), main_process: bool = True) -> None:
        """List the series that failed in ``failed.csv``, then complete the manifest.

        Args:
            failed: (path, reason) of each series that was left out.

        Raises:
            SystemExit: with status 1 if any failed, in the main process, so that a script or scheduler notices.
        """
        if failed and main_process:  # before the manifest: a run that says it is completed has all its files
            named = failed
            if self.anonymise:
                named = [(anonymous_path(path), anonymous_text(reason, path)) for path, reason in failed]
            table = pd.DataFrame(named, columns=["image", "reason"])
            write_atomically(self.path / "failed.csv", table.to_csv(index=False))
            logger.error("%d series failed, listed in %s", len(failed), self.path / "failed.csv")
        if main_process:
            self._end(f"completed, {len(failed)} series failed" if failed else "completed")
            logger.info("finished after %.0f s, results in %s", time.time() - self._started, self.path)
        self._until_finish.close()  # the next run of this process has a log of its own
        if failed and main_process:  # when another ends so, torchrun ends this one, in the middle of its files
            raise SystemExit(1)

    def _log_to_file(self) -> None:
        log = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(log)
        self._until_finish.callback(log.close)
        self._until_finish.callback(root.removeHandler, log)
        root.setLevel(min(root.level or logging.INFO, logging.INFO))

    def _fail(self, result: str, error: dict[str, str]) -> None:
        self._end(result, error)
        self._until_finish.close()

    def _end(self, result: str, error: dict[str, str] | None = None) -> None:
        self._write_manifest(result, error)
        if self._tracked is not None:
            self._tracked.close(result, self.path)

    def _write_manifest(self, result: str, error: dict[str, str] | None = None) -> None:
        if self._manifest is None:
            self._manifest = Manifest(self.path, self._started, self.resume)
        write_atomically(self.path / "run.json", self._manifest.text(result, error, self.data, self.metrics))
