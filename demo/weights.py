# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The weights that the bundles ship, from nothing: synthetic patients and small open CT, pretraining, fine-tuning.

    python -m demo.weights --work out/weights --models bundles [--data DIR ...]

It may be stopped at any time: the same command goes on where it was, and one with other settings is refused that work
folder. The networks are the bundles' default ones, trained from small to large images so that a CPU is enough; the
classifier's figures are of the very file that is shipped, at the default settings. The injuries are SYNTHETIC: the
figures say nothing about patients, and the weights are not for clinical use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from workflow.checkpoint_files import newest_checkpoint
from workflow.datalist import find_series, read_folds
from workflow.run import whole_file, write_atomically

from .cards import backbone_card, classifier_card
from .run import ROOT, Demo, health, split
from .work_folder import OtherSettings, duration, hold_settings, stamp, write_stamp

VOCO, RSNA = "voco2d_pretrain", "rsna_cnn_lstm"
SAMPLES = ROOT / "tests" / "data"
NO_IMAGES = ["*mask*", "*segmentation*", "*label*", "*organs*"]
PATIENTS, TESTED, SEED = 300, 100, 0
REPEATS = 8  # of each real series among the synthetic ones, in an epoch

CPU = {"device": "cpu", "num_workers": 1}
# The projector is not kept: a narrow one is enough for so few volumes.
VOCO_RUN = {
    **CPU, "hidden_size": 512, "warmup_fraction": 0.1, "ema_momentum": 0.9, "num_val_crops": 4, "augment_prob": 0,
}  # fmt: skip
PRETRAIN_SMALL = {
    **VOCO_RUN, "volume_size": [96, 96, 32], "crop_size": [32, 32], "num_slices": 6, "batch_size": 6, "max_epochs": 4,
    "learning_rate": 0.001, "val_interval": 4,
}  # fmt: skip
PRETRAIN = {**VOCO_RUN, "num_slices": 4, "batch_size": 4, "max_epochs": 1, "learning_rate": 0.0003}
HEALTH = {**CPU, "hidden_size": 512, "num_slices": 4, "num_val_crops": 8, "part": "test"}
RSNA_RUN = {**CPU, "dropout": 0.1, "augment_prob": 0, "flip_prob": 0, "keep_best": False, "slice_loss_weight": 0.3}
# The whole body at once: of a crop of it a label speaks only in part, and nothing was learnt in as many steps.
FINE_TUNE_SMALL = {
    **RSNA_RUN, "volume_size": [96, 96, 32], "image_size": [96, 96], "num_slices": 16, "batch_size": 8,
    "max_epochs": 20, "learning_rate": 0.001, "val_interval": 5,
}  # fmt: skip
# half way to the default size: what was learnt of small bodies was mostly lost in one step from 96 to 256 pixels
FINE_TUNE_MEDIUM = {
    **RSNA_RUN, "volume_size": [160, 160, 48], "image_size": [160, 160], "num_slices": 12, "batch_size": 8,
    "max_epochs": 3, "learning_rate": 0.001, "val_interval": 3,
}  # fmt: skip
FINE_TUNE = {
    **RSNA_RUN, "num_slices": 12, "batch_size": 4, "max_epochs": 3, "learning_rate": 0.0005, "val_interval": 3,
}  # fmt: skip
# the recurrent network and the head alone, on just what inference will give them
FINE_TUNE_HEAD = {**RSNA_RUN, "freeze_blocks": "all", "batch_size": 4, "max_epochs": 1, "learning_rate": 0.0003}
EVALUATE = {**CPU, "part": "test"}  # the default settings, on patients of the test
WHOLE_NETWORK = "demo/whole_network.json"  # `pretrained_path` is then of the classifier


class Weights(Demo):
    """The stages, each done once: a finished one leaves a stamp in the work folder.

    Args:
        work: folder of data, runs and stamps.
        override: settings of every run, to try it faster.
    """

    def __init__(self, work: Path, override: dict[str, Any] | None = None) -> None:
        super().__init__(work)
        self.override = override or {}

    def done(self, stage: str) -> bool:
        return stamp(self.out, stage).is_file()

    def finish(self, stage: str, *, resumed: bool = False) -> None:
        write_stamp(self.out, stage, self.seconds.get(stage, 0.0), resumed=resumed)

    def train(self, stage: str, bundle: str, configs: Sequence[str] = (), **settings: Any) -> Path:
        """A training run, which goes on with what is left of it; its weights."""
        if not self.done(stage):
            begun = {"resume": "latest"} if (self.runs / stage).exists() else {}
            names = ["train.json", *configs]
            self.bundle(stage, bundle, stage, names, **{**settings, **self.override, "save_every_steps": 25, **begun})
            self.finish(stage, resumed=bool(begun))
        return self.runs / stage / "model.pt"

    def measure(self, stage: str, bundle: str, **settings: Any) -> Path:
        """An evaluation, begun anew where it was stopped; its run folder."""
        if not self.done(stage):
            shutil.rmtree(self.runs / stage, ignore_errors=True)
            self.bundle(stage, bundle, stage, ["train.json", "evaluate.json"], **{**settings, **self.override})
            self.finish(stage)
        return self.runs / stage


def make_data(demo: Weights, patients: int, tested: int, seed: int, options: Sequence[object] = ()) -> dict[str, Any]:
    """Synthetic patients, of which the first are for the test alone, and folds of the others."""
    if not demo.done("data"):
        demo.command("data", "-m", "demo.dataset", demo.data, "--patients", patients + tested, "--seed", seed,
                     "--workers", 2, "--overwrite", *options)  # fmt: skip
        split(demo.data, seed, tested)
        demo.finish("data")
    return {"dataset_dir": demo.data, "folds_file": demo.out / "folds.csv", "seed": seed}


def real_series(folders: Sequence[Path]) -> list[Path]:
    """The CT below some folders, without masks of organs."""
    return [Path(item["image"]).absolute() for folder in folders for item in find_series(folder, NO_IMAGES)]


def write_datalist(demo: Weights, real: Sequence[Path]) -> Path:
    """Series of the pretraining: synthetic ones of the folds, and the real ones, several times each, by links."""
    fold_of = read_folds(demo.out / "folds.csv")
    sections: dict[str, list[dict[str, str]]] = {"training": [], "validation": [], "test": []}
    for item in find_series(demo.data, NO_IMAGES):
        part = {"test": "test", "0": "validation"}.get(fold_of[item["patient_id"]], "training")
        sections[part].append({**item, "image": str(Path(item["image"]).absolute())})
    for series in real:
        for number in range(REPEATS):
            link = demo.out / "real" / str(number) / series.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(series)
            name = f"real {series.name} {number}"
            sections["training"].append({"image": str(link), "patient_id": f"real {series.name}", "series_id": name})
    file = demo.out / "pretraining.json"
    write_atomically(file, json.dumps(sections, indent=4) + "\n")
    return file


def write_half(source: Path, target: Path) -> Path:
    """The tensors of a run's model.pt in half precision; counts stay whole numbers. Loading casts them back."""
    state = torch.load(source, map_location="cpu", weights_only=True)
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    broken = [name for name, value in half.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{source}: not finite in half precision: {', '.join(broken[:3])}")
    with whole_file(target) as file:
        torch.save(half, file)
    return target


def pretrain(demo: Weights, data: dict[str, Any], real: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The backbone in half precision, and its figures beside those of an untrained one."""
    series = {"datalist": write_datalist(demo, real), "seed": data["seed"], "dataset_dir": demo.data}
    small = demo.train("pretrain_small", VOCO, **series, **PRETRAIN_SMALL)
    full = demo.train("pretrain", VOCO, **series, **PRETRAIN, pretrained_path=small)
    shipped = write_half(full, demo.out / "shipped" / VOCO / "model.pt")
    newest = newest_checkpoint(demo.runs / "pretrain" / "checkpoints")
    trained = demo.measure("health", VOCO, **series, **HEALTH, checkpoint=newest)
    untrained = demo.measure("health_untrained", VOCO, **series, **HEALTH)
    return shipped, {"pretrained": health(trained), "untrained": health(untrained)}


def fine_tune(demo: Weights, data: dict[str, Any], backbone: Path) -> tuple[Path, dict[str, Any]]:
    """The classifier in half precision, and the figures of that file on the test patients."""
    path = demo.train("fine_tune_small", RSNA, **data, **FINE_TUNE_SMALL, pretrained_path=backbone)
    whole = [f"../../../{WHOLE_NETWORK}"]
    settings = stage_settings()
    for stage in ("fine_tune_medium", "fine_tune", "fine_tune_head"):
        path = demo.train(stage, RSNA, whole, **data, **settings[stage], pretrained_path=path)
    shipped = write_half(path, demo.out / "shipped" / RSNA / "model.pt")
    folder = demo.measure("evaluation", RSNA, **data, **EVALUATE, weights=shipped)
    return shipped, json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def make_weights(
    work: Path,
    models: Path,
    *,
    folders: Sequence[Path] = (),
    patients: int = PATIENTS,
    tested: int = TESTED,
    seed: int = SEED,
    options: Sequence[object] = (),
    override: dict[str, Any] | None = None,
) -> None:
    """All stages; writes ``models/<bundle>/models/model.pt`` and ``MODEL_CARD.md``.

    Args:
        work: as of `Weights`.
        models: folder of the bundles.
        folders: where real CT is searched for; the samples of the tests where there are none.
        patients: synthetic patients that are trained on. tested: those that are not.
        seed: of data and training.
        options: further ones of ``demo.dataset``.
        override: as of `Weights`.

    Raises:
        OtherSettings: if `work` was begun with others.
    """
    demo = Weights(work.absolute(), override)
    real = real_series(folders or [SAMPLES])
    numbers = {"patients": patients, "tested": tested, "seed": seed}
    where = {"data": [str(folder.absolute()) for folder in folders], "series": [path.name for path in real]}
    hold_settings(
        demo.out, {**numbers, **where, "options": list(options), "override": demo.override, **stage_settings()}
    )
    data = make_data(demo, patients, tested, seed, options)
    backbone, figures = pretrain(demo, data, real)
    classifier, result = fine_tune(demo, data, backbone)
    facts = {**numbers, "real": real, "versions": versions(), "duration": duration(demo.out),
             "command": command(numbers, folders, options, demo.override)}  # fmt: skip
    for name, file, text in (
        (VOCO, backbone, backbone_card(backbone, facts, figures)),
        (RSNA, classifier, classifier_card(classifier, facts, result, backbone)),
    ):
        write_atomically(models / name / "models" / "model.pt", file.read_bytes())
        write_atomically(models / name / "models" / "MODEL_CARD.md", text)
        sys.stdout.write(f"\n{text}\n")


def stage_settings() -> dict[str, Any]:
    """The settings of every stage, by which a work folder is known."""
    return {
        "repeats": REPEATS, "pretrain_small": PRETRAIN_SMALL, "pretrain": PRETRAIN, "health": HEALTH,
        "fine_tune_small": FINE_TUNE_SMALL, "fine_tune_medium": FINE_TUNE_MEDIUM, "fine_tune": FINE_TUNE,
        "fine_tune_head": FINE_TUNE_HEAD, "evaluation": EVALUATE,
    }  # fmt: skip


def command(
    numbers: Mapping[str, int], folders: Sequence[Path], options: Sequence[object], override: Mapping[str, Any]
) -> str:
    """What makes the same weights: `make weights`, or what was given in place of its defaults."""
    defaults = {"patients": PATIENTS, "tested": TESTED, "seed": SEED}
    words = [word for name, value in numbers.items() if value != defaults[name] for word in (f"--{name}", value)]
    words += ["--data", *(folder.name for folder in folders)] if folders else []
    text = shlex.join(["python", "-m", "demo.weights", *map(str, words)]) if words else "make weights"
    further = [" ".join(map(str, options)), ", ".join(f"{name} {value}" for name, value in override.items())]
    return f"{text} ({'; '.join(filter(None, further))})" if any(further) else text


def versions() -> str:
    import monai
    import timm

    packages = f"torch {torch.__version__.split('+')[0]}, MONAI {monai.__version__}, timm {timm.__version__}"
    return f"a CPU ({platform.machine()}, {os.cpu_count()} cores), Python {platform.python_version()}, {packages}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/weights"), help="folder of data, runs and stamps")
    parser.add_argument("--models", type=Path, default=ROOT / "bundles", help="folder of the bundles to write into")
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="DIR",
                        help="real CT for the pretraining, instead of the samples in tests/data")  # fmt: skip
    parser.add_argument("--patients", type=int, default=PATIENTS, help="synthetic patients that are trained on")
    parser.add_argument("--tested", type=int, default=TESTED, help="synthetic patients of the test")
    parser.add_argument("--seed", type=int, default=SEED, help="of data and training")
    args = parser.parse_args(argv)
    numbers = {"patients": args.patients, "tested": args.tested, "seed": args.seed}
    try:
        make_weights(args.work, args.models, folders=args.data, **numbers)
    except OtherSettings as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
