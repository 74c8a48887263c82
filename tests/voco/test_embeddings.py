# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Embeddings of slices and volumes, and the files they go to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from torch import nn

from bundles.voco2d_pretrain.scripts.embeddings import EmbeddingWriter, SliceInferer2D


class Flat(nn.Module):
    """[N, 1, 4, 5] -> two numbers a slice, and the largest batch it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest = max(self.largest, len(x))
        assert type(x) is torch.Tensor
        return torch.stack([x.mean(dim=(1, 2, 3)), x[:, 0, 0, 1]], dim=1)


@pytest.mark.parametrize("slice_batch", [1, 4, 64])
@pytest.mark.parametrize("meta", [False, True])
def test_every_slice_goes_through_the_network_once(slice_batch, meta):
    volume = torch.rand(2, 1, 4, 5, 7)
    network = Flat()
    found = SliceInferer2D(slice_batch)(MetaTensor(volume) if meta else volume, network)
    assert found.shape == (2, 7, 2)
    assert network.largest == min(slice_batch, 14)
    for b in range(2):
        for s in range(7):
            expected = [volume[b, 0, :, :, s].mean(), volume[b, 0, 0, 1, s]]
            assert found[b, s].tolist() == pytest.approx([float(v) for v in expected])


def run(folder: Path, failed: list[str]) -> EmbeddingWriter:
    writer = EmbeddingWriter(str(folder))
    data = [
        {
            "image": torch.full((1, 1, 4, 5, 3), float(i)) + torch.arange(3.0),
            "source": [f"/data/é, {i}"],
            "failed": [reason],
        }
        for i, reason in enumerate(failed)
    ]
    SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=data, network=Flat(), inferer=SliceInferer2D(),
        prepare_batch=lambda batch, *_, **__: (batch["image"], None), val_handlers=[writer], decollate=True,
    ).run()  # fmt: skip
    return writer


def test_one_file_a_series_and_an_index(tmp_path):
    writer = run(tmp_path, ["", "SeriesError: a slice is missing", ""])
    assert writer.failed == [("/data/é, 1", "SeriesError: a slice is missing")]
    index = pd.read_csv(tmp_path / "embeddings.csv")
    assert index["file"].tolist() == ["embeddings/00001.npz", "embeddings/00002.npz"]
    assert index["image"].tolist() == ["/data/é, 0", "/data/é, 2"]
    assert index["slices"].tolist() == [3, 3]
    for i, file in zip((0, 2), index["file"], strict=True):
        with np.load(tmp_path / file) as saved:
            assert saved["slices"].dtype == np.float32
            np.testing.assert_allclose(saved["slices"], [[i, i], [i + 1, i + 1], [i + 2, i + 2]])
            np.testing.assert_allclose(saved["volume"], [i + 1, i + 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embeddings", "embeddings.csv"]


def test_where_all_fail_the_index_is_empty(tmp_path):
    writer = run(tmp_path, ["bad", "worse"])
    assert len(writer.failed) == 2
    assert (tmp_path / "embeddings.csv").read_text().strip() == "file,image,slices"
