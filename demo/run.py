# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole path on synthetic CT: data, pretraining, fine-tuning, evaluation, inference; ends with a short table.

    python -m demo.run --out out/demo

Each stage is the bundles' own command, printed before it runs, so that any of them can be tried again by hand. The demo
uses a small backbone, small volumes and easy injuries by override, so that it learns something in minutes on two cores;
the bundles' defaults stay those of the method. Nothing here says anything about patients: the data are synthetic.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from workflow.checkpoint_files import newest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TEST_SHARE = 1 / 3
# Fewer page faults: without this glibc hands every large tensor's memory back and fetches it again at the next step.
# And threads that wait give the core to the loader's processes instead of spinning.
SURROUNDINGS = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
}  # fmt: skip

SMALL = {"backbone_name": "test_efficientnet", "volume_size": [96, 96, 28], "num_workers": 2, "device": "cpu"}
PRETRAIN = {
    **SMALL, "crop_size": [32, 32], "num_slices": 8, "hidden_size": 256, "batch_size": 6, "max_epochs": 3,
    "learning_rate": 0.002, "warmup_fraction": 0.1, "ema_momentum": 0.9, "val_interval": 3, "augment_prob": 0,
}  # fmt: skip
NETWORK = {**SMALL, "image_size": [96, 96], "num_slices": 20, "hidden_size": 64}
FINE_TUNE = {
    **NETWORK, "batch_size": 8, "max_epochs": 12, "learning_rate": 0.003, "dropout": 0.1, "augment_prob": 0,
    "val_interval": 3,
}  # fmt: skip


class Demo:
    """Runs stages one after the other and remembers how long each took."""

    def __init__(self, out: Path) -> None:
        self.out, self.runs, self.data = out, out / "runs", out / "data"
        self.seconds: dict[str, float] = {}
        self.environment = {**os.environ, **SURROUNDINGS}

    def command(self, stage: str, *arguments: object) -> None:
        """One command of a stage; ends the demo if it fails."""
        words = [sys.executable, *map(str, arguments)]
        sys.stdout.write(f"\n--- {stage}\n$ {shlex.join(['python', *words[1:]])}\n")
        sys.stdout.flush()
        start = time.time()
        subprocess.run(words, cwd=ROOT, env=self.environment, check=True)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.time() - start

    def bundle(self, stage: str, bundle: str, run_name: str, configs: list[str], **overrides: Any) -> None:
        """`python -m monai.bundle run` of a bundle, from the project's top folder."""
        folder = Path("bundles") / bundle
        files = [str(folder / "configs" / name) for name in configs]
        pairs = {"bundle_root": folder, "output_root": self.runs, "run_name": run_name, **overrides}
        arguments = [word for key, value in pairs.items() for word in (f"--{key}", value)]
        config = files[0] if len(files) == 1 else str(files)
        self.command(stage, "-m", "monai.bundle", "run", "--config_file", config, *arguments)


def split(data: Path, seed: int, tested: int | None = None) -> Path:
    """So many patients (default: a third) for the test, never trained on; ten folds of the others."""
    from workflow.folds import make_folds, write_folds

    from bundles.rsna_cnn_lstm.scripts.datalist import rsna_datalist

    items = rsna_datalist(data, ROOT / "bundles/rsna_cnn_lstm/configs/labels.json")
    patients = sorted({item["patient_id"] for item in items})
    number = round(len(patients) * TEST_SHARE) if tested is None else tested
    test_patients = set(patients[:number])  # patients are independent of their number
    folds = make_folds([item for item in items if item["patient_id"] not in test_patients], num_folds=10, seed=seed)
    test = pd.DataFrame({"patient_id": sorted(test_patients), "fold": "test"})
    (data.parent / "folds.csv").unlink(missing_ok=True)  # an older demo's
    write_folds(data.parent / "folds.csv", pd.concat([folds, test]))
    return data.parent / "folds.csv"


def health(folder: Path) -> dict[str, float]:
    """Figures of an evaluation of the pretraining bundle."""
    table = pd.read_csv(folder / "metrics.csv", header=None, index_col=0)
    return table[1].astype(float).to_dict()


def figure(value: dict[str, Any]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def table(demo: Demo) -> str:
    """What came out, each figure beside its baseline."""
    result = json.loads((demo.runs / "evaluation" / "metrics.json").read_text())
    trained, untrained = health(demo.runs / "health"), health(demo.runs / "health_untrained")
    baseline = result["baseline"]
    rows = [
        f"SYNTHETIC data, small backbone {SMALL['backbone_name']}: shows that the software works, no more",
        f"{result['patients']} test patients; intervals: 95 % bootstrap over patients",
        "",
        f"{'classifier':<28}{'fine-tuned':<26}class frequencies",
        f"{'score (lower is better)':<28}{figure(result['score']):<26}{baseline['score']:.3f}",
        f"{'mAP':<28}{figure(result['mAP']):<26}{baseline['mAP']:.3f}",
        *(f"{f'AUC {name}':<28}{figure(value):<26}0.500" for name, value in result["auc"].items() if value["value"]),
        f"{'score minus frequencies':<28}{figure(baseline['score_difference'])}",
        "",
        f"{'pretrained network':<28}{'pretrained':<26}untrained",
        *(f"{name:<28}{trained[key]:<26.3f}{untrained[key]:.3f}" for name, key in HEALTH.items()),
        "",
        "seconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in demo.seconds.items())
        + f"; in all {sum(demo.seconds.values()):.0f}",
        f"TensorBoard: tensorboard --logdir {demo.runs}",
        f"predictions: {demo.runs / 'evaluation' / 'predictions.csv'}",
        f"one series: {demo.runs / 'inference' / 'series'}",
        f"the same series by the weights that the bundle ships: {demo.runs / 'inference_shipped' / 'series'}",
    ]  # fmt: skip
    return "\n".join(rows)


HEALTH = {
    "position accuracy": "position_accuracy",
    "embedding spread": "embedding_spread",
    "slice height error": "slice_height_error",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder of the demo; an older one is replaced"
    )
    parser.add_argument("--patients", type=int, default=450, help="synthetic patients, a third of them for the test")
    parser.add_argument("--seed", type=int, default=0, help="of data and training")
    parser.add_argument("--max_epochs", type=int, help="epochs of both trainings, to try it faster")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    shutil.rmtree(out / "runs", ignore_errors=True)
    demo = Demo(out)
    epochs = {} if args.max_epochs is None else {"max_epochs": args.max_epochs, "val_interval": 1}
    demo.command("data", "-m", "demo.dataset", demo.data, "--patients", args.patients, "--seed", args.seed,
                 "--size", 96, "--slices", 28, "--workers", 2, "--overwrite")  # fmt: skip
    data = {"dataset_dir": demo.data, "folds_file": split(demo.data, args.seed), "seed": args.seed}
    voco, rsna = "voco2d_pretrain", "rsna_cnn_lstm"
    demo.bundle("pretrain", voco, "pretrain", ["train.json"], **data, **{**PRETRAIN, **epochs})
    newest = newest_checkpoint(demo.runs / "pretrain" / "checkpoints")
    measured = ["train.json", "evaluate.json"]
    demo.bundle("probe", voco, "health", measured, **data, **PRETRAIN, part="test", checkpoint=newest)
    demo.bundle("probe", voco, "health_untrained", measured, **data, **PRETRAIN, part="test")
    pretrained = {"pretrained_path": demo.runs / "pretrain" / "model.pt"}
    demo.bundle("fine-tune", rsna, "fine_tune", ["train.json"], **data, **pretrained, **{**FINE_TUNE, **epochs})
    weights = {"weights": demo.runs / "fine_tune" / "model.pt"}
    demo.bundle("evaluate", rsna, "evaluation", measured, **data, **NETWORK, **weights, part="test")
    series = next(folder for folder in sorted((demo.data / "train_images").glob("*/*")))
    demo.bundle("infer", rsna, "inference", ["inference.json"], dataset_dir=series, **NETWORK, **weights)
    # the bundle as it is shipped: its own weights (see MODEL_CARD.md beside them), the default network and sizes
    demo.bundle("infer", rsna, "inference_shipped", ["inference.json"], dataset_dir=series, device="cpu", num_workers=0)
    sys.stdout.write(f"\n{table(demo)}\n")


if __name__ == "__main__":
    main()
