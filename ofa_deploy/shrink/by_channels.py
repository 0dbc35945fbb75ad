"""Shrinking by whole channels: less to compute, and less to store."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.constraints import ConstraintName, binding
from ofa_deploy.errors import InfeasibleBudget, SpaceError
from ofa_deploy.evidence import expected_ratio
from ofa_deploy.nn.projection import drop_needless
from ofa_deploy.shrink.cost import rounded_up
from ofa_deploy.shrink.device_prices import DevicePrices
from ofa_deploy.shrink.finetuning import finetune, freeze
from ofa_deploy.shrink.fitting import AIMED_SHARE, Fitted, Fitting
from ofa_deploy.shrink.methods import SEARCHING, Found, Search
from ofa_deploy.shrink.pas import LatentOrder
from ofa_deploy.shrink.recipe import ChannelMethod
from ofa_deploy.shrink.resume_store import remembered
from ofa_deploy.shrink.shrinking import BROUGHT, SEARCH_FOLDER, Shrinking, Shrunk
from ofa_deploy.shrink.stages import find_stages, shallower
from ofa_deploy.shrink.tas_network import reset_parameters
from ofa_deploy.shrink.tas_order import ROUNDING

# Fine-tuned networks certified: one that misses gives up channels and is tuned again.
MAX_FINISHED = 3
# Of the share of its price that is asked of a network which was thought fast enough.
SHARE_STEP = 0.05
# What the exported file alone tells.
FILE_LIMITS: frozenset[ConstraintName] = frozenset({"size", "compressed", "memory"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ByChannels:
    """A call, by one of the methods that choose channels.

    Args:
        call: The call.
        method: Its method.
        prices: The device's.
        stack: Closes the folders of exported files.
    """

    call: Shrinking
    method: ChannelMethod
    prices: DevicePrices
    stack: ExitStack

    def run(self) -> Shrunk:
        """As little as the limits ask for: nothing, where the whole keeps them.

        Raises:
            InfeasibleBudget: No form keeps the limits.
        """
        call, own = self.call, self.call.own
        masked = own.masked()
        as_it_is = LatentOrder(
            latents=masked.latents(), step=self.prices.step, floors=self.floors
        )
        whole = call.fitting(masked, as_it_is, self.prices, floors=self.floors)
        expected = expected_ratio(call.constraints)
        share = whole.budget_ms / expected / whole.full_ms
        kept = masked.kept()
        unchanged = own.remainder(masked, kept)
        if share >= 1:
            network = call.certify(whole, unchanged, kept, whole.full_ms, self.stack)
            if network.met:
                return self._shrunk(network, self._channels, ())
            call.require_accuracy(network)
            least_share = self._least_share(whole)
            if least_share >= 1:
                raise call.missed(network)
            share = self._asked_share(network)
        else:
            least_share = self._least_share(whole)
        share = max(share, least_share)
        self.stack.enter_context(call.at_work(self.prices))
        # What its file would not compute is known before hours of training.
        with TemporaryDirectory(prefix="ofa-deploy-") as name:
            written = whole.written(unchanged, kept, Path(name))
            call.compare(written, beside=BROUGHT)
        teacher = self._teacher() if call.recipe.distill else None
        folder = call.work / self._name(share)
        call.reporter.begin(SEARCHING)
        found = Search(
            own=own,
            price=self.prices.price,
            share=share,
            step=self.prices.step,
            recipe=call.recipe,
            images=call.images,
            held_out=call.ranked_on,
            folder=folder / SEARCH_FOLDER,
            on_progress=call.tell,
            judged=call.reporter.advance,
            announced=lambda found: call.reporter.begin(f"{SEARCHING}: {found.told}"),
            executor=call.executor,
        ).run(self.method)
        # What channels go from may be less deep than the network was.
        left = replace(
            self,
            call=replace(call, own=found.own),
            prices=self.prices.of_graph(found.own.graph),
        )
        shrunk = left._finish(found, folder, teacher)
        return self._of_all(shrunk, found)

    def _teacher(self) -> nn.Module:
        """The network as it was brought."""
        return drop_needless(copy.deepcopy(self.call.own.module))

    def _of_all(self, shrunk: Shrunk, found: Found) -> Shrunk:
        """With the groups that went with their blocks, and the depths."""
        counts = dict(zip(shrunk.parts, shrunk.kept, strict=True))
        parts = [group.name for group in self.call.own.graph.groups]
        return replace(
            shrunk,
            parts=(*parts, *(name for name, _, _ in found.depths)),
            had=(*self._channels, *(blocks for _, blocks, _ in found.depths)),
            kept=(
                *(counts.get(name, 0) for name in parts),
                *(depth for _, _, depth in found.depths),
            ),
            family=found.family,
        )

    @property
    def floors(self) -> list[int]:
        """Least channels of each group."""
        return self.call.recipe.floors(
            self.call.own.graph, method=self.method, step=self.prices.step
        )

    @property
    def _channels(self) -> tuple[int, ...]:
        return tuple(group.channels for group in self.call.own.graph.groups)

    def _shrunk(
        self,
        network: VerifiedNetwork,
        counts: tuple[int, ...],
        trainings: tuple[Path, ...],
    ) -> Shrunk:
        return Shrunk(
            network=network,
            parts=tuple(group.name for group in self.call.own.graph.groups),
            had=self._channels,
            kept=counts,
            trainings=trainings,
        )

    def _lowest(self, share: float) -> float:
        """The share at which is searched."""
        lowest_share = self.call.recipe.lowest_share
        if self.method == "legr" and lowest_share is not None:
            return min(share, lowest_share)
        return share

    def _name(self, share: float) -> str:
        decides: list[object] = [self._lowest(share), self.prices.step]
        if self.method == "legr":
            decides.append(self.call.ranked_on.sha256)
        return self.call.name(self.prices, *decides)

    def _asked_share(self, missed: VerifiedNetwork) -> float:
        """Of the price, after the whole network missed a limit.

        A call that goes on must ask for the same again, whatever it measures.
        """
        call = self.call
        name = call.name(self.prices, self.prices.step, call.limits_name)
        used_share = binding(missed.verdicts).used_share
        share = math.floor(AIMED_SHARE / used_share / SHARE_STEP) * SHARE_STEP
        return float(remembered(call.work / f"asked-{name}.json", lambda: share))

    def _least_share(self, whole: Fitting) -> float:
        """Of the price, that the least form has.

        Raises:
            InfeasibleBudget: Even that misses a limit.
            SpaceError: It costs more than the share that LeGR is to rank at.
        """
        call, recipe = self.call, self.call.recipe
        least = self._least(whole)
        least_ms = least.price_ms(least.floors)
        needed_ms = expected_ratio(call.constraints) * least_ms
        if needed_ms > whole.budget_ms:
            raise InfeasibleBudget(
                f"no form of {call.own.family} meets {whole.budget_ms:g} ms on "
                f"{call.target.backend}: with no more than {self._floors_told} it is "
                f"still priced at {least_ms:.4g} ms. Ask for at least "
                f"{rounded_up(needed_ms):.4g} ms{self._floors_cure}",
                budget_ms=whole.budget_ms,
                fastest_ms=needed_ms,
            )
        # Hours of search would be for nothing where only the file tells, or its runs.
        constraints = call.constraints
        if constraints.limits.keys() & FILE_LIMITS or not constraints.is_plain:
            found = least.time(least.floors)
            if found.used_share > 1:
                raise least.infeasible([found])
        share = (1 + ROUNDING) * least_ms / whole.full_ms
        lowest = recipe.lowest_share
        if self.method == "legr" and lowest is not None and lowest < share:
            raise SpaceError(
                f"lowest_share={lowest:g}, but with no more than {self._floors_told} "
                f"the network still costs {share:.3g} of its {whole.full_ms:.4g} ms; "
                f"give at least {rounded_up(share):.4g}{self._floors_cure}"
            )
        return share

    @property
    def _floors_told(self) -> str:
        recipe = self.call.recipe
        if self.method == "tas":
            return "the narrowest widths, and the fewest blocks, that tas chooses among"
        told = f"the channels that floor={recipe.floor}"
        if self.method == "legr":
            told += f" and safeguard={recipe.legr.safeguard:g}"
        return f"{told} keep"

    @property
    def _floors_cure(self) -> str:
        return "" if self.method == "tas" else ", or lower these (from Python: recipe=)"

    def _least(self, whole: Fitting) -> Fitting:
        """Of whose forms the one at its floors is the least; of tas one block a stage.

        Args:
            whole: Of the network as it is.
        """
        call, recipe = self.call, self.call.recipe
        if self.method != "tas" or not recipe.tas.searches_depth:
            return whole
        own = call.own
        stages = find_stages(own.module, own.graph, own.image)
        left = own.left_of(shallower(own.module, stages, [1] * len(stages)))
        masked, step = left.masked(), self.prices.step
        floors = recipe.floors(left.graph, method="tas", step=step)
        order = LatentOrder(latents=masked.latents(), step=step, floors=floors)
        prices = self.prices.of_graph(left.graph)
        return replace(call, own=left).fitting(masked, order, prices, floors=floors)

    def _finish(
        self,
        found: Found,
        folder: Path,
        teacher: nn.Module | None,
    ) -> Shrunk:
        """Fit, fine-tune, certify; narrower where that missed."""
        call = self.call
        fitting = call.fitting(
            found.masked, found.order, self.prices, floors=self.floors
        )
        chosen = f"chosen-{call.limits_name}"
        fitted: Fitted | None = fitting.widest(memory=folder / f"{chosen}.json")
        trainings = [folder / SEARCH_FOLDER]
        for _ in range(MAX_FINISHED):
            if fitted is None:
                break
            freeze(fitting.masked, fitted.kept)
            remainder = call.own.remainder(fitting.masked, fitted.kept)
            if found.fresh:
                torch.manual_seed(call.recipe.finetune.seed)
                reset_parameters(remainder)
            trainings.append(folder / call.tuned_name(fitted.name))
            call.reporter.begin("fine-tuning")
            finetune(
                remainder,
                resolution=call.own.resolution,
                recipe=call.finetuning,
                images=call.images,
                folder=trainings[-1],
                teacher=teacher,
                on_progress=call.tell,
            )
            network = call.certify(
                fitting, remainder, fitted.kept, fitted.predicted_ms, self.stack
            )
            if network.met:
                return self._shrunk(network, fitted.counts, tuple(trainings))
            call.require_accuracy(network)
            if len(trainings) <= MAX_FINISHED:
                used_share = binding(network.verdicts).used_share
                memory = folder / f"{chosen}-after-{fitted.name}.json"
                fitted = fitting.narrower(fitted, used_share=used_share, memory=memory)
        raise call.missed(network)
