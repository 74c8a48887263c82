# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: alternating runs, ratios, tables, processes of their own."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks.common import command_line, figure, header, in_bundle, interleaved, ratio, revision, table, write


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
    assert found["smoke"] is True
    assert found["revision"] == revision()
    assert {"cpu", "torch", "gpu", "threads"} <= set(found["machine"])
    write(tmp_path / "new" / "results.json", found)
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == found
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]
    write(None, found)


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


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"parts_of of rsna_cnn_lstm ended with 1(?s:.*)KeyError"):
        in_bundle("rsna_cnn_lstm", "tests.benchmarks.test_common:parts_of", {})
