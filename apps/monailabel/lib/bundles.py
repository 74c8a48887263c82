# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the bundles and the user's settings are: what `--conf KEY VALUE` of the server's command line says."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "CLASSIFIER",
    "PRETRAINING",
    "Setup",
    "SetupError",
    "bundles_folder",
    "left_aside",
    "read_setup",
    "use_bundle",
]

CLASSIFIER, PRETRAINING = "rsna_cnn_lstm", "voco2d_pretrain"
KEYS = ("models", "bundles", "settings", "weights", "output_root", "device", "upload_limit_mb", "unpacked_limit_mb",
        "hosts", "labels", "patients")  # fmt: skip
# the configs of each bundle that the app runs
CONFIGS = {CLASSIFIER: ("inference", "train", "evaluate"), PRETRAINING: ("train",)}
# what the app itself says in every run
OWN = ("bundle_root", "dataset_dir", "datalist", "folds_file", "weights", "output_root", "run_name", "resume")


class SetupError(ValueError):
    """A `--conf` that the app cannot start with; the message names it and what was expected."""


@dataclass(frozen=True)
class Setup:
    """The parsed `--conf` pairs.

    Attributes:
        bundles: folder of both bundles.
        models: what is served, out of both.
        settings: overrides of the bundles' configs: model -> config -> name -> value.
        weights: the classifier to start with; may be absent, then training makes the first. None where the bundle's own
            are not for this, see `left_aside`.
        output_root: folder of runs and versions.
        device: None for the bundle's own choice.
        upload_limit: bytes of a request.
        unpacked_limit: bytes that an upload may unpack to.
        hosts: names by which browsers may call the server, beside localhost and any address in numbers.
        labels: folder below which the labels are; None for the studies.
        patients: CSV of the patient of each image; None where the images tell.
    """

    app_dir: Path
    bundles: Path
    models: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]]
    weights: Path | None
    output_root: Path
    device: str | None
    upload_limit: int
    unpacked_limit: int = 2_048_000_000
    hosts: tuple[str, ...] = ()
    labels: Path | None = None
    patients: Path | None = None

    def bundle(self, name: str) -> Path:
        """The folder of a bundle."""
        return self.bundles / name

    def overrides(self, name: str, config: str) -> dict[str, Any]:
        """The user's overrides of one config of a bundle."""
        return dict(self.settings.get(name, {}).get(config, {}))


def bundles_folder(app_dir: Path, conf: Mapping[str, str]) -> Path:
    """The folder of both bundles.

    Raises:
        SetupError: if a bundle is not in it.
    """
    folder = (
        Path(conf["bundles"]).expanduser().resolve()
        if conf.get("bundles")
        else app_dir.resolve().parents[1] / "bundles"
    )
    for name, configs in CONFIGS.items():
        for config in configs:
            if not (folder / name / "configs" / f"{config}.json").is_file():
                raise SetupError(f"--conf bundles: expected {name}/configs/{config}.json in {folder}, found none")
    return folder


def shipped_weights(bundles: Path) -> Path:
    """The file of the classifier's own weights; it may be absent."""
    return bundles / CLASSIFIER / "models" / "model.pt"


def left_aside(bundles: Path) -> str | None:
    """What is said of the classifier's own weights where their model card warns of them: a server would show what they
    predict to radiologists and begin trainings with them. Such weights are served only where they are named."""
    from workflow.card import card_notice  # the bundle's, see `use_bundle`

    path = shipped_weights(bundles)
    notice = card_notice(path)
    return notice and f"{path} is not served: {notice} Name it, or better another file, by --conf weights FILE"


def read_setup(app_dir: Path, conf: Mapping[str, str]) -> Setup:
    """The setup that `--conf` pairs mean.

    Raises:
        SetupError: for an unknown key or model, a value of the wrong kind, unreadable settings or a file that is not
            there: one that is named has to be.
    """
    unknown = sorted(set(conf) - set(KEYS))
    if unknown:
        raise SetupError(f"--conf {', '.join(unknown)}: unknown; known are {', '.join(KEYS)}")
    bundles = bundles_folder(app_dir, conf)
    root, labels = conf.get("output_root"), conf.get("labels")
    shipped = None if left_aside(bundles) else shipped_weights(bundles)
    return Setup(
        app_dir=app_dir,
        bundles=bundles,
        models=_models(conf.get("models", ",".join(CONFIGS))),
        settings=_settings(conf.get("settings")),
        weights=_file("weights", conf) or shipped,
        output_root=_path(root) if root else app_dir.resolve() / "model",
        device=conf.get("device") or None,
        upload_limit=_bytes("upload_limit_mb", conf),
        unpacked_limit=_bytes("unpacked_limit_mb", conf),
        hosts=tuple(name.strip().lower() for name in conf.get("hosts", "").split(",") if name.strip()),
        labels=_path(labels) if labels else None,
        patients=_file("patients", conf),
    )


def use_bundle(folder: Path) -> None:
    """Make a bundle's `scripts`, `workflow`, `transforms` and `networks` importable.

    Raises:
        SetupError: if the `scripts` of another bundle are in use: a process can only have one.
    """
    scripts = getattr(sys.modules.get("scripts"), "__file__", None)
    if scripts is not None and Path(scripts).resolve().parents[1] != folder.resolve():
        raise SetupError(f"{folder}: the modules of {Path(scripts).parents[1]} are in use in this process")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _models(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in CONFIGS]
    if unknown or not names:
        raise SetupError(f"--conf models: expected some of {', '.join(CONFIGS)}, got {text!r}")
    return names


def _file(key: str, conf: Mapping[str, str]) -> Path | None:
    """A file that is named has to be there: a typing error would else count as none."""
    if not conf.get(key):
        return None
    path = _path(conf[key])
    if not path.is_file():
        raise SetupError(f"--conf {key}: expected a file, found none at {path}")
    return path


def _bytes(key: str, conf: Mapping[str, str]) -> int:
    text = conf.get(key, "2048")
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0.0
    if not 0 < megabytes < float("inf"):
        raise SetupError(f"--conf {key}: expected a number above 0, got {text!r}")
    return int(megabytes * 1e6)


def _settings(text: str | None) -> dict[str, dict[str, dict[str, Any]]]:
    """The settings file; the names of overrides themselves are the bundles' to judge."""
    if not text:
        return {}
    try:
        content = json.loads(_path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"--conf settings: expected a JSON file, got {text}: {error}") from error
    expected = f"--conf settings {text}: expected {{model: {{config: {{name: value}}}}}} of {CONFIGS}"
    if not isinstance(content, dict):
        raise SetupError(f"{expected}, found a {type(content).__name__}")
    for model, configs in content.items():
        if model not in CONFIGS or not isinstance(configs, dict):
            raise SetupError(f"{expected}, found {model!r}")
        for config, overrides in configs.items():
            if config not in CONFIGS[model] or not isinstance(overrides, dict):
                raise SetupError(f"{expected}, found {model!r}: {config!r}")
            own = sorted(set(overrides) & set(OWN))
            if own:
                raise SetupError(
                    f"--conf settings {text}: {model}, {config}: {', '.join(own)} is set by the app itself"
                )
    return content
