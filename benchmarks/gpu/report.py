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


def gain(part: dict[str, Any], name: str, over: str = EAGER) -> dict[str, float] | None:
    """How many times faster than another variant; None where one of both did not run."""
    ran = measured(part)
    return ratio(ran[over]["runs"], ran[name]["runs"]) if name in ran and over in ran else None


def shown(value: dict[str, float] | None) -> str:
    """A ratio, if there is one."""
    return "unknown" if value is None else figure(value)


def fastest(part: dict[str, Any]) -> str | None:
    """The variant whose median step took least."""
    ran = measured(part)
    return min(ran, key=lambda name: spread(ran[name]["runs"])["median"], default=None)


def variants(results: dict[str, Any], part: dict[str, Any]) -> str:
    """A table of training steps."""
    size, lines = part["batch_size"], []
    for name, found in part["variants"].items():
        if "runs" not in found:
            lines.append([name, f"failed: {found['failed']}", "", "", "", ""])
            continue
        seconds = spread(found["runs"])
        known = part["flop"] is not None and "peaks" in results
        share = f"{100 * part['flop'] / seconds['median'] / peak_of(name, results):.1f} %" if known else "unknown"
        memory = "" if found["peak_mb"] is None else f"{found['peak_mb']:,.0f}"
        milliseconds = spread([1000 * value for value in found["runs"]])
        volumes = spread([size / value for value in found["runs"]])
        lines.append([name, figure(milliseconds, 1), figure(volumes, 1), shown(gain(part, name)), share, memory])
    return table(["variant", "ms a step", "volumes a second", "times eager fp32", "share of peak", "peak MB"], lines)


def default_and_best(part: dict[str, Any]) -> str:
    """What train.json does beside the fastest, which is said and not judged."""
    best = fastest(part)
    if best is None:
        return "- no variant ran"
    if DEFAULT not in measured(part):
        return f"- {DEFAULT}, the config's default on CUDA, failed; fastest: {best}"
    more = gain(part, best, DEFAULT)
    said = "it is the fastest" if best == DEFAULT else f"fastest: {best}, {shown(more)} times as fast"
    return f"- {DEFAULT} is the config's default on CUDA; {said}"


def pretraining(results: dict[str, Any]) -> str:
    """Variants of the pretraining step."""
    part = results["pretraining"]
    size, found = part["batch_size"], gain(part, DEFAULT)
    peaks = results.get("peaks", {"flop_per_second": {}})["flop_per_second"]
    listed = ", ".join(f"{name} {value / 1e12:.1f}" for name, value in peaks.items()) or "unmeasured"
    operations = "an unknown number of" if part["flop"] is None else f"{part['flop'] / size:,.0f}"
    judged = "unknown, one of both failed" if found is None else verdict(found["median"] >= SPEED_UP)
    return "\n\n".join([
        "### A pretraining step",
        f"The bundle's own trainer on one resident batch of {size} volumes at the config's sizes, "
        f"{operations} floating-point operations a volume. Share of peak: of this "
        f"machine's own large matrix products ({listed} TFLOP/s), in TF32 for fp32 where cuDNN may use it. "
        "Peak memory is what PyTorch allocated for the variant.",
        variants(results, part),
        f"- the config's default, {DEFAULT}: {shown(found)} times eager fp32 (target: at least {SPEED_UP:.0f}): "
        f"{judged}\n{default_and_best(part)}",
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
    """Training steps of the classifier."""
    part = results["classifier"]
    return "\n\n".join([
        "### A classifier step",
        f"The bundle's own trainer on one resident batch of {part['batch_size']} series at the config's sizes.",
        variants(results, part),
        default_and_best(part),
    ])  # fmt: skip


def inference(results: dict[str, Any]) -> str:
    """One series."""
    runs, number = results["inference"]["runs"], results["inference"]["slices"]
    seconds = spread(runs["without decoding"])
    lines = [[name, figure(spread(values))] for name, values in runs.items()]
    target = f" (target for {SLICES} slices: at most {SECONDS:.0f} s): {verdict(seconds['median'] <= SECONDS)}"
    return "\n\n".join([
        "### A series to probabilities",
        f"A DICOM series of {number} uncompressed slices, random weights: decoding, preprocessing on the CPU, and "
        "preprocessing with the network.",
        table(["step", "seconds"], lines),
        f"- without decoding {seconds['median']:.2f} s{target if number == SLICES else ''}",
    ])  # fmt: skip


PARTS = {"pretraining": pretraining, "loader": loader, "classifier": classifier, "inference": inference}


def section(results: dict[str, Any]) -> str:
    """Markdown; a run that ended early has left parts out."""
    opening = (
        f"**Synthetic** series on {results['machine']['gpu']}. Median (and range) over {results['options']['repeats']} "
        "timings in turns, each up to a synchronisation with the device."
    )
    told = [
        part(results) if name in results else f"### {name.capitalize()}\n\n**Unmeasured**: the run ended before."
        for name, part in PARTS.items()
    ]
    return "\n\n".join([opening, *told]) + "\n"


def headline(results: dict[str, Any]) -> str | None:
    """Volumes a second of pretraining as the config does it, and its gain over eager fp32."""
    part = results.get("pretraining")
    if part is None or DEFAULT not in measured(part):
        return None
    rate = spread([part["batch_size"] / value for value in part["variants"][DEFAULT]["runs"]])
    more = gain(part, DEFAULT)
    times = "" if more is None else f", {more['median']:.1f} times eager fp32"
    return (
        f"GPU: pretraining by the default config ({DEFAULT}) at {rate['median']:,.0f} volumes a second{times} "
        f"({results['machine']['gpu']}, synthetic series)."
    )


def plots(results: dict[str, Any], folder: Path) -> None:
    """Volumes a second of the variants of a pretraining step."""
    from matplotlib.figure import Figure

    part = results.get("pretraining", {"variants": {}})
    rates = {name: spread([part["batch_size"] / v for v in found["runs"]]) for name, found in measured(part).items()}
    names, middle = list(rates), [rate["median"] for rate in rates.values()]
    ranges = [[r["median"] - r["low"] for r in rates.values()], [r["high"] - r["median"] for r in rates.values()]]
    picture = Figure(figsize=(8, 3), layout="constrained")
    axes = picture.subplots()
    axes.barh(names, middle, xerr=ranges, capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel="volumes a second", title="A pretraining step")
    axes.grid(axis="x", alpha=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    picture.savefig(folder / PLOT, dpi=80)
