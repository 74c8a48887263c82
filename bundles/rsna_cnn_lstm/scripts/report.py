# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation: one self-contained HTML page, and its figures as PNG files.

``report.html`` holds everything it shows (figures as data, styles, no script) and asks nothing of any network; a policy
in the page forbids the browser to try. It names patients as the tables do, and no DICOM UID.
"""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from workflow.dataset import SlabDataset
from workflow.gather import ranks
from workflow.privacy import redact
from workflow.run import write_atomically

from . import report_context, report_facts, report_sections
from .labels import LabelTable
from .results import BASELINE, Picture, Results, Section, number, with_interval

__all__ = ["ReportError", "ReportWriter", "try_report", "write_report"]

logger = logging.getLogger(__name__)

MARKER = "README.txt"  # `python -m demo.dataset` and others of its kind say SYNTHETIC in it, first of all
TEMPLATE = "report.html.j2"
DPI = 150
# what a part, or the page, may fail by without taking the run along
FAILURES = (RuntimeError, ValueError, OSError, LookupError, TypeError, ArithmeticError, TemplateError)


class ReportError(RuntimeError):
    """Parts of a report that could not be made; the rest of it is written."""


def write_report(
    folder: str | Path,
    table: LabelTable,
    *,
    dataset_dir: str | Path | None,
    dataset: SlabDataset | None = None,
    weights: str | Path | Sequence[str | Path] | None = None,
    failed: Sequence[tuple[str, str]] | None = None,
) -> Path:
    """Writes ``report.html`` and ``report/*.png`` into the folder of an evaluation.

    Args:
        folder: holds ``predictions.csv``, ``solution.csv`` and ``metrics.json``, and what else a run leaves.
        table: the label table of these files.
        dataset_dir: top of the data, whose README.txt says so if they are synthetic; ``None`` where there is no such.
        dataset: prepared volumes of the patients, for the slices of the worst-scored; ``None`` for a report without.
        weights: path of the weights, beside which TensorBoard's files lie; ``None`` or several for no learning curves.
        failed: (path, reason) of the series left out; ``None`` takes the dataset's, or else those of ``failed.csv``.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError, ValueError: the folder holds no results, or not of this table.
        ReportError: a part failed; the page is written, with the reason in that part's place.
    """
    results = Results.from_folder(folder, table)
    parts: list[tuple[str, Callable[[], Section]]] = [
        ("Score", partial(report_sections.score, results)),
        ("Earlier runs", partial(report_context.runs, results)),
        ("ROC curves", partial(report_sections.curves, results, "roc")),
        ("Precision-recall curves", partial(report_sections.curves, results, "precision_recall")),
        ("Precision, recall, F1 by class", partial(report_sections.classes, results)),
        ("Confusion matrices", partial(report_sections.confusion, results)),
        ("Calibration", partial(report_sections.calibration, results)),
        ("Learning curves", partial(report_context.learning, weights)),
        ("Worst-scored patients", partial(report_context.worst_patients, results, dataset)),
    ]
    sections, lacking = [], []
    for title, make in parts:
        try:
            section = make()
        except FAILURES as error:
            reason = redact(f"{type(error).__name__}: {error}")
            logger.exception("report: '%s' could not be made", title)
            lacking.append(f"'{title}' ({reason})")
            section = Section(f"failed-{len(lacking)}", title, [f"This part could not be made. {reason}"])
        sections.append(section)
    page = _page(results, sections, report_facts.facts(results, dataset, failed), _is_synthetic(dataset_dir))
    path = results.folder / "report.html"
    write_atomically(path, redact(page))
    logger.info("Wrote %s", path)
    if lacking:
        raise ReportError(f"{path} lacks {', '.join(lacking)}; the predictions and all other parts are written")
    return path


def try_report(folder: str | Path, table: LabelTable, **arguments: Any) -> list[tuple[str, str]]:
    """`write_report` for a run whose results are written already and count without it.

    Returns:
        (path of the page, reason) if it failed, as `workflow.run.RunFolder.finish` takes it; the log says so too.
    """
    try:
        write_report(folder, table, **arguments)
    except FAILURES as error:
        reason = redact(str(error) if isinstance(error, ReportError) else f"{type(error).__name__}: {error}")
        logger.exception("the report failed, predictions and figures are written: %s", reason)
        return [(str(Path(folder) / "report.html"), reason)]
    return []


class ReportWriter:
    """Handler that writes the report when an evaluator's run completes; to be attached after `PredictionWriter`, whose
    files it reads. A report that fails is listed among the dataset's failed items and does not end the run.

    Args:
        output_dir: folder of the run.
        labels_file: path of the label table, or the table.
        dataset_dir, dataset, weights: as in `write_report`.
        save_rank: the process that writes.
    """

    def __init__(
        self,
        output_dir: str | Path,
        labels_file: str | Path | LabelTable,
        dataset_dir: str | Path | None = None,
        dataset: SlabDataset | None = None,
        weights: str | Path | Sequence[str | Path] | None = None,
        save_rank: int = 0,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.table = labels_file if isinstance(labels_file, LabelTable) else LabelTable.from_file(labels_file)
        self.dataset_dir, self.dataset, self.weights, self.save_rank = dataset_dir, dataset, weights, save_rank

    def attach(self, engine: Engine) -> None:
        """Registers the handler; to be attached once to each evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, _engine: Engine) -> None:
        """Writes the report, or lists it as failed."""
        if ranks()[0] != self.save_rank:
            return
        if not (self.output_dir / "metrics.json").is_file():
            logger.warning("no report: none of the evaluated patients has a label")
            return
        failed = try_report(
            self.output_dir, self.table, dataset_dir=self.dataset_dir, dataset=self.dataset, weights=self.weights
        )
        if self.dataset is not None:
            self.dataset.failed += failed


def _is_synthetic(dataset_dir: str | Path | None) -> bool:
    """Whether the data say of themselves that they are."""
    marker = None if dataset_dir is None else Path(dataset_dir) / MARKER
    if marker is None or not marker.is_file():
        return False
    return marker.read_text(encoding="utf-8", errors="replace").lstrip().upper().startswith("SYNTHETIC")


def _page(results: Results, sections: Sequence[Section], facts: Sequence[tuple[str, str]], synthetic: bool) -> str:
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        run_name=results.folder.name,
        synthetic=synthetic,
        facts=facts,
        figures=_headline(results),
        sections=sections,
        source=partial(_embed, results.folder / "report"),
        versions=results.manifest.get("versions", {}),
    )


def _headline(results: Results) -> list[tuple[str, str, str]]:
    """(name, figure, what to compare it with) of the cards at the top."""
    metrics, base = results.metrics, results.metrics["baseline"]
    auc = metrics["auc"]
    found = [
        ("Score, lower is better", with_interval(metrics["score"]), f"{BASELINE} {number(base['score'])}"),
        ("mAP", with_interval(metrics["mAP"]), f"{BASELINE} {number(base['mAP'])}"),
    ]
    name = results.table.any_injury.name if results.table.any_injury else next(iter(auc))
    return [*found, (f"AUC of {name.replace('_', ' ')}", with_interval(auc[name]), "guessing 0.500")]


def _embed(folder: Path, picture: Picture) -> str:
    """Writes the picture as PNG and gives it as a data URI: photographs as PNG, drawings as SVG."""
    folder.mkdir(exist_ok=True)
    if picture.figure.get_layout_engine() is not None:
        picture.figure.draw_without_rendering()  # the layout once, not again for each format
        picture.figure.set_layout_engine("none")
    content = _bytes(picture, "png")
    temporary = folder / f".{picture.name}.png"
    temporary.write_bytes(content)
    os.replace(temporary, folder / f"{picture.name}.png")
    kind = "image/png" if picture.raster else "image/svg+xml"
    content = content if picture.raster else _bytes(picture, "svg")
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _bytes(picture: Picture, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    picture.figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()
