# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights files of others, as the names of our backbone: pure functions from one state dict to another.

`LAYOUTS` says which files are known, `TORCHVISION` for which networks torchvision's ImageNet weights are. The layout
that fits most tensors is taken; whether enough fit is for `workflow.weights.load_weights` to judge.

>>> import torch
>>> own = {"model.conv.weight": torch.zeros(2, 1, 3, 3)}
>>> file = {"student.conv.weight": torch.ones(2, 1, 3, 3), "teacher.conv.weight": torch.zeros(2, 1, 3, 3)}
>>> found = translate(file, own, None)
>>> found.layout, found.notes, float(found.state["model.conv.weight"].mean())
("the original's pretraining, its student", ('dropped: teacher (1)',), 1.0)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["LAYOUTS", "TORCHVISION", "Layout", "TimmFacts", "Translation", "strip_wrappers", "timm_facts", "translate"]

State = Mapping[str, Tensor]

# what DDP and torch.compile put before every name, in any order
WRAPPERS = ("module.", "_orig_mod.", "model_state_dict.")
# the attribute that a Lightning module or another wrapper keeps the network in
ATTRIBUTES = ("", "model.", "net.", "network.")
# torchvision's densenet files still have the names of its first version: denselayer1.norm.1 for denselayer1.norm1
OLD_DENSENET = re.compile(r"(?<=norm|conv)\.(?=[12]\.)")


@dataclass(frozen=True)
class Layout:
    """A kind of file.

    Args:
        name: as messages call it.
        part: what the names of the backbone begin with; the rest of the file is dropped, and said.
        names: whose names follow: ``own`` (this project's), ``timm`` or ``torchvision``.
        imagenet: made for three channels, which are adapted to those of the input.
    """

    name: str
    part: str = ""
    names: str = "own"
    imagenet: bool = False


LAYOUTS = (
    Layout("this project's weights"),
    Layout("a classifier of this project", "backbone."),
    Layout("a pretraining of this project, its student", "student.backbone."),
    Layout("timm's or torchvision's names", "", "timm", imagenet=True),
    Layout("the original's pretraining, its student", "student.", "timm"),
    Layout("the original's later pretraining, its student", "student.backbone.", "timm"),
    Layout("the original's classifier", "backbone.", "timm"),
    Layout("torchvision's names, in timm's order", "", "torchvision", imagenet=True),
)

# timm's architecture -> (torchvision's, epsilon of its batch norm). The modules of both stand in the same order and
# compute the same; torchvision's resnet*, resnext*, wide_resnet* and densenet* have timm's names already.
TORCHVISION: dict[str, tuple[str, float]] = {
    **{f"efficientnet_b{i}": (f"efficientnet_b{i}", 1e-5 if i < 5 else 1e-3) for i in range(8)},
    **{f"efficientnetv2_{size}": (f"efficientnet_v2_{size}", 1e-3) for size in "sml"},
    **{f"convnext_{size}": (f"convnext_{size}", 1e-6) for size in ("tiny", "small", "base")},
    "mobilenetv2_100": ("mobilenet_v2", 1e-5),
    "mobilenetv3_large_100": ("mobilenet_v3_large", 1e-3),
    "mobilenetv3_small_100": ("mobilenet_v3_small", 1e-3),
    "mnasnet_100": ("mnasnet1_0", 1e-5),
}


@dataclass(frozen=True)
class TimmFacts:
    """What a timm model says of itself, and the epsilons of its batch norm."""

    architecture: str
    heads: tuple[str, ...]
    first_convs: tuple[str, ...]
    epsilons: frozenset[float]


@dataclass(frozen=True)
class Translation:
    """A state dict in the module's names, the layout it came from, and what was done to it."""

    state: dict[str, Tensor]
    layout: str
    notes: tuple[str, ...]


def timm_facts(module: nn.Module) -> TimmFacts | None:
    """Of a `networks.backbone.Backbone`; None for any other module."""
    model = getattr(module, "model", None)
    config = getattr(model, "default_cfg", None)
    if model is None or not config:
        return None
    heads, first = config.get("classifier"), config.get("first_conv")
    epsilons = frozenset(m.eps for m in model.modules() if isinstance(m, _BatchNorm))
    return TimmFacts(str(config.get("architecture")), _names(heads), _names(first), epsilons)


def _names(found: str | Sequence[str] | None) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else tuple(found or ())


def strip_wrappers(state: State) -> dict[str, Tensor]:
    """Names without the prefixes that wrappers put before all of them."""
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            return strip_wrappers({name.removeprefix(prefix): value for name, value in state.items()})
    return dict(state)


def translate(state: State, own: State, facts: TimmFacts | None) -> Translation:
    """The file's tensors in the names of `own`, by the layout that gives most of them; unchanged where none gives any.

    Raises:
        ValueError: for torchvision's weights where this network would compute something else with them.
    """
    most, best = 0, Translation(dict(state), "unknown", ())
    for attribute in ATTRIBUTES:
        for layout in LAYOUTS:
            prefix = attribute + layout.part
            named = _named(_part(state, prefix), own, facts, layout.names)
            fitting = sum(name in own for name in named)
            if fitting > most:
                rest = [_group(name, prefix) for name in state if not name.startswith(prefix)]
                most, best = fitting, _finish(named, own, facts, layout, rest)
    if best.layout == LAYOUTS[-1].name and facts is not None:
        _check_epsilon(facts)
    return best


def _finish(
    named: dict[str, Tensor], own: State, facts: TimmFacts | None, layout: Layout, rest: Iterable[str]
) -> Translation:
    """Without the head of the file's network, the input convolution adapted, and a note on each."""
    heads = tuple(f"model.{head}." for head in facts.heads) if facts else ()
    if layout.names == "torchvision":
        heads = (*heads, "classifier.")
    head = [name for name in named if name.startswith(heads) and name not in own] if heads else []
    dropped = Counter([*rest, *(name.removeprefix("model.").rsplit(".", 1)[0] for name in head)])
    notes = ["dropped: " + ", ".join(f"{group} ({n})" for group, n in dropped.items())] if dropped else []
    kept = {name: value for name, value in named.items() if name not in head}
    for conv in facts.first_convs if facts and layout.imagenet else ():
        name = f"model.{conv}.weight"
        value = kept.get(name)
        if value is not None and name in own and value.dim() == 4 and value.shape[1] == 3 != own[name].shape[1]:
            kept[name] = adapt_input_conv(own[name].shape[1], value)
            notes.append(f"{conv}: 3 input channels made {own[name].shape[1]}")
    return Translation(kept, layout.name, tuple(notes))


def _group(name: str, prefix: str) -> str:
    """What a dropped tensor belonged to: ``student.projector`` beside a ``student.backbone.``, else ``teacher``."""
    parts = name.split(".")
    return ".".join(parts[: 2 if prefix.startswith(f"{parts[0]}.") else 1])


def _check_epsilon(facts: TimmFacts) -> None:
    theirs, epsilon = TORCHVISION[facts.architecture]
    if facts.epsilons - {epsilon}:
        raise ValueError(
            f"torchvision's {theirs} has batch norm with eps {epsilon:g}, this {facts.architecture} "
            f"{sorted(facts.epsilons)}: give --backbone_kwargs \"{{'bn_eps': {epsilon:g}}}\" with these weights"
        )


def _part(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _named(taken: dict[str, Tensor], own: State, facts: TimmFacts | None, names: str) -> dict[str, Tensor]:
    """The part's tensors as our `Backbone` names them: a timm model stands in its attribute `model`."""
    if names == "own":
        return taken
    if names == "timm":
        return {"model." + OLD_DENSENET.sub("", name): value for name, value in taken.items()}
    return _paired(taken, own, facts)


def _paired(taken: dict[str, Tensor], own: State, facts: TimmFacts | None) -> dict[str, Tensor]:
    """Tensors of a torchvision file to those of the timm model by their order; nothing where the two do not match.

    Sizes and kinds must agree one by one; shapes may differ (a linear layer is timm's 1x1 convolution).
    """
    model = [name for name in own if name.startswith("model.")]
    if facts is None or facts.architecture not in TORCHVISION or not len(model) < len(taken) <= len(model) + 2:
        return {}
    pairs: dict[str, Tensor] = {}
    for ours, (theirs, value) in zip(model, taken.items(), strict=False):
        wanted = own[ours]
        channels = wanted.shape[1] if any(ours == f"model.{c}.weight" for c in facts.first_convs) else None
        same_size = value.numel() == wanted.numel() or (channels and value.numel() * channels == wanted.numel() * 3)
        if not same_size or _kind(ours) != _kind(theirs):
            return {}
        pairs[ours] = value if channels else value.reshape(wanted.shape)
    pairs.update(list(taken.items())[len(model) :])
    return pairs


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[-1].replace("layer_scale", "gamma")
