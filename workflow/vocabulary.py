# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""All that a config may say. MONAI evaluates every ``$`` expression and calls every ``_target_``: a config is code.

The lists below are what the bundles' own configs need and nothing else; `findings` names whatever is outside them. It
reads, and evaluates nothing. Used by `workflow.review`, the override guard and the tests of the configs.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["ATTRIBUTES", "IMPORTS", "MAX_LENGTH", "NAMES", "TARGETS", "Finding", "findings", "foreign"]

IMPORTS = {"$import torch"}
NAMES = {"torch", "int", "len", "list", "str"}
ATTRIBUTES = {
    "start", "finish", "stop", "run", "prepare_all",  # the run
    "path", "model", "checkpoints", "tensorboard", "failed", "rank", "device", "type",  # what an object knows
    "backbone", "student", "module", "parameters", "to", "num_logits", "slice_groups", "uint8", "bfloat16", "Generator",
}  # fmt: skip
NODES = (
    ast.Expression, ast.Name, ast.Load, ast.Store, ast.Attribute, ast.Call, ast.keyword, ast.Subscript, ast.Slice,
    ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.IfExp, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not,
    ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Compare, ast.cmpop,
    ast.Lambda, ast.arguments, ast.arg, ast.ListComp, ast.comprehension,
)  # fmt: skip
MAX_LENGTH = 100
# Each by its whole name: a package as such would let through whatever its modules import.
TARGETS = {
    # MONAI's components by their short names
    "CastToTyped", "CenterSpatialCropd", "Compose", "EnsureChannelFirstd", "IgniteMetricHandler", "LrScheduleHandler",
    "MetricsSaver", "RandAdjustContrastd", "RandCoarseDropoutd", "RandFlipd", "RandHistogramShiftd", "RandRotate90d",
    "RandRotated", "RandSpatialCropd", "Resized", "ScaleIntensityRanged", "SelectItemsd", "SimpleInferer",
    "StatsHandler", "SupervisedEvaluator", "SupervisedTrainer", "TensorBoardImageHandler", "TensorBoardStatsHandler",
    "Transposed",
    # of other packages
    "ignite.handlers.ProgressBar", "monai.networks.nets.resnet18", "monai.optimizers.WarmupCosineSchedule",
    "monai.utils.path_to_sqlite_uri", "networks.backbone.Backbone", "torch.optim.AdamW", "torch.utils.data.DataLoader",
    "transforms.body.CropBodyd", "transforms.organs.CropSeriesd", "transforms.series.LoadSeries",
    "transforms.series.LoadSeriesd", "transforms.slice_labels.SliceLabelsd", "transforms.slices.ExtractSlicesd",
    "transforms.slices.SliceAffinesd", "transforms.voco.RandVoCoCropd", "workflow.checkpoint.Checkpoints",
    "workflow.checkpoint.WeightsSaver", "workflow.datalist.find_series", "workflow.datalist.unlabelled_datalist",
    "workflow.dataset.SeriesDataset", "workflow.dataset.SlabDataset", "workflow.dataset.collate_plain",
    "workflow.distributed.ProcessGroup", "workflow.distributed.SharedBuffers", "workflow.distributed.parallel",
    "workflow.global_mean.GlobalMean", "workflow.guard.check_overrides", "workflow.prepare.Preparation",
    "workflow.provenance.check_training_config", "workflow.provenance.check_unseen_patients",
    "workflow.provenance.record_patients", "workflow.record.RunRecord", "workflow.run.RunFolder",
    "workflow.run.select_device", "workflow.run.use_amp", "workflow.sampler.EpochSampler",
    "workflow.tensorboard.HyperParameters", "workflow.tensorboard.LazyWriter", "workflow.tensorboard.LearningRates",
    "workflow.tensorrt.with_engine", "workflow.tracking.OutputAsList", "workflow.training.EarlyStopping",
    "workflow.training.GradientClipping", "workflow.training.LossMeans", "workflow.training.StopAtNonFiniteLoss",
    "workflow.training.Validation", "workflow.training.parameter_groups", "workflow.training.shared_handler",
    "workflow.weights.WeightsLoader",
    # of one bundle or the other
    "scripts.batch.PrepareCrops", "scripts.calibrate.Calibrator", "scripts.check.DataCheck",
    "scripts.cohort.labelled_series", "scripts.cross_validation.CrossValidation", "scripts.embeddings.EmbeddingWriter",
    "scripts.embeddings.SliceInferer2D", "scripts.ensemble.EnsembleCheckpointLoader",
    "scripts.ensemble.EnsembleInferer", "scripts.evidence_writer.EvidenceWriter", "scripts.fold_file.FoldFile",
    "scripts.health.EmbeddingSpread", "scripts.health.PositionAccuracy", "scripts.health.RecalibrateBN",
    "scripts.health.SliceHeight", "scripts.health.embeddings_and_labels", "scripts.images.CropImages",
    "scripts.inference_data.series_to_predict", "scripts.labels.LabelTable.from_file", "scripts.loss.InjuryLoss",
    "scripts.loss.VoCoLoss", "scripts.masks.add_masks", "scripts.network.CNNLSTM", "scripts.network.VoCoNetwork",
    "scripts.partner.partner_rule", "scripts.predictions.PatientScore", "scripts.predictions.PredictionWriter",
    "scripts.report.ReportWriter", "scripts.sampling.sampling_weights", "scripts.slice_loss.training_batch",
    "scripts.slice_loss.training_loss", "scripts.slice_loss.training_network",
    "scripts.structured_report.StructuredReportWriter", "scripts.teacher.MomentumAverage",
    "scripts.teacher.StudentWeights", "scripts.teacher.TeacherUpdate",
}  # fmt: skip
MODES = {"default", "callable"}  # and not "debug"
SPECIAL = {"_target_", "_mode_", "_debug_"}

# what MONAI makes of @id in an expression before Python sees it, and its names that are always there
REFERENCE = re.compile(r"@\w*(?:::\w*)*")
REFERENCES = "__local_refs"
GIVEN = {"monai", "torch", "np", "numpy", REFERENCES}


class Finding(NamedTuple):
    """Something outside the vocabulary: where it stands, what it says, and why it was found."""

    id: str
    text: str
    reason: str


def findings(config: Any, id: str = "") -> Iterator[Finding]:
    """Whatever a config (or a part of it) holds outside the vocabulary; descriptions are looked at too, since any
    ``@`` can refer to one."""
    items = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        name = f"{id}#{key}".strip("#")
        # an overlay's key is a path of its own: "train#trainer#_target_", "+train"
        leaf = re.split(r"#|::", str(key))[-1].lstrip("+")
        yield from _special(name, leaf, value)
        if leaf not in SPECIAL:
            yield from findings(value, name)
    if isinstance(config, str):
        yield from _text(id, config)


def _special(id: str, key: str, value: Any) -> Iterator[Finding]:
    """Keys that MONAI acts on."""
    if key == "_target_" and (not isinstance(value, str) or value not in TARGETS):
        yield Finding(id, repr(value), "a target that is not in the vocabulary")
    elif key == "_mode_" and str(value) not in MODES:
        yield Finding(id, repr(value), f"a mode other than {', '.join(sorted(MODES))}")
    elif key == "_debug_":
        yield Finding(id, repr(value), "starts a debugger")


def _text(id: str, text: str) -> Iterator[Finding]:
    if text.startswith("%"):
        yield Finding(id, text, "a macro: its content comes from elsewhere, write it out")
    elif text.startswith("$"):
        if re.match(r"\$\s*(import|from)\b", text):
            if text not in IMPORTS:
                yield Finding(id, text, "an import that is not in the vocabulary")
        elif outside := foreign(text[1:]):
            yield Finding(id, text, f"an expression outside the vocabulary: {', '.join(sorted(outside))}")


def foreign(expression: str) -> set[str]:
    """Names, attributes and constructs of an expression (without its ``$``) outside the vocabulary."""
    if len(expression) > MAX_LENGTH:
        return {f"longer than {MAX_LENGTH} characters"}
    if REFERENCES in expression:
        return {REFERENCES}
    # the very text that MONAI evaluates
    text = REFERENCE.sub(lambda found: f"{REFERENCES}['{found[0][1:]}']", expression.replace("#", "::"))
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {"no Python expression"}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    # a variable of a lambda or comprehension hides nothing, so that its name means the same all over the expression
    hiding = {name for name in bound if name in GIVEN or name.startswith("_") or hasattr(builtins, name)}
    names = {node.id for node in nodes if isinstance(node, ast.Name)} - NAMES - {REFERENCES} - (bound - hiding)
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)} - ATTRIBUTES
    return names | attributes | hiding | {type(node).__name__ for node in nodes if not isinstance(node, NODES)}
