# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: the machine, the command, times of alternating runs, ratios with their spread, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "monai", "timm", "pytorch-ignite", "numpy", "scikit-learn", "nibabel", "pydicom", "highdicom")
# What is compared gets these: glibc then keeps the memory of large tensors instead of handing it back at each step,
# where page faults would take a share of the time that differs between variants and from run to run.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
# what a measurement depends on, without what is written after it: results may be committed between two parts of a run
MEASURED = (
    "benchmarks", "transforms", "workflow", "networks", "bundles", "demo", ":!benchmarks/results",
    ":!benchmarks/*/findings.md", ":!bundles/*/models/*", ":!bundles/*/docs/*",
)  # fmt: skip
SETTINGS = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")  # and MALLOC_*: variables that move times


def machine() -> dict[str, str]:
    """What the figures were measured with: processor, memory, GPU if any, system, threads, environment, versions."""
    import torch

    cpu = _field("/proc/cpuinfo", "model name") or platform.processor()
    memory = _field("/proc/meminfo", "MemTotal")
    found = {
        "cpu": f"{cpu}, {os.cpu_count()} logical cores",
        "memory": f"{int(memory.split()[0]) / 1e6:.0f} GB" if memory else "unknown",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "platform": platform.platform(),
        "threads": os.environ.get("OMP_NUM_THREADS", f"default ({torch.get_num_threads()})"),
        "environment": environment(),
        "python": platform.python_version(),
    }
    return found | {name: version(name) for name in PACKAGES}


def _field(path: str, name: str) -> str:
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def environment() -> str:
    """The variables that move times, as this process found them; what a benchmark sets for its children it says."""
    found = {name: value for name, value in os.environ.items() if name in SETTINGS or name.startswith("MALLOC_")}
    return ", ".join(f"{name}={value}" for name, value in sorted(found.items())) or "nothing set"


def revision(root: Path = ROOT) -> str:
    """The last commit of what is measured, with "-dirty" where files differ from it or are new; "unknown" outside git.

    Results, documents and weights are not part of it: committing them leaves it as it was.
    """
    log = _git(root, "log", "-1", "--format=%h", "--abbrev=12")
    return f"{log}{'-dirty' * bool(_git(root, 'status', '--porcelain'))}" if log else "unknown"


def _git(root: Path, *words: str) -> str:
    """What git says of `MEASURED`; nothing where it fails."""
    done = subprocess.run(["git", *words, "--", *MEASURED], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB.

    Linux counts in ru_maxrss what the process held before exec too, which after vfork is its parent's; VmHWM begins
    anew.
    """
    own = _field("/proc/self/status", "VmHWM")
    if own:
        return int(own.split()[0]) / 1e3
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def header(module: str, argv: Sequence[str] | None, smoke: bool) -> dict[str, Any]:
    """What each result file opens with.

    Args:
        module: as after ``python -m``.
        argv: the command line's arguments; None for those of this process.
        smoke: a run that only shows that the benchmark works: no figure of it goes into a document.
    """
    words = sys.argv[1:] if argv is None else argv
    # where things lay on somebody's machine is nothing for a document
    words = ["python", "-m", module, *(Path(word).name if Path(word).is_absolute() else word for word in words)]
    return {"command": shlex.join(words), "revision": revision(), "smoke": smoke, "machine": machine()}


def command_line(module: str, description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has: ``--smoke`` and ``--out``."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--smoke", action="store_true", help="smallest sizes, in under a minute: does it still work?")
    parser.add_argument("--out", type=Path, help="JSON file of the results; python -m benchmarks.document shows it")
    return parser


def write(path: Path | None, results: Mapping[str, Any]) -> None:
    """The results as JSON, under a temporary name first; nothing where `path` is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def interleaved(actions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each action, `repeats` times in turn (a, b, a, b, ...), so that a drifting machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(-warmup, repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the smallest and largest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times faster the second is: `spread` of the quotients, run by run."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def figure(value: Mapping[str, float], digits: int = 2) -> str:
    """A median with its range as text, such as ``1.80 (1.75 to 1.84)``."""
    return f"{value['median']:,.{digits}f} ({value['low']:,.{digits}f} to {value['high']:,.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def in_bundle(bundle: str, function: str, task: Mapping[str, Any], **environment: str) -> dict[str, Any]:
    """Run ``module:function`` with `task` in a process of its own, as a bundle's own run would be.

    Args:
        bundle: name of the bundle whose ``scripts`` are imported; its folder is the working directory.
        function: ``package.module:name`` of a function from a dictionary to one, both JSON.
        environment: further environment variables.

    Returns:
        What the function returned, and ``peak_mb``, the process' largest resident memory.

    Raises:
        RuntimeError: with the end of the process' messages, where it failed.
    """
    folder = ROOT / "bundles" / bundle
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary) / name for name in ("task.json", "result.json")]
        files[0].write_text(json.dumps(task), encoding="utf-8")
        path = os.pathsep.join([str(folder), str(ROOT)])
        done = subprocess.run([sys.executable, "-m", "benchmarks.child", function, *map(str, files)], cwd=folder,
                              env=os.environ | {"PYTHONPATH": path} | environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{function} of {bundle} ended with {done.returncode}: {done.stderr[-3000:]}")
        return json.loads(files[1].read_text(encoding="utf-8"))
