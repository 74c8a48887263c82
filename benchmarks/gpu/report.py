# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables, statements and a plot of `benchmarks.gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import figure, ratio, spread, table

from .parts import DEFAULT, EAGER, FASTEST

TITLE = "On a GPU"
COMMAND = "python -m benchmarks.gpu --out benchmarks/results/gpu.json"
SPEED_UP = 2.0  # of a pretraining step over eager fp32: target
SECONDS = 2.0  # of a series of 300 slices without decoding: target
STALL = 1.10  # epoch over an epoch without loading: target
SLICES = 300
PLOT = "gpu_steps.png"


def verdict(reached: bool) -> str:
    """How a target is said to have come out."""
    return "reached" if reached else "**MISSED**"


def peak_of(name: str, results: dict[str, Any]) -> float:
    """FLOP/s of the matrix product that a variant is held against."""
    peaks = results["peaks"]["flop_per_second"]
    if name.startswith("bf16"):
        return peaks["bf16"]
    # convolutions in fp32 take TF32 where cuDNN may
    return max(peaks["tf32"], peaks["fp32"]) if results["peaks"]["cudnn_allows_tf32"] else peaks["fp32"]


def measured(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants that ran."""
    return {name: found for name, found in part["variants"].items() if "runs" in found}


def fastest(part: dict[str, Any]) -> str:
    """The variant whose median step took least."""
    return min(measured(part), key=lambda name: spread(part["variants"][name]["runs"])["median"])


def variants(results: dict[str, Any], part: dict[str, Any]) -> str:
    """A table of training steps."""
    size, eager, lines = part["batch_size"], part["variants"][EAGER]["runs"], []
    for name, found in part["variants"].items():
        if "runs" not in found:
            lines.append([name, f"failed: {found['failed']}", "", "", "", ""])
            continue
        seconds = spread(found["runs"])
        share = part["flop"] / seconds["median"] / peak_of(name, results)
        memory = "" if found["peak_mb"] is None else f"{found['peak_mb']:,.0f}"
        milliseconds = spread([1000 * value for value in found["runs"]])
        volumes = spread([size / value for value in found["runs"]])
        lines.append([name, figure(milliseconds, 1), figure(volumes, 1), figure(ratio(eager, found["runs"])),
                      f"{100 * share:.1f} %", memory])  # fmt: skip
    return table(["variant", "ms a step", "volumes a second", "times eager fp32", "share of peak", "peak MB"], lines)


def default_or_best(part: dict[str, Any]) -> str:
    """Is what train.json does the fastest?"""
    best = fastest(part)
    if DEFAULT not in measured(part):
        return f"- {DEFAULT}, the config's default, failed; fastest: {best}"
    gain = ratio(part["variants"][DEFAULT]["runs"], part["variants"][best]["runs"])
    said = "it is the fastest" if best == DEFAULT else f"fastest: {best}, {figure(gain)} times as fast"
    return f"- {DEFAULT} is the config's default on CUDA; {said}"


def pretraining(results: dict[str, Any]) -> str:
    """Variants of the pretraining step."""
    part = results["pretraining"]
    size, best = part["batch_size"], fastest(part)
    gain = ratio(part["variants"][EAGER]["runs"], part["variants"][best]["runs"])
    peaks = ", ".join(f"{name} {value / 1e12:.1f}" for name, value in results["peaks"]["flop_per_second"].items())
    return "\n\n".join([
        "### A pretraining step",
        f"The bundle's own trainer on one resident batch of {size} volumes at the config's sizes, "
        f"{part['flop'] / size:,.0f} floating-point operations a volume. Share of peak: of this "
        f"machine's own large matrix products ({peaks} TFLOP/s), in TF32 for fp32 where cuDNN may use it. "
        "Peak memory is what PyTorch allocated for the variant.",
        variants(results, part),
        f"- fastest: {best}, {figure(gain)} times eager fp32 (target: at least {SPEED_UP:.0f}): "
        f"{verdict(gain['median'] >= SPEED_UP)}\n{default_or_best(part)}",
        f"![A pretraining step](benchmarks/{PLOT})",
    ])  # fmt: skip


def loader(results: dict[str, Any]) -> str:
    """What the loader costs an epoch."""
    part = results["loader"]
    runs, volumes = part["runs"], part["volumes"]
    lines, stalls = [], {}
    for name, seconds in runs.items():
        stalls[name] = ratio(seconds, runs["no data"])
        rate = spread([volumes / value for value in seconds])
        lines.append([name, figure(spread(seconds)), figure(rate, 1), figure(stalls[name])])
    cut = ("crops by the loader", "crops on the device")
    said = "\n".join(
        f"- {name}: {stalls[name]['median']:.2f} times the epoch without loading (target: at most {STALL:.2f}): "
        f"{verdict(stalls[name]['median'] <= STALL)}"
        for name in cut
    )
    return "\n\n".join([
        "### The loader",
        f"An epoch of {volumes} prepared volumes, {FASTEST}, {part['workers']} workers: on one resident batch (no "
        "data), with crops that the loader cuts (as the config does), and with crops cut on the device from uint8 "
        "slabs.",
        table(["epoch", "seconds", "volumes a second", "loader stall"], lines),
        said,
    ])  # fmt: skip


def classifier(results: dict[str, Any]) -> str:
    """Training steps and one series."""
    part, runs = results["classifier"], results["inference"]["runs"]
    seconds, number = spread(runs["without decoding"]), results["inference"]["slices"]
    lines = [[name, figure(spread(values))] for name, values in runs.items()]
    target = f" (target for {SLICES} slices: at most {SECONDS:.0f} s): {verdict(seconds['median'] <= SECONDS)}"
    return "\n\n".join([
        "### A classifier step",
        f"The bundle's own trainer on one resident batch of {part['batch_size']} series at the config's sizes.",
        variants(results, part),
        default_or_best(part),
        "### A series to probabilities",
        f"A DICOM series of {number} slices, random weights: decoding, preprocessing on the CPU, and preprocessing "
        "with the network.",
        table(["step", "seconds"], lines),
        f"- without decoding {seconds['median']:.2f} s{target if number == SLICES else ''}",
    ])  # fmt: skip


def section(results: dict[str, Any]) -> str:
    """Markdown."""
    opening = (
        f"**Synthetic** series on {results['machine']['gpu']}. Median (and range) over {results['options']['repeats']} "
        "timings in turns, each up to a synchronisation with the device."
    )
    return "\n\n".join([opening, pretraining(results), loader(results), classifier(results)]) + "\n"


def headline(results: dict[str, Any]) -> str | None:
    """Volumes a second of pretraining, and its gain over eager fp32."""
    part = results["pretraining"]
    best = fastest(part)
    runs = part["variants"][best]["runs"]
    rate = spread([part["batch_size"] / value for value in runs])
    gain = ratio(part["variants"][EAGER]["runs"], runs)
    return (
        f"GPU: pretraining at {rate['median']:,.0f} volumes a second ({best}), {gain['median']:.1f} times eager fp32 "
        f"({results['machine']['gpu']}, synthetic series)."
    )


def plots(results: dict[str, Any], folder: Path) -> None:
    """Volumes a second of the variants of a pretraining step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    part = results["pretraining"]
    rates = {name: spread([part["batch_size"] / v for v in found["runs"]]) for name, found in measured(part).items()}
    names, middle = list(rates), [rate["median"] for rate in rates.values()]
    ranges = [[r["median"] - r["low"] for r in rates.values()], [r["high"] - r["median"] for r in rates.values()]]
    picture = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    axes.barh(names, middle, xerr=ranges, capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel="volumes a second", title="A pretraining step")
    axes.grid(axis="x", alpha=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    picture.savefig(folder / PLOT, dpi=80)
