# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of the report on their own: earlier runs, learning curves, slices, and the handler of an evaluator."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from torch.utils.tensorboard import SummaryWriter
from workflow.privacy import pseudonym
from workflow.run import RunFolder

from bundles.rsna_cnn_lstm.scripts import report, report_context
from bundles.rsna_cnn_lstm.scripts.earlier_runs import find_earlier_runs
from bundles.rsna_cnn_lstm.scripts.figures import slices_figure
from bundles.rsna_cnn_lstm.scripts.learning_curves import by_epoch, read_scalars
from bundles.rsna_cnn_lstm.scripts.predictions import PredictionWriter
from bundles.rsna_cnn_lstm.scripts.report import ReportWriter
from bundles.rsna_cnn_lstm.scripts.results import Results
from tests.rsna.report_runs import LABELS_FILE, TABLE, Page, draw, volumes, write_run


def test_pseudonyms_find_their_volumes(tmp_path):
    solution, predictions = draw(TABLE, 6, seed=2)
    names = solution["patient_id"].tolist()
    hidden = [frame.assign(patient_id=frame["patient_id"].map(pseudonym)) for frame in (solution, predictions)]
    results = Results.from_folder(write_run(tmp_path / "run", frames=tuple(hidden), n_resamples=0), TABLE)
    section = report_context.worst_patients(results, volumes(names))
    assert [len(card.pictures) for card in section.cards] == [2] * 5
    assert {card.title for card in section.cards} < {f"Patient {pseudonym(name)}" for name in names}


def test_earlier_runs(tmp_path):
    now = write_run(tmp_path / "now", n_resamples=0)
    assert find_earlier_runs(now).comparable == []
    for age, name in enumerate(("newest", "oldest")):
        path = write_run(tmp_path / name, skill=1.0, n_resamples=0) / "metrics.json"
        os.utime(path, (1e9 - age, 1e9 - age))
    solution, predictions = draw(TABLE, 40, seed=0, skill=3.0)
    hidden = [frame.assign(patient_id=frame["patient_id"].map(pseudonym)) for frame in (solution, predictions)]
    write_run(tmp_path / "pseudonyms", frames=tuple(hidden), n_resamples=0)
    other_truth = solution.assign(
        bowel_healthy=1 - solution["bowel_healthy"], bowel_injury=1 - solution["bowel_injury"]
    )
    write_run(tmp_path / "other truth", frames=(other_truth, predictions), n_resamples=0)
    write_run(tmp_path / "fewer", patients=39, n_resamples=0)
    (write_run(tmp_path / "broken", n_resamples=0) / "metrics.json").write_text("{", encoding="utf-8")
    (write_run(tmp_path / "foreign", n_resamples=0) / "metrics.json").write_text('{"loss": 1}', encoding="utf-8")
    (write_run(tmp_path / "no truth", n_resamples=0) / "solution.csv").unlink()
    found = find_earlier_runs(now)
    assert [name for name, _ in found.comparable] == ["oldest", "newest", "pseudonyms"]
    assert sorted(found.others) == ["fewer", "other truth"]
    assert sorted(name for name, _ in found.unreadable) == ["broken", "foreign", "no truth"]


def test_scalars_of_a_resumed_run(tmp_path):
    for start, offset in ((1, 0.0), (3, 10.0)):
        with SummaryWriter(tmp_path, filename_suffix=str(start)) as events:
            for step in range(start, start + 3):
                events.add_scalar("loss", step + offset, step, walltime=1000 * start + step)
                events.add_scalar("other", 1.0, step)
    frame = by_epoch(read_scalars(tmp_path))
    assert frame.columns.tolist() == ["loss"]
    assert frame["loss"].to_dict() == {1: 1.0, 2: 2.0, 3: 13.0, 4: 14.0, 5: 15.0}
    assert read_scalars(tmp_path / "absent") == {}
    assert by_epoch({}).empty


def test_weights_without_events_have_no_learning_curves(tmp_path):
    section = report_context.learning(tmp_path / "shipped" / "model.pt")
    assert section.text == ["No TensorBoard events lie beside the weights of shipped."]
    assert not section.pictures
    assert report_context.learning([tmp_path / "shipped" / "checkpoints" / "3.pt"]).text == section.text
    assert "no single training" in report_context.learning(["a/model.pt", "b/model.pt"]).text[0]


def test_slices_are_shown_as_radiologists_look_at_them():
    volume = volumes(["a"])[0]["image"][0].numpy()
    figure = slices_figure(volume, (2.0, 2.0, 5.0), count=4, columns=2)
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(shown) == 4
    assert shown[0][0, 0] == 255  # the first slice is the top; patient's right is at the left, front is up
    assert shown[0][-1].max() == shown[0][:, -1].max() == 0
    assert shown[-1].max() == 0
    floats = slices_figure(volume.astype(np.float32) / 255, (1.0, 1.0, 1.0), count=50)
    assert floats.axes[0].images[0].get_clim() == (0.0, 1.0)


def _evaluate(items: list[dict], *handlers: object) -> None:
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=4),
        network=torch.nn.Identity(),
        val_handlers=list(handlers),
    )
    evaluator.logger.disabled = True
    evaluator.run()


def _items(labelled: bool) -> list[dict]:
    rng = np.random.default_rng(0)
    items = [
        {"image": rng.normal(size=11).astype(np.float32), "patient_id": str(k), "series_id": "s"} for k in range(6)
    ]
    label = {"label": np.zeros(5, np.int64)} if labelled else {}
    return [{**item, **label} for item in items]


def test_handler_has_nothing_to_report_without_labels_or_on_other_processes(tmp_path, caplog):
    plain, elsewhere = tmp_path / "plain", tmp_path / "elsewhere"
    _evaluate(_items(labelled=False), PredictionWriter(plain, TABLE), ReportWriter(plain, LABELS_FILE))
    assert (plain / "predictions.csv").is_file()
    assert "no report: none of the evaluated patients has a label" in caplog.text
    writer = PredictionWriter(elsewhere, TABLE, n_resamples=0)
    _evaluate(_items(labelled=True), writer, ReportWriter(elsewhere, TABLE, save_rank=1))
    assert (elsewhere / "metrics.json").is_file()
    assert not [folder for folder in (plain, elsewhere) if (folder / "report.html").exists()]


def test_handler_whose_report_fails_keeps_the_predictions_and_lists_it(tmp_path, caplog):
    dataset = volumes(["x"])
    handlers = PredictionWriter(tmp_path, TABLE, n_resamples=0), ReportWriter(tmp_path, TABLE, dataset=dataset)
    _evaluate(_items(labelled=True), *handlers)
    ((path, reason),) = dataset.failed
    assert path == str(tmp_path / "report.html")
    assert "lacks 'Worst-scored patients' (ValueError: the dataset holds no series" in reason
    assert "the report failed, predictions and figures are written" in caplog.text
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 6
    assert "Score minus baseline" in Page(tmp_path / "report.html").text
    folder = RunFolder(tmp_path.parent, tmp_path.name)
    with pytest.raises(SystemExit) as ended:
        folder.finish(dataset.failed)
    assert ended.value.code == 1
    assert json.loads((tmp_path / "run.json").read_text())["result"].startswith("completed")
    assert pd.read_csv(tmp_path / "failed.csv")["image"].tolist() == [path]


def test_a_page_that_cannot_be_made_is_no_reason_to_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TEMPLATE", "no such template")
    failed = report.try_report(write_run(tmp_path / "run", patients=6, n_resamples=0), TABLE, dataset_dir=None)
    assert failed == [(str(tmp_path / "run" / "report.html"), failed[0][1])]
    assert failed[0][1].startswith("TemplateNotFound: ")
