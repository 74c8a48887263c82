# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is measured of the pretraining bundle, each part in a process of its own in the bundle's folder."""

from __future__ import annotations

import collections
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.transforms import Compose
from workflow.dataset import SlabDataset, collate_plain
from workflow.training import GradientClipping

from benchmarks import monai_caches, reference
from benchmarks.bundle_parts import parse
from benchmarks.speed.rows import IN_MEMORY, ORIGINAL, OURS, PERSISTENT, WITH_GRADIENT, Measured, measure_parts, timed
from scripts.teacher import TeacherUpdate

LOSS_BATCH = 4


def _parse(task: dict[str, Any], dataset_dir: str, **overrides: Any) -> ConfigParser:
    """The bundle's training config, without augmentation as the original is; `overrides` of the task are those of a
    smoke run."""
    places = {"dataset_dir": dataset_dir, "val_fraction": 0.0, "device": "cpu", "output_root": task["work"]}
    places["augment_prob"] = 0.0
    return parse(["train"], task["overrides"] | places | overrides)


def _sizes(parser: ConfigParser) -> tuple[Any, ...]:
    return tuple(parser[name] for name in ("volume_size", "num_slices", "grid_size", "crop_size", "num_random_crops"))


def _item(parser: ConfigParser) -> Callable[[], Any]:
    """From the dataset's first item to what the network takes, a batch of one."""
    dataset: SlabDataset = parser.get_parsed_content("train#dataset")
    prepare_batch = parser.get_parsed_content("train#prepare_batch")
    return lambda: prepare_batch(collate_plain([dataset[0]]), "cpu")


def data(task: dict[str, Any]) -> Measured:
    """From a file or a cached volume to the float crops and labels that the network takes."""
    files = task["inputs"]
    own = _parse(task, files["nii_gz"])
    volume, slices, *layout = _sizes(own)
    chain = reference.data_chain(volume, slices, *layout)
    original = {name: lambda name=name: chain({"image": files[name]}) for name in ("nii", "nii_gz")}
    uncached = {name: _item(_parse(task, files[name], cache_dir=None)) for name in original}
    found = {"uncached .nii": timed({ORIGINAL: original["nii"], OURS: uncached["nii"]}, task["repeats"])}
    crops = monai_caches.RandCrops(slices, *layout)
    with tempfile.TemporaryDirectory(dir=task["work"]) as folder:
        persistent = monai_caches.on_disk([files["nii_gz"]], Path(folder), volume, crops)
        in_memory = monai_caches.in_memory([files["nii_gz"]], volume, crops)
        cached = {PERSISTENT: lambda: persistent[0], IN_MEMORY: lambda: in_memory[0], OURS: _item(own)}
        # the chain has no cache: it takes its turn beside them with all that it does at every step
        actions = {ORIGINAL: original["nii_gz"], "uncached": uncached["nii_gz"], **cached}
        seconds = timed(actions, task["repeats"], dict.fromkeys(cached, task["calls"]))
    without_cache = {ORIGINAL: seconds[ORIGINAL], OURS: seconds.pop("uncached")}
    return found | {"uncached .nii.gz": without_cache, "cached": seconds}


def crops(task: dict[str, Any]) -> Measured:
    """Crop and label alone, from the slices of one volume."""
    parser = _parse(task, task["inputs"]["nii"])
    dataset: SlabDataset = parser.get_parsed_content("train#dataset")
    steps = dataset.transform.transforms
    slices = Compose(steps[:2])({"image": dataset.cache.load(dataset.data[0])})  # [S, 1, X, Y] uint8
    cropper, prepare_batch = steps[2], parser.get_parsed_content("train#prepare_batch")
    own_crops = reference.Crops(*_sizes(parser)[2:])
    last = {"image": (slices["image"].permute(1, 2, 3, 0).float() / 255).contiguous()}  # [1, X, Y, S], as it has them

    def floats() -> Any:
        found = cropper(slices)
        return prepare_batch(collate_plain([{key: found[key] for key in ("random_crops", "base_crops", "overlap")}]))

    calls = {ORIGINAL: task["calls"], OURS: 5 * task["calls"]}
    return {
        name: timed({ORIGINAL: lambda: own_crops(last), OURS: action}, task["repeats"], calls)
        for name, action in (("views", lambda: cropper(slices)), ("floats", floats))
    }


def _embeddings(parser: ConfigParser, batch: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random embeddings [B, R+K, D] of student and teacher, and labels [B, R, K]."""
    _, _, grid, crop, number = _sizes(parser)
    ends = [g * c - c + 1 for g, c in zip(grid, crop, strict=True)]
    windows = [[int(torch.randint(end, ())) for end in ends] for _ in range(number)]
    labels = reference.overlap_by_loops(windows, grid, crop).expand(batch, -1, -1).contiguous()
    shape = (batch, sum(labels.shape[1:]), parser["hidden_size"])
    return {"student": torch.randn(shape, requires_grad=True), "teacher": torch.randn(shape)}, labels


def _losses(parser: ConfigParser, batch: int) -> dict[str, Callable[[], None]]:
    """The loss forward and backward, ours and the original's."""
    loss = parser.get_parsed_content("loss")
    embeddings, labels = _embeddings(parser, batch)
    return {
        ORIGINAL: lambda: reference.voco_loss(embeddings["student"], embeddings["teacher"], labels).backward(),
        OURS: lambda: loss(embeddings, labels).backward(),
    }


def loss(task: dict[str, Any]) -> Measured:
    """The loss, forward and backward."""
    actions = _losses(_parse(task, task["inputs"]["nii"]), LOSS_BATCH)
    return {"loss": timed(actions, task["repeats"], dict.fromkeys(actions, task["calls"]))}


def ema(task: dict[str, Any]) -> Measured:
    """The teacher's moving average: of the whole student in both."""
    parser = _parse(task, task["inputs"]["nii"])
    original = reference.VoCo(parser["backbone_name"], parser["hidden_size"])
    actions = {ORIGINAL: original.move_teacher, OURS: parser.get_parsed_content("voco").move_teacher}
    return {"ema": timed(actions, task["repeats"], dict.fromkeys(actions, task["calls"]))}


def _batch(parser: ConfigParser) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops [1, R+K, S, 1, h, w] in [0, 1] and labels."""
    _, slices, _, crop, _ = _sizes(parser)
    _, labels = _embeddings(parser, batch=1)
    return torch.rand(1, sum(labels.shape[1:]), slices, 1, *crop), labels


def _own_step(parser: ConfigParser) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A step of the bundle's training: its network, loss, optimizer and the hooks of its handlers."""
    network, loss, optimizer = (parser.get_parsed_content(name) for name in ("voco", "loss", "optimizer"))
    for handler in (GradientClipping(optimizer, parser["grad_clip"]), TeacherUpdate(network, optimizer)):
        handler.attach(Engine(lambda *_: None))
    network.train()

    def step(crops: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(network(crops), labels).backward()
        optimizer.step()

    return step


def _original_step(parser: ConfigParser, teacher_gradient: bool) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A step of the original's structure; its optimizer has the projector of the teacher where that has a gradient."""
    network = reference.VoCo(parser["backbone_name"], parser["hidden_size"], teacher_gradient=teacher_gradient)
    parameters = [*network.student.parameters(), *(network.teacher.projector.parameters() if teacher_gradient else ())]
    optimizer = torch.optim.AdamW(parameters, lr=parser["learning_rate"], amsgrad=True)

    def step(crops: torch.Tensor, labels: torch.Tensor) -> None:
        network.zero_grad(set_to_none=True)
        network(crops, labels).backward()
        optimizer.step()

    return step


def _step(task: dict[str, Any], variant: str) -> Callable[[], None]:
    """One of the three steps, on crops of its own."""
    parser = _parse(task, task["inputs"]["nii"])
    step = _own_step(parser) if variant == OURS else _original_step(parser, variant == WITH_GRADIENT)
    batch = _batch(parser)
    return lambda: step(*batch)


def step(task: dict[str, Any]) -> Measured:
    """Pretraining steps at batch 1, and the share that loss and moving average have of ours."""
    seconds = timed({name: _step(task, name) for name in (ORIGINAL, WITH_GRADIENT, OURS)}, task["repeats"])
    parser = _parse(task, task["inputs"]["nii"])
    own = {"loss": _losses(parser, 1)[OURS], "ema": parser.get_parsed_content("voco").move_teacher}
    parts = timed(own, task["repeats"], dict.fromkeys(own, task["calls"]))
    both = [a + b for a, b in zip(parts["loss"], parts["ema"], strict=True)]
    return {"step": seconds, "share": {"loss and moving average": both, "step": seconds[OURS]}}


def memory(task: dict[str, Any]) -> Measured:
    """Two steps of each of ``task["variants"]`` in this process, whose largest resident memory is what counts."""
    for variant in task["variants"]:
        action = _step(task, variant)
        for _ in range(2):
            action()
    return {}


def stall_repeats(repeats: int) -> int:
    """Epochs of each kind: they are long, and a quotient of two varies little."""
    return max(repeats // 2, 1)


def stall(task: dict[str, Any]) -> Measured:
    """An epoch over cached volumes with the bundle's own loader, beside as many steps on one batch."""
    parser = _parse(task, task["inputs"]["epoch"], batch_size=1, cache_dir=os.path.join(task["work"], "epoch_cache"))
    parser.get_parsed_content("train#dataset").prepare_all()
    loader, prepare_batch = (parser.get_parsed_content(f"train#{name}") for name in ("dataloader", "prepare_batch"))
    step, batch = _own_step(parser), _batch(parser)
    step(*batch)
    collections.deque(loader, maxlen=0)  # its workers start now, and stay

    def with_loader() -> None:
        for item in loader:
            step(*prepare_batch(item, "cpu"))

    def without_data() -> None:
        for _ in range(len(loader)):
            step(*batch)

    actions = {"with loader": with_loader, "without data": without_data}
    return {"stall": timed(actions, stall_repeats(task["repeats"]), warmup=0)}


ACTIONS = {"data": data, "crops": crops, "loss": loss, "ema": ema, "step": step, "memory": memory, "stall": stall}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """See `rows.measure_parts`."""
    torch.manual_seed(0)
    return measure_parts(ACTIONS, task)
