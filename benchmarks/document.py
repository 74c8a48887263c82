# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes docs/benchmarks.md, its plots and the README's headlines from the committed results.

    python -m benchmarks.document            # after a benchmark left its JSON in benchmarks/results
    python -m benchmarks.document --check    # do documents and plots say what the results say? (a test asks this)

Each benchmark's ``report`` module has ``TITLE``, ``COMMAND``, ``section(results)`` (Markdown), ``headline(results)``
(one sentence, or None) and ``plots(results, folder)`` (PNG files named after the benchmark). A file
``benchmarks/<name>/findings.md`` says what the figures mean; its first line names the revision of the results that it
speaks of, so that findings of older results are noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

from .common import RESULTS, ROOT

# result file -> module of its report; the order is the document's
REPORTS = {
    "speed": "benchmarks.speed.report",
    "growth": "benchmarks.growth.report",
    "gpu": "benchmarks.gpu.report",
    "label_efficiency": "benchmarks.label_efficiency.report",
    "real_ct": "benchmarks.real_ct.report",
    "two_vs_three_d": "benchmarks.two_vs_three_d.report",
    "two_vs_three_d_gpu": "benchmarks.two_vs_three_d.gpu_report",
}
DOCUMENT = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "benchmarks"
DIGESTS = PLOTS / "plots.json"  # benchmark -> sha256 of the results that its plots were drawn from
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
INTRODUCTION = """# Benchmarks

Made by `python -m benchmarks.document` from the results in `benchmarks/results/`; do not edit. Each figure comes from
the command above it, as a ratio within one run, with its range or interval. Commands run from the
repository's root; where one needs more than requirements.txt it says so. Synthetic data (the demo's generator) are
called synthetic: figures on them say how the method behaves there, and nothing about patients.
"""
UNMEASURED = "**Unmeasured**: nobody has run this yet."
NO_BENCHMARK = ("several GPUs with NCCL", "anything on RSNA 2023 itself")  # claims that nothing here measures


def load(name: str) -> dict[str, Any] | None:
    """The committed results of a benchmark; None where there are none.

    Raises:
        ValueError: if they are of a smoke run, or of files that no commit holds.
    """
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return None
    results = json.loads(file.read_text(encoding="utf-8"))
    if results["smoke"]:
        raise ValueError(f"{file}: results of a smoke run say nothing; expected a whole run")
    if results["revision"].endswith("-dirty"):
        raise ValueError(
            f"{file}: measured at {results['revision']}, with changes that no commit holds: nobody could measure that "
            "again; commit them and measure anew"
        )
    return results


def digests() -> dict[str, str]:
    """sha256 of each result file that there is."""
    files = {name: RESULTS / f"{name}.json" for name in REPORTS}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}


def wrapped(text: str) -> str:
    """The text with its prose and lists in lines of up to 120 characters, as the rest of the documentation has them;
    tables, code and HTML stay as they are."""
    lines: list[tuple[str, bool]] = []  # each with whether it is prose
    code = False
    for line in text.split("\n"):
        code ^= line.startswith("```")
        prose = bool(line) and not code and not line.startswith(("|", "<", "    ", "#", "!", "```"))
        if prose and lines and lines[-1][1] and not re.match(r" *- ", line):
            line = f"{lines.pop()[0]} {line.lstrip()}"
        lines.append((line, prose))
    return "\n".join(_filled(line) if prose else line for line, prose in lines)


def _filled(line: str) -> str:
    begin = re.match(r" *(- )?", line)
    indent = " " * (begin.end() if begin else 0)
    line = line.replace(" %", "\0%")  # a number stays with its unit
    line = textwrap.fill(line, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
    return line.replace("\0", " ")


def not_measured(titles: list[str]) -> str:
    """The line of the README that says what has no figures."""
    return f"Not measured yet: {'; '.join([*titles, *NO_BENCHMARK])}."


def findings(name: str, report: str, results: dict[str, Any]) -> str:
    """What the figures mean, written by hand; empty where nobody has.

    Raises:
        ValueError: if it speaks of other results than those that are there.
    """
    file = ROOT.joinpath(*report.split(".")[:-1]) / "findings.md"
    if not file.is_file():
        return ""
    first, _, rest = file.read_text(encoding="utf-8").partition("\n")
    expected = f"<!-- {name} at {results['revision']} -->"
    if first != expected:
        raise ValueError(f"{file}: expected the first line {expected!r}, found {first!r}: do the findings still hold?")
    return f"### What it says\n\n{rest.strip()}\n"


def surroundings(results: dict[str, Any]) -> str:
    """The machine and the versions, one line each."""
    lines = [f"- {key}: {value}" for key, value in results["machine"].items()]
    text = "\n".join([*lines, f"- revision: {results['revision']}"])
    return f"<details><summary>machine and versions</summary>\n\n{text}\n\n</details>\n"


def document(plot_folder: Path | None) -> tuple[str, str]:
    """The text of docs/benchmarks.md, and the README's headlines with what is not measured; plots are drawn where a
    folder is given."""
    parts, headlines, unmeasured = [INTRODUCTION], [], []
    for name, module in REPORTS.items():
        report, results = import_module(module), load(name)
        parts.append(f"## {report.TITLE}\n\n```bash\n{report.COMMAND}\n```\n")
        if results is None:
            parts.append(f"{UNMEASURED}\n")
            unmeasured.append(report.TITLE)
            continue
        parts += [f"Run as `{results['command']}`.\n", report.section(results)]
        if plot_folder is not None:
            report.plots(results, plot_folder)
        parts += [findings(name, module, results), surroundings(results)]
        headline = report.headline(results)
        headlines += [f"- {headline}"] if headline else []
    listed = [*headlines, ""] if headlines else []
    text = "\n".join(part for part in parts if part)
    return wrapped(text), wrapped("\n".join([*listed, not_measured(unmeasured)]))


def in_readme(headlines: str) -> str:
    """The README with these headlines between its two marks."""
    text = README.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", flags=re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{README}: expected one pair of {BEGIN} and {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{headlines}\n{END}", text)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 where ``--check`` finds a document that is not what the results give."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.document", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(argv).check
    text, headlines = document(None if check else PLOTS)
    drawn = json.dumps(digests(), indent=1) + "\n"
    wanted = {DOCUMENT: text, README: in_readme(headlines), DIGESTS: drawn}
    stale = [
        path for path, content in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != content
    ]
    if check:
        for path in stale:
            sys.stderr.write(f"{path}: not what benchmarks/results give; run python -m benchmarks.document\n")
        return int(bool(stale))
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
