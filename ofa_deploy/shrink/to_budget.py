"""From a user's network, data and a budget to a verified bundle."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from ofa_deploy.assembly import (
    VerifiedNetwork,
    assemble_bundle,
    measured_accuracy,
    require_classes,
)
from ofa_deploy.bundle import Bundle, require_free
from ofa_deploy.constraints import Constraints, binding
from ofa_deploy.contract import EXPECTED_RATIO
from ofa_deploy.dataset import ImageSet, load_images
from ofa_deploy.errors import DataError, DeviceError, InfeasibleBudget, SpaceError
from ofa_deploy.exporting import compare_exported
from ofa_deploy.predict.latency import TWO_SIDED_95, LatencyEstimate
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.profiling import cache_folder
from ofa_deploy.report.page import REPORT_FILE
from ofa_deploy.report.shrunk import ShrinkHistory, shrunk_report
from ofa_deploy.reporting import Reporter, Silent
from ofa_deploy.shrink.device_prices import (
    DevicePrices,
    measure_prices,
    runtime_step,
)
from ofa_deploy.shrink.finetuning import Told, finetune, freeze, nobody
from ofa_deploy.shrink.fitting import AIMED_SHARE, Fitted, Fitting
from ofa_deploy.shrink.methods import SEARCHING, Found, Search
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.pas import LatentOrder
from ofa_deploy.shrink.recipe import (
    METHODS,
    Method,
    ShrinkRecipe,
    default_shrink_recipe,
)
from ofa_deploy.target import Target, parse_target
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LOG_FILE, LoopProgress
from ofa_deploy.verify import judge, require_memory_gauge
from profilers.backends import get_backend
from profilers.device import this_device

HISTORY_FILE, SEARCH_FOLDER = "shrink.json", "search"
# Fine-tuned networks certified: one that misses gives up channels and is tuned again.
MAX_FINISHED = 3
# Of the share of its price that is asked of a network which was thought fast enough.
SHARE_STEP = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """A network that keeps its limits, and how it came to be.

    Args:
        network: Verified.
        counts: Channels of each group.
        trainings: Folders of the search, and of each fine-tuning; none where the whole
            network keeps the limits.
    """

    network: VerifiedNetwork
    counts: tuple[int, ...]
    trainings: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrinking:
    """One call: a network, a device, and what is asked for.

    Args:
        own: The network.
        method: That chooses channels.
        target: Where it is to run.
        constraints: What is asked for; a latency is among it.
        recipe: How to shrink.
        images: To train on.
        evaluation: To measure the accuracy on.
        work: Folder of checkpoints, from which a call that was killed goes on.
        reporter: Told of stages.
        told: Told of trainings.
        executor: Judges LeGR's candidates; None for processes of its own.
    """

    own: OwnNetwork
    method: Method
    target: Target
    constraints: Constraints
    recipe: ShrinkRecipe
    images: TrainingImages
    evaluation: ImageSet
    work: Path
    reporter: Reporter
    told: Told = nobody
    executor: Executor | None = None

    def run(self, *, out: Path, prices_folder: Path) -> Bundle:
        """Price, search, fit, fine-tune, certify, write.

        Args:
            out: Folder of the bundle; must not exist, or be empty.
            prices_folder: Of the tables measured on this machine.

        Raises:
            InfeasibleBudget: The network's least form is slower, as priced or measured.
            ParityError: The file computes something else.
        """
        require_free(out)
        prices = self._prices(prices_folder)
        before_sha256 = self.own.sha256
        with ExitStack() as stack:
            shrunk = self.shrink(prices, stack)
            network = shrunk.network
            self.reporter.begin("comparing with the trained network")
            parity = compare_exported(
                network.exported,
                self.evaluation.images,
                normalisation=self.own.normalisation,
            )
            history = self._history(before_sha256, shrunk)
            self.reporter.begin("writing the bundle")
            return assemble_bundle(
                out,
                network,
                parity=parity,
                source=_Source(self.own, before_sha256),
                extra_files={
                    HISTORY_FILE: history.to_json().encode(),
                    REPORT_FILE: shrunk_report(
                        network, history=history, table=prices.table
                    ).encode(),
                },
            )

    def _prices(self, folder: Path) -> DevicePrices:
        backend = get_backend(self.target.backend)
        step = self.recipe.step or runtime_step(
            self.target, backend=backend, folder=folder, reporter=self.reporter
        )
        return measure_prices(
            self.own,
            target=self.target,
            backend=backend,
            step=step,
            folder=folder,
            reporter=self.reporter,
        )

    def shrink(self, prices: DevicePrices, stack: ExitStack) -> Shrunk:
        """As little as the limits ask for: nothing, where the whole network keeps them.

        Args:
            prices: The device's.
            stack: Closes the folders of exported files.

        Raises:
            InfeasibleBudget: No form keeps the limits.
        """
        masked = self.own.masked()
        as_it_is = LatentOrder(
            latents=masked.latents(), step=prices.step, floors=self._floors(prices)
        )
        whole = self.fitting(Found(masked=masked, order=as_it_is), prices)
        share = whole.budget_ms / EXPECTED_RATIO / whole.full_ms
        if share >= 1:
            kept = masked.kept()
            unchanged = self.own.remainder(masked, kept)
            network = self._certify(whole, unchanged, kept, whole.full_ms, stack)
            if network.met:
                counts = tuple(group.channels for group in self.own.graph.groups)
                return Shrunk(network=network, counts=counts, trainings=())
            self._require_accuracy(network)
            # In coarse steps: a call that goes on must ask for the same share again.
            used_share = binding(network.verdicts).used_share
            share = math.floor(AIMED_SHARE / used_share / SHARE_STEP) * SHARE_STEP
        self._require_reachable(whole, share)
        teacher = copy.deepcopy(self.own.module) if self.recipe.distill else None
        folder = self.work / self._name(prices, share)
        self.reporter.begin(SEARCHING)
        found = Search(
            own=self.own,
            price=prices.price,
            share=share,
            step=prices.step,
            recipe=self.recipe,
            images=self.images,
            folder=folder / SEARCH_FOLDER,
            told=self._tell,
            judged=self.reporter.advance,
            executor=self.executor,
        ).run(self.method)
        return self._finish(self.fitting(found, prices), folder, teacher, stack)

    def _floors(self, prices: DevicePrices) -> list[int]:
        return self.recipe.floors(self.own.graph, method=self.method, step=prices.step)

    def _name(self, prices: DevicePrices, share: float) -> str:
        """Of everything that decides a search: another one is never continued."""
        if self.method == "legr" and self.recipe.lowest_share is not None:
            share = min(share, self.recipe.lowest_share)
        decides = [self.method, self.own.sha256, prices.table.space_sha256]
        decides += [prices.table.created_at, str(share), str(prices.step)]
        decides += [str(asdict(self.recipe)), str(asdict(self.own.normalisation))]
        return _short_digest(decides)

    def fitting(self, found: Found, prices: DevicePrices) -> Fitting:
        """What fits structures to the budget, in the order that was found."""
        return Fitting(
            own=self.own,
            masked=found.masked,
            order=found.order,
            method=self.method,
            target=self.target,
            constraints=self.constraints,
            floors=self._floors(prices),
            prices=prices,
            reporter=self.reporter,
        )

    def _require_reachable(self, whole: Fitting, share: float) -> None:
        least_ms = whole.price_ms(whole.floors)
        if least_ms > share * whole.full_ms:
            raise InfeasibleBudget(
                f"no form of {self.own.family} meets {whole.budget_ms:g} ms on "
                f"{self.target.backend}: with {self.recipe.floor} channels in every "
                f"layer it is still priced at {least_ms:.4g} ms. Ask for at least "
                f"{least_ms * EXPECTED_RATIO:.4g} ms, or lower the floor",
                budget_ms=whole.budget_ms,
                fastest_ms=least_ms,
            )

    def _require_accuracy(self, network: VerifiedNetwork) -> None:
        """Nothing narrower would be more accurate."""
        if any(v.constraint == "accuracy" and not v.met for v in network.verdicts):
            raise self._missed(network)

    def _tell(self, stage: str, progress: LoopProgress) -> None:
        self.reporter.advance(progress.step, progress.steps)
        self.told(stage, progress)

    def _finish(
        self,
        fitting: Fitting,
        folder: Path,
        teacher: nn.Module | None,
        stack: ExitStack,
    ) -> Shrunk:
        """Fit, fine-tune, certify; narrower where that missed."""
        limits = _short_digest([str(asdict(self.constraints))])
        fitted: Fitted | None = fitting.widest(memory=folder / f"chosen-{limits}.json")
        trainings = [folder / SEARCH_FOLDER]
        for _ in range(MAX_FINISHED):
            if fitted is None:
                break
            freeze(fitting.masked, fitted.kept)
            remainder = self.own.remainder(fitting.masked, fitted.kept)
            trainings.append(folder / fitted.name)
            self.reporter.begin("fine-tuning")
            finetune(
                remainder,
                resolution=self.own.resolution,
                recipe=self.recipe.finetune,
                images=self.images,
                folder=trainings[-1],
                teacher=teacher,
                told=self._tell,
            )
            network = self._certify(
                fitting, remainder, fitted.kept, fitted.predicted_ms, stack
            )
            if network.met:
                return Shrunk(
                    network=network, counts=fitted.counts, trainings=tuple(trainings)
                )
            self._require_accuracy(network)
            if len(trainings) <= MAX_FINISHED:
                used_share = binding(network.verdicts).used_share
                fitted = fitting.narrower(fitted, used_share=used_share)
        raise self._missed(network)

    def _missed(self, network: VerifiedNetwork) -> InfeasibleBudget:
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

    def _certify(
        self,
        fitting: Fitting,
        trained: nn.Module,
        kept: Sequence[Tensor],
        predicted_ms: float,
        stack: ExitStack,
    ) -> VerifiedNetwork:
        """Export what is left now, and show what it does."""
        folder = stack.enter_context(TemporaryDirectory(prefix="ofa-deploy-"))
        exported = fitting.written(trained, kept, Path(folder))
        measurement = fitting.measure(exported)
        runtime = fitting.prices.table.runtime
        self.reporter.begin("measuring the accuracy")
        accuracy = measured_accuracy(
            _Source(self.own, ""),
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
                size_bytes=exported.loaded_bytes,
                accuracy=accuracy,
            ),
            device=this_device(
                accelerator=get_backend(self.target.backend).accelerator()
            ),
            runtime=runtime,
            candidates=tuple(found.candidate for found in fitting.timed),
        )

    def _history(self, before_sha256: str, shrunk: Shrunk) -> ShrinkHistory:
        """What happened, for the report and for whoever asks later."""
        logs = [_read_log(folder / LOG_FILE) for folder in shrunk.trainings]
        return ShrinkHistory(
            method=self.method,
            recipe=asdict(self.recipe),
            weights_sha256=before_sha256,
            groups=tuple(group.name for group in self.own.graph.groups),
            channels=tuple(group.channels for group in self.own.graph.groups),
            search=logs[0] if logs else (),
            finetune=tuple(line for log in logs[1:] for line in log),
            kept=shrunk.counts,
        )


def shrink(
    model: nn.Module,
    *,
    device: str,
    constraints: Constraints,
    method: str,
    data: str | Path | ImageSet,
    out: str | Path,
    threads: int | None = None,
    eval_data: str | Path | ImageSet | None = None,
    normalisation: Normalisation | None = None,
    recipe: ShrinkRecipe | None = None,
    work: str | Path | None = None,
    reporter: Reporter | None = None,
    told: Told = nobody,
    executor: Executor | None = None,
) -> Bundle:
    """Shrink a network to a budget on a device; return what was shown to keep it.

    Args:
        model: Trained, from images `(N, 3, H, W)` to logits `(N, classes)`. Not
            changed.
        device: Such as `openvino-cpu`.
        constraints: What is asked for; a latency must be among it.
        method: `pas`, `legr` or `autoprune`.
        data: Labelled images of the network's input size, to train on.
        out: Folder of the bundle; must not exist, or be empty.
        threads: Of one inference, instead of naming them in `device`.
        eval_data: Labelled images to measure the accuracy on; None takes those of
            `data` that are held out.
        normalisation: Of the network's inputs; None measures the training images, as
            `ofa-deploy` itself trains.
        recipe: How; None for `default_shrink_recipe`.
        work: Folder of checkpoints, from which a call that was killed goes on; None
            for one beside `out`.
        reporter: Told of stages.
        told: Told of trainings.
        executor: Judges LeGR's candidates; None for processes, one a core.

    Raises:
        SpaceError: No such method, or no latency asked for.
        TraceError: Names the layer whose channels cannot be told.
        DataError: The images do not fit the network.
        TrainingError: The recipe does not fit the images.
        InfeasibleBudget: No form of the network keeps the limits.
    """
    if method not in METHODS:
        raise SpaceError(f"method={method!r}; give one of {', '.join(METHODS)}")
    known: Method = method
    if constraints.peak_memory_mb is not None:
        require_memory_gauge()
    if constraints.budget_ms is None:
        raise SpaceError(
            "no latency is asked for; a network is shrunk to one: give latency_ms"
        )
    out = Path(out).resolve()
    require_free(out)
    target = parse_target(device, threads=threads)
    get_backend(target.backend).runtime(threads=target.threads)
    recipe, reporter = recipe or default_shrink_recipe(), reporter or Silent()
    read = _read(data, reporter)
    images = TrainingImages(read, recipe.search, normalisation=normalisation)
    images.for_recipe(recipe.finetune)
    evaluation = images.validation if eval_data is None else _read(eval_data, reporter)
    height, width = read.images.shape[1:3]
    if height != width:
        raise DataError(
            f"the images are {width}×{height}; a network is priced for square ones. "
            "Crop or resize them"
        )
    own = OwnNetwork.of(
        model,
        resolution=height,
        normalisation=images.normalisation,
        class_names=read.class_names,
    )
    require_classes(evaluation, _Source(own, ""))
    if target.backend == "litert-cpu" and not own.is_chain:
        raise DeviceError(
            f"{own.family} on litert-cpu: only chains of branched convolutions (the "
            "RepVGG family) are written for LiteRT so far. Take another device, or "
            "convert the model.onnx of a bundle for one"
        )
    work = Path(work) if work is not None else out.with_name(f"{out.name}.work")
    return Shrinking(
        own=own,
        method=known,
        target=target,
        constraints=constraints,
        recipe=recipe,
        images=images,
        evaluation=evaluation,
        work=work,
        reporter=reporter,
        told=told,
        executor=executor,
    ).run(out=out, prices_folder=cache_folder())


def _read(data: str | Path | ImageSet, reporter: Reporter) -> ImageSet:
    if isinstance(data, ImageSet):
        return data
    reporter.begin(f"reading {Path(data).name}")
    return load_images(Path(data), progress=reporter.advance)[0]


@dataclass(frozen=True, slots=True)
class _Source:
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


def _short_digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:12]


def _read_log(path: Path) -> tuple[Mapping[str, object], ...]:
    if not path.is_file():
        return ()
    return tuple(json.loads(line) for line in path.read_text().splitlines())
