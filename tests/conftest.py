# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests. Modules of a bundle's `scripts` are imported as `bundles.<name>.scripts.<module>`."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ignite.utils import manual_seed

ROOT = Path(__file__).resolve().parents[1]
# MONAI Label has an environment of its own, where these run: make test-label
collect_ignore = [] if importlib.util.find_spec("monailabel") else ["apps"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, then those that run bundles: several processes share the files, and a long
    one that begins last would keep the others waiting."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], item.path.parent.name != "bundles"))


# the same examples each time, or a suite that passed may fail elsewhere; --hypothesis-profile=default draws new ones
if importlib.util.find_spec("hypothesis"):  # MONAI Label's environment has none
    from hypothesis import settings

    settings.register_profile("same", derandomize=True, deadline=None)
    settings.load_profile("same")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same whichever ran before it in its process."""
    manual_seed(0)


@pytest.fixture(autouse=True)
def plain_logs() -> Iterator[None]:
    """A run that a test does not finish would keep UIDs out of the logs of those after it."""
    yield
    logging.setLogRecordFactory(logging.LogRecord)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The samples in the project."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Reference values of the method and the score."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Further real CT beside the project, where there is some: nothing that matters rests on it alone."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared here")
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic RSNA tree: 24 patients, made by the demo's generator."""
    from demo.dataset import Options, write_dataset

    folder = tmp_path_factory.mktemp("phantoms") / "rsna"
    write_dataset(folder, patients=24, seed=7, options=Options(size=96, slices=24), workers=2, progress=False)
    return folder


@pytest.fixture(scope="session")
def run_bundle() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m monai.bundle run` as a user calls it, in a process of its own without PYTHONPATH."""

    def run(bundle: str, *arguments: object, configs: tuple[str, ...] = ("train.json",), cwd: Path | None = None,
            check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:  # fmt: skip
        folder = ROOT / "bundles" / bundle
        cwd = folder if cwd is None else cwd
        prefix = Path("configs") if cwd == folder else folder / "configs"
        files = [str(prefix / name) for name in configs]
        command = [
            sys.executable,
            "-m",
            "monai.bundle",
            "run",
            "--config_file",
            files[0] if len(files) == 1 else str(files),
        ]
        if cwd != folder:
            command += ["--bundle_root", str(folder)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment.update(COVERAGE_PROCESS_START=str(ROOT / "pyproject.toml"), COVERAGE_FILE=str(ROOT / ".coverage"))
        done = subprocess.run(
            [*command, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            pytest.fail(f"exit {done.returncode}: {' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done

    return run
