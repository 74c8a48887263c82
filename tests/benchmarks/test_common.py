# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: alternating runs, ratios, tables, processes of their own."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import (
    command_line,
    environment,
    figure,
    header,
    in_bundle,
    interleaved,
    peak_mb,
    ratio,
    revision,
    table,
    write,
)
from benchmarks.growth import report as growth
from benchmarks.speed import report as speed


def test_actions_take_turns_and_warm_up_uncounted() -> None:
    order: list[str] = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2, warmup=1)
    assert order == list("ababab")
    assert [len(seconds[name]) for name in "ab"] == [2, 2]


def test_a_ratio_is_of_neighbouring_runs() -> None:
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert figure({"median": 1234.5, "low": 0.125, "high": 2000}, 1) == "1,234.5 (0.1 to 2,000.0)"
    with pytest.raises(ValueError, match="longer"):
        ratio([1.0], [1.0, 2.0])


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_results_say_where_they_are_from(tmp_path) -> None:
    found = header("benchmarks.some", ["--out", "a file"], smoke=True)
    assert found["command"] == "python -m benchmarks.some --out 'a file'"
    elsewhere = header("benchmarks.some", ["--work", "/home/me/work", "--out", "a/b.json"], smoke=True)
    assert elsewhere["command"] == "python -m benchmarks.some --work work --out a/b.json"
    assert found["smoke"] is True
    assert found["revision"] == revision()
    assert {"cpu", "torch", "gpu", "threads", "environment"} <= set(found["machine"])
    write(tmp_path / "new" / "results.json", found)
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == found
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]
    write(None, found)


def test_variables_that_move_times_are_named_as_found(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith(("OMP_", "MALLOC_"))]:
        monkeypatch.delenv(name)
    assert environment() == "nothing set"
    for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("MALLOC_ARENA_MAX", "2"), ("OTHER", "1")):
        monkeypatch.setenv(name, value)
    assert environment() == "MALLOC_ARENA_MAX=2, OMP_WAIT_POLICY=PASSIVE"


def test_the_revision_is_of_what_is_measured(tmp_path: Path) -> None:
    """Committed results, findings, weights and documents leave it as it is; a changed or new part makes it dirty."""

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def put(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            with (tmp_path / name).open("a") as file:
                file.write("more\n")

    assert revision(tmp_path) == "unknown"
    git("init", "--quiet")
    put("benchmarks/common.py", "README.md")
    git("add", "."), git("commit", "--quiet", "-m", "first")
    first = revision(tmp_path)
    assert first == git("rev-parse", "--short=12", "HEAD")
    made = ["benchmarks/results/x.json", "benchmarks/x/findings.md", "bundles/x/models/a.pt", "docs/a.md", "README.md"]
    put(*made)
    assert revision(tmp_path) == first
    git("add", "."), git("commit", "--quiet", "-m", "results")
    assert revision(tmp_path) == first != git("rev-parse", "--short=12", "HEAD")
    put("workflow/new.py")
    assert revision(tmp_path) == f"{first}-dirty"
    git("add", "."), git("commit", "--quiet", "-m", "another")
    assert revision(tmp_path) == git("rev-parse", "--short=12", "HEAD")
    put("benchmarks/common.py")
    assert revision(tmp_path).endswith("-dirty")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_bench_is_the_commands_of_the_document(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "python $* ${OMP_WAIT_POLICY-unset}"\n')
    python.chmod(0o755)
    (tmp_path / "run.stamp").touch()
    done = subprocess.run(["make", "bench", f"VENV={tmp_path}"], cwd=root, capture_output=True, text=True, check=True)
    ran = [line.removesuffix(" unset") for line in done.stdout.splitlines() if line.endswith(" unset")]
    commands = [words for module in (speed, growth) for words in module.COMMAND.split(" && ")]
    assert sorted(ran) == sorted({*commands, "python -m benchmarks.document"})


def test_every_benchmark_has_the_same_options(tmp_path) -> None:
    arguments = command_line("benchmarks.some", "what it does").parse_args(["--smoke", "--out", str(tmp_path)])
    assert arguments == argparse.Namespace(smoke=True, out=tmp_path)


def parts_of(task: dict) -> dict:
    """Runs in the bundle's folder."""
    from benchmarks.bundle_parts import parse

    parser = parse(["train"], {"hidden_size": task["hidden_size"]})
    return {"hidden": parser["hidden_size"], "pool": parser["pool"]}


def test_a_process_of_its_own_sees_the_bundle_and_tells_its_memory() -> None:
    function = "tests.benchmarks.test_common:parts_of"
    found = in_bundle("voco2d_pretrain", function, {"hidden_size": 3})
    assert found["peak_mb"] > 20
    assert (found["hidden"], found["pool"]) == (3, "avg")


def nothing(task: dict) -> dict:
    """A process that needs no memory of its own."""
    return {}


def test_a_childs_memory_is_not_its_parents() -> None:
    np.ones(600_000_000 // 8).sum()  # freed at once; the high-water mark stays
    assert peak_mb() > 600
    assert in_bundle("voco2d_pretrain", "tests.benchmarks.test_common:nothing", {})["peak_mb"] < 300


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"parts_of of rsna_cnn_lstm ended with 1(?s:.*)KeyError"):
        in_bundle("rsna_cnn_lstm", "tests.benchmarks.test_common:parts_of", {})
