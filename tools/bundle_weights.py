# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The weights of a packed bundle: those that its default network takes, with checksums, or the place where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from monai.bundle import ConfigParser
from safetensors.torch import save
from torch import Tensor, nn
from workflow.card import CARD, names_weights
from workflow.provenance import check_training_config
from workflow.weights import WeightsError, load_tensors, load_weights

from .bundle_files import PackError

__all__ = ["default_network", "large_files", "read_default_weights", "weights_card", "weights_files"]

MODELS = PurePosixPath("models")
# what changes the input or the network; a bundle's own `weights_check` may say more
SETTINGS = ("window", "volume_size", "backbone_name", "backbone_kwargs", "pool")


def default_network(root: Path, name: str) -> nn.Module:
    """`network_def` of the bundle's inference config, without any override."""
    folder = root / "bundles" / name
    text = (folder / "configs" / "inference.json").read_text(encoding="utf-8")
    # the bundle's own code under its name in the repository: `scripts` of two bundles do not go into one process
    parser = ConfigParser(json.loads(text.replace('"scripts.', f'"bundles.{name}.scripts.')))
    parser["bundle_root"] = str(folder)
    network: nn.Module = parser.get_parsed_content("network_def")
    return network


def read_default_weights(root: Path, name: str, path: Path, *, allow_mismatch: bool = False) -> dict[str, Tensor]:
    """A flat state dict that loads strictly into the bundle's default network.

    Raises:
        WeightsError: if it holds anything else than such tensors, or one that is not finite.
        ConfigMismatch: if the training run it stands in had another input than the bundle's default.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: expected the weights of {name}, found no file")
    content = load_tensors(path)
    network = default_network(root, name)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        found = sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(f"{path}: expected a flat state dict, as a run's model.pt is, found {found}")
    load_weights(network, path, what=f"{name} network")
    if set(content) != set(network.state_dict()):  # `load_weights` looks past prefixes, others do not
        raise WeightsError(f"{path}: expected the names of {name}'s network_def, found {sorted(content)[:3]}")
    broken = [key for key, value in content.items() if not torch.isfinite(value).all()]
    if broken:
        raise WeightsError(f"{path}: not finite: {', '.join(broken[:3])}")
    config = ConfigParser.load_config_file(root / "bundles" / name / "configs" / "inference.json")
    names = config.get("weights_check", {}).get("settings", SETTINGS)
    check_training_config(path, {key: config[key] for key in names if key in config}, allow_mismatch)
    return dict(content)


def weights_files(path: Path, state: Mapping[str, Tensor]) -> dict[PurePosixPath, bytes]:
    """What goes into the bundle: the file as it is, the same as safetensors, and checksums for `sha256sum -c`."""
    files = {"model.pt": path.read_bytes(), "model.safetensors": save({k: v.contiguous() for k, v in state.items()})}
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    return {MODELS / name: content for name, content in {**files, "SHA256SUMS": sums.encode()}.items()}


def weights_card(path: Path, *, shipped: bool) -> dict[PurePosixPath, bytes]:
    """The model card beside weights, which goes with those that it names and with no others.

    Args:
        path: the weights.
        shipped: they are the bundle's own, whose card must be theirs; beside a user's file another's card is left out.

    Raises:
        PackError: if the bundle's card is of other weights, or no text.
    """
    file = path.parent / CARD
    if not file.is_file():
        return {}
    content, weights = file.read_bytes(), path.read_bytes()
    if names_weights(content.decode("utf-8", errors="replace"), weights):
        return {MODELS / CARD: content}
    if not shipped:
        return {}
    raise PackError(
        f"{file}: expected the card of {path.name}, sha256 {hashlib.sha256(weights).hexdigest()}, found that of other "
        "weights: `make weights` writes both; for weights of your own write a card that names them, or remove it"
    )


def large_files(path: Path, url: str) -> dict[PurePosixPath, bytes]:
    """``large_files.yml`` for weights that are downloaded (`monai.bundle download_large_files`).

    Raises:
        PackError: if the address is not https.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.netloc or any(c.isspace() or c == '"' for c in url):
        raise PackError(f"--weights-url {url}: expected an address that begins with https://")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    text = f'large_files:\n- path: "models/model.pt"\n  url: "{url}"\n  hash_val: "{digest}"\n  hash_type: "sha256"\n'
    return {PurePosixPath("large_files.yml"): text.encode()}
