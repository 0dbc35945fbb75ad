"""Shrinking by single weights: less to store, and as much to compute."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.shrink.cost import full_counts
from ofa_deploy.shrink.device_prices import DevicePrices
from ofa_deploy.shrink.fitting import Fitting
from ofa_deploy.shrink.pas import LatentOrder
from ofa_deploy.shrink.resume_store import remembered
from ofa_deploy.shrink.shrinking import BROUGHT, SEARCH_FOLDER, Shrinking, Shrunk
from ofa_deploy.shrink.size_fitting import SizeFitting
from ofa_deploy.shrink.sparse import (
    SEARCHING,
    SparsityPull,
    finetune_weights,
    search_weights,
)
from ofa_deploy.shrink.weight_masks import weights_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ByWeights:
    """A call to make the compressed file as small as it is asked for.

    Args:
        call: The call; a compressed size is asked for.
        prices: The device's.
        stack: Closes the folders of exported files.
    """

    call: Shrinking
    prices: DevicePrices
    stack: ExitStack

    def run(self) -> Shrunk:
        """As few weights as the limit asks for: all, where the whole network keeps it.

        Raises:
            InfeasibleBudget: No number of weights keeps the limits.
        """
        call, model = self.call, self.call.own.module
        full_ms = float(self.prices.price(full_counts(call.own.graph)))
        whole = self._certify(model, full_ms)
        if whole.met:
            return self._shrunk(whole, self._had, ())
        self._require_only_size(whole)
        self.stack.enter_context(call.at_work(self.prices))
        call.compare(whole.exported, beside=BROUGHT)  # before hours of training
        fitting = self._size_fitting(whole)
        most = fitting.most(lambda count: self._bytes(self._masks(model), count))
        share = most / fitting.weight_count
        folder = call.work / call.name(self.prices, share)
        call.reporter.begin(SEARCHING)
        pull = search_weights(
            model,
            target_share=share,
            settings=call.recipe.sparsity,
            estimator=call.recipe.estimator,
            deciding_share=call.recipe.deciding_share,
            resolution=call.own.resolution,
            images=call.images,
            recipe=call.recipe.search,
            folder=folder / SEARCH_FOLDER,
            on_progress=call.tell,
        )
        count = self._settled(pull, fitting, memory=folder / "weights.json")
        pull.freeze(count)
        tuning = folder / call.tuned_name(f"finetune-{count}")
        call.reporter.begin("fine-tuning")
        trained = finetune_weights(
            pull,
            resolution=call.own.resolution,
            images=call.images,
            recipe=call.finetuning,
            folder=tuning,
            teacher=copy.deepcopy(model) if call.recipe.distill else None,
            on_progress=call.tell,
        )
        small = self._trimmed(trained, fitting)
        network = self._certify(small, whole.measurement.quiet_ms)
        if not network.met:
            raise call.missed(network)
        return self._shrunk(network, _nonzero(small), (folder / SEARCH_FOLDER, tuning))

    @property
    def _limit_bytes(self) -> int:
        limit = self.call.constraints.compressed_bytes
        assert limit is not None
        return limit

    def _masks(self, model: nn.Module) -> SparsityPull:
        """Of a network that is not searched: by magnitude."""
        return SparsityPull(
            copy.deepcopy(model),
            target_share=1.0,
            steps=1,
            settings=self.call.recipe.sparsity,
        )

    def _size_fitting(self, whole: VerifiedNetwork) -> SizeFitting:
        return SizeFitting(
            limit_bytes=self._limit_bytes,
            weight_count=sum(self._had),
            full_bytes=whole.exported.compressed_bytes,
        )

    def _require_only_size(self, whole: VerifiedNetwork) -> None:
        """Refuse what fewer weights do not mend."""
        others = [v for v in whole.verdicts if v.constraint != "compressed"]
        if not all(verdict.met for verdict in others):
            raise self.call.missed(whole)

    def _trimmed(self, trained: nn.Module, fitting: SizeFitting) -> nn.Module:
        """Without the least weights, where fine-tuned ones compress worse."""
        pull, count = self._masks(trained), sum(_nonzero(trained))
        if self._bytes(pull, count) <= self._limit_bytes:
            return trained
        fewer = replace(
            fitting, weight_count=count, full_bytes=self._bytes(pull, count)
        )
        return pull.narrowed_to(fewer.most(lambda count: self._bytes(pull, count)))

    def _settled(
        self, pull: SparsityPull, fitting: SizeFitting, *, memory: Path
    ) -> int:
        """Weights that may stay of those that were found; a killed call's are taken."""

        def found() -> int:
            self.call.reporter.begin("fitting the file's size")
            return fitting.most(lambda count: self._bytes(pull, count))

        return int(remembered(memory, found))

    def _bytes(self, pull: SparsityPull, count: int) -> int:
        """Of the compressed file with so many weights."""
        network = pull.narrowed_to(count)
        with TemporaryDirectory(prefix="ofa-deploy-") as name:
            fitting = self._fitting(network)
            return fitting.written(network, (), Path(name)).compressed_bytes

    def _certify(self, network: nn.Module, expected_ms: float) -> VerifiedNetwork:
        fitting = self._fitting(network)
        return self.call.certify(fitting, network, (), expected_ms, self.stack)

    def _fitting(self, network: nn.Module) -> Fitting:
        """What writes and times a network, all of whose groups are left whole."""
        own = replace(self.call.own, module=network)
        masked = own.masked()
        order = LatentOrder(latents=[], step=self.prices.step, floors=[])
        call = replace(self.call, own=own)
        return call.fitting(masked, order, self.prices, floors=[])

    def _shrunk(
        self, network: VerifiedNetwork, kept: Sequence[int], trainings: tuple[Path, ...]
    ) -> Shrunk:
        return Shrunk(
            network=network,
            parts=tuple(weights_of(self.call.own.module)),
            had=tuple(self._had),
            kept=tuple(kept),
            trainings=trainings,
        )

    @property
    def _had(self) -> list[int]:
        return [w.numel() for w in weights_of(self.call.own.module).values()]


def _nonzero(network: nn.Module) -> list[int]:
    """Weights of each layer that are not zero."""
    return [int(w.count_nonzero()) for w in weights_of(network).values()]
