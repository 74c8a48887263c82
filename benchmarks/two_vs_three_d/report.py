# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables, plot and headline of ``benchmarks.two_vs_three_d``, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import figure, ratio, spread, table
from benchmarks.windows import baselines_text

TITLE = "What 2D saves over 3D"
COMMAND = (
    "# Swin needs einops, of requirements-dev.txt\n"
    "OMP_NUM_THREADS=2 python -m benchmarks.two_vs_three_d --size small --device cpu --seconds 60 --seeds 3"
    " --out benchmarks/results/two_vs_three_d.json"
)
# of like kind, so that little but the dimensions differs: the headline's pair
PAIR = ("2D ResNet-18", "3D ResNet-18")
FLOOR_MB = 1.0  # an increase below it is none that this measurement can tell


def plot_name(results: dict[str, Any]) -> str:
    """File of the plot: a result of a GPU has its own."""
    return "two_vs_three_d.png" if results["device"] == "cpu" else "two_vs_three_d_gpu.png"


def networks(results: dict[str, Any], dimensions: str = "") -> list[str]:
    """Those that were run, in their order; `dimensions` "2D" or "3D" picks."""
    names = dict.fromkeys(row["network"] for row in results["rows"])
    return [name for name in names if name.startswith(dimensions)]


def of_seeds(results: dict[str, Any], network: str, name: str) -> list[float]:
    """A figure of each round, in the order of the seeds."""
    rows = sorted((row for row in results["rows"] if row["network"] == network), key=lambda row: row["seed"])
    return [row["step_seconds"]["median"] if name == "step_seconds" else row[name] for row in rows]


def ratios(results: dict[str, Any], two: str, three: str) -> dict[str, dict[str, float] | None]:
    """How many times the 2D network's memory, FLOP and step time the 3D one takes, round by round; None for the memory
    that training adds where an increase is below `FLOOR_MB`."""
    names = {"memory": "training_mb", "flop": "gflop_per_volume", "time": "step_seconds"}
    found: dict[str, dict[str, float] | None] = {
        key: ratio(*(of_seeds(results, one, name) for one in (three, two))) for key, name in names.items()
    }
    added = [added_mb(results, one) for one in (three, two)]
    told = min(map(min, added)) >= FLOOR_MB
    return found | {"added": ratio(*added) if told else None}


def added_mb(results: dict[str, Any], network: str) -> list[float]:
    """What training adds to the peak memory before the first step."""
    peaks, before = (of_seeds(results, network, name) for name in ("training_mb", "before_mb"))
    return [peak - base for peak, base in zip(peaks, before, strict=True)]


def _cells(results: dict[str, Any], network: str) -> list[str]:
    def cell(name: str, digits: int) -> str:
        return figure(spread(of_seeds(results, network, name)), digits)

    return [
        network,
        f"{of_seeds(results, network, 'parameters')[0] / 1e6:.1f}",
        f"{of_seeds(results, network, 'gflop_per_volume')[0]:,.1f}",
        cell("step_seconds", 2),
        cell("volumes_per_second", 2),
        cell("training_mb", 0),
        cell("before_mb", 0),
        cell("steps", 0),
        f"{of_seeds(results, network, 'position_accuracy_untrained')[0]:.3f}",
        cell("position_accuracy", 3),
    ]


def baselines(results: dict[str, Any]) -> str:
    """Of the windows of 2D, and of those of 3D: they are drawn along other axes."""
    first = {dimensions: networks(results, dimensions)[0] for dimensions in ("2D", "3D")}
    found = {key: next(row for row in results["rows"] if row["network"] == name) for key, name in first.items()}
    return "; ".join(f"in {key}, {baselines_text(row['position_baselines'])}" for key, row in found.items())


def section(results: dict[str, Any]) -> str:
    """Markdown for docs/benchmarks.md."""
    size, common = results["sizes"], results["common"]
    plane, depth = size["crop"], size["volume"][2]
    pairs = [(two, three) for two in networks(results, "2D") for three in networks(results, "3D")]
    found = [(two, three, ratios(results, two, three)) for two, three in pairs]
    lines = [
        [three, two, *("-" if one[key] is None else figure(one[key]) for key in ("memory", "added", "time", "flop"))]
        for two, three, one in found
    ]
    memory = "tensors on the GPU" if results["device"] != "cpu" else "the whole process, libraries included"
    settings = " ".join(f"{name}={value}" for name, value in results["environment"].items() if "MALLOC" in name)
    allocator = "" if results["device"] != "cpu" else f" (glibc keeps freed memory: `{settings}`)"
    head = ["network", "encoder's parameters, M", "GFLOP a volume", "step, s", "volumes/s", "peak MB", "MB before",
            "steps", "position accuracy untrained", f"after {results['seconds']:g} s"]  # fmt: skip
    return f"""**Synthetic** volumes of {" x ".join(map(str, size["volume"]))}, batches of {common["batch_size"]},
the same grid of 3 x 3 positions. 2D sees {size["slices"]} of the {depth} slices in each window of {plane} x {plane}
(one of every {depth / size["slices"]:g}), as 2D-VoCo does; 3D sees all: the same window over the whole depth,
{plane} x {plane} x {depth}. So a part of what 2D saves is slices that it does not look at. The loss (form
{common["voco_form"]} for both), the grid and all other settings are the same, device {results["device"]}. Each network
in a process of its own, {results["seeds"]} rounds in turns, each with a seed: median of the rounds (smallest to
largest).

"GFLOP a volume": convolutions and matrix products of a training step, forward passes as PyTorch counts them, a
backward pass as two forward ones. "Peak MB": {memory}, while training; "MB before": the same just before the first
step{allocator}. "Step": forward pass of
student and teacher, the student's backward pass, optimizer and teacher's move, without cutting the batch. Position
accuracy: on {size["phantoms"][1]} phantoms held out, {common["num_val_crops"]} windows each (untrained: the first
seed); without looking, {baselines(results)}; equal time is {results["seconds"]:g} s of steps.

{table(head, [_cells(results, network) for network in networks(results)])}

How many times as much 3D takes, round by round (time: also how many times the volumes per second 2D does; "-":
training added less than {FLOOR_MB:g} MB to the peak before it, so there is no ratio):

{table(["3D", "beside 2D", "peak memory", "memory that training adds", "time", "FLOP"], lines)}

![Memory, speed and position accuracy](benchmarks/{plot_name(results)})
"""


def headline(results: dict[str, Any]) -> str | None:
    """One sentence for the README."""
    found = ratios(results, *PAIR)
    machine = results["machine"]["cpu" if results["device"] == "cpu" else "gpu"]
    accuracy = [figure(spread(of_seeds(results, network, "position_accuracy"))) for network in PAIR]
    parameters = [f"{of_seeds(results, network, 'parameters')[0] / 1e6:.0f} M" for network in PAIR]
    untrained = [f"{of_seeds(results, network, 'position_accuracy_untrained')[0]:.2f}" for network in PAIR]
    size = results["sizes"]
    seen = f"{size['slices']} of {size['volume'][2]} slices"
    return (
        f"3D VoCo takes {figure(found['memory'], 1)} times the peak memory and {figure(found['time'], 1)} times the"
        f" time a volume of 2D-VoCo on {seen} (ResNet-18, {parameters[0]} parameters in 2D and {parameters[1]} in 3D,"
        f" loss {results['common']['voco_form']} and grid alike); {results['seconds']:g} s of training on synthetic CT"
        f" take position accuracy from {untrained[0]} to {accuracy[0]} in 2D and from {untrained[1]} to {accuracy[1]}"
        f" in 3D ({machine}; median, smallest to largest of {results['seeds']} rounds)"
    )


def plots(results: dict[str, Any], folder: Path) -> None:
    """Peak memory, volumes per second and position accuracy of each network, a dot a round."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = Figure(figsize=(10, 3), layout="constrained")
    titles = {"training_mb": "peak MB", "volumes_per_second": "volumes/s", "position_accuracy": "position accuracy"}
    for axis, (name, title) in zip(drawn.subplots(1, len(titles)), titles.items(), strict=True):
        _bars(axis, [of_seeds(results, network, name) for network in networks(results)], networks(results))
        axis.set_title(title, fontsize=9)
    drawn.savefig(folder / plot_name(results), dpi=80)


def _bars(axis: Any, rounds: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    colours = ["tab:blue" if name.startswith("2D") else "tab:orange" for name in names]
    axis.bar(range(len(names)), [spread(one)["median"] for one in rounds], color=colours)
    for x, one in enumerate(rounds):
        axis.plot([x] * len(one), one, "k.", markersize=4)
    axis.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=7)
