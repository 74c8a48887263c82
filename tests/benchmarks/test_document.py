# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md and the README's headlines are what the committed results give, and nothing else."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import document

RESULTS = {
    "command": "python -m benchmarks.some --out x",
    "revision": "abc",
    "smoke": False,
    "machine": {"cpu": "a CPU"},
    "x": 3,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A project with one measured and one unmeasured benchmark."""
    for name in ("some", "other"):
        report = ModuleType(f"benchmarks.{name}.report")
        report.TITLE, report.COMMAND = name.title(), f"python -m benchmarks.{name}"
        report.section = lambda results: f"x is {results['x']}\n"
        report.headline = lambda results: f"x: {results['x']}"
        report.plots = lambda results, folder: (folder / "x.png").write_bytes(b"plot")
        monkeypatch.setitem(sys.modules, report.__name__, report)
    for folder in ("docs/benchmarks", "results", "benchmarks/some"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"before\n{document.BEGIN}\nold\n{document.END}\nafter\n")
    (tmp_path / "docs" / "benchmarks.md").write_text("old")
    (tmp_path / "results" / "some.json").write_text(json.dumps(RESULTS))
    places = {"ROOT": "", "DOCUMENT": "docs/benchmarks.md", "PLOTS": "docs/benchmarks", "README": "README.md",
              "DIGESTS": "docs/benchmarks/plots.json", "RESULTS": "results"}  # fmt: skip
    for name, path in places.items():
        monkeypatch.setattr(document, name, tmp_path / path)
    monkeypatch.setattr(document, "REPORTS", {name: f"benchmarks.{name}.report" for name in ("some", "other")})
    return tmp_path


def test_results_become_sections_headlines_and_plots(place: Path) -> None:
    assert document.main(["--check"]) == 1
    assert not (place / "docs" / "benchmarks" / "x.png").exists(), "a check writes nothing"
    assert document.main([]) == 0
    text = (place / "docs" / "benchmarks.md").read_text()
    some, other = text.split("## Other")
    assert "x is 3" in some
    assert "- cpu: a CPU\n- revision: abc" in some
    assert "Run as `python -m benchmarks.some --out x`." in some
    assert document.UNMEASURED in other
    assert "x is" not in other
    missing = "Not measured yet: Other; several GPUs with NCCL; anything on RSNA 2023 itself."
    between = f"{document.BEGIN}\n- x: 3\n\n{missing}\n{document.END}"
    assert (place / "README.md").read_text() == f"before\n{between}\nafter\n"
    assert (place / "docs" / "benchmarks" / "x.png").is_file()
    assert document.main(["--check"]) == 0
    (place / "results" / "some.json").write_text(json.dumps(RESULTS | {"x": 4}))
    assert document.main(["--check"]) == 1


def test_plots_of_other_results_are_noticed(place: Path, capsys) -> None:
    """Here the text is the same, so that only the plots could differ."""
    document.main([])
    (place / "results" / "some.json").write_text(json.dumps(RESULTS | {"y": 1}))
    assert document.main(["--check"]) == 1
    assert "plots.json: not what" in capsys.readouterr().err
    assert document.main([]) == document.main(["--check"]) == 0
    (place / "docs" / "benchmarks" / "plots.json").unlink()
    assert document.main(["--check"]) == 1


def test_results_that_nobody_could_measure_again_are_refused(place: Path) -> None:
    (place / "results" / "some.json").write_text(json.dumps(RESULTS | {"revision": "abc-dirty"}))
    with pytest.raises(ValueError, match=r"some.json: measured at abc-dirty, with changes that no commit holds"):
        document.main(["--check"])


def test_findings_of_other_results_are_noticed(place: Path) -> None:
    file = place / "benchmarks" / "some" / "findings.md"
    file.write_text("<!-- some at abc -->\n\nx is small.\n")
    document.main([])
    assert "### What it says\n\nx is small.\n" in (place / "docs" / "benchmarks.md").read_text()
    (place / "results" / "some.json").write_text(json.dumps(RESULTS | {"revision": "def"}))
    with pytest.raises(ValueError, match=r"findings.md: expected the first line '<!-- some at def -->'"):
        document.main(["--check"])


def test_a_smoke_run_is_no_result(place: Path) -> None:
    (place / "results" / "some.json").write_text(json.dumps(RESULTS | {"smoke": True}))
    with pytest.raises(ValueError, match="smoke"):
        document.main([])


def test_a_readme_without_its_marks_is_refused(place: Path) -> None:
    (place / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="one pair"):
        document.main([])


def test_the_documents_of_the_project_are_those_of_its_results(root: Path) -> None:
    assert document.main(["--check"]) == 0
    text = document.DOCUMENT.read_text(encoding="utf-8")
    pictures = set(re.findall(r"\]\(benchmarks/([^)]+\.png)\)", text))
    there = {path.name: path.stat().st_size for path in document.PLOTS.glob("*.png")}
    assert pictures == set(there)
    assert all(size < 60_000 for size in there.values())
    measured = {path.stem for path in document.RESULTS.glob("*.json")}
    assert measured <= set(document.REPORTS)


def test_benchmarks_of_the_document_are_those_that_exist(root: Path) -> None:
    packages = {path.parent.name for path in (root / "benchmarks").glob("*/report.py")}
    assert {module.split(".")[1] for module in document.REPORTS.values()} == packages


def test_prose_is_wrapped_and_tables_code_and_html_are_not() -> None:
    words = " ".join(["word"] * 40)
    text = f"{words}\n\n- {words}\n  - {words}\n| {words} |\n```bash\n{words}\n```\n<p>{words}\n![plot]({words})"
    found = document.wrapped(text)
    assert found.split() == text.split()
    lines = found.split("\n")
    assert [len(line) > 120 for line in lines].count(True) == 4
    assert lines[0].startswith("word word")
    assert [line[: line.index("word")] for line in lines[:7] if line] == ["", "", "- ", "  ", "  - ", "    "]
    assert document.wrapped(found) == found
    assert document.wrapped("one\ntwo\n- three\n  four\n- five\n\nsix") == "one two\n- three four\n- five\n\nsix"
    assert document.wrapped("- a\n\n| b |\n| c |\n\nd") == "- a\n\n| b |\n| c |\n\nd"
    assert not re.search(r"^%", document.wrapped("at 25 % " * 30), flags=re.MULTILINE)
