"""One call to shrink a network: what it is given, and what all methods share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from ofa_deploy.assembly import VerifiedNetwork, measured_accuracy
from ofa_deploy.constraints import Constraints
from ofa_deploy.dataset import ImageSet
from ofa_deploy.errors import InfeasibleBudget
from ofa_deploy.exporting import ExportedNetwork, compare_exported
from ofa_deploy.predict.latency import TWO_SIDED_95, LatencyEstimate
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.reporting import Reporter
from ofa_deploy.shrink.device_prices import DevicePrices, keep_prices, keep_step
from ofa_deploy.shrink.finetuning import TrainingCallback, ignore_progress
from ofa_deploy.shrink.fitting import Fitting
from ofa_deploy.shrink.legr import Member
from ofa_deploy.shrink.masks import MaskedNetwork
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.ranking import ChannelOrder
from ofa_deploy.shrink.recipe import Method, ShrinkRecipe
from ofa_deploy.target import Target
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LoopProgress
from ofa_deploy.train.recipe import Recipe
from ofa_deploy.verify import ParityReport, judge
from ofa_deploy.work_folder import working_alone
from profilers.backends import get_backend
from profilers.device import this_device

SEARCH_FOLDER = "search"
# The network that a call is given, for people.
BROUGHT = "the network that was brought"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """A network that keeps its limits, and how it came to be.

    Args:
        network: Verified.
        parts: Names of what could go, channels or weights, part by part.
        had: How many each had.
        kept: How many each has now.
        trainings: Folders of the search, and of each fine-tuning; none where the whole
            network keeps the limits.
        family: Networks that the same search leaves for other budgets.
    """

    network: VerifiedNetwork
    parts: tuple[str, ...]
    had: tuple[int, ...]
    kept: tuple[int, ...]
    trainings: tuple[Path, ...]
    family: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrinking:
    """One call: a network, a device, and what is asked for.

    Args:
        own: The network.
        method: That chooses what goes.
        target: Where it is to run.
        constraints: What is asked for.
        recipe: How to shrink.
        images: To train on.
        ranked_on: To judge candidates on.
        evaluation: To measure the accuracy on.
        work: Folder of checkpoints, from which a call that was killed goes on.
        reporter: Told of stages.
        on_progress: Called with what is trained, and how far it is.
        executor: Judges LeGR's candidates; None for processes of its own.
    """

    own: OwnNetwork
    method: Method
    target: Target
    constraints: Constraints
    recipe: ShrinkRecipe
    images: TrainingImages
    ranked_on: ImageSet
    evaluation: ImageSet
    work: Path
    reporter: Reporter
    on_progress: TrainingCallback = ignore_progress
    executor: Executor | None = None

    @property
    def source(self) -> Source:
        """The network as it was brought."""
        return Source(own=self.own, sha256=self.own.sha256)

    def fitting(
        self,
        masked: MaskedNetwork,
        order: ChannelOrder,
        prices: DevicePrices,
        *,
        floors: Sequence[int],
    ) -> Fitting:
        """What fits structures to the budget.

        Args:
            masked: The network with its masks.
            order: In which channels go.
            prices: The device's.
            floors: Least channels of each group.
        """
        return Fitting(
            own=self.own,
            masked=masked,
            order=order,
            method=self.method,
            target=self.target,
            constraints=self.constraints,
            floors=floors,
            prices=prices,
            reporter=self.reporter,
        )

    def tell(self, stage: str, progress: LoopProgress) -> None:
        """Of a training."""
        self.reporter.advance(progress.step, progress.steps)
        self.on_progress(stage, progress)

    def name(self, prices: DevicePrices, *others: object) -> str:
        """Of everything that decides a search: another one is never continued.

        Args:
            prices: The device's.
            others: What else decides this one.
        """
        decides = [self.method, self.own.sha256, prices.table.space_sha256]
        decides += [prices.table.created_at, self.images.sha256, *map(str, others)]
        decides += [
            str(self.recipe.of_search(self.method)),
            str(asdict(self.own.normalisation)),
        ]
        return short_digest(decides)

    @property
    def finetuning(self) -> Recipe:
        """How what is found is trained."""
        return self.recipe.finetune_of(self.method)

    def tuned_name(self, found: str) -> str:
        """Of everything that decides a fine-tuning, besides the search.

        Args:
            found: Name of what is trained.
        """
        decides = [str(asdict(self.finetuning)), str(self.recipe.distill)]
        return f"{found}-{short_digest(decides)}"

    @property
    def limits_name(self) -> str:
        """Of everything that is asked for."""
        return short_digest([str(asdict(self.constraints))])

    def missed(self, network: VerifiedNetwork) -> InfeasibleBudget:
        """What does not keep all limits, to be raised."""
        return InfeasibleBudget(
            f"what is left of {self.own.family} does not keep all limits on "
            f"{self.target.backend}: "
            + "; ".join(
                f"{v.constraint} {v.told(v.bound)}, asked for {v.told(v.limit)}"
                for v in network.verdicts
                if not v.met
            )
            + ". Loosen that",
            budget_ms=self.constraints.budget_ms,
            fastest_ms=None,
            nearest=network.exported.facts.name,
        )

    def require_accuracy(self, network: VerifiedNetwork) -> None:
        """Refuse what is not accurate enough: nothing smaller would be.

        Raises:
            InfeasibleBudget: The accuracy that is asked for is not kept.
        """
        if any(v.constraint == "accuracy" and not v.met for v in network.verdicts):
            raise self.missed(network)

    @contextmanager
    def at_work(self, prices: DevicePrices) -> Iterator[None]:
        """Have the work folder for itself, and the prices with what goes by them.

        Args:
            prices: The device's.

        Raises:
            TrainingError: Another call is at work in it, or it cannot be written.
        """
        with working_alone(self.work):
            keep_prices(prices, self.work)
            if self.recipe.step is None and self.own.graph.groups:  # it was measured
                backend = get_backend(self.target.backend)
                keep_step(prices.step, self.target, backend=backend, work=self.work)
            yield

    def compare(self, exported: ExportedNetwork, *, beside: str) -> ParityReport:
        """What a file computes, beside the network that it was written from.

        Args:
            exported: The file, and the network.
            beside: What the network is, for people.

        Raises:
            ParityError: It computes something else.
        """
        self.reporter.begin(f"comparing with {beside}")
        return compare_exported(
            exported, self.evaluation.images, normalisation=self.own.normalisation
        )

    def certify(
        self,
        fitting: Fitting,
        trained: nn.Module,
        kept: Sequence[Tensor],
        predicted_ms: float,
        stack: ExitStack,
    ) -> VerifiedNetwork:
        """Export what is left now, and show what it does.

        Args:
            fitting: Writes and times it.
            trained: What is left.
            kept: Indices of the channels that stay, of each group.
            predicted_ms: What it should take.
            stack: Closes the folder of its files.
        """
        folder = stack.enter_context(TemporaryDirectory(prefix="ofa-deploy-"))
        exported = fitting.written(trained, kept, Path(folder))
        measurement = fitting.measure(exported)
        runtime = fitting.prices.table.runtime
        self.reporter.begin("measuring the accuracy")
        accuracy = measured_accuracy(
            self.source,
            exported,
            self.evaluation,
            runtime,
            progress=self.reporter.advance,
        )
        margin = TWO_SIDED_95 * fitting.prices.residual_ratio * predicted_ms
        return VerifiedNetwork(
            exported=exported,
            measurement=measurement,
            predicted=LatencyEstimate(
                ms=predicted_ms,
                low_ms=predicted_ms - margin,
                high_ms=predicted_ms + margin,
            ),
            accuracy=accuracy,
            constraints=self.constraints,
            verdicts=judge(
                self.constraints,
                measurement=measurement,
                files=exported,
                accuracy=accuracy,
            ),
            device=this_device(
                accelerator=get_backend(self.target.backend).accelerator()
            ),
            runtime=runtime,
            candidates=tuple(found.candidate for found in fitting.timed),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A `NetworkSource`: the network before it was shrunk."""

    own: OwnNetwork
    sha256: str

    @property
    def normalisation(self) -> Normalisation:
        """See `NetworkSource`."""
        return self.own.normalisation

    @property
    def class_names(self) -> tuple[str, ...]:
        """See `NetworkSource`."""
        return self.own.class_names


def short_digest(parts: Sequence[str]) -> str:
    """Name of what is decided by these."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:12]
