# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables, plot and headline of ``benchmarks.two_vs_three_d``, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import figure, ratio, spread, table

TITLE = "What 2D saves over 3D"
COMMAND = (
    "OMP_NUM_THREADS=2 python -m benchmarks.two_vs_three_d --size small --device cpu --seconds 60 --seeds 3"
    " --out benchmarks/results/two_vs_three_d.json"
)
# of like kind, so that little but the dimensions differs: the headline's pair
PAIR = ("2D ResNet-18", "3D ResNet-18")
CHANCE = 1 / 9


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


def ratios(results: dict[str, Any], two: str, three: str) -> dict[str, dict[str, float]]:
    """How many times the 2D network's memory, FLOP and step time the 3D one takes, round by round."""
    names = {"memory": "training_mb", "flop": "gflop_per_volume", "time": "step_seconds"}
    found = {key: ratio(*(of_seeds(results, one, name) for one in (three, two))) for key, name in names.items()}
    return found | {"added": ratio(added_mb(results, three), added_mb(results, two))}


def added_mb(results: dict[str, Any], network: str) -> list[float]:
    """What training adds to the peak memory before the first step, at least 1 MB."""
    peaks, before = (of_seeds(results, network, name) for name in ("training_mb", "before_mb"))
    return [max(peak - base, 1.0) for peak, base in zip(peaks, before, strict=True)]


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
        f"{of_seeds(results, network, 'before_mb')[0]:,.0f}",
        cell("steps", 0),
        f"{of_seeds(results, network, 'position_accuracy_untrained')[0]:.3f}",
        cell("position_accuracy", 3),
    ]


def section(results: dict[str, Any]) -> str:
    """Markdown for docs/benchmarks.md."""
    size, common = results["sizes"], results["common"]
    plane, depth = size["crop"], size["volume"][2]
    pairs = [(two, three) for two in networks(results, "2D") for three in networks(results, "3D")]
    found = [(two, three, ratios(results, two, three)) for two, three in pairs]
    lines = [
        [three, two, *(figure(one[key]) for key in ("memory", "added", "time", "flop"))] for two, three, one in found
    ]
    memory = "tensors on the GPU" if results["device"] != "cpu" else "the whole process, libraries included"
    head = ["network", "encoder's parameters, M", "GFLOP a volume", "step, s", "volumes/s", "peak MB", "MB before",
            "steps", "position accuracy untrained", f"after {results['seconds']:g} s"]  # fmt: skip
    return f"""**Synthetic** volumes of {" x ".join(map(str, size["volume"]))}, batches of {common["batch_size"]},
the same grid of 3 x 3 positions. 2D: {size["slices"]} slices of each window of {plane} x {plane}; 3D: the same window
over the whole depth, {plane} x {plane} x {depth}. Loss {common["voco_form"]} and all settings are the same for both,
device {results["device"]}. Each network in a process of its own, {results["seeds"]} rounds in turns, each with a seed:
median of the rounds (smallest to largest).

"GFLOP a volume": convolutions and matrix products of a training step, forward passes as PyTorch counts them, a
backward pass as two forward ones. "Peak MB": {memory}, while training; "MB before": the same just before the first
step. "Step": forward pass of student and teacher, the student's backward pass, optimizer and teacher's move, without
cutting the batch. Position accuracy: on {size["phantoms"][1]} phantoms held out, {common["num_val_crops"]} windows
each, chance about {CHANCE:.2f} (untrained: the first seed); equal time is {results["seconds"]:g} s of steps.

{table(head, [_cells(results, network) for network in networks(results)])}

How many times as much 3D takes, round by round (time: also how many times the volumes per second 2D does):

{table(["3D", "beside 2D", "peak memory", "memory that training adds", "time", "FLOP"], lines)}

![Memory, speed and position accuracy](benchmarks/{plot_name(results)})
"""


def headline(results: dict[str, Any]) -> str | None:
    """One sentence for the README."""
    found = ratios(results, *PAIR)
    machine = results["machine"]["cpu" if results["device"] == "cpu" else "gpu"]
    accuracy = [spread(of_seeds(results, network, "position_accuracy"))["median"] for network in PAIR]
    return (
        f"3D VoCo takes {found['memory']['median']:.1f} times the peak memory and {found['time']['median']:.1f} times"
        f" the time a volume of 2D-VoCo (ResNet-18 in both); after {results['seconds']:g} s of training on synthetic CT"
        f" position accuracy is {accuracy[0]:.2f} in 2D and {accuracy[1]:.2f} in 3D ({machine})"
    )


def plots(results: dict[str, Any], folder: Path) -> None:
    """Peak memory, volumes per second and position accuracy of each network, a dot a round."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(drawn)
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
