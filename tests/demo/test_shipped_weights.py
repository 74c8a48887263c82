# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The weights in the repository: small, whole, of the default networks, and what their cards say of them is so."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from workflow.card import CARD, card_notice
from workflow.weights import load_weights

from demo.cards import NOTICE, SOURCES
from tools.bundle_weights import default_network, read_default_weights, weights_files
from tools.pack import BUNDLES

bundles = pytest.mark.parametrize("bundle", BUNDLES)


def shipped(root: Path, bundle: str) -> Path:
    return root / "bundles" / bundle / "models" / "model.pt"


def test_they_are_small(root: Path) -> None:
    assert sum(shipped(root, bundle).stat().st_size for bundle in BUNDLES) < 25_000_000


@bundles
def test_they_fit_the_default_network_in_half_precision(root: Path, bundle: str) -> None:
    state = read_default_weights(root, bundle, shipped(root, bundle))  # strictly, all finite
    kinds = {tensor.dtype for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert kinds == {torch.float16}


@bundles
def test_loading_gives_a_network_in_single_precision(root: Path, bundle: str, caplog: pytest.LogCaptureFixture) -> None:
    network, path = default_network(root, bundle), shipped(root, bundle)
    load_weights(network, path, what="network")
    plain = default_network(root, bundle)  # as `monai.bundle.load` and `ckpt_export` do
    plain.load_state_dict(torch.load(path, weights_only=True))
    for loaded in (network, plain):
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert f"{path}: {NOTICE}" in caplog.text


@bundles
def test_the_card_names_them_and_says_what_they_are_not_for(root: Path, bundle: str) -> None:
    path = shipped(root, bundle)
    card = path.with_name(CARD).read_text(encoding="utf-8")
    assert card_notice(path) == NOTICE
    state = torch.load(path, weights_only=True)
    for name, content in weights_files(path, state).items():
        if name.suffix in (".pt", ".safetensors"):
            assert hashlib.sha256(content).hexdigest() in card, name
    assert "clinical use" in card.split("## Not for")[1]


def test_the_classifiers_card_names_the_backbone_that_it_began_from(root: Path) -> None:
    voco, rsna = (shipped(root, bundle) for bundle in BUNDLES)
    assert hashlib.sha256(voco.read_bytes()).hexdigest() in rsna.with_name(CARD).read_text(encoding="utf-8")


@bundles
def test_every_source_is_cited_as_beside_the_data(root: Path, data_dir: Path, bundle: str) -> None:
    card = shipped(root, bundle).with_name(CARD).read_text(encoding="utf-8")
    table = (data_dir / "README.md").read_text(encoding="utf-8")
    for file, (patient, collection, licence, doi) in SOURCES.items():
        (row,) = [line for line in table.splitlines() if line.startswith((f"| `{file}/`", f"| `{file}.nii"))]
        assert all(part in row for part in (patient, collection, licence, doi))
        assert all(part in card for part in (patient, collection, licence, f"https://doi.org/{doi}"))
