# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The model cards of the shipped weights: what they are, of which data, under which licence, and what was measured.

A card names the sha256 of its weights, by which `workflow.card` and the packing know that it is theirs.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from .run import HEALTH, figure

NOTICE = "Trained on synthetic injuries, not for clinical use."
# part of a series' path -> patient, collection, licence, doi; as in tests/data/README.md
SOURCES = {
    "crlm_ct_1004": ("CRLM-CT-1004", "Colorectal-Liver-Metastases", "CC BY 4.0", "10.7937/qxk2-qg03"),
    "acrin_flt_breast_001": ("ACRIN-FLT-Breast_001", "ACRIN-FLT-Breast", "CC BY 3.0", "10.7937/k9/tcia.2017.ol20zmxg"),
    "cptac_pda_c3l_00189": ("C3L-00189", "CPTAC-PDA", "CC BY 4.0", "10.7937/k9/tcia.2018.sc20fo18"),
    "lidc_idri_0001": ("LIDC-IDRI-0001", "LIDC-IDRI", "CC BY 3.0", "10.7937/k9/tcia.2015.lo9ql9sx"),
}


def backbone_card(weights: Path, facts: Mapping[str, Any], figures: Mapping[str, Mapping[str, float]]) -> str:
    """Card of the pretrained backbone.

    Args:
        weights: the file.
        facts: what `demo.weights.make_weights` knows of data and machine.
        figures: of the evaluation, ``pretrained`` and ``untrained``.
    """
    rows = [[name, *(f"{figures[kind][key]:.3f}" for kind in ("pretrained", "untrained"))]
            for name, key in HEALTH.items()]  # fmt: skip
    return card(
        "voco2d_pretrain: a small pretrained backbone",
        "The backbone of the default config (timm's efficientnet_b0, one channel), pretrained by 2D-VoCo on a few"
        " synthetic and real CT series, to begin with and to try the software: far from the papers' 250,000 steps.",
        weights,
        facts,
        f"{facts['tested']} synthetic test patients, never trained on; 4 slices and 8 random crops a series at the"
        " default size; student, teacher and projector in full precision, of which the backbone alone is kept. Whether"
        " pretraining helps on real injuries has not been measured.",
        [["figure (synthetic data)", "pretrained", "untrained"], *rows],
        real_sources(facts["real"]),
    )


def classifier_card(weights: Path, facts: Mapping[str, Any], result: Mapping[str, Any], backbone: Path) -> str:
    """Card of the classifier; `result` is the evaluation's ``metrics.json``, `backbone` the file it began from."""
    baseline = result["baseline"]
    difference = baseline["score_difference"]
    rows = [
        ["score (lower is better)", figure(result["score"]), f"{baseline['score']:.3f}", said(difference["high"] < 0)],
        ["score minus that of the frequencies", figure(difference), "", ""],
        ["mAP", figure(result["mAP"]), f"{baseline['mAP']:.3f}", ""],
        *([f"AUC {name}", figure(value), "0.500", said(value["low"] > 0.5)]
          for name, value in result["auc"].items() if value["value"] is not None),
    ]  # fmt: skip
    return card(
        "rsna_cnn_lstm: a small classifier of synthetic injuries",
        "The classifier of the default config (efficientnet_b0, LSTM), fine-tuned on synthetic patients from the"
        f" shipped backbone (sha256 `{sha256(backbone.read_bytes())}`), so that inference, evaluation and export can be"
        " tried with nothing but this repository. It has never seen an injury of a patient.",
        weights,
        facts,
        f"{result['patients']} synthetic test patients, never trained on, at the default settings of `evaluate.json`;"
        " 95 % bootstrap intervals over patients; beside it the class frequencies of the training patients. The"
        " injuries are easy on purpose (`--conspicuity 1`). Better than chance: the score where the interval of its"
        " difference to that of the frequencies, paired by patient, is below 0; an AUC where its interval is above 0.5."
        " Of mAP it is not said: in few patients random scores reach more than the frequencies.",
        [["figure (synthetic data)", "classifier", "class frequencies", "better than chance"], *rows],
        real_sources(facts["real"]),
    )


def said(better: bool) -> str:
    """Whether the whole interval is on the better side of what chance gives."""
    return "yes" if better else "not shown"


def real_sources(series: Sequence[Path]) -> list[str]:
    """A line for each real series that was trained on, with its licence and its citation."""
    lines = []
    for path in series:
        known = [source for name, source in SOURCES.items() if name in path.as_posix()]
        if known:
            patient, collection, licence, doi = known[0]
            link = f"[{licence}](https://creativecommons.org/licenses/by/{licence.split()[-1]}/)"
            lines.append(f"- {patient} of {collection} (The Cancer Imaging Archive), {link}, <https://doi.org/{doi}>")
        else:
            lines.append(
                f"- `{path.name}`: own data, whose source and licence have to be stated here before it is shared"
            )
    return lines


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digests(weights: Path) -> list[str]:
    """sha256 of the file and of the same tensors as safetensors, as packing writes them."""
    state = torch.load(weights, map_location="cpu", weights_only=True)
    tensors = save({name: value.contiguous() for name, value in state.items()})
    return [sha256(weights.read_bytes()), sha256(tensors)]


def filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def card(
    title: str,
    what: str,
    weights: Path,
    facts: Mapping[str, Any],
    measured: str,
    figures: Sequence[Sequence[str]],
    sources: Sequence[str],
) -> str:
    """The whole page."""
    plain, tensors = digests(weights)
    files = [["file", "sha256"], ["model.pt", f"`{plain}`"], ["model.safetensors (packed)", f"`{tensors}`"]]
    real = "\n".join(sources) or "- none"
    made = f"{facts['patients']} synthetic patients of `python -m demo.dataset`, a tenth of them to validate on"
    run = (f"Made and measured, with those of the other bundle, by `{facts['command']}` (seed {facts['seed']}), whose"
           f" stages took {facts['duration']}, on {facts['versions']}. One seed. Another number of threads or another"
           " version changes the last digits of every step, and so the file.")  # fmt: skip
    return f"""# {title}

> **{NOTICE}**

{filled(what)}

{table(files)}

Tensors are in half precision ({weights.stat().st_size / 1e6:.1f} MB); loading casts them to float32.

## Data and licence

{made} (computed, no patient involved).
The pretraining also saw, several times an epoch, this real CT, which carries no injury labels; `tests/data/README.md`
states how its samples were made small. Whoever shares these weights keeps these citations:

{real}

The weights are under the Apache License 2.0, as the code; the citations are what the sources' CC BY asks for.

## Figures

{filled(measured)}

{table(figures)}

{filled(run)}

## Not for

Diagnosis or any other clinical use, any statement about patients, or a comparison of methods.
"""
