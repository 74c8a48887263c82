# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is timed, in a process of `common.in_bundle`: training steps of a bundle's own trainer in several variants, its
loader, and one series' inference."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.bundle_parts import parse
from benchmarks.common import interleaved

EAGER = "fp32, contiguous"  # what the others are compared with
DEFAULT = "bf16, channels_last, deterministic"  # what train.json does on CUDA
FASTEST = "bf16, channels_last"  # train.json with --deterministic False
COMPILED = "bf16, channels_last, compiled"
VARIANTS: dict[str, dict[str, bool]] = {
    EAGER: {},
    "fp32, channels_last": {"channels_last": True},
    "bf16, contiguous": {"amp": True},
    FASTEST: {"amp": True, "channels_last": True},
    DEFAULT: {"amp": True, "channels_last": True, "deterministic": True},
    COMPILED: {"amp": True, "channels_last": True, "compiled": True},
}
SKIPPED = "not tried on a CPU"
ERRORS = (RuntimeError, OSError, ImportError)  # no memory (torch.OutOfMemoryError is a RuntimeError), no compiler
PRODUCTS = 10  # matrix products a timing of the peak
Task = dict[str, Any]


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Steps:
    """A bundle's trainer in one variant, to be stepped by hand.

    Args:
        task: ``overrides`` of train.json, among them the device.
        variant: see `VARIANTS`.
    """

    def __init__(self, task: Task, variant: Mapping[str, bool]) -> None:
        self.device = torch.device(task["overrides"]["device"])
        self.deterministic, self.compiled = variant.get("deterministic", False), variant.get("compiled", False)
        amp = variant.get("amp", False) and self.device.type == "cuda"
        options = {"amp": amp, "channels_last": variant.get("channels_last", False)}
        torch.manual_seed(0)
        self.parser = parse(["train"], task["overrides"] | options)
        dataset = self.parser.get_parsed_content("train#dataset")
        dataset.prepare_all()
        length = task.get("epoch_volumes", len(dataset.data))  # a longer epoch of the same volumes
        dataset.data = (dataset.data * math.ceil(length / len(dataset.data)))[:length]
        self.trainer = self.parser.get_parsed_content("train#trainer")
        self.loader = self.parser.get_parsed_content("train#dataloader")
        if self.compiled:
            self.trainer.network = torch.compile(self.trainer.network, mode="reduce-overhead")

    def step(self, batch: Mapping[str, Any]) -> None:
        """What the trainer does with a batch: forward, loss, backward, clipping, optimizer, teacher."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        self.trainer._iteration(self.trainer, batch)

    def run(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Step through batches and wait for the device."""
        # as workflow.run.RunFolder does; process-wide, so set by each variant before its turn
        torch.backends.cudnn.deterministic = self.deterministic
        torch.backends.cudnn.benchmark = not self.deterministic
        for batch in batches:
            self.step(batch)
        finish(self.device)

    def resident(self) -> dict[str, Any]:
        """The loader's first batch, on the device."""
        batch = next(iter(self.loader))
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def steps(task: Task) -> dict[str, Any]:
    """Seconds of ``steps`` training steps on one resident batch, in turns, for each of ``variants``; peak memory of
    each; and the floating-point operations of one step."""
    device, batch = torch.device(task["overrides"]["device"]), None
    ready: dict[str, Steps] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in task["variants"]:
        if VARIANTS[name].get("compiled") and device.type != "cuda":
            found[name] = {"failed": SKIPPED}
            continue
        try:
            before = _reset_memory(device)
            ready[name] = Steps(task, VARIANTS[name])
            batch = ready[name].resident() if batch is None else batch
            ready[name].run([batch] * 3)
            found[name] = {"peak_mb": _peak_memory(device, before)}
        except ERRORS as error:
            found[name] = _give_up(ready, name, error)

    def turn(name: str) -> None:
        if name in ready:
            try:
                ready[name].run([batch] * task["steps"])
            except ERRORS as error:
                found[name] = _give_up(ready, name, error)

    seconds = interleaved({name: lambda name=name: turn(name) for name in list(ready)}, task["repeats"])
    for name in ready:  # those that got through
        found[name]["runs"] = [value / task["steps"] for value in seconds[name]]
    return {"variants": found, "flop": _flop(ready, batch), "batch_size": task["overrides"]["batch_size"]}


def _give_up(ready: dict[str, Steps], name: str, error: Exception) -> dict[str, str]:
    """Free what a variant held; the others are still measured."""
    ready.pop(name, None)
    lines = str(error).strip().splitlines() or ["no message"]
    said = f"{type(error).__name__}: {lines[0][:200]}"
    traceback.clear_frames(error.__traceback__)  # they hold its tensors
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"failed": said}


def _reset_memory(device: torch.device) -> float:
    """MB that are allocated already."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 1e6


def _peak_memory(device: torch.device, before: float) -> float | None:
    """MB at most since then, less what was there before; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e6 - before if device.type == "cuda" else None


def _flop(ready: Mapping[str, Steps], batch: Mapping[str, Any] | None) -> int | None:
    """Of one step, alike in all variants: by the first that ran, but none that was compiled, whose operations the
    counter does not see. None where none can be counted."""
    from torch.utils.flop_counter import FlopCounterMode

    for own in ready.values():
        if own.compiled:
            continue
        try:
            with FlopCounterMode(display=False) as counter:
                own.step(batch)
        except ERRORS:
            continue
        return counter.get_total_flops()
    return None


def peaks(task: Task) -> dict[str, Any]:
    """FLOP/s of large square matrix products: what this device reaches at best, by precision."""
    device, n = torch.device(task["device"]), task["matrix"]
    found = {}
    for name, dtype, precision in (
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

        def multiply(a: Tensor = a, b: Tensor = b) -> None:
            for _ in range(PRODUCTS):
                torch.mm(a, b)
            finish(device)

        seconds = interleaved({name: multiply}, task["repeats"])[name]
        found[name] = PRODUCTS * 2 * n**3 / min(seconds)
    return {"flop_per_second": found, "cudnn_allows_tf32": torch.backends.cudnn.allow_tf32}


class DeviceCrops:
    """Crops of a batch of slabs, cut on the device.

    Args:
        cropper: a `transforms.voco.RandVoCoCrop`.
        device: where the slabs go, as uint8.
    """

    def __init__(self, cropper: Callable[[Tensor], Any], device: torch.device) -> None:
        self.cropper, self.device = cropper, device

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """``image`` [B, S, C, X, Y] -> what the loader's own transform gives: random_crops, base_crops, overlap."""
        slabs = batch["image"].to(self.device, non_blocking=True)
        cuts = [self.cropper(slab)._asdict() for slab in slabs]
        crops = {
            name: torch.stack([torch.as_tensor(cut[name].as_tensor()) for cut in cuts])
            for name in ("random_crops", "base_crops")
        }
        overlap = torch.stack([torch.as_tensor(cut["overlap"]) for cut in cuts])
        return crops | {"overlap": overlap, "series_id": batch["series_id"]}


def without_crops(own: Steps) -> tuple[Any, DeviceCrops]:
    """The trainer's loader with slices instead of crops, and what cuts the crops."""
    from monai.transforms import Compose, SelectItemsd
    from transforms.voco import RandVoCoCropd

    dataset = own.parser.get_parsed_content("train#dataset")
    transforms = own.parser.get_parsed_content("train#preprocessing").transforms
    number = next(k for k, transform in enumerate(transforms) if isinstance(transform, RandVoCoCropd))
    dataset.transform = Compose([*transforms[:number], SelectItemsd(["image", "series_id"])])
    return own.loader, DeviceCrops(transforms[number].cropper, own.device)


def stall(task: Task) -> dict[str, Any]:
    """Seconds of an epoch of pretraining, in turns: on one resident batch, with the loader's crops, and with crops cut
    on the device from the slabs that the loader brings."""
    cut_ahead, slab_fed = (Steps(task, VARIANTS[FASTEST]) for _ in range(2))
    batch = cut_ahead.resident()
    slabs, cut = without_crops(slab_fed)
    actions = {
        "no data": lambda: cut_ahead.run([batch] * len(cut_ahead.loader)),
        "crops by the loader": lambda: cut_ahead.run(cut_ahead.loader),
        "crops on the device": lambda: slab_fed.run(map(cut, slabs)),
    }
    runs = interleaved(actions, task["repeats"])
    return {"runs": runs, "volumes": len(cut_ahead.loader.dataset), "workers": cut_ahead.loader.num_workers}


def infer(task: Task) -> dict[str, Any]:
    """One DICOM series to probabilities: seconds of decoding, of preprocessing on the CPU, and of preprocessing and
    network together."""
    from monai.transforms import Compose

    parser = parse(["inference"], task["overrides"])
    device = parser.get_parsed_content("engine_device")
    first, *others = parser.get_parsed_content("preprocessing").transforms
    rest, item = Compose(others), parser.get_parsed_content("dataset").data[0]
    network = parser.get_parsed_content("network").eval()
    loaded = first(dict(item))

    @torch.inference_mode()
    def predict() -> Tensor:
        image = rest(dict(loaded))["image"].as_tensor()[None].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(image)
        return logits.float().cpu()  # waits for the device

    actions = {
        "decoding": lambda: first(dict(item)),
        "preprocessing": lambda: rest(dict(loaded)),
        "without decoding": predict,
    }
    return {"runs": interleaved(actions, task["repeats"]), "slices": loaded["image"].shape[-1]}


def several(task: Task) -> dict[str, Any]:
    """Functions of this module, each with its task, one after the other in this process."""
    return {"found": {name: globals()[function](own) for name, (function, own) in task["tasks"].items()}}
