# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Whoever loads weights with a model card is told what the card warns of; another file's card says nothing."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from workflow.card import CARD, card_notice
from workflow.weights import load_weights

NOTICE = "Trained on synthetic injuries, not for clinical use."


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """In half precision, with a card."""
    path = tmp_path / "model.pt"
    torch.save({name: tensor.half() for name, tensor in nn.Linear(3, 2).state_dict().items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / CARD).write_text(f"# Card\n\n> **{NOTICE}**\n> More.\n\nsha256 `{digest}`\n", encoding="utf-8")
    return path


def test_the_notice_is_the_first_quoted_line(weights: Path) -> None:
    assert card_notice(weights) == card_notice(str(weights)) == NOTICE


def test_another_files_card_and_none_say_nothing(weights: Path) -> None:
    other = weights.with_name("other.pt")
    torch.save(nn.Linear(3, 2).state_dict(), other)
    assert card_notice(other) is None
    assert card_notice(weights.with_name("absent.pt")) is None
    card = weights.with_name(CARD)
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace("> ", ""), encoding="utf-8")
    assert card_notice(weights) is None
    card.write_bytes(b"\xff" + text.encode())
    assert card_notice(weights) is None
    card.unlink()
    assert card_notice(weights) is None


def test_loading_warns_and_casts_to_the_networks_type(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Linear(3, 2)
    with caplog.at_level(logging.INFO):
        assert load_weights(module, weights) == (2, 2)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"{weights}: {NOTICE}"]
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
    caplog.clear()
    weights.with_name(CARD).unlink()
    load_weights(module, weights)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
