"""From a supernet, a device and constraints to a verified bundle: `specialize`."""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.assembly import (
    NO_PREDICTOR,
    VerifiedNetwork,
    assemble_bundle,
    require_classes,
)
from ofa_deploy.bundle import Bundle, require_output, writing
from ofa_deploy.calibration import load_calibration, require_calibration
from ofa_deploy.choosing import Chooser, Predictors, find_front
from ofa_deploy.constraints import Constraints
from ofa_deploy.contract import fulfil
from ofa_deploy.dataset import ImageSet, load_images
from ofa_deploy.device_bench import DeviceBench
from ofa_deploy.drift import MAX_DRIFT_RATIO, DriftCheck
from ofa_deploy.errors import (
    DataError,
    DeployError,
    InfeasibleBudget,
    SpaceError,
    StaleTable,
)
from ofa_deploy.exporting import compare_exported
from ofa_deploy.feasibility import (
    CostRange,
    ReachableRange,
    feasibility,
    reachable_range,
    require_satisfiable,
)
from ofa_deploy.predict.latency import LatencyPredictor, fit_latency_predictor
from ofa_deploy.predict.sizes import network_sizes
from ofa_deploy.profiling import measure_table
from ofa_deploy.report.page import REPORT_FILE, bundle_report
from ofa_deploy.reporting import Reporter, Silent
from ofa_deploy.search.evolution import Evolution
from ofa_deploy.search.pareto import Front, Nsga2
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.table_files import cache_folder, find_table, open_table, table_folders
from ofa_deploy.target import Target, parse_target
from ofa_deploy.verify import ParityReport, require_memory_gauge, require_time_for
from ofa_deploy.zoo import open_supernet
from profilers.backends import get_backend
from profilers.device import this_device
from profilers.kept import KeptTexts
from profilers.table import LatencyTable

DEFAULT_SUPERNET = "cifar10-small"
# Enough for a space of some thousand million networks, in about a second.
FRONT_SEARCH = Nsga2(population=100, generations=120, polish=60_000, capacity=500)
# Of limits that the front does not know of.
EVOLUTION = Evolution(generations=250)

# A table of the last minutes is not held against today's anchor model.
FRESH_S = 600.0

OnDrift = Literal["refuse", "reprofile", "accept"]


class Specializer:
    """A supernet on a device, ready for many budgets.

    The first use reads the latency table of this machine, or measures one.

    Args:
        device: Such as `openvino-cpu` or `openvino-cpu?threads=2`.
        supernet: Name in the zoo, folder of one that was trained, or one that is open.
        threads: Of one inference, instead of naming them in `device`.
        table: A latency table's file to use instead of looking for one.
        reprofile: Measure anew even where there is a table.
        on_drift: What to do where the machine is no longer what its table says:
            `refuse`, measure anew (`reprofile`), or go on (`accept`).
        cache: Folder of the tables measured on this machine; None for the user's.
        reporter: Told of progress.

    Raises:
        DeployError: The device, supernet or table cannot be used.
    """

    def __init__(
        self,
        device: str,
        *,
        supernet: str | Path | StoredSupernet = DEFAULT_SUPERNET,
        threads: int | None = None,
        table: str | Path | None = None,
        reprofile: bool = False,
        on_drift: OnDrift = "refuse",
        cache: str | Path | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.target: Target = parse_target(device, threads=threads)
        self.backend = get_backend(self.target.backend)
        self.reporter: Reporter = reporter or Silent()
        # Fails early, and with the cure, where the runtime is missing.
        self.runtime = self.backend.runtime(threads=self.target.threads)
        self.device = this_device(accelerator=self.backend.accelerator())
        self.supernet: StoredSupernet = opened(supernet)
        accuracy = self.supernet.accuracy
        if accuracy is None:  # before the profiling, not after it
            raise DeployError(NO_PREDICTOR)
        self._accuracy = accuracy
        self._cache = cache_folder() if cache is None else Path(cache)
        self._table_file = table
        self.on_drift: OnDrift = on_drift
        self._measured_s = -FRESH_S  # long ago
        self._use(self._find_table(table, reprofile=reprofile))

    def _use(self, table: LatencyTable) -> None:
        """Take a table, and what follows from it."""
        space = self.supernet.space
        self.table = table
        self.predictor: LatencyPredictor = fit_latency_predictor(space, table)
        # What is known of networks without measuring them.
        self.predictors = Predictors(
            latency=self.predictor,
            accuracy=self._accuracy.predict,
            sizes=network_sizes(space),
        )
        self._front: Front | None = None  # of another table

    def _find_table(self, path: str | Path | None, *, reprofile: bool) -> LatencyTable:
        space = self.supernet.space
        if path is not None:
            return open_table(Path(path), space, self.device, self.runtime)
        if not reprofile:
            found = find_table(
                space, self.device, self.runtime, folders=table_folders(self._cache)
            )
            if found is not None:
                return found[0]
        return self._measure_table()

    def _measure_table(self) -> LatencyTable:
        began_s = time.time()
        table = measure_table(
            self.supernet.space,
            backend=self.backend,
            threads=self.target.threads,
            folder=self._cache,
            reporter=self.reporter,
        )
        # What an earlier call had left in the journal may be out of date already.
        if table.created_s >= began_s:
            self._measured_s = time.monotonic()
        return table

    @property
    def front(self) -> Front:
        """Latency, accuracy and size against each other, by prediction."""
        return self.search_front() if self._front is None else self._front

    def search_front(self, search: Nsga2 = FRONT_SEARCH, *, seed: int = 0) -> Front:
        """Search the front; budgets choose from it until there is another table.

        Args:
            search: And its settings.
            seed: Of the search.
        """
        self.reporter.begin("searching")
        self._front = find_front(
            self.predictors, search, seed=seed, progress=self.reporter.advance
        )
        return self._front

    def reachable(self) -> ReachableRange:
        """The latencies that the space can reach here, as predicted."""
        return reachable_range(self.predictor)

    def feasibility(self, constraints: Constraints | float) -> tuple[CostRange, ...]:
        """What the space can reach of everything that can be asked for.

        Args:
            constraints: What is asked for, or a latency in milliseconds alone.

        Raises:
            SpaceError: A limit that no network of a supernet differs in.
        """
        asked = _asked(constraints)
        _require_of_supernets(asked)
        predictors = self.predictors
        return feasibility(
            asked,
            latency=predictors.latency,
            accuracy=predictors.accuracy,
            sizes=predictors.sizes,
        )

    def specialize(
        self,
        constraints: Constraints | float,
        *,
        out: str | Path,
        calibration: str | Path | NDArray[np.uint8] | None = None,
        eval_data: str | Path | ImageSet | None = None,
        seed: int = 0,
    ) -> Bundle:
        """Search, export, measure, certify; return what was shown to keep all limits.

        Args:
            constraints: What is asked for; a number is a latency in ms.
            out: Folder of the bundle; must not exist, or be empty.
            calibration: Images for the batch-norm statistics instead of the supernet's
                own: a folder, .zip or .npz, or `(n, H, W, 3)` uint8.
            eval_data: Labelled images to measure the accuracy on; None to predict it.
            seed: Of searches.

        Raises:
            SpaceError: A limit, or the seed, makes no sense.
            InfeasibleBudget: No network keeps them, by prediction or by measurement.
            StaleTable: The machine is no longer what its table says.
            ParityError: An exported file computes something else.
            BundleError: The output folder is not free, or cannot be written.
        """
        asked = _asked(constraints)
        out = Path(out)
        require_output(out)
        images, evaluation = read_inputs(
            self.supernet,
            calibration=calibration,
            eval_data=eval_data,
            reporter=self.reporter,
        )
        with writing(out), ExitStack() as stack:
            network = self.fulfil(
                asked, images=images, evaluation=evaluation, stack=stack, seed=seed
            )
            parity = self.compare(network, images)
            self.reporter.begin("writing the bundle")
            return assemble_bundle(
                out,
                network,
                parity=parity,
                source=self.supernet,
                extra_files=self.report(network),
            )

    def fulfil(
        self,
        constraints: Constraints,
        *,
        images: NDArray[np.uint8],
        evaluation: ImageSet | None,
        stack: ExitStack,
        seed: int = 0,
    ) -> VerifiedNetwork:
        """The best network that was shown to keep all limits.

        Args:
            constraints: What is asked for.
            images: Calibrate the networks.
            evaluation: To measure accuracies on; None to predict them.
            stack: Holds its files, which vanish when it is closed.
            seed: Of searches.

        Raises:
            SpaceError: A limit that no supernet has, or the seed, makes no sense.
            InfeasibleBudget: No network keeps them, by prediction or by measurement.
            StaleTable: The machine is no longer what its table says.
        """
        _require_of_supernets(constraints)
        require_seed(seed)
        if constraints.peak_memory_mb is not None:
            require_memory_gauge()
        require_time_for(constraints)
        try:
            return self._fulfil(constraints, images, evaluation, stack, seed)
        except StaleTable:
            if self.on_drift != "reprofile":
                raise
            self.reprofile()
            return self._fulfil(constraints, images, evaluation, stack, seed)

    def compare(
        self, network: VerifiedNetwork, images: NDArray[np.uint8]
    ) -> ParityReport:
        """Hold a network's file against its unfused graph.

        Raises:
            ParityError: The file computes something else.
        """
        self.reporter.begin("comparing with the unfused graph")
        return compare_exported(
            network.exported, images, normalisation=self.supernet.normalisation
        )

    def bench(
        self,
        constraints: Constraints,
        *,
        images: NDArray[np.uint8],
        evaluation: ImageSet | None,
        stack: ExitStack,
    ) -> DeviceBench:
        """Where networks are exported and timed; arguments as `fulfil`'s."""
        return DeviceBench(
            supernet=self.supernet,
            target=self.target,
            device=self.device,
            table=self.table,
            drift=self.drift_check(),
            predictor=self.predictor,
            images=images,
            evaluation=evaluation,
            constraints=constraints,
            stack=stack,
            reporter=self.reporter,
            kept=self._kept(constraints, stack),
        )

    def _kept(self, constraints: Constraints, stack: ExitStack) -> KeptTexts:
        """What the same call measured before it was killed; gone once it is over."""
        kept = KeptTexts.of(
            self._cache / "unfinished",
            {
                "device": self.device.fingerprint,
                "runtime": asdict(self.runtime),
                "constraints": asdict(constraints),
            },
        )

        def forget_if_over(kind: type[BaseException] | None, *_: object) -> None:
            if kind is None or issubclass(kind, InfeasibleBudget):
                kept.forget()

        stack.push(forget_if_over)
        return kept

    def drift_check(self) -> DriftCheck:
        """Whether the table holds today; for one call."""
        return DriftCheck(
            space=self.supernet.space,
            target=self.target,
            table=self.table,
            profile_command=self._profile_command,
            reporter=self.reporter,
            max_drift_ratio=MAX_DRIFT_RATIO if self._checks_drift else None,
        )

    def require_current(self) -> None:
        """Let predictions be of today's machine, as far as `on_drift` asks for it.

        Raises:
            StaleTable: The machine is no longer what its table says.
        """
        try:
            self.drift_check().check()
        except StaleTable:
            if self.on_drift != "reprofile":
                raise
            self.reprofile()
            # Something to do only where an earlier call had begun that profile.
            self.drift_check().check()

    @property
    def _profile_command(self) -> str:
        device = f"{self.target.backend}?threads={self.target.threads}"
        words = ["ofa-deploy", "profile", "--device", device]
        words += ["--supernet", self.supernet.source or "FOLDER"]
        if self._table_file is not None:
            words += ["--out", str(self._table_file)]
        return shlex.join(words)

    @property
    def _checks_drift(self) -> bool:
        # What was measured just now cannot be out of date.
        fresh = time.monotonic() < self._measured_s + FRESH_S
        return self.on_drift != "accept" and not fresh

    def reprofile(self) -> None:
        """Measure this machine anew, and take that table."""
        self._use(self._measure_table())

    def chooser(self, *, seed: int = 0) -> Chooser:
        """Finds networks by prediction."""
        return Chooser(
            predictors=self.predictors,
            front=self.front,
            evolution=EVOLUTION,
            seed=seed,
        )

    def _fulfil(
        self,
        constraints: Constraints,
        images: NDArray[np.uint8],
        evaluation: ImageSet | None,
        stack: ExitStack,
        seed: int,
    ) -> VerifiedNetwork:
        bench = self.bench(
            constraints, images=images, evaluation=evaluation, stack=stack
        )
        try:
            for row in self.feasibility(constraints):
                if row.constraint == "latency" and not row.satisfiable:
                    # Of a machine that has become faster, if that is accepted.
                    accepted = self.on_drift == "accept"
                    ratio = bench.drift.ratio_now() if accepted else 1.0
                    row = replace(row, best=min(1.0, ratio) * row.best)
                require_satisfiable(row, self.predictor, where=self.target.backend)
            return fulfil(
                constraints,
                chooser=self.chooser(seed=seed),
                bench=bench,
                where=self.target.backend,
            )
        except InfeasibleBudget:
            bench.drift.check()  # a stale table has no say in what is impossible
            raise

    def report(self, network: VerifiedNetwork) -> dict[str, bytes]:
        """The page to look at, by its file name."""
        page = bundle_report(
            network, predictor=self.predictor, table=self.table, front=self.front
        )
        return {REPORT_FILE: page.encode()}


def require_seed(seed: int) -> None:
    """Refuse what no random generator takes.

    Raises:
        SpaceError: It is below 0.
    """
    if seed < 0:
        raise SpaceError(f"seed={seed}; give a whole number, 0 or above")


def _asked(constraints: Constraints | float) -> Constraints:
    if isinstance(constraints, Constraints):
        return constraints
    return Constraints(latency_ms=constraints)


def _require_of_supernets(constraints: Constraints) -> None:
    """Refuse what is not searched for."""
    if constraints.compressed_bytes is not None:
        raise SpaceError(
            f"compressed_bytes={constraints.compressed_bytes} is for a network of your "
            "own: a supernet's weights hardly compress. Give size_bytes"
        )


def read_inputs(
    supernet: StoredSupernet,
    *,
    calibration: str | Path | NDArray[np.uint8] | None,
    eval_data: str | Path | ImageSet | None,
    reporter: Reporter,
) -> tuple[NDArray[np.uint8], ImageSet | None]:
    """The images to calibrate with, and those to measure the accuracy on.

    Raises:
        DataError: They cannot be used.
    """
    images, evaluation = calibration, eval_data
    if images is None:
        if supernet.calibration is None:
            raise DataError(
                "the supernet has no calibration images of its own; give some with "
                "`calibration=` (`--calibration`): a few hundred of what it will see"
            )
        images = supernet.calibration
    if not isinstance(images, np.ndarray):
        reporter.begin("reading calibration images")
        images = load_calibration(
            Path(images),
            size=max(supernet.space.resolutions),
            progress=reporter.advance,
        )
    require_calibration(images)
    if isinstance(evaluation, str | Path):
        reporter.begin("reading evaluation images")
        evaluation, _ = load_images(Path(evaluation), progress=reporter.advance)
    if evaluation is not None:
        require_classes(evaluation, supernet)
    return images, evaluation


def opened(supernet: str | Path | StoredSupernet) -> StoredSupernet:
    """A supernet, whichever way it is named."""
    return supernet if isinstance(supernet, StoredSupernet) else open_supernet(supernet)
