# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The versions of a model: the weights that are shipped, and those of each training beside them.

```
versions/
  current.json      which one is used, since when and why; before it those that were; absent: the shipped one
  0001/             a training with its evaluations, as it was run
    version.json    when, on how many patients, its score and that of the version before, why it was chosen or not
    training/model.pt
```

All is read from the files at each call: the server and the processes that train share nothing else. A version comes
into being by renaming a finished run, and none is ever changed or removed here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock
from workflow.run import write_atomically

from .errors import Conflict, NotFound

__all__ = ["SHIPPED", "WEIGHTS", "ModelVersions", "Version", "now"]

SHIPPED = "shipped"
WEIGHTS = "training/model.pt"  # in a version's folder, beside the config and the patients of its training
RECORD, CURRENT = "version.json", "current.json"
NAME = re.compile(r"[0-9]{4,}", re.ASCII)


@dataclass(frozen=True)
class Version:
    """A version's name and its weights file, which exists."""

    name: str
    weights: Path


class ModelVersions:
    """The versions of one model.

    Args:
        folder: of the versions; made when the first is added.
        shipped: the weights to begin with, which nothing here writes to; they may be absent, or None.
    """

    def __init__(self, folder: Path, shipped: Path | None) -> None:
        self.folder, self.shipped = Path(folder), shipped

    def current(self) -> Version:
        """The version in use.

        Raises:
            Conflict: if there are no weights yet, or those that were chosen are gone.
        """
        choices = self._choices()
        name = choices[-1]["name"] if choices else SHIPPED
        if self._weights(name).is_file():
            return Version(name, self._weights(name))
        if choices or self._names():
            which = f"of version {name}, which was chosen," if choices else "that were shipped"
            raise Conflict(f"the weights {which} are gone: put them back, or choose another of {self._known()}")
        raise Conflict(
            "there are no weights yet: none were given, and no training was done. Give a weights file by"
            " --conf weights, or label images and train"
        )

    def in_use(self) -> Version | None:
        """As `current`, and None if there are no weights of any version.

        Raises:
            Conflict: if those that were chosen are gone and there are others, or the choice cannot be read.
        """
        self._choices()
        return self.current() if self._names() else None

    def list(self) -> list[dict[str, Any]]:
        """What is known of each version, the shipped one first, then by age: ``name``, ``created``, ``score`` and
        ``compared_with`` (name and score of the version that was in use) on the patients held out then, ``chosen``
        (whether it is in use), ``reason``, ``labels`` (patients with labels)."""
        choices = self._choices()
        current = choices[-1]["name"] if choices else SHIPPED
        listed = []
        for name in self._names():
            record = {} if name == SHIPPED else self.record(name)
            reason = "shipped with the bundle" if name == SHIPPED else record.get("reason")
            last = [choice["reason"] for choice in choices if choice["name"] == name]
            keys = ("created", "score", "compared_with", "labels", "started_from")
            known = {key: record.get(key) for key in keys}
            listed.append({"name": name, **known, "chosen": name == current, "reason": last[-1] if last else reason})
        return listed

    def choose(self, name: str, reason: str = "chosen by hand") -> Version:
        """Use this version from now on, an earlier one or the shipped one too.

        Raises:
            NotFound: if there is no such version.
        """
        with self._lock():
            if name not in self._names():
                raise NotFound(f"no version {name!r}: expected one of {self._known()}")
            self._choose(name, reason)
        return Version(name, self._weights(name))

    def add(self, run: Path, record: Mapping[str, Any]) -> Version:
        """A finished run becomes a version, and the one in use where the record says ``chosen`` and the one that it was
        ``compared_with`` (None: there was none) is still in use: what somebody chose meanwhile stays.

        Args:
            run: folder that holds `WEIGHTS`, on the same file system; it is renamed.
            record: what `list` tells; see `record` for what became of it.

        Raises:
            Conflict: if the run left no weights.
        """
        if not (run / WEIGHTS).is_file():
            raise Conflict("the training left no weights: no version is made of it")
        with self._lock():
            # a number that was used once means those weights to whoever wrote it down, even if they are gone
            names = [path.name for path in self.folder.iterdir()] + [choice["name"] for choice in self._choices()]
            name = f"{max((int(name) for name in names if NAME.fullmatch(name)), default=0) + 1:04d}"
            made = {"created": now(), **record}
            if made.get("chosen") and self._changed(made):
                reason = f"not chosen: the version in use changed meanwhile; {made.get('reason')}"
                made |= {"chosen": False, "reason": reason}
            _write(run / RECORD, made)
            os.rename(run, self.folder / name)
            if made.get("chosen"):
                self._choose(name, str(made.get("reason")))
        return Version(name, self._weights(name))

    def record(self, name: str) -> dict[str, Any]:
        """What was recorded of a version when it was added."""
        try:
            return _read(self.folder / name / RECORD)
        except Conflict as error:  # the weights are there: it can be used
            return {"reason": str(error)}

    def _changed(self, record: Mapping[str, Any]) -> bool:
        """Whether another version is in use than that which a new one was compared with."""
        compared = (record.get("compared_with") or {}).get("name")
        choices = self._choices()
        name = choices[-1]["name"] if choices else SHIPPED
        return compared != (name if self._names() else None)

    def _choose(self, name: str, reason: str) -> None:
        """With the lock held."""
        choices = self._choices()
        if not choices or choices[-1]["name"] != name:
            _write(self.folder / CURRENT, [*choices, {"name": name, "at": now(), "reason": reason}])

    def _lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock", timeout=60)

    def _weights(self, name: str) -> Path:
        return self.shipped if name == SHIPPED and self.shipped else self.folder / name / WEIGHTS

    def _names(self) -> list[str]:
        """Of all versions that have weights."""
        found = sorted((path.name for path in self.folder.glob("*") if NAME.fullmatch(path.name)), key=int)
        return [name for name in (SHIPPED, *found) if self._weights(name).is_file()]

    def _known(self) -> str:
        return ", ".join(self._names()) or "none"

    def _choices(self) -> list[dict[str, str]]:
        """All choices so far, the last one holds."""
        path = self.folder / CURRENT
        return _read(path) if path.is_file() else []


def now() -> str:
    """UTC, so that later is greater as text."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Conflict(f"{path.parent.name}/{path.name} of the versions cannot be read: {error}") from error


def _write(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")
