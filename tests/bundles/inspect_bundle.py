# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What MONAI finds when it opens a bundle, as JSON: run by test_conformance.py as `python -c`, with the bundle's folder
as working directory, as the zoo does (two bundles in one process would share the names `scripts` and `transforms`).

Arguments: a JSON object with `out`, `data` (an RSNA tree), `samples` (series), `root` (for what runs write), `port`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from torch import Tensor

ERRORS = (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ImportError)
WORKFLOWS = {
    "train": ["train.json"],
    "inference": ["inference.json"],
    "inference+trt": ["inference.json", "inference_trt.json"],
    "train+evaluate": ["train.json", "evaluate.json"],
    "train+multi_gpu": ["train.json", "multi_gpu_train.json"],
}
SMALL = {"backbone_name": "test_efficientnet", "hidden_size": 16, "device": "cpu", "num_workers": 0, "backend": "gloo"}


def state() -> dict[str, Any]:
    """What importing a bundle's code must leave as it is."""
    return {
        "sys.path": list(sys.path),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "handlers": [str(handler) for handler in logging.getLogger().handlers],
        "level": logging.getLogger().level,
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),  # noqa: NPY002
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_initialized(),
        "files": sorted(str(path) for path in Path().rglob("*") if "__pycache__" not in path.parts),
    }


def changed_by_imports() -> list[str]:
    """Imports all modules of the bundle; how many there are, and names of what that changed."""
    before = state()
    files = [path for name in ("transforms", "networks", "workflow", "scripts") for path in Path(name).rglob("*.py")]
    for path in sorted(files):
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
    after = state()
    return [str(len(files) > 35), *(name for name in before if before[name] != after[name])]


def overrides(files: list[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `SMALL` and the paths that the config has."""
    parser = ConfigParser()
    parser.read_config([f"configs/{name}" for name in files])
    wanted = {**SMALL, "dataset_dir": arguments["data"], "output_root": arguments["root"]}
    return {key: value for key, value in wanted.items() if key in parser.get()}


def workflow(name: str, arguments: dict[str, Any], **more: Any) -> ConfigWorkflow:
    files = WORKFLOWS[name]
    opened = ConfigWorkflow(
        config_file=[f"configs/{file}" for file in files],
        meta_file="configs/metadata.json",
        logging_file="configs/logging.conf",
        workflow_type="infer" if name.startswith("inference") else "train",
        run_name=name,
        **{**overrides(files, arguments), **more},
    )
    opened.initialize()
    return opened


def wrong_properties(name: str, arguments: dict[str, Any]) -> list[str]:
    opened = workflow(name, arguments)
    if "trt" in name:  # the rest of the config, where there is no TensorRT
        opened.parser["network"] = "$@network_def"
    if "multi_gpu" not in name:
        return opened.check_properties()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=arguments["port"])
    group = opened.parser.get_parsed_content("distributed")
    group.start()  # as its `run` does before anything else
    wrong = opened.check_properties()
    group.stop()
    return wrong


def round_trip(arguments: dict[str, Any]) -> dict[str, Any]:
    """Properties set by name, and what is read afterwards."""
    opened = workflow("train", arguments)
    opened.max_epochs, opened.val_interval = 3, 2
    opened.bundle_root, opened.dataset_dir = os.getcwd(), f"{arguments['data']}/."
    opened.initialize()
    read = {name: getattr(opened, name) for name in ("max_epochs", "val_interval", "bundle_root", "dataset_dir")}
    read["trainer_epochs"] = opened.trainer.state.max_epochs
    read["network_def"] = isinstance(opened.network_def, torch.nn.Module)
    read["version"], read["monai_version"] = opened.version, opened.monai_version
    return read


def overridden(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the trained parts know of overrides, given as the command line gives them."""
    parser = workflow("train", arguments, learning_rate=0.5, batch_size=3, max_epochs=7, weight_decay=0.25).parser
    optimizer, trainer = (parser.get_parsed_content(name) for name in ("optimizer", "train#trainer"))
    groups = optimizer.param_groups
    return {
        "learning_rate": sorted({group["initial_lr"] for group in groups}),
        "weight_decay": sorted({group["weight_decay"] for group in groups}),
        "batch_size": parser.get_parsed_content("train#dataloader").batch_size,
        "max_epochs": trainer.state.max_epochs,
    }


def as_volume(item: dict[str, Tensor], parser: ConfigParser) -> Tensor:
    """The network's input from a validation item, [C, X, Y, S]; VoCo's base crops are put together again."""
    if "base_crops" not in item:
        return torch.as_tensor(item["image"])
    rows, columns = item["base_crops"].shape[:2]
    batch = {key: torch.as_tensor(value)[None] for key, value in item.items() if key != "series_id"}
    crops, overlap = parser.get_parsed_content("train#prepare_batch")(batch, "cpu")
    base = crops[0, overlap.shape[1] :].unflatten(0, (rows, columns))  # (rows, columns, S, C, h, w)
    return base.permute(3, 0, 4, 1, 5, 2).flatten(1, 2).flatten(2, 3)


def preprocessing(arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Validation's and inference's tensors of the same series, validation's also as read back from its cache."""
    train, inference = workflow("train", arguments).parser, workflow("inference", arguments).parser
    validated, inferred = train.get_parsed_content("validate#dataset"), inference.get_parsed_content("dataset")
    found = {}
    for path in arguments["samples"]:
        data = [{"image": path, "patient_id": "a", "series_id": "b"}]
        validated.data, inferred.data = data, data
        volumes = [as_volume(validated[0], train) for _ in range(2)]
        item = inferred[0]
        result = torch.as_tensor(item["image"])
        found[Path(path).name] = {
            "failed": item["failed"],
            "shape": list(result.shape),
            "equal": [torch.equal(result, volume) for volume in volumes],
            "largest_difference": [float((result - volume).abs().max()) for volume in volumes],
            "range": [float(result.min()), float(result.max())],
            "std": float(result.std()),
        }
    return found


def network_shape() -> str:
    verify_net_in_out("network_def", meta_file="configs/metadata.json", config_file="configs/inference.json",
                      device="cpu")  # fmt: skip
    return "verified"


def attempt(function: Any, *arguments: Any) -> Any:
    """The result, or what went wrong, so that one fault does not hide the others."""
    try:
        return function(*arguments)
    except ERRORS as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return f"{type(error).__name__}: {error}"


def main(arguments: dict[str, Any]) -> None:
    found = {
        "imports": attempt(changed_by_imports),  # first: nothing of the bundle is imported yet
        "round_trip": attempt(round_trip, arguments),
        "overridden": attempt(overridden, arguments),
        "preprocessing": attempt(preprocessing, arguments),
        "network_shape": attempt(network_shape),
        # last: Ignite remembers that the process was one of a group
        "properties": {name: attempt(wrong_properties, name, arguments) for name in WORKFLOWS},
        "folders": [name for name in WORKFLOWS if (Path(arguments["root"]) / name).exists()],
    }
    Path(arguments["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
