"""A user's network: what it takes, what can go, and its narrowed forms as files."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa_deploy.batches import in_batches
from ofa_deploy.dataset import ImageSet
from ofa_deploy.errors import DataError, MissingDependency, TraceError, few_of
from ofa_deploy.export.activations import peak_activation_count
from ofa_deploy.export.model_files import ONNX_FILE
from ofa_deploy.exporting import ExportedNetwork, NetworkFacts, write_model
from ofa_deploy.layers import LinearLayer, PoolLayer, RepConvLayer
from ofa_deploy.nn.onnx_module import write_module
from ofa_deploy.nn.projection import drop_needless
from ofa_deploy.nn.static import FusedNet, PlannedNet, StaticNet
from ofa_deploy.plan import BYTES_PER_FLOAT, IMAGE_CHANNELS, NetworkCost
from ofa_deploy.preprocess import Normalisation, prepare
from ofa_deploy.shrink.counts import mac_count, parameter_count
from ofa_deploy.shrink.coupling import operations_of, trace_channels
from ofa_deploy.shrink.extract import FusedNetwork, extract_module, extract_plan
from ofa_deploy.shrink.groups import ChannelGraph, planned_channels
from ofa_deploy.shrink.masks import MaskedNetwork, insert_masks
from ofa_deploy.shrink.user_module import (
    are_equal,
    plain_copy,
    require_numbers,
    require_trainable,
    run,
    train_once,
)
from ofa_deploy.target import Target

_logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]
# Neighbouring multiples of it are far from each other behind the point.
GOLDEN_RATIO = (5**0.5 - 1) / 2
# Images that tell what a network knows from a guess: at least, at most, at a time.
FEW, MOST_SEEN, AT_A_TIME = 100, 1000, 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OwnNetwork:
    """A network that somebody brings.

    Args:
        module: From images `(N, 3, resolution, resolution)` to logits `(N, classes)`.
        resolution: Height and width of its input.
        normalisation: Of its inputs.
        class_names: In output order.
        graph: Its channels.
    """

    module: nn.Module
    resolution: int
    normalisation: Normalisation
    class_names: tuple[str, ...]
    graph: ChannelGraph

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        resolution: int,
        normalisation: Normalisation,
        class_names: tuple[str, ...],
        narrowed: bool = True,
    ) -> OwnNetwork:
        """A plain copy of a network, traced.

        Args:
            module: From images to logits.
            resolution: Height and width of its input.
            normalisation: Of its inputs.
            class_names: In output order.
            narrowed: Whether channels of it are to go; else all groups are left whole,
                and it need not have any.

        Raises:
            TraceError: It cannot be copied, traced or trained; names the layer.
            DataError: It has another number of outputs than there are classes, or
                weights that are no numbers.
        """
        module = plain_copy(module)
        if isinstance(module, PlannedNet) and module.plan.resolution != resolution:
            raise DataError(
                f"the network's plan is for images of {module.plan.resolution} pixels; "
                f"these have {resolution}. Resize them, or lower a plan for them"
            )
        shape = (IMAGE_CHANNELS, resolution, resolution)
        if _is_chain(module):
            graph = planned_channels(module)
        else:
            graph = trace_channels(module, input_shape=shape)
            operations_of(module, input_shape=shape)  # or says where it branches
        outputs = run(module, np.zeros((1, *shape), dtype=np.float32)).shape
        require_numbers(module)
        if outputs != (1, len(class_names)):
            raise DataError(
                f"the network gives outputs of shape {outputs} for one image; the data "
                f"has {len(class_names)} classes. Give a network whose last layer has "
                "as many outputs, or other data"
            )
        require_trainable(module, shape)
        own = cls(
            module=module,
            resolution=resolution,
            normalisation=normalisation,
            class_names=class_names,
            graph=graph,
        )
        return own._exact() if narrowed else replace(own, graph=graph.only([]))

    def _exact(self, *, in_order: bool = False) -> OwnNetwork:
        """Itself, with the groups left whole that cannot be removed exactly.

        Whatever the tracing missed, such as widths that its forward has as numbers, is
        found before hours of training, not after.

        Args:
            in_order: Whether the first channels of each group are to stay, and not any.

        Raises:
            TraceError: No group is left.
        """
        if not self.graph.groups:
            raise TraceError(
                f"{type(self.module).__name__} has no channels that could be removed: "
                "it has no layer whose channels end before its outputs, or every one "
                "is grouped"
            )
        if self._narrows_exactly(in_order=in_order):
            return self
        exact = [
            index
            for index in range(len(self.graph.groups))
            if replace(self, graph=self.graph.only([index]))._narrows_exactly(
                in_order=in_order
            )
        ]
        found = replace(self, graph=self.graph.only(exact))
        if not exact or not found._narrows_exactly(in_order=in_order):
            others = [
                group.name
                for index, group in enumerate(self.graph.groups)
                if index not in exact
            ]
            raise TraceError(
                f"{type(self.module).__name__} computes something else, or nothing, "
                f"once channels of {', '.join(others)} are removed: its forward has "
                "their number in it, or treats them as more than maps of their own. "
                "Rewrite it with convolutions, linear layers, norms, activations, "
                "pools, sums, products, concatenations and nn.Flatten"
            )
        return found

    def _narrows_exactly(self, *, in_order: bool) -> bool:
        """Whether masking channels and removing them is the same."""
        rng = np.random.default_rng(0)
        kept = tuple(
            torch.from_numpy(_some(group.channels, index, rng, in_order=in_order))
            for index, group in enumerate(self.graph.groups)
        )
        masked = self.masked()
        for mask, indices in zip(masked.masks, kept, strict=True):
            mask.keep_only(indices)
        return self.computes_what_is_left(masked.module, kept)

    def computes_what_is_left(self, form: nn.Module, kept: Sequence[Tensor]) -> bool:
        """Whether a form of it computes what it does without its other channels.

        And whether what is left can be trained.

        Args:
            form: Takes the same images.
            kept: Indices of the channels that stay, of each group.
        """
        shape = (IMAGE_CHANNELS, self.resolution, self.resolution)
        noise = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
        try:
            expected = run(form, noise)
            narrow = self._narrowed(kept)
            if isinstance(narrow, FusedNetwork):
                found = run(FusedNet(narrow.plan, narrow.weights), noise)
            else:
                found = run(narrow, noise)
                train_once(narrow, shape)
        except (MissingDependency, MemoryError):
            raise
        except Exception as error:
            # Whatever its forward makes of shapes that do not fit, and its layers of
            # being cut.
            _logger.debug("%s with fewer channels: %s", self.family, error)
            return False
        return are_equal(found, expected)

    @property
    def family(self) -> str:
        """Name of its kind: of the space, or of the class."""
        if isinstance(self.module, PlannedNet):
            return self.module.plan.space_name
        return type(self.module).__name__

    @property
    def image(self) -> Tensor:
        """Of the size of its inputs, black, `(1, 3, resolution, resolution)`."""
        return torch.zeros(1, IMAGE_CHANNELS, self.resolution, self.resolution)

    def grown(self, module: nn.Module) -> OwnNetwork:
        """A form with more in it, without those groups that it has not itself.

        Args:
            module: With further modules; the others have their paths.

        Raises:
            TraceError: No group of it can be removed exactly.
        """
        shape = (IMAGE_CHANNELS, self.resolution, self.resolution)
        names = {group.name for group in self.graph.groups}
        whole = trace_channels(self.module, input_shape=shape).groups
        left_whole = {group.name for group in whole} - names
        graph = trace_channels(module, input_shape=shape)
        still = [i for i, g in enumerate(graph.groups) if g.name not in left_whole]
        grown = replace(self, module=module, graph=graph.only(still))
        return grown._exact(in_order=True)

    def left_of(self, module: nn.Module) -> OwnNetwork:
        """A part of it, with those of its groups that are still there.

        Args:
            module: Without some of its modules; the others have their paths.
        """
        shape = (IMAGE_CHANNELS, self.resolution, self.resolution)
        graph = trace_channels(module, input_shape=shape)
        names = {group.name for group in self.graph.groups}
        still = [i for i, group in enumerate(graph.groups) if group.name in names]
        left = replace(graph.only(still), removable=self.graph.removable)
        return replace(self, module=module, graph=left)

    @property
    def left_whole(self) -> tuple[str, ...]:
        """Layers some or all of whose channels cannot be removed, but for the last."""
        return tuple(
            layer.name
            for layer in self.graph.layers[:-1]
            if not layer.is_projection
            and sum(len(cut.positions) for cut in self.graph.cuts_at(layer.name, "out"))
            < layer.out_channels
        )

    @property
    def is_chain(self) -> bool:
        """Whether it becomes a plain chain of convolutions, which any writer writes."""
        return _is_chain(self.module)

    def operations(self) -> str:
        """As text: what decides how fast it is, besides its channels.

        Raises:
            TraceError: They depend on values.
        """
        if _is_chain(self.module):
            return repr(self.module.plan.blocks)
        shape = (IMAGE_CHANNELS, self.resolution, self.resolution)
        return operations_of(self.module, input_shape=shape)

    @property
    def sha256(self) -> str:
        """Digest of its weights, as they were brought."""
        digest = hashlib.sha256()
        brought = drop_needless(copy.deepcopy(self.module))
        for name, tensor in sorted(brought.state_dict().items()):
            array = tensor.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def masked(self) -> MaskedNetwork:
        """Itself with a mask behind each group; the weights are shared."""
        return insert_masks(self.module, self.graph)

    def remainder(self, masked: MaskedNetwork, kept: Sequence[Tensor]) -> nn.Module:
        """What is left of it, as a module to train.

        A chain of branched layers keeps its masks: their identities hand on prefixes of
        channels, which narrower layers would not have. Anything else becomes narrow,
        and trains as fast as what is left of it computes.

        Args:
            masked: Its masked form; keeps these channels and no others.
            kept: Indices of the channels that stay, of each group.
        """
        if self.is_chain:
            return masked.module
        return extract_module(self.module, self.graph, kept)

    def candidate(self, kept: Sequence[Tensor]) -> nn.Module:
        """What would be left of it as it is, as a module that shares nothing with it.

        Args:
            kept: Indices of the channels that stay, of each group.
        """
        if not self.is_chain:
            return extract_module(self.module, self.graph, kept)
        masked = insert_masks(copy.deepcopy(self.module), self.graph)
        for mask, indices in zip(masked.masks, kept, strict=True):
            mask.keep_only(indices)
            mask.latent.requires_grad_(False)  # or tuning could bring channels back
        return masked.module

    def export(
        self,
        trained: nn.Module,
        kept: Sequence[Tensor],
        *,
        method: str,
        target: Target,
        folder: Path,
    ) -> ExportedNetwork:
        """Write what is left of it.

        Args:
            trained: What `remainder` gave, as it is now: what the file must compute.
            kept: Indices of the channels that stay, of each group.
            method: That chose them.
            target: What the file is for.
            folder: Gets the files.

        Raises:
            ModelRejected: It cannot be written for the target.
        """
        narrow = self._narrowed(kept) if self.is_chain else trained.eval()
        model_file = self._write(narrow, target, folder)
        return ExportedNetwork(
            facts=NetworkFacts(
                name=f"{method}-{_digest(kept)}",
                family=self.family,
                resolution=self.resolution,
                cost=self._cost(narrow, folder),
            ),
            reference=_frozen(trained),
            target=target,
            folder=folder,
            model_file=model_file,
        )

    def write(self, kept: Sequence[Tensor], *, target: Target, folder: Path) -> str:
        """Write a narrowed form of it, to be timed; returns the file to load.

        Args:
            kept: Indices of the channels that stay, of each group.
            target: What the file is for.
            folder: Gets the files.
        """
        return self._write(self._narrowed(kept), target, folder)

    def _narrowed(self, kept: Sequence[Tensor]) -> FusedNetwork | nn.Module:
        if _is_chain(self.module):
            return extract_plan(self.module, self.graph, kept, name=_digest(kept))
        return extract_module(self.module, self.graph, kept).eval()

    def _write(
        self, narrow: FusedNetwork | nn.Module, target: Target, folder: Path
    ) -> str:
        if isinstance(narrow, FusedNetwork):
            return write_model(
                narrow.plan, narrow.weights, target=target, folder=folder
            )
        return write_module(
            narrow, resolution=self.resolution, target=target, folder=folder
        )

    def _cost(self, narrow: FusedNetwork | nn.Module, folder: Path) -> NetworkCost:
        """What it comes to, as it was written into the folder."""
        if isinstance(narrow, FusedNetwork):
            return narrow.plan.cost
        peak = peak_activation_count(onnx.load(folder / ONNX_FILE))
        return NetworkCost(
            mac_count=mac_count(narrow, self.image),
            parameter_count=parameter_count(narrow, self.image),
            peak_activation_bytes=peak * BYTES_PER_FLOAT,
        )


def _is_chain(module: nn.Module) -> TypeGuard[StaticNet]:
    # What was fused already has no branches left to merge, whatever its plan says.
    return isinstance(module, StaticNet) and all(
        isinstance(layer, RepConvLayer | PoolLayer | LinearLayer)
        for layer in module.plan.layers
    )


def warn_if_by_chance(own: OwnNetwork, images: ImageSet) -> None:
    """Warn of a network that knows no more of held-out images than a guess would.

    Classes count alike, however many images they have.

    Args:
        own: As it was brought.
        images: Held out; of fewer than `FEW` nothing is told.
    """
    if len(images) < FEW:
        return
    seen = images.take(np.random.default_rng(0).permutation(len(images))[:MOST_SEEN])
    inputs = prepare(
        seen.images, resolution=own.resolution, normalisation=own.normalisation
    )
    guesses = _run_in_parts(own.module, inputs).argmax(1)
    right = guesses == seen.labels
    known = float(np.mean([right[seen.labels == c].mean() for c in set(seen.labels)]))
    by_chance = 1 / len(own.class_names)
    error = (by_chance * (1 - by_chance) / len(seen)) ** 0.5
    if known > by_chance + 3 * error:
        return
    warnings.warn(
        f"{own.family} classifies {known:.1%} of {len(seen)} held-out images right, "
        f"and a guess {by_chance:.1%}: there is nothing to keep of what it knows. Look "
        "at the order of its outputs, which must be "
        f"{few_of(own.class_names, most=3)}, at the normalisation, and at the weights",
        stacklevel=3,
    )


def _some(
    channels: int, place: int, rng: np.random.Generator, *, in_order: bool
) -> NDArray[np.int64]:
    """Half of the channels or more, ascending; never all, if there are several.

    Args:
        channels: Of a group.
        place: Of the group among all: neighbours keep different shares, or what holds
            for equal counts alone, such as halves, would pass for all.
        rng: Chooses which.
        in_order: Whether the first ones.
    """
    share = 0.5 + 0.5 * (place * GOLDEN_RATIO % 1)
    count = max(1, min(channels - 1, round(share * channels)))
    if in_order:
        return np.arange(count)
    return np.sort(rng.permutation(channels)[:count])


def _frozen(module: nn.Module) -> Callable[[Floats], Floats]:
    """What a module computes now, whatever becomes of it."""
    kept = copy.deepcopy(module)
    return lambda inputs: _run_in_parts(kept, inputs)


def _run_in_parts(module: nn.Module, inputs: Floats) -> Floats:
    """`run`, of few images at a time."""
    parts = in_batches(len(inputs), AT_A_TIME)
    return np.concatenate([run(module, inputs[part]) for part in parts])


def _digest(kept: Sequence[Tensor]) -> str:
    parts = [indices.to(torch.int64).numpy().tobytes() + b"/" for indices in kept]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]
