# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of index, check, preparation and evaluation, for growing numbers of series: are they linear?

    python -m benchmarks.scale --series 50,200,800 --out benchmarks/results/scale.json
    python -m benchmarks.scale --series 2,6 --size 512 --slices 300 --steps check,preparation --repeats 1

Synthetic series, one a patient; by default of 64 x 64 pixels and about 16 slices, for comparing numbers of series, not
for forecasting RSNA's. The second command is for that: images above 128 pixels are prepared to the published sizes.
Each step runs in a process of its own, so that its peak memory (ru_maxrss) is its own; the time is that of the step
without imports, in one process without workers, the median of the repeats. Files are in the page cache. The index is
listed afresh ("index") and read again ("index again").
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "rsna_cnn_lstm"
PACKAGES = ("torch", "monai", "pydicom", "highdicom", "numpy", "pandas", "scipy")
STEPS = ("index", "index again", "check", "preparation", "evaluation")
COMMON = {
    "backbone_name": "test_efficientnet", "hidden_size": 16, "num_workers": 0, "device": "cpu", "seed": 0,
    "batch_size": 8, "part": "all",
}  # fmt: skip
SMALL = {"volume_size": [48, 48, 16], "image_size": [32, 32], "num_slices": 8}
SMALL_IMAGE = 128  # pixels up to which series are prepared to SMALL, above to the config's own sizes

logger = logging.getLogger("benchmarks.scale")


def _parser(configs: list[str], overrides: dict[str, Any]) -> Any:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([f"configs/{name}.json" for name in configs])
    for name, value in overrides.items():
        if name in parser.get():
            parser[name] = value
    return parser


def _index(task: dict[str, Any]) -> Callable[[], Any]:
    from workflow.datalist import find_series

    return lambda: find_series(task["tree"], cache_dir=task["cache_dir"])


def _check(task: dict[str, Any]) -> Callable[[], Any]:
    overrides = task["overrides"] | {"dataset_dir": task["tree"], "output_root": task["out"], "cache_dir": None}
    check = _parser(["check_data"], overrides).get_parsed_content("check")
    return lambda: check.run(task["out"])


def _prepare(task: dict[str, Any]) -> Callable[[], Any]:
    overrides = task["overrides"] | {
        "dataset_dir": task["tree"],
        "output_root": task["out"],
        "cache_dir": task["cache_dir"],
    }
    preparation = _parser(["train", "prepare"], overrides).get_parsed_content("preparation")
    return lambda: preparation.run(task["out"])


def _evaluate(task: dict[str, Any]) -> Callable[[], Any]:
    import torch

    weights = str(Path(task["out"]) / "model.pt")
    places = {"dataset_dir": task["tree"], "output_root": task["out"], "cache_dir": task["cache_dir"]}
    overrides = task["overrides"] | places | {"run_name": "evaluation", "weights": weights, "report": False}
    parser = _parser(["train", "evaluate"], overrides)
    torch.save(parser.get_parsed_content("network_def").state_dict(), weights)
    parser.get_parsed_content("run_folder").start()
    dataset, evaluator = (parser.get_parsed_content(f"validate#{name}") for name in ("dataset", "evaluator"))

    def evaluate() -> None:
        dataset.prepare_all()  # finds what the preparation left
        evaluator.run()

    return evaluate


ACTIONS = {"index": _index, "index again": _index, "check": _check, "preparation": _prepare, "evaluation": _evaluate}


def run_step(task: dict[str, Any]) -> dict[str, float]:
    """In a process of its own, in the bundle's folder: one step, timed."""
    action = ACTIONS[task["step"]](task)
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kB elsewhere
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def _measure(step: str, tree: Path, work: Path, overrides: dict[str, Any]) -> dict[str, float]:
    out = Path(tempfile.mkdtemp(dir=work))
    result = out / "result.json"
    task = {"step": step, "tree": str(tree), "cache_dir": str(work / "cache"), "out": str(out), "result": str(result),
            "overrides": overrides}  # fmt: skip
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--task", json.dumps(task)], cwd=BUNDLE,
                          env=os.environ | {"PYTHONPATH": str(BUNDLE)}, capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{step}: {done.stderr[-3000:]}")
    found = json.loads(result.read_text())
    shutil.rmtree(out)
    return found


def measure(series: list[int], repeats: int, size: int, slices: int, steps: list[str]) -> list[dict[str, Any]]:
    """A row for each step and number of series."""
    from demo.dataset import Options, write_dataset

    rows = []
    overrides = COMMON | SMALL if size <= SMALL_IMAGE else COMMON
    options = Options(size=size, slices=slices, series_per_patient=1.0, segmentations=0.0)
    for number in series:
        with tempfile.TemporaryDirectory() as folder:
            work, tree = Path(folder), Path(folder) / "rsna"
            write_dataset(tree, patients=number, options=options, progress=False)
            found: dict[str, list[dict[str, float]]] = {step: [] for step in steps}
            for _ in range(repeats):
                shutil.rmtree(work / "cache", ignore_errors=True)
                for step in steps:
                    found[step].append(_measure(step, tree, work, overrides))
                    logger.info("%d series, %s: %.2f s", number, step, found[step][-1]["seconds"])
        for step in steps:
            median = {key: statistics.median(one[key] for one in found[step]) for key in ("seconds", "peak_mb")}
            rows.append({"step": step, "series": number, **median})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with the ratios to the smallest number of series."""
    lines = ["| step | series | times the series | seconds | times the seconds | ms a series | peak MB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for step in STEPS:
        own = sorted((row for row in rows if row["step"] == step), key=lambda row: row["series"])
        for row in own:
            n, seconds = row["series"], row["seconds"]
            lines.append(
                f"| {step} | {n} | {n / own[0]['series']:.1f} | {seconds:.3f} | {seconds / own[0]['seconds']:.1f}"
                f" | {1000 * seconds / n:.2f} | {row['peak_mb']:.0f} |"
            )
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """What the figures were measured with."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": f"{cpu or platform.processor()}, {os.cpu_count()} logical cores", "platform": platform.platform(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"), "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description="Time and peak memory of index, check, preparation and evaluation for growing numbers of series.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--series", default="50,200,800", help="numbers of series")
    parser.add_argument("--size", type=int, default=64, help="rows and columns of an image")
    parser.add_argument("--slices", type=int, default=16, help="mean number of slices of a series")
    parser.add_argument("--steps", default=",".join(STEPS), help="out of these; evaluation needs what preparation left")
    parser.add_argument("--repeats", type=int, default=3, help="of each step; the median counts")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.task is not None:
        Path(arguments.task["result"]).write_text(json.dumps(run_step(arguments.task)))
        return
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    options = {name: getattr(arguments, name) for name in ("repeats", "size", "slices")}
    rows = measure([int(n) for n in arguments.series.split(",")], steps=arguments.steps.split(","), **options)
    results = {"machine": machine(), **options, "rows": rows}
    text = "\n".join(
        [table(results["rows"]), "", *(f"- {name}: {value}" for name, value in results["machine"].items())]
    )
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=4) + "\n")


if __name__ == "__main__":
    main()
