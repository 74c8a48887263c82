# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Order and randomness are a pure function of (seed, epoch, item)."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, RandFlipd, RandGaussianNoised
from torch.utils.data import DataLoader
from transforms import SeriesError
from workflow.dataset import PreparationError, SeriesDataset, SlabDataset, collate_plain
from workflow.sampler import EpochSampler


class Read(MapTransform):
    """A text file with a number -> a volume of that number; another content is an error."""

    def __init__(self) -> None:
        super().__init__(keys="image")

    def __call__(self, data: dict) -> dict:
        text = Path(data["image"]).read_text()
        if not text.isdigit():
            raise SeriesError(f"{data['image']}: expected a number, found {text}")
        return {
            **data,
            "image": MetaTensor(torch.full((1, 4, 4, 3), int(text), dtype=torch.uint8), affine=torch.eye(4)),
        }


@pytest.fixture
def data(tmp_path) -> list[dict]:
    items = []
    for i in range(7):
        path = tmp_path / f"{i}.txt"
        path.write_text(str(i * 10))
        items.append({"image": str(path), "series_id": str(i)})
    return items


def noisy() -> Compose:
    return Compose([RandGaussianNoised("image", prob=1.0, std=5.0), RandFlipd("image", prob=0.5, spatial_axis=0)])


def drawn(dataset: SlabDataset, numbers: list[int], workers: int, batch_size: int = 2) -> dict[int, torch.Tensor]:
    loader = DataLoader(
        dataset, batch_size=batch_size, sampler=numbers, num_workers=workers, collate_fn=collate_plain
    )  # fmt: skip
    images = torch.cat([batch["image"] for batch in loader])
    return dict(zip(numbers, images, strict=True))


@given(
    num_items=st.integers(1, 40),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 4),
    epoch=st.integers(0, 10**6),
    seed=st.integers(0, 2**32),
    weighted=st.booleans(),
    fill=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_each_step_of_all_ranks_is_that_of_one_process_with_the_global_batch(
    num_items, world_size, batch_size, epoch, seed, weighted, fill
):
    options = {"seed": seed, "weights": np.arange(1, num_items + 1) if weighted else None}
    single = EpochSampler(num_items, **options)
    single.set_epoch(epoch)
    order = list(single)
    steps: list[list[int]] = []  # batches of the ranks in turn
    for rank in range(world_size):
        sampler = EpochSampler(num_items, batch_size=batch_size, fill=fill, rank=rank, world_size=world_size, **options)
        sampler.set_epoch(epoch)
        share = list(sampler)
        assert list(sampler) == share  # pure: the same when asked again
        assert len(share) == len(sampler)
        steps.append([share[i : i + batch_size] for i in range(0, len(share), batch_size)])
    together = batch_size * world_size
    last = num_items % together
    filled = world_size - last if fill and 0 < last < world_size else 0
    expected = order + [order[i % num_items] for i in range(filled)]
    if fill:
        assert len({len(batches) for batches in steps}) == 1  # every rank takes part in every step
    for number in range(0, len(expected), together):
        batches = [rank[number // together] if number // together < len(rank) else [] for rank in steps]
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) > 0 or not fill
        found = [batch[j] for j in range(max(sizes)) for batch in batches if j < len(batch)]
        assert found == expected[number : number + together]


def test_the_order_changes_with_epoch_and_seed_and_nothing_else():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(50, seed=seed)
        sampler.set_epoch(epoch)
        return [number % 50 for number in sampler]

    np.random.seed(1)  # noqa: NPY002
    first = order(0, 0)
    np.random.seed(2)  # noqa: NPY002
    assert order(0, 0) == first
    assert first != list(range(50))
    assert order(0, 1) != first
    assert order(1, 0) != first
    assert list(EpochSampler(5, shuffle=False)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="num_items: expected at least one item, got 0"):
        EpochSampler(0)


def test_partners_in_a_batch_change_from_epoch_to_epoch():
    sampler, pairs = EpochSampler(8), set()
    for epoch in range(6):
        sampler.set_epoch(epoch)
        order = [number % 8 for number in sampler]
        pairs |= {frozenset(order[i : i + 2]) for i in range(0, 8, 2)}
    assert len(pairs) > 8  # a fixed order would have 4


@pytest.mark.parametrize("cached", [False, True])
def test_items_are_the_same_for_any_workers_batches_and_order(data, tmp_path, cached):
    cache_dir = str(tmp_path / "cache") if cached else None
    numbers = [14, 3, 8, 0, 7, 10]  # items 0 and 3 in two epochs each
    runs = [
        drawn(SlabDataset(data, Read(), noisy(), cache_dir=cache_dir, seed=5), order, workers, batch_size)
        for order, workers, batch_size in [(numbers, 0, 2), (numbers, 2, 2), (numbers[::-1], 0, 3), (numbers, 2, 1)]
    ]
    for other in runs[1:]:
        assert all(torch.equal(other[number], runs[0][number]) for number in numbers)
    assert not torch.equal(runs[0][14], runs[0][7])  # item 0 again, in another epoch
    assert not torch.equal(runs[0][14], runs[0][0])
    other_seed = drawn(SlabDataset(data, Read(), noisy(), cache_dir=cache_dir, seed=6), numbers, 0)
    assert not torch.equal(other_seed[14], runs[0][14])
    assert not torch.equal(runs[0][3] - 30.0, runs[0][7] - 0.0)  # the noise of two items differs


def test_the_transform_may_be_absent_or_without_chance(data):
    dataset = SlabDataset(data, Read())
    assert dataset[10]["image"].unique().tolist() == [30]
    assert dataset[3]["series_id"] == "3"
    assert data[3]["image"].endswith("3.txt")  # the datalist keeps its paths
    assert SlabDataset(data, Read(), lambda item: item["series_id"])[2] == "2"
    assert len(dataset) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_every_failed_series_is_listed_before_training(data, tmp_path, workers):
    for i in (2, 5):
        Path(data[i]["image"]).write_text("nonsense")
    Path(data[6]["image"]).unlink()
    dataset = SlabDataset(data, Read(), cache_dir=str(tmp_path / "cache"), num_workers=workers)
    with pytest.raises(PreparationError) as caught:
        dataset.prepare_all()
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 of 7 series cannot be used:"
    assert lines[1] == f"  {data[2]['image']}: SeriesError: {data[2]['image']}: expected a number, found nonsense"
    assert lines[2].startswith(f"  {data[5]['image']}: SeriesError")
    assert lines[3].startswith(f"  {data[6]['image']}: FileNotFoundError")
    assert lines[4] == "(--skip_failed True goes on without them)"


def test_failed_series_may_be_left_out(data, tmp_path, caplog):
    Path(data[2]["image"]).write_text("nonsense")
    data = [{**item, "patient_id": "lost" if k == 2 else "p"} for k, item in enumerate(data)]
    dataset = SlabDataset(data, Read(), cache_dir=str(tmp_path / "cache"), skip_failed=True)
    dataset.prepare_all()
    assert dataset.lost_patients == 1
    assert [item["series_id"] for item in dataset.data] == ["0", "1", "3", "4", "5", "6"]
    assert dataset.failed[0][0] == data[2]["image"]
    assert "1 of 7 series cannot be used" in caplog.text
    assert dataset[2]["image"].unique().tolist() == [30]
    for item in data:
        Path(item["image"]).write_text("nonsense")
    with pytest.raises(PreparationError, match="6 of 6"):  # nothing is left to go on with
        dataset.prepare_all()


def test_all_good_series_are_prepared_once(data, tmp_path, caplog):
    dataset = SlabDataset(data, Read(), cache_dir=str(tmp_path / "cache"))
    dataset.prepare_all()
    assert dataset.failed == []
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 7
    with caplog.at_level(logging.WARNING):
        SlabDataset(data, Read()).prepare_all()
    assert "cache_dir is null" in caplog.text


def test_a_series_that_fails_at_inference_leaves_a_placeholder(data):
    Path(data[1]["image"]).write_text("nonsense")
    dataset = SeriesDataset(data[:2], Compose([Read()]), (1, 4, 4, 3))
    assert len(dataset) == 2
    good, bad = dataset[0], dataset[1]
    assert (good["failed"], good["source"]) == ("", data[0]["image"])
    assert bad["failed"] == f"SeriesError: {data[1]['image']}: expected a number, found nonsense"
    assert bad["source"] == data[1]["image"]
    assert bad["image"].shape == (1, 4, 4, 3)
    assert not bad["image"].any()
    batch = collate_plain([{**good, "image": good["image"].float()}, bad])
    assert batch["image"].shape == (2, 1, 4, 4, 3)
    assert batch["failed"] == ["", bad["failed"]]


def test_a_bug_is_no_failed_series(data):
    with pytest.raises(KeyError):
        SeriesDataset(data, lambda item: item["absent"], (1,))[0]


def test_collation_copies_views_and_leaves_meta_data_behind():
    volume = torch.arange(2 * 36, dtype=torch.uint8).reshape(2, 6, 6)
    items = []
    for image in volume:
        view = image.unfold(0, 3, 3).unfold(1, 3, 3)  # base crops as a strided view
        assert not view.is_contiguous()
        items.append({"crops": MetaTensor(view, affine=torch.eye(4)), "array": np.ones(2), "series_id": "a"})
    batch = collate_plain(items)
    assert type(batch["crops"]) is torch.Tensor
    assert batch["crops"].is_contiguous()
    assert batch["series_id"] == ["a", "a"]
    assert batch["array"].shape == (2, 2)
    for crops, image in zip(batch["crops"], volume, strict=True):
        for i in range(2):
            for j in range(2):
                assert torch.equal(crops[i, j], image[3 * i : 3 * i + 3, 3 * j : 3 * j + 3])
    volume.zero_()
    assert batch["crops"].any()


@given(
    num_items=st.integers(1, 30), world_size=st.integers(1, 4), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**32)
)
@settings(deadline=None, max_examples=80)
def test_weighted_draws_are_the_same_for_any_number_of_processes_and_each_has_its_number(
    num_items, world_size, epoch, seed
):
    weights = np.arange(1, num_items + 1) / num_items
    shards = []
    for rank in range(world_size):
        sampler = EpochSampler(num_items, seed=seed, weights=weights, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        shards.append(list(sampler))
        assert list(sampler) == shards[-1]
        assert len(shards[-1]) == len(sampler)
    merged = [number for step in zip(*shards, strict=True) for number in step][:num_items]
    assert len(set(merged)) == len(merged)  # an item drawn twice is augmented in two ways
    sampler.set_epoch(epoch + 1)
    assert not set(merged) & set(sampler)
    if world_size == 1:
        expected = np.random.default_rng([seed, epoch]).choice(num_items, num_items, p=weights / weights.sum())
        assert [number % num_items for number in merged] == expected.tolist()


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [[1.0, 1.0]]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weights: expected 2 positive numbers"):
        EpochSampler(2, weights=weights)
