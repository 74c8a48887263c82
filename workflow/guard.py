# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""An override that no config knows is an error. MONAI accepts any, so ``--learning_rat 1e-3`` would train with the
default.

`check_overrides` is the first item of every config's ``run``: it ends the run with exit status 2, before anything is
built, and its message (with near misses) is the last line printed. Two sources are held against the config:

- the top-level ids of the config that runs (command line, ``args_file`` and Python callers alike): each must have a
  line in the config's ``_desc_``;
- on the command line also nested ids (``train#trainer#max_epochs``), which must exist in the config files.

Values are looked at too: on the command line, an expression, target or macro outside `workflow.vocabulary` is refused
before it is evaluated. That holds as long as the guard is what runs first: overrides of ``initialize``, ``run``,
``guard``, ``run_id``, ``init_id`` and import statements are acted on before or instead of it, and a config that
others wrote need not have it at all (`workflow.review` looks at one before it is run).

One case comes too early for a config: an id below a name that does not exist (``trainr#max_epochs``). MONAI itself
stops there, before anything is built: its traceback says ``did you mean 'train'?``, its last line is the KeyError.
`CheckedWorkflow` gives our message there too, checks the nested ids of Python callers, and looks at all values before
MONAI has read them.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from traceback import format_exception
from types import TracebackType
from typing import Any, NoReturn

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from .errors import root_cause
from .privacy import redact
from .tracking import untrackable
from .vocabulary import findings

__all__ = ["CheckedWorkflow", "RefusedValue", "UnknownOverride", "check_overrides", "given_overrides",
           "running_config"]  # fmt: skip

# arguments of `python -m monai.bundle run` itself; the rest overrides the config
RUN_ARGUMENTS = (
    "run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file",
)  # fmt: skip
RESERVED = {"_desc_", "_meta_"}


class RefusedValue(SystemExit):
    """Ends the process with status 2; `str()` gives the message. (SystemExit: MONAI wraps any other exception.)"""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(2)

    def __str__(self) -> str:
        return self.message


class UnknownOverride(RefusedValue):
    """Overrides that the config does not know, each with near misses."""

    def __init__(self, unknown: Sequence[str], known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__("; ".join(self._explain(name, names) for name in unknown))

    @staticmethod
    def _explain(name: str, known: list[str]) -> str:
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        leaf = name.rsplit("#", 1)[-1]
        near += [k for k in known if k not in near and k.rsplit("#", 1)[-1] == leaf][: 4 - len(near)]
        hint = f"did you mean {', '.join(near)}?" if near else "see _desc_ in the config for the names it knows"
        return f"unknown override '{name}': {hint}"


def running_config() -> dict[str, Any] | None:
    """Content, overrides included, of the config whose expression called us; None outside a `ConfigWorkflow`.

    MONAI hands an expression only what it refers to, so the workflow is found on the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        workflow = frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow):
            return dict(workflow.parser.get())
        frame = frame.f_back
    return None


def command_line(argv: Sequence[str]) -> dict[str, Any]:
    """The ``--name value`` pairs of ``python -m monai.bundle run`` as Fire reads them; those of ``args_file`` come
    first."""
    pairs: dict[str, Any] = {}
    tokens = list(argv[1:])
    while tokens:
        token = tokens.pop(0)
        if not _is_flag(token):
            continue
        name, has_value, value = token.lstrip("-").partition("=")
        if not has_value:
            value = tokens.pop(0) if tokens and not _is_flag(tokens[0]) else "True"
        pairs[name.replace("-", "_")] = DefaultParseValue(value)
    if pairs.get("args_file"):
        pairs = {**ConfigParser.load_config_file(pairs["args_file"]), **pairs}
    return pairs


def given_overrides(argv: Sequence[str]) -> dict[str, Any]:
    """The overrides on MONAI's own command line; none on another."""
    return _overrides(command_line(argv)) if _is_monais(argv) else {}


def _is_monais(argv: Sequence[str]) -> bool:
    """Whether it is ``python -m monai.bundle``."""
    return Path(argv[0]).parts[-3:-1] == ("monai", "bundle")


def _overrides(pairs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in pairs.items() if name not in RUN_ARGUMENTS}


def _is_flag(token: str) -> bool:
    """Whether Fire takes it for a flag: a negative number is a value."""
    return re.match(r"--?[A-Za-z_]", token) is not None


def _ids(config: Any, prefix: str = "") -> Iterator[str]:
    """Every id of a config: ``a``, ``a#b``, ``a#b#0``..."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(config, Mapping):
        items = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    for key, value in items:
        name = f"{prefix}{key}"
        yield name
        yield from _ids(value, f"{name}#")


def _normalise(name: str) -> str:
    return name.replace("::", "#")


def explain_last(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Exception hook of the command line: after MONAI's nested traceback the last line says what was wrong.

    Without DICOM UIDs, as the logs: both are what people paste into an issue.
    """
    whole = "".join(format_exception(kind, error, traceback))
    sys.stderr.write(redact(f"{whole}\nerror: {root_cause(error)}\n"))


def check_overrides(argv: Sequence[str] | None = None) -> None:
    """End the run if an override names an id that the config does not have, or its value is code.

    Args:
        argv: the command line, default ``sys.argv``; looked at only when it is MONAI's own.

    Raises:
        UnknownOverride: naming each unknown id and its near misses; also written to standard error as the last line.
        RefusedValue: for a value of the command line outside `workflow.vocabulary`, or that would not arrive, and for
            tracking that is not possible.
    """
    config = running_config() or {}
    tracked = False
    described = set(config.get("_desc_", {}))
    unknown = []
    if described:
        tracking = {key for settings in DEFAULT_EXP_MGMT_SETTINGS.values() for key in settings.get("configs", {})}
        unknown = [key for key in config if key not in described | RESERVED | tracking]
    known = set(described)
    argv = sys.argv if argv is None else argv
    if _is_monais(argv):
        sys.excepthook = explain_last
        pairs = command_line(argv)
        _refuse_code(pairs)
        files = pairs.get("config_file", [])
        content = ConfigParser.load_config_files(files)
        known |= set(_ids({key: value for key, value in content.items() if key not in RESERVED}))
        given = _overrides(pairs)
        overrides = [_normalise(name) for name in given]
        unknown += [name for name in overrides if name not in known and name not in unknown and "#" in name]
        _refuse_lost_values(given)
        tracked = bool(pairs.get("tracking"))
    if unknown:
        _stop(UnknownOverride(unknown, known))
    reason = untrackable(config, tracked)
    if reason is not None:
        _stop(RefusedValue(reason))


class CheckedWorkflow(ConfigWorkflow):
    """A `ConfigWorkflow` that holds the overrides against the config files before MONAI applies them.

    ``monai.bundle.create_workflow("workflow.guard.CheckedWorkflow", config_file=...)``, or ``python -m monai.bundle
    run_workflow --workflow_name workflow.guard.CheckedWorkflow --config_file ...``. Arguments as `ConfigWorkflow`.

    Raises:
        UnknownOverride: naming each id that the config does not have, and its near misses.
        RefusedValue: for an override outside `workflow.vocabulary`.
    """

    def __init__(self, config_file: str | Sequence[str], *args: Any, **kwargs: Any) -> None:
        arguments = inspect.signature(ConfigWorkflow.__init__).parameters
        _refuse_code(kwargs)
        content = ConfigParser.load_config_files(config_file)
        known = set(_ids({key: value for key, value in content.items() if key not in RESERVED}))
        unknown = [key for key in kwargs if key not in arguments and _normalise(key) not in known]
        if unknown:
            _stop(UnknownOverride(unknown, known))
        super().__init__(config_file, *args, **kwargs)


def _refuse_code(pairs: Mapping[str, Any]) -> None:
    """Values that MONAI would evaluate, outside the vocabulary of the configs."""
    found = [f"--{id} {text}: {reason}" for id, text, reason in findings(pairs)]
    if found:
        _stop(RefusedValue(f"{'; '.join(found)}. What is meant goes into a JSON file named last in --config_file"))


def _refuse_lost_values(pairs: Mapping[str, Any]) -> None:
    """Values that would not arrive: MONAI drops a None, and Fire leaves ``null``, ``true`` and ``false`` as (true)
    strings."""
    for name, value in pairs.items():
        if value is None or value == "null":
            _stop(RefusedValue(f"--{name} {value}: null cannot be given here; put it into a JSON file named last in "
                               "--config_file"))  # fmt: skip
        if value in ("true", "false"):
            _stop(RefusedValue(f"--{name} {value}: a string here; write {str(value).capitalize()}"))


def _stop(error: RefusedValue) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"{error}\n")
    raise error
