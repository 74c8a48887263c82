# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Label table: reading, checks, class indices and probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from bundles.rsna_cnn_lstm.scripts.labels import LabelTable, first_few

ROOT = Path(__file__).parents[2]
LABELS_FILE = ROOT / "bundles/rsna_cnn_lstm/configs/labels.json"
TABLE = LabelTable.from_file(LABELS_FILE)
KIDNEY_STONE = {"groups": [{"name": "kidney", "classes": [{"name": "clear"}, {"name": "stone", "loss_weight": 3}]}]}


def _write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "labels.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_rsna_table():
    header = (ROOT / "tests/golden/rsna_submission.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert ["patient_id", *TABLE.columns] == header
    assert TABLE.heads == {"bowel": 1, "extravasation": 1, "kidney": 3, "liver": 3, "spleen": 3}
    assert TABLE.num_logits == 11
    assert TABLE.logit_slices["liver"] == slice(5, 8)
    assert TABLE.column_slices["liver"] == slice(7, 10)
    assert len(TABLE.injury_columns) == 8
    assert TABLE.channel_def["0"] == "bowel_injury"
    assert TABLE.channel_def["10"] == "spleen_high"
    assert [group.loss_weights for group in TABLE.groups] == [(1, 2), (1, 6), (1, 2, 4), (1, 2, 4), (1, 2, 4)]
    assert [group.score_weights for group in TABLE.groups] == [(1, 2), (1, 6), (1, 2, 4), (1, 2, 4), (1, 2, 4)]
    assert (TABLE.any_injury.healthy_weight, TABLE.any_injury.injury_weight) == (1, 6)


def test_file_is_in_the_repository_format():
    text = LABELS_FILE.read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=4) + "\n"


def test_other_organ(tmp_path):
    table = LabelTable.from_file(_write(tmp_path, KIDNEY_STONE))
    assert (table.num_logits, table.columns) == (1, ("kidney_clear", "kidney_stone"))
    assert table.any_injury is None
    assert table.groups[0].loss_weights == (1.0, 3.0)
    assert table.probabilities(torch.zeros(4, 1)).tolist() == [[0.5, 0.5]] * 4


def test_select_keeps_order_and_drops_any_injury():
    table = LabelTable.from_file(LABELS_FILE, groups=["spleen", "bowel"])
    assert table.group_names == ("bowel", "spleen")
    assert table.any_injury is None
    assert TABLE.select(list(TABLE.group_names)) == TABLE
    with pytest.raises(ValueError, match=r"unknown groups: pancreas; the table has bowel, extravasation"):
        TABLE.select(["pancreas"])
    with pytest.raises(ValueError, match="none given"):
        TABLE.select([])


def _with(**changes: object) -> dict:
    return {**KIDNEY_STONE, **changes}


def _group(*classes: object, name: object = "kidney") -> dict:
    return {"groups": [{"name": name, "classes": list(classes)}]}


_GROUP = {"name": "kidney", "image_level_name": "Kidney", "classes": [{"name": "a"}, {"name": "b"}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ([], "must be a JSON object"),
        ({}, r"missing \['groups'\]"),
        ({"groups": []}, "at least one group"),
        (_with(weights=1), r"unknown \['weights'\]"),
        (_group({"name": "healthy"}), "at least two classes"),
        (_group({"name": "a"}, {"name": "a"}), "unique and not reserved, got kidney_a"),
        (_group({"name": "a"}, {"name": "b,c"}), "got 'b,c'"),
        (_group({"name": "a"}, {"name": "b"}, name=3), "got 3"),
        (_group({"name": "a"}, {"name": "b"}, name="score"), "not reserved, got score"),
        (
            _group({"name": "a"}, {"name": "b", "weight": 2}),
            r"class of group 'kidney' has wrong keys.*unknown \['weight'\]",
        ),
        (_group({"name": "a"}, {"name": "b", "loss_weight": 0}), "'loss_weight' of kidney_b must be a positive number"),
        (_group({"name": "a"}, {"name": "b", "score_weight": "2"}), "'score_weight' of kidney_b"),
        (_group({"name": "a"}, {"name": "b", "loss_weight": float("nan")}), "positive number, got nan"),
        (_with(groups=KIDNEY_STONE["groups"] * 2), "unique.*kidney"),
        (_with(any_injury={"name": "kidney"}), "unique.*kidney"),
        (_with(any_injury={"name": "any", "injury_weight": -1}), "'injury_weight' of any_injury"),
        (_with(any_injury=[]), "'any_injury' must be a JSON object"),
        (
            _with(groups=[_GROUP | {"classes": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}]),
            "'kidney' has an image_level_name and 3 classes: slices can have labels only in a group of two",
        ),
        (_with(groups=[_GROUP | {"image_level_name": ""}]), "'image_level_name' .* must be a text, got ''"),
    ],
)
def test_refuses(tmp_path, content, message):
    path = _write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        LabelTable.from_file(path)
    assert str(path) in str(error.value)


def test_groups_with_slice_labels():
    assert TABLE.slice_groups == ("bowel", "extravasation")
    assert [group.image_level_name for group in TABLE.groups[:3]] == ["Bowel", "Active_Extravasation", None]
    assert TABLE.select(["liver", "bowel"]).slice_groups == ("bowel",)
    own = {"groups": [{"name": "lung", "image_level_name": "Lung", "classes": [{"name": "a"}, {"name": "b"}]}]}
    assert LabelTable.from_dict(own).slice_groups == ("lung",)


def test_class_index_of_golden_rows():
    frame = pd.read_csv(ROOT / "tests/golden/rsna_solution.csv")
    indices = TABLE.class_indices(frame)
    assert indices.dtype == np.int64
    assert indices[0].tolist() == [0, 0, 0, 1, 0]  # 10000: liver_low
    np.testing.assert_array_equal(TABLE.class_index(frame.iloc[6]), [0, 0, 2, 0, 0])
    np.testing.assert_array_equal(TABLE.one_hot(indices), frame[list(TABLE.columns)])


def test_missing_groups_are_minus_one():
    row = {"kidney_healthy": 0, "kidney_low": 1, "kidney_high": 0, "liver_healthy": None, "liver_low": None}
    np.testing.assert_array_equal(TABLE.class_index({**row, "liver_high": float("nan")}), [-1, -1, 1, -1, -1])


def test_class_indices_refuses():
    frame = pd.read_csv(ROOT / "tests/golden/rsna_solution.csv").astype({"liver_low": float})
    frame.loc[[3, 9], "liver_low"] = 1
    with pytest.raises(
        ValueError, match=r"'liver': 2 of \d+ rows .* sum to 1.*: 10003, 10009; the first holds \[1.0, 1.0"
    ):
        TABLE.class_indices(frame)
    frame.loc[3, "liver_low"] = np.nan
    with pytest.raises(ValueError, match="10003"):
        TABLE.class_indices(frame)
    with pytest.raises(ValueError, match=r"'liver': the columns .* must be numbers"):
        TABLE.class_indices(frame.assign(liver_low="yes"))
    with pytest.raises(ValueError, match="'liver' lacks the columns liver_high"):
        TABLE.class_indices(frame.drop(columns="liver_high"))
    with pytest.raises(ValueError, match="none of the class columns"):
        TABLE.class_indices(frame[["patient_id"]])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.integers(-1, len(group.classes) - 1) for group in TABLE.groups]), min_size=1))
def test_one_hot_is_the_inverse_of_class_indices(rows):
    indices = np.array(rows)
    frame = pd.DataFrame(TABLE.one_hot(indices), columns=list(TABLE.columns))
    np.testing.assert_array_equal(TABLE.class_indices(frame), indices)


def test_probabilities():
    logits = torch.randn(2, 3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = TABLE.probabilities(logits)
    assert found.shape == (2, 3, 13)
    for name, part in TABLE.column_slices.items():
        torch.testing.assert_close(found[..., part].sum(-1), torch.ones(2, 3, dtype=torch.float64))
        torch.testing.assert_close(
            found[..., part][..., 1:] if TABLE.heads[name] == 1 else found[..., part],
            torch.sigmoid(logits[..., TABLE.logit_slices[name]])
            if TABLE.heads[name] == 1
            else torch.softmax(logits[..., TABLE.logit_slices[name]], -1),
        )


def test_probabilities_keep_precision_and_drop_metadata():
    logits = torch.full((1, 11), 30.0, dtype=torch.float16)
    found = TABLE.probabilities(MetaTensor(logits))
    assert type(found) is torch.Tensor
    assert found.dtype == torch.float32
    assert 0 < found[0, 0] < 1e-12  # 1 - sigmoid(30) would be 0 in float32
    with pytest.raises(ValueError, match="expected 11 logits"):
        TABLE.probabilities(torch.zeros(1, 13))


def test_first_few():
    assert first_few(range(3)) == "0, 1, 2"
    assert first_few(range(9), 2) == "0, 1, ..."
