"""From a user's network, data and a budget to a verified bundle."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
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
from ofa_deploy.device_bench import CERTIFY_SETTINGS
from ofa_deploy.errors import DataError, DeviceError, InfeasibleBudget, SpaceError
from ofa_deploy.exporting import ExportedNetwork, compare_exported
from ofa_deploy.predict.latency import TWO_SIDED_95, LatencyEstimate
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.profiling import cache_folder
from ofa_deploy.report.page import REPORT_FILE
from ofa_deploy.report.shrunk import ShrinkHistory, shrunk_report
from ofa_deploy.reporting import Reporter, Silent
from ofa_deploy.shrink.cost import full_counts
from ofa_deploy.shrink.device_prices import (
    DevicePrices,
    measure_prices,
    runtime_step,
)
from ofa_deploy.shrink.masks import MaskedNetwork
from ofa_deploy.shrink.own_network import OwnNetwork
from ofa_deploy.shrink.pas import settle_counts
from ofa_deploy.shrink.widths import (
    ShrinkRecipe,
    Told,
    aligned_floor,
    default_shrink_recipe,
    finetune,
    freeze,
    nobody,
    search_widths,
    top_channels,
)
from ofa_deploy.target import Target, parse_target
from ofa_deploy.train.images import TrainingImages
from ofa_deploy.train.loop import LOG_FILE, LoopProgress
from ofa_deploy.verify import (
    AccuracyClaim,
    Candidate,
    enough_runs,
    judge,
    require_memory_gauge,
)
from profilers.backends import get_backend
from profilers.device import this_device
from profilers.files import write_atomically
from profilers.fresh import FreshMeasurement, measure_in_fresh_process
from profilers.timing import CERTIFY_PROCESSES

HISTORY_FILE = "shrink.json"
# Beside the search's checkpoint: the channel counts that were chosen after it.
CHOSEN_FILE = "chosen.json"
METHODS = ("pas",)
# A structure whose certified latency is within these shares of the budget is kept: near
# it, and far enough below that the same structure, timed again, keeps it too.
NEAR_BUDGET = (0.96, 0.99)
AIMED_SHARE = 0.978
# Structures timed before the nearest must do.
MAX_FITS = 6
# Fine-tuned networks certified: one that misses gives up channels and is tuned again.
MAX_FINISHED = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A structure that was timed.

    Args:
        counts: Channels of each group.
        kept: Their indices.
        name: Of the structure.
        predicted_ms: By the device's prices.
        measurement: Of its file, in fresh processes.
        bound_ms: What was held against the budget, its uncertainty included.
        used_share: The most that it uses of any limit but the accuracy.
    """

    counts: tuple[int, ...]
    kept: tuple[Tensor, ...]
    name: str
    predicted_ms: float
    measurement: FreshMeasurement
    bound_ms: float
    used_share: float

    @property
    def candidate(self) -> Candidate:
        """As a manifest tells it."""
        return Candidate(
            config_id=self.name,
            predicted_ms=self.predicted_ms,
            confirmed_ms=self.measurement.quiet_ms,
            certified_ms=self.bound_ms,
        )


@dataclass(slots=True, kw_only=True)
class Shrinking:
    """One call: a network, a device, a budget, and what was learnt on the way.

    Args:
        own: The network.
        target: Where it is to run.
        constraints: What is asked for; a latency is among it.
        recipe: How to shrink.
        images: To train on.
        evaluation: To measure the accuracy on.
        work: Folder of checkpoints, from which a call that was killed goes on.
        reporter: Told of stages.
        told: Told of trainings.
    """

    own: OwnNetwork
    target: Target
    constraints: Constraints
    recipe: ShrinkRecipe
    images: TrainingImages
    evaluation: ImageSet
    work: Path
    reporter: Reporter
    told: Told = nobody
    timed: list[Fitted] = field(default_factory=list)
    _run_name: str = ""

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
        backend = get_backend(self.target.backend)
        step = self.recipe.step or runtime_step(
            self.target, backend=backend, folder=prices_folder, reporter=self.reporter
        )
        prices = measure_prices(
            self.own,
            target=self.target,
            backend=backend,
            step=step,
            folder=prices_folder,
            reporter=self.reporter,
        )
        before = self.own.sha256
        masked = self._search(prices, before)
        latents = masked.latents()
        fitted = self.fit(masked, latents, prices)
        with ExitStack() as stack:
            network, fitted = self._finish(masked, latents, prices, fitted, stack)
            self.reporter.begin("comparing with the trained network")
            parity = compare_exported(
                network.exported,
                self.evaluation.images,
                normalisation=self.own.normalisation,
            )
            history = self.history(before, fitted)
            self.reporter.begin("writing the bundle")
            return assemble_bundle(
                out,
                network,
                parity=parity,
                source=_Source(self.own, before),
                extra_files={
                    HISTORY_FILE: history.to_json().encode(),
                    REPORT_FILE: shrunk_report(
                        network, history=history, table=prices.table
                    ).encode(),
                },
            )

    @property
    def budget_ms(self) -> float:
        """Latency that is asked for."""
        budget_ms = self.constraints.budget_ms
        assert budget_ms is not None
        return budget_ms

    def _floors(self, prices: DevicePrices) -> list[int]:
        floor = aligned_floor(self.recipe, prices.step)
        return [min(floor, group.channels) for group in self.own.graph.groups]

    def _search(self, prices: DevicePrices, before_sha256: str) -> MaskedNetwork:
        full_ms = float(prices.price(full_counts(self.own.graph)))
        share = min(1.0, self.budget_ms / EXPECTED_RATIO / full_ms)
        least = torch.tensor(self._floors(prices), dtype=torch.float64)
        least_ms = float(prices.price(least))
        if least_ms > share * full_ms:
            raise InfeasibleBudget(
                f"no form of {self.own.family} meets {self.budget_ms:g} ms on "
                f"{self.target.backend}: with {self.recipe.floor} channels in every "
                f"layer it is still priced at {least_ms:.4g} ms. Ask for at least "
                f"{least_ms * EXPECTED_RATIO:.4g} ms, or lower the floor",
                budget_ms=self.budget_ms,
                fastest_ms=least_ms,
            )
        # What else decides the search is in the folder's name: another one's
        # checkpoints are never continued.
        decides = [before_sha256, prices.table.space_sha256, prices.table.created_at]
        decides += [str(share), str(prices.step), str(asdict(self.recipe))]
        self._run_name = hashlib.sha256("/".join(decides).encode()).hexdigest()[:12]
        self.reporter.begin("searching widths")
        return search_widths(
            self.own,
            price=prices.price,
            target_share=share,
            recipe=self.recipe,
            step=prices.step,
            images=self.images,
            folder=self._folder("search"),
            told=self._tell,
        )

    def _folder(self, part: str) -> Path:
        return self.work / self._run_name / part

    def _tell(self, stage: str, progress: LoopProgress) -> None:
        self.reporter.advance(progress.step, progress.steps)
        self.told(stage, progress)

    def fit(
        self, masked: MaskedNetwork, latents: Sequence[Tensor], prices: DevicePrices
    ) -> Fitted:
        """The widest structure, as the latents order channels, that keeps the budget.

        Its file is timed with the weights that it has: these do not change how fast it
        is. Each answer corrects the price. What a killed call had chosen is taken.

        Raises:
            InfeasibleBudget: None does, of those tried.
        """
        chosen = self._folder("search") / CHOSEN_FILE
        if chosen.is_file():
            counts = json.loads(chosen.read_text(encoding="utf-8"))
            best = self._time(masked, latents, counts, prices)
        else:
            best = self._fit(masked, latents, prices)
            chosen.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(chosen, json.dumps(best.counts).encode())
        freeze(masked, best.kept)
        return best

    def _fit(
        self, masked: MaskedNetwork, latents: Sequence[Tensor], prices: DevicePrices
    ) -> Fitted:
        low, high = NEAR_BUDGET
        everything = tuple(group.channels for group in self.own.graph.groups)
        most_ms = self.budget_ms / EXPECTED_RATIO
        tried: list[Fitted] = []
        while len(tried) < MAX_FITS:
            counts = self._settle(latents, prices, most_ms)
            if any(tuple(counts) == found.counts for found in tried):
                break
            found = self._time(masked, latents, counts, prices)
            tried.append(found)
            whole = found.counts == everything and found.used_share <= high
            if whole or low <= found.used_share <= high:
                return found
            most_ms = found.predicted_ms * AIMED_SHARE / found.used_share
        # With room for the next measurement's noise, or else with less.
        for limit in (high, 1.0):
            keeping = [found for found in tried if found.used_share <= limit]
            if keeping:
                return max(keeping, key=lambda found: found.used_share)
        nearest = min(tried, key=lambda found: found.used_share)
        raise InfeasibleBudget(
            f"no form of {self.own.family} that was timed keeps all limits on "
            f"{self.target.backend}: the nearest takes up to {nearest.bound_ms:.4g} ms "
            f"of {self.budget_ms:g}, and {nearest.used_share:.0%} of what it uses most "
            "of. Ask for more, or lower the floor of channels",
            budget_ms=self.budget_ms,
            fastest_ms=nearest.bound_ms,
            nearest=nearest.name,
        )

    def _settle(
        self, latents: Sequence[Tensor], prices: DevicePrices, most_ms: float
    ) -> list[int]:
        floors = self._floors(prices)
        least = torch.tensor(floors, dtype=torch.float64)
        return settle_counts(
            latents,
            price=prices.price,
            most=max(most_ms, float(prices.price(least))),
            step=prices.step,
            floors=floors,
        )

    def _time(
        self,
        masked: MaskedNetwork,
        latents: Sequence[Tensor],
        counts: Sequence[int],
        prices: DevicePrices,
    ) -> Fitted:
        kept = top_channels(latents, counts)
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as name:
            exported = self.own.export(
                masked, kept, method="pas", target=self.target, folder=Path(name)
            )
            measurement = self._measure(exported, prices)
            verdicts = judge(
                replace(self.constraints, latency_ms=self.budget_ms, min_accuracy=None),
                measurement=measurement,
                size_bytes=exported.loaded_bytes,
                accuracy=_UNKNOWN,
            )
        (bound_ms,) = (v.bound for v in verdicts if v.constraint == "latency")
        found = Fitted(
            counts=tuple(counts),
            kept=kept,
            name=exported.facts.name,
            predicted_ms=float(prices.price(torch.tensor(counts, dtype=torch.float64))),
            measurement=measurement,
            bound_ms=bound_ms,
            used_share=binding(verdicts).used_share,
        )
        self.timed.append(found)
        return found

    def _measure(
        self, exported: ExportedNetwork, prices: DevicePrices
    ) -> FreshMeasurement:
        self.reporter.begin("certifying the exported file")
        return measure_in_fresh_process(
            exported.folder / exported.model_file,
            backend_name=self.target.backend,
            threads=self.target.threads,
            settings=enough_runs(
                CERTIFY_SETTINGS, self.constraints, processes=CERTIFY_PROCESSES
            ),
            processes=CERTIFY_PROCESSES,
            beta=prices.table.beta,
            anchor_reference_ns=prices.table.anchor_reference_ns,
            pace=self.constraints.pace,
            progress=self.reporter.advance,
        )

    def _finish(
        self,
        masked: MaskedNetwork,
        latents: Sequence[Tensor],
        prices: DevicePrices,
        fitted: Fitted,
        stack: ExitStack,
    ) -> tuple[VerifiedNetwork, Fitted]:
        """Fine-tune, export, certify; narrower where that missed."""
        for _ in range(MAX_FINISHED):
            self.reporter.begin("fine-tuning")
            finetune(
                self.own,
                masked,
                recipe=self.recipe.finetune,
                images=self.images,
                folder=self._folder(fitted.name),
                told=self._tell,
            )
            network = self._certify(masked, prices, fitted, stack)
            if network.met:
                return network, fitted
            missed = [verdict for verdict in network.verdicts if not verdict.met]
            if any(verdict.constraint == "accuracy" for verdict in missed):
                break  # a narrower one would be less accurate still
            over = binding(network.verdicts).used_share
            most_ms = fitted.predicted_ms * AIMED_SHARE / over
            counts = self._settle(latents, prices, most_ms)
            fitted = self._time(masked, latents, counts, prices)
            freeze(masked, fitted.kept)
        raise InfeasibleBudget(
            f"what was left of {self.own.family} was fine-tuned, and does not keep all "
            f"limits on {self.target.backend}: "
            + "; ".join(
                f"{v.constraint} {v.told(v.bound)}, asked for {v.told(v.limit)}"
                for v in missed
            )
            + ". Loosen that",
            budget_ms=self.constraints.budget_ms,
            fastest_ms=None,
            nearest=network.exported.facts.name,
        )

    def _certify(
        self,
        masked: MaskedNetwork,
        prices: DevicePrices,
        fitted: Fitted,
        stack: ExitStack,
    ) -> VerifiedNetwork:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ofa-deploy-"))
        exported = self.own.export(
            masked, masked.kept(), method="pas", target=self.target, folder=Path(folder)
        )
        measurement = self._measure(exported, prices)
        runtime = prices.table.runtime
        self.reporter.begin("measuring the accuracy")
        accuracy = measured_accuracy(
            _Source(self.own, ""),
            exported,
            self.evaluation,
            runtime,
            progress=self.reporter.advance,
        )
        margin = TWO_SIDED_95 * prices.residual_ratio * fitted.predicted_ms
        return VerifiedNetwork(
            exported=exported,
            measurement=measurement,
            predicted=LatencyEstimate(
                ms=fitted.predicted_ms,
                low_ms=fitted.predicted_ms - margin,
                high_ms=fitted.predicted_ms + margin,
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
            candidates=tuple(found.candidate for found in self.timed),
        )

    def history(self, before_sha256: str, fitted: Fitted) -> ShrinkHistory:
        """What happened, for the report and for whoever asks later."""
        return ShrinkHistory(
            method="pas",
            recipe=asdict(self.recipe),
            weights_sha256=before_sha256,
            groups=tuple(group.name for group in self.own.graph.groups),
            channels=tuple(group.channels for group in self.own.graph.groups),
            search=_read_log(self._folder("search") / LOG_FILE),
            finetune=_read_log(self._folder(fitted.name) / LOG_FILE),
            kept=fitted.counts,
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
) -> Bundle:
    """Shrink a network to a budget on a device; return what was shown to keep it.

    Args:
        model: Trained, from images `(N, 3, H, W)` to logits `(N, classes)`. Not
            changed.
        device: Such as `openvino-cpu`.
        constraints: What is asked for; a latency must be among it.
        method: `pas`.
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

    Raises:
        SpaceError: No such method, or no latency asked for.
        TraceError: Names the layer whose channels cannot be told.
        DataError: The images do not fit the network.
        InfeasibleBudget: No form of the network keeps the limits.
    """
    if method not in METHODS:
        raise SpaceError(f"method={method!r}; give one of {', '.join(METHODS)}")
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
        target=target,
        constraints=constraints,
        recipe=recipe,
        images=images,
        evaluation=evaluation,
        work=work,
        reporter=reporter,
        told=told,
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


# What judging asks for where no accuracy is judged.
_UNKNOWN = AccuracyClaim(kind="predicted", value=0.0, low=0.0, high=1.0, image_count=1)


def _read_log(path: Path) -> tuple[Mapping[str, object], ...]:
    if not path.is_file():
        return ()
    return tuple(json.loads(line) for line in path.read_text().splitlines())
