# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Slabs: made once, never stale, never damaged, the same as what was prepared."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import CastToTyped, Compose, Lambdad, Resized, ScaleIntensityRanged
from torch.utils.data import DataLoader, Dataset
from transforms import CropBodyd, CropSeriesd, LoadSeriesd
from workflow.cache import SlabCache, describe, slab_bytes
from workflow.dataset import SlabDataset


class Counting:
    """Stands for a preparation: reads a text file with a seed, counts its calls."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.__dict__["R"] = None

    def __call__(self, data: dict) -> dict:
        seed = int(Path(data["image"]).read_text())
        values = np.random.default_rng(seed).integers(0, 200, (1, 5, 4, 3), dtype=np.uint8) + self.offset
        affine = torch.diag(torch.tensor([0.7, 0.8, 5.0, 1.0], dtype=torch.float64))
        calls.append(data["image"])
        return {**data, "image": MetaTensor(torch.from_numpy(values), affine=affine)}


calls: list[str] = []


@pytest.fixture
def item(tmp_path) -> dict:
    calls.clear()
    (tmp_path / "a.txt").write_text("3")
    return {"image": str(tmp_path / "a.txt"), "patient_id": "a"}


@pytest.fixture
def cache(tmp_path) -> SlabCache:
    return SlabCache(Compose([Counting()]), tmp_path / "cache")


def files(cache: SlabCache) -> list[str]:
    return sorted(path.suffix for path in cache.folder.rglob("*") if path.is_file())


def test_the_second_load_prepares_nothing_and_gives_the_same(cache, item):
    assert slab_bytes(cache.path_of(item)) == 0
    first, second = cache.load(item), cache.load(dict(item))
    assert len(calls) == 1
    assert slab_bytes(cache.path_of(item)) > 0
    assert torch.equal(first.as_tensor(), second.as_tensor())
    assert torch.equal(first.affine, second.affine)
    assert second.affine.dtype == torch.float64
    assert second.dtype == torch.uint8
    assert second.meta["filename_or_obj"] == item["image"]
    assert files(cache) == [".json", ".npy"]  # nothing temporary stays
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in cache.folder.rglob("*") if p.is_file())
    SlabCache(Compose([Counting()]), cache.folder).load(item)
    assert len(calls) == 1  # another process's cache finds it


def test_slabs_are_slice_major_and_writing_to_them_reaches_no_file(cache, item):
    cache.load(item)
    volume = cache.load(item)
    assert volume.shape == (1, 5, 4, 3)
    assert volume.as_tensor().permute(3, 0, 1, 2).is_contiguous()
    before = volume.as_tensor().clone()
    volume.as_tensor().zero_()
    assert torch.equal(cache.load(item).as_tensor(), before)
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["parameter", "content", "time", "transforms"])
def test_another_parameter_or_source_makes_another_slab(cache, item, change):
    before = cache.load(item)
    source = Path(item["image"])
    if change == "parameter":
        cache = SlabCache(Compose([Counting(offset=1)]), cache.folder)
    elif change == "transforms":
        cache = SlabCache(Compose([Counting(), Lambdad("image", lambda x: x + 1)]), cache.folder)
    elif change == "content":
        source.write_text("17")
    else:
        os.utime(source, ns=(0, 0))
    after = cache.load(item)
    assert len(calls) == 2
    assert torch.equal(before.as_tensor(), after.as_tensor()) == (change == "time")
    assert files(cache).count(".npy") == 2


def test_a_file_more_in_a_series_folder_makes_another_slab(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "1.dcm").write_text("a")
    (folder / "sub").mkdir()
    cache = SlabCache(Compose([]), tmp_path / "cache")
    before = cache.path_of({"image": str(folder)})
    assert cache.path_of({"image": str(folder), "patient_id": "other"}) == before  # the label is no part of the volume
    (folder / "2.dcm").write_text("a")
    after = cache.path_of({"image": str(folder)})
    assert after != before
    assert cache.path_of({"image": str(folder), "mask": str(folder / "1.dcm")}) != after
    with pytest.raises(FileNotFoundError):
        cache.path_of({"image": str(tmp_path / "gone")})


@pytest.mark.parametrize("damage", ["truncated", "empty", "no json", "broken json", "other shape", "no key", "text"])
def test_a_damaged_slab_is_made_again(cache, item, damage, caplog):
    before = cache.load(item)
    npy = cache.path_of(item).with_suffix(".npy")
    sidecar = npy.with_suffix(".json")
    if damage == "truncated":
        npy.write_bytes(npy.read_bytes()[:-7])
    elif damage == "empty":
        npy.write_bytes(b"")
    elif damage == "text":
        npy.write_text("no array")
    elif damage == "no json":
        sidecar.unlink()
    elif damage == "broken json":
        sidecar.write_text(sidecar.read_text()[:10])
    elif damage == "other shape":
        np.save(npy, np.zeros((3, 1, 4, 4), dtype=np.uint8))
    else:
        sidecar.write_text(json.dumps({"shape": [3, 1, 5, 4]}))
    with caplog.at_level(logging.WARNING):
        again = cache.load(item)
    assert len(calls) == 2
    assert torch.equal(again.as_tensor(), before.as_tensor())
    assert ("damaged slab" in caplog.text) == (damage != "no json")
    cache.load(item)
    assert len(calls) == 2  # repaired


@pytest.mark.parametrize("damage", ["bit", "no checksum"])
def test_a_bit_that_changed_on_the_disk_is_found_by_the_preparation(cache, item, damage, caplog):
    before = cache.load(item).as_tensor().clone()
    path = cache.path_of(item)
    if damage == "bit":
        content = bytearray(path.with_suffix(".npy").read_bytes())
        content[-5] ^= 4
        path.with_suffix(".npy").write_bytes(content)
        assert not torch.equal(cache.load(item).as_tensor(), before)  # steps do not look
    else:
        meta = json.loads(path.with_suffix(".json").read_text())
        del meta["crc32"]
        path.with_suffix(".json").write_text(json.dumps(meta))
    dataset = SlabDataset([item], Compose([Counting()]), cache_dir=str(cache.folder))
    with caplog.at_level(logging.WARNING):
        dataset.prepare_all()
    assert "damaged slab" in caplog.text
    assert len(calls) == 2
    assert torch.equal(cache.load(item).as_tensor(), before)
    dataset.prepare_all()
    assert len(calls) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_is_an_error_of_the_run(cache, item, monkeypatch, workers):
    def full(file: object, *args: object, **options: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("workflow.cache.np.save", full)
    dataset = SlabDataset([item], Compose([Counting()]), cache_dir=str(cache.folder), skip_failed=True,
                          num_workers=workers)  # fmt: skip
    with pytest.raises(OSError, match=r"\.npy could not be written: No space left on device .*make room there"):
        dataset.prepare_each()
    assert dataset.failed == []
    assert files(cache) == [".json"]  # nothing temporary stays


def test_a_file_of_a_series_stands_for_its_folder(tmp_path):
    for name in ("1.dcm", "2.dcm", "a.nii.gz", "b.nii"):
        (tmp_path / name).write_text("a")
    cache = SlabCache(Compose([]), tmp_path / "cache")
    before = {name: cache.path_of({"image": str(tmp_path / name)}) for name in ("1.dcm", "2.dcm", "a.nii.gz")}
    assert len(set(before.values())) == 3
    (tmp_path / "2.dcm").write_text("ab")
    (tmp_path / "b.nii").write_text("ab")
    changed = {name for name, path in before.items() if cache.path_of({"image": str(tmp_path / name)}) != path}
    assert changed == {"1.dcm", "2.dcm"}


def test_no_cache_prepares_each_time(item):
    cache = SlabCache(Compose([Counting()]), None)
    assert cache.path_of(item) is None
    assert torch.equal(cache.load(item), cache.load(item))
    assert len(calls) == 2


class _Loads(Dataset):
    def __init__(self, cache: SlabCache, item: dict) -> None:
        self.cache, self.item = cache, item

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.cache.load(self.item).as_tensor().clone()


def test_several_processes_may_prepare_the_same_series(cache, item):
    expected = Counting()(item)["image"].as_tensor()
    for found in DataLoader(_Loads(cache, item), batch_size=None, num_workers=2):
        assert torch.equal(found, expected)
    assert files(cache) == [".json", ".npy"]


@pytest.mark.parametrize("bundle", ["voco2d_pretrain", "rsna_cnn_lstm"])
@pytest.mark.parametrize("source", ["lidc_idri_0001.nii.gz", "crlm_ct_1004"])
def test_a_slab_of_real_ct_is_what_the_config_prepares(root, data_dir, tmp_path, bundle, source):
    parser = ConfigParser()
    parser.read_config(str(root / "bundles" / bundle / "configs" / "train.json"))
    parser["volume_size"] = [48, 40, 16]
    prepare = parser.get_parsed_content("prepare")
    item = {"image": str(data_dir / source)}
    cache = SlabCache(prepare, tmp_path)
    cache.load(item)
    slab, expected = cache.load(item), prepare(item)["image"]
    assert slab.dtype == torch.uint8
    assert slab.shape == (1, 48, 40, 16)
    assert torch.equal(slab.as_tensor(), expected.as_tensor())
    torch.testing.assert_close(slab.affine, expected.affine.double(), rtol=0, atol=1e-9)
    assert slab.as_tensor().float().std() > 20  # an image, not a constant


# what each option of the preparing transforms may be besides its default; the test below asks for all of them
OPTIONS = {
    LoadSeriesd: {"dtype": "float32", "eight_bit_window": (0, 100), "series_uid": "1.2", "resample": True},
    CropBodyd: {"margin_mm": 7.0, "threshold_hu": -300.0, "mask_key": "mask", "mask_labels": (1,), "source_key": "b"},
    CropSeriesd: {"crop": "organs", "mask_key": "m", "organ_labels": (1,), "organ_margin": 3.0, "missing": "body"},
    ScaleIntensityRanged: {"a_min": -9, "a_max": 9, "b_min": 0.25, "b_max": 0.75, "clip": True, "dtype": np.float64},
    Resized: {
        "spatial_size": (4, 4, 5), "size_mode": "longest", "mode": "trilinear", "align_corners": True,
        "anti_aliasing": True, "anti_aliasing_sigma": 2.0, "dtype": torch.float64,
    },
    CastToTyped: {"dtype": torch.uint8},
}  # fmt: skip
NEEDED = {ScaleIntensityRanged: {"a_min": 0, "a_max": 1, "b_min": 0, "b_max": 1}, Resized: {"spatial_size": (4, 4, 4)}}
NOT_OPTIONS = {"keys", "lazy", "allow_missing_keys", "self", "kwargs"}


def _signature(kind: type) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters) - NOT_OPTIONS


@pytest.mark.parametrize("bundle", ["voco2d_pretrain", "rsna_cnn_lstm"])
def test_the_description_sees_every_option_of_the_preparing_transforms(root, bundle):
    content = ConfigParser.load_config_file(str(root / "bundles" / bundle / "configs" / "train.json"))
    used = {transform["_target_"].rsplit(".", 1)[-1] for transform in content["prepare"]["transforms"]}
    assert used < {kind.__name__ for kind in OPTIONS}  # each bundle has its own way to crop
    for kind, options in OPTIONS.items():
        assert _signature(kind) <= set(options), f"{kind.__name__} has a new option"
        needed = NEEDED.get(kind, {})
        seen = {json.dumps(describe(kind(keys="image", **needed)), sort_keys=True)}
        for name in _signature(kind):
            options_with_one = {**needed, name: options[name]}
            if kind is Resized and name == "size_mode":
                options_with_one["spatial_size"] = 4
            if kind is CropBodyd and name == "mask_labels":
                options_with_one["mask_key"] = "mask"
            if kind is CropSeriesd:  # its other options change nothing where it crops to the body
                options_with_one["crop"] = "organs"
            description = json.dumps(describe(kind(keys="image", **options_with_one)), sort_keys=True)
            assert description not in seen, f"{kind.__name__}: {name} is not in the slab's name"
            seen.add(description)


def test_options_of_the_organs_leave_slabs_of_the_body_valid():
    plain = describe(CropSeriesd(keys="image"))
    assert describe(CropSeriesd(keys="image", organ_labels=[1], organ_margin=2.0, missing="body")) == plain


def test_a_slab_keeps_where_the_slices_of_its_source_lay(data_dir, tmp_path):
    cache = SlabCache(Compose([LoadSeriesd(keys="image")]), tmp_path)
    item = {"image": str(data_dir / "crlm_ct_1004")}
    fresh, kept = cache.load(item), cache.load(item)
    assert len(json.loads(kept.meta["source_slices"])) == 8
    assert kept.meta["source_slices"] == fresh.meta["source_slices"]


def test_a_mask_is_part_of_the_source(item, tmp_path):
    cache = SlabCache(Compose([Counting()]), tmp_path / "cache")
    (tmp_path / "organs").mkdir()
    (tmp_path / "organs" / "liver.nii").write_text("1")
    names = [cache.path_of(item), cache.path_of({**item, "mask": ""}), cache.path_of({**item, "mask": item["image"]})]
    names.append(cache.path_of({**item, "mask": str(tmp_path / "organs")}))
    (tmp_path / "organs" / "liver.nii").write_text("22")
    names.append(cache.path_of({**item, "mask": str(tmp_path / "organs")}))
    assert names[0] == names[1]  # no mask
    assert len(set(names[1:])) == 4


def test_the_description_sees_functions_and_their_values():
    def scaled(factor: float) -> object:
        return lambda x: x * factor

    things = [
        lambda x: x + 1, lambda x: x + 2, lambda x: x - 1, scaled(2), scaled(3), partial(np.clip, a_min=0),
        partial(np.clip, a_min=1), partial(np.round, decimals=1), np.clip, torch.uint8, torch.float32, np.float32,
        Counting(1).__call__, Counting(2).__call__, None, True, "True", 1.5, {"a": 1}, [1, 2], np.arange(2), Path("a"),
    ]  # fmt: skip
    seen = [json.dumps(describe(thing), default=str) for thing in things]
    assert len(set(seen)) == len(things)
    assert describe(torch.arange(3)) == describe(np.arange(3)) == [0, 1, 2]
    assert not [text for text in seen if " at 0x" in text]  # no address: the same in every process


def test_random_state_is_no_parameter(cache, item):
    before = describe(cache.prepare)
    cache.prepare.set_random_state(3)
    cache.load(item)
    assert describe(cache.prepare) == before


def test_a_failing_preparation_leaves_nothing(cache, item, tmp_path):
    shutil.move(item["image"], tmp_path / "b.txt")
    (tmp_path / "a.txt").write_text("no number")
    with pytest.raises(RuntimeError):
        cache.load(item)
    assert not cache.folder.exists()
