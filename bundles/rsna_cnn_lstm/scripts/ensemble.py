# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Several weights files and flipped images in one prediction: the mean of all their logits."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ignite.engine import Engine, Events
from monai.inferers import Inferer
from torch import Tensor, nn
from workflow.weights import WeightsLoader

__all__ = ["EnsembleCheckpointLoader", "EnsembleInferer"]

logger = logging.getLogger(__name__)

AXES = {"x": 2, "y": 3}  # of [B, C, X, Y, S]; training flips the same two


class EnsembleInferer(Inferer):
    """Inferer, and the handler that loads its weights when the engine starts.

    The prediction is the mean of the logits over the members and over the views (the image as it is, and each flip of
    `flips`); one member without flips is exactly `monai.inferers.SimpleInferer`. MONAI's EnsembleEvaluator wants a
    built network a member in the config and leaves the mean to a transform after it; here a list of files is enough,
    and handlers that look into `network` (evidence, TorchScript) find the first member in it.

    Args:
        network: the engine's network; it becomes the first member, the others are copies of it, each loaded once.
        weights: a weights file or full checkpoint, or a list of them (folds, epochs); None leaves the network as it is.
        flips: views beside the image as it is: ``"x"`` (left to right), ``"y"`` (front to back), ``"xy"`` (both).

    Raises:
        ValueError: an empty list, or an unknown or repeated flip.
    """

    def __init__(
        self, network: nn.Module, weights: str | Sequence[str] | None = None, flips: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.paths = [weights] if weights is None or isinstance(weights, str) else list(weights)
        if not self.paths:
            raise ValueError("weights: expected a file or a list of files, got an empty list")
        flips = [flips] if isinstance(flips, str) else list(flips)
        if len(set(flips)) < len(flips) or not set(flips) <= {"x", "y", "xy"}:
            raise ValueError(f"tta: expected a list out of 'x', 'y', 'xy', each once at most, got {flips}")
        self.network = network
        self.views: list[list[int]] = [[], *([AXES[axis] for axis in flip] for flip in flips)]
        self._copies: list[nn.Module] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.load)

    def load(self, engine: Engine) -> None:
        """Loads every file, checked tensor by tensor. Raises WeightsError as `workflow.weights.load_weights`."""
        self._copies = [copy.deepcopy(self.network) for _ in self.paths[1:]]
        for path, member in zip(self.paths, [self.network, *self._copies], strict=True):
            WeightsLoader(path, member, what="network")(engine)
        for member in self._copies:
            member.eval()  # of the engine's own network the engine takes care
        if len(self.paths) * len(self.views) > 1:
            logger.info("mean of the logits of %d weights files, %d views each", len(self.paths), len(self.views))

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Logits of a batch [B, C, X, Y, S]; `network` is the engine's."""
        members = [network, *self._copies]
        if len(members) == len(self.views) == 1:
            return network(inputs, *args, **kwargs)
        total = None
        for axes in self.views:
            view = inputs.flip(axes) if axes else inputs
            for member in members:
                logits = member(view, *args, **kwargs).float()  # half precision would lose in the sum
                total = logits if total is None else total + logits
        return total / (len(members) * len(self.views))


class EnsembleCheckpointLoader:
    """Handler that lets an `EnsembleInferer` load its weights.

    MONAI's federated client takes handlers of the name "CheckpointLoader" out of an evaluation: it scores the weights
    that the server sends, and `weights` would come over them.
    """

    def __init__(self, inferer: EnsembleInferer) -> None:
        self.inferer = inferer

    def attach(self, engine: Engine) -> None:
        self.inferer.attach(engine)
