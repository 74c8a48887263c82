# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""2D-VoCo beside 3D VoCo: the same volumes, the same grid in the plane, encoders of like size.

    python -m benchmarks.two_vs_three_d --size small --device cpu --seconds 60 --seeds 3 --out out/two_vs_three_d.json
    python -m benchmarks.two_vs_three_d --size paper --device cuda --seconds 60 --seeds 3 --out out/gpu.json
    python -m benchmarks.two_vs_three_d --smoke --out out/two_vs_three_d.json

A 2D crop is a window in some of the volume's slices (see SIZES), a 3D crop the same window over its whole depth, so
that both are asked for one of the same nine positions. Each network trains in a process of its own, in turns:
round by round, one after another, each round with another seed.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import MALLOC, command_line, header, in_bundle, write
from benchmarks.phantoms import make_phantoms, phantom_series

MODULE = "benchmarks.two_vs_three_d"
# for both alike, so that only the dimensions differ; a fixed momentum suits runs of a minute
COMMON = {
    "voco_form": "v2", "grid_size": 3, "batch_size": 2, "learning_rate": 0.001, "warmup_fraction": 0.1,
    "ema_momentum": 0.9, "num_workers": 0, "num_val_crops": 16,
}  # fmt: skip
# volume: x, y, z. crop: pixels in the plane. slices: of a volume a step in 2D; in 3D all. hidden: the projector's.
# swin: width of the encoder's first stage (3D VoCo's) and its window: SwinUNETR's 7, or 4 where a crop has 16 tokens a
# side, which 7 would pad to 21. phantoms: to train on, and held out
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"volume": [24, 24, 8], "crop": 8, "slices": 2, "hidden": 16, "swin": [12, 4], "phantoms": [4, 2]},
    "small": {"volume": [96, 96, 32], "crop": 32, "slices": 16, "hidden": 256, "swin": [48, 4], "phantoms": [40, 8]},
    # 2D-VoCo's volume, crop and slices; the crop of the bundle's train_3d.json
    "paper": {
        "volume": [192, 192, 64],
        "crop": 64,
        "slices": 32,
        "hidden": 2048,
        "swin": [48, 7],
        "phantoms": [60, 20],
    },
}
SECONDS, SEEDS = 60.0, 3
SMOKE_SECONDS, SMOKE_VAL_CROPS = 0.2, 2
PHANTOM_SEED, SMALLEST_PHANTOM = 7, 32  # pixels
ENVIRONMENT = {**MALLOC, "OMP_WAIT_POLICY": "PASSIVE"}


def networks(size: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each network takes besides `COMMON`: configs, overrides, and parts replaced below the top level."""
    plane, depth = [size["crop"]] * 2, size["volume"][2]
    two = {"crop_size": plane, "num_slices": size["slices"], "grid_size": [COMMON["grid_size"]] * 2}
    three = {"crop_size": [*plane, depth], "grid_size": [COMMON["grid_size"]] * 2 + [1]}
    width, window = size["swin"]
    encoder = {"_target_": "benchmarks.two_vs_three_d.encoders.SwinEncoder", "feature_size": width, "window": window}
    swin = {"network_def": encoder, "voco#num_features": 16 * width}
    found: dict[str, dict[str, Any]] = {
        f"2D {title}": {"configs": ["train"], "settings": two | {"backbone_name": name}, "replaced": {}}
        for title, name in (("EfficientNet-B0", "efficientnet_b0"), ("ResNet-18", "resnet18"))
    }
    # timm's stem halves a crop's sides, MONAI's by default does not: without this 3D would work on twice the side
    stem = {"network_def#conv1_t_stride": 2}
    for title, replaced in (("ResNet-18", stem), ("Swin", swin)):
        found[f"3D {title}"] = {"configs": ["train", "train_3d"], "settings": three, "replaced": replaced}
    return found


def tasks(
    size: dict[str, Any], seeds: int, device: str, seconds: float, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """One a network and seed, in the order in which they run."""
    settings = common | {"volume_size": size["volume"], "hidden_size": size["hidden"], "device": device}
    return [
        {"network": name, "seconds": seconds, **parts, "settings": settings | parts["settings"] | {"seed": seed}}
        for seed in range(seeds)
        for name, parts in networks(size).items()
    ]


def run(plan: list[dict[str, Any]], size: dict[str, Any], together: bool) -> list[dict[str, Any]]:
    """What each task found, in processes of their own one after another, with the threads that OMP_NUM_THREADS says; or
    `together` in one, where nobody reads memory and time."""
    learn, held_out = size["phantoms"]
    with tempfile.TemporaryDirectory() as work:
        shape = max(size["volume"][0], SMALLEST_PHANTOM), size["volume"][2]
        series = phantom_series(make_phantoms(Path(work), learn + held_out, *shape, PHANTOM_SEED))
        data = {"training": series[:learn], "held_out": series[learn:], "cache": str(Path(work, "cache"))}
        # the cache is filled before, so that preparing needs no memory of a process that is measured
        in_bundle("voco2d_pretrain", "benchmarks.two_vs_three_d.parts:fill_cache", plan[0] | data, **ENVIRONMENT)
        rows: list[dict[str, Any]] = []
        for share in [plan] if together else [[task] for task in plan]:
            found = in_bundle(
                "voco2d_pretrain",
                "benchmarks.two_vs_three_d.parts:measure_each",
                {"tasks": share} | data,
                **ENVIRONMENT,
            )
            rows += found["rows"]
        return rows


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = command_line(MODULE, "Memory, speed, FLOP and position accuracy of 2D-VoCo beside 3D VoCo.")
    parser.add_argument("--size", choices=("small", "paper"), default="small", help="see SIZES")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (there with bfloat16, as the bundle's default)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training, each network and seed")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="rounds of all networks, each with its own seed")
    arguments = parser.parse_args(argv)
    if find_spec("einops") is None:
        parser.error("MONAI's Swin encoder needs the package einops: pip install einops (see requirements-dev.txt)")
    name = "smoke" if arguments.smoke else arguments.size
    seeds, seconds = (1, SMOKE_SECONDS) if arguments.smoke else (arguments.seeds, arguments.seconds)
    common = COMMON | ({"num_val_crops": SMOKE_VAL_CROPS} if arguments.smoke else {})
    plan = tasks(SIZES[name], seeds, arguments.device, seconds, common)
    rows = run(plan, SIZES[name], together=arguments.smoke)
    sizes = {"size": name, "sizes": SIZES[name], "common": common, "device": arguments.device}
    sizes |= {"environment": ENVIRONMENT}
    found = sizes | {"seconds": seconds, "seeds": seeds, "rows": rows}
    write(arguments.out, header(MODULE, argv, arguments.smoke) | found)


if __name__ == "__main__":
    sys.exit(main())
