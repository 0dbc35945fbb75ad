"""From a supernet, a device and a budget to a verified bundle: `specialize`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.assembly import (
    NO_PREDICTOR,
    VerifiedNetwork,
    assemble_bundle,
    require_classes,
)
from ofa_deploy.bundle import Bundle, require_free
from ofa_deploy.calibration import load_calibration, require_calibration
from ofa_deploy.dataset import ImageSet, load_images
from ofa_deploy.errors import (
    BundleError,
    DataError,
    DeployError,
    InfeasibleBudget,
)
from ofa_deploy.exporting import export_network
from ofa_deploy.plan import lower
from ofa_deploy.predict.latency import LatencyPredictor, fit_latency_predictor
from ofa_deploy.profiling import (
    cache_folder,
    find_table,
    measure_table,
    open_table,
    table_folders,
)
from ofa_deploy.reporting import Reporter, Silent
from ofa_deploy.search.dominance import promotion
from ofa_deploy.search.evolution import (
    Evolution,
    SearchProblem,
    SearchResult,
    descend_to_fastest,
    require_budget,
)
from ofa_deploy.space import SubnetConfig
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.target import Target, parse_target
from ofa_deploy.zoo import open_supernet
from profilers.backends import get_backend
from profilers.device import this_device
from profilers.fresh import measure_in_fresh_process
from profilers.measure import MeasureSettings
from profilers.table import LatencyTable

DEFAULT_SUPERNET = "cifar10-small"
MAX_CANDIDATES = 5
# Each next candidate is looked for below what the last one showed to be too much.
BUDGET_STEP = 0.97
# As far as a single timing is believed.
MAX_EXCESS = 1.15
VERIFY_PROCESSES = 3
VERIFY_SETTINGS = MeasureSettings(
    visits=20,
    runs_per_visit=12,
    warmup_runs=20,
    warmup_windows=20,
    anchor_repeats=6,
    seed=0,
    target_relative_error=0.01,
    max_seconds=1.5,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachableRange:
    """What a space can reach on a device, by prediction in quiet-state ms."""

    fastest_ms: float
    median_ms: float
    slowest_ms: float

    @property
    def middle_ms(self) -> float:
        """The geometric middle between fastest and slowest."""
        return float(np.sqrt(self.fastest_ms * self.slowest_ms))


class Specializer:
    """A supernet on a device, ready for many budgets.

    The first use reads the latency table of this machine, or measures one.

    Args:
        device: Such as `openvino-cpu` or `openvino-cpu?threads=2`.
        supernet: Name in the zoo, folder of one that was trained, or one that is open.
        table: A latency table's file to use instead of looking for one.
        reprofile: Measure anew even where there is a table.
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
        table: str | Path | None = None,
        reprofile: bool = False,
        cache: Path | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.target: Target = parse_target(device)
        self.backend = get_backend(self.target.backend)
        self.reporter: Reporter = reporter or Silent()
        # Fails early, and with the cure, where the runtime is missing.
        self.runtime = self.backend.runtime(threads=self.target.threads)
        self.device = this_device(accelerator=self.backend.accelerator())
        self.supernet: StoredSupernet = _opened(supernet)
        if self.supernet.accuracy is None:  # before the profiling, not after it
            raise DeployError(NO_PREDICTOR)
        self.table: LatencyTable = self._find_table(
            None if table is None else Path(table),
            reprofile=reprofile,
            cache=cache or cache_folder(),
        )
        self.predictor: LatencyPredictor = fit_latency_predictor(
            self.supernet.space, self.table
        )

    def _find_table(
        self, path: Path | None, *, reprofile: bool, cache: Path
    ) -> LatencyTable:
        space = self.supernet.space
        if path is not None:
            return open_table(path, space, self.device, self.runtime)
        if not reprofile:
            found = find_table(
                space, self.device, self.runtime, folders=table_folders(cache)
            )
            if found is not None:
                return found[0]
        return measure_table(
            space,
            backend=self.backend,
            threads=self.target.threads,
            folder=cache,
            reporter=self.reporter,
        )

    def reachable(self) -> ReachableRange:
        """The latencies that the space can reach here, as predicted."""
        return reachable_range(self.predictor)

    def _problem(self, *, budget_ms: float) -> SearchProblem:
        accuracy = self.supernet.accuracy
        if accuracy is None:
            raise DeployError(NO_PREDICTOR)
        return SearchProblem(
            space=self.supernet.space,
            accuracy=accuracy.predict,
            latency_ms=self.predictor.predict_ms,
            budget_ms=budget_ms,
            promotion=promotion(self.supernet.space, self.predictor.slot_ms),
        )

    def search(self, budget_ms: float, *, seed: int = 0) -> SearchResult:
        """The most accurate networks predicted to stay within a budget.

        Raises:
            SpaceError: The budget is not a positive number.
            InfeasibleBudget: No network is fast enough.
        """
        rng = np.random.default_rng(seed)
        return Evolution().search(self._problem(budget_ms=budget_ms), rng)

    def specialize(
        self,
        latency_ms: float,
        *,
        out: str | Path,
        calibration: str | Path | NDArray[np.uint8] | None = None,
        eval_data: str | Path | ImageSet | None = None,
        seed: int = 0,
    ) -> Bundle:
        """Search, export, verify and time; return what was shown to meet the budget.

        Args:
            latency_ms: Budget for the quiet-state latency of one image.
            out: Folder of the bundle; must not exist, or be empty.
            calibration: Images for the batch-norm statistics instead of the supernet's
                own: a folder, .zip or .npz, or `(n, H, W, 3)` uint8.
            eval_data: Labelled images to measure the accuracy on; None to predict it.
            seed: Of the search.

        Raises:
            SpaceError: The budget is not a positive number.
            InfeasibleBudget: No network meets it, by prediction or by measurement.
            ParityError: An exported file computes something else.
            BundleError: The output folder is not free, or cannot be written.
        """
        require_budget(latency_ms)
        out = Path(out)
        require_free(out)
        images, evaluation = read_inputs(
            self.supernet,
            calibration=calibration,
            eval_data=eval_data,
            reporter=self.reporter,
        )
        with _writing(out), ExitStack() as stack:
            network = self._within_budget(latency_ms, images, seed=seed, stack=stack)
            self.reporter.begin("writing the bundle")
            return assemble_bundle(
                out,
                network,
                supernet=self.supernet,
                evaluation=evaluation,
                progress=self.reporter.advance,
            )

    def _within_budget(
        self,
        budget_ms: float,
        images: NDArray[np.uint8],
        *,
        seed: int,
        stack: ExitStack,
    ) -> VerifiedNetwork:
        """The best of a few networks that is measured within a budget.

        Each is exported and timed once; their files stay until the stack is closed.

        Raises:
            InfeasibleBudget: None is.
        """
        timed: list[VerifiedNetwork] = []

        def time(config: SubnetConfig) -> VerifiedNetwork:
            timed.append(stack.enter_context(self._timed(config, images, budget_ms)))
            return timed[-1]

        limit_ms = budget_ms / self.predictor.upper_ratio
        network = time(self._next_config(budget_ms, limit_ms=limit_ms, seed=seed))
        if network.verdict.meets_budget:
            return network
        config = self._fastest_config(seed=seed)
        # Whether any network can meet the budget is told before more are tried.
        if network.config == config or not time(config).verdict.meets_budget:
            raise self._refusal(timed)
        fastest = timed[-1]
        for _ in range(MAX_CANDIDATES - 2):
            limit_ms = _lowered(network, timed)
            config = self._next_config(budget_ms, limit_ms=limit_ms, seed=seed)
            if config == fastest.config:
                break
            network = time(config)
            if network.verdict.meets_budget:
                return network
        return fastest

    def _refusal(self, timed: Sequence[VerifiedNetwork]) -> InfeasibleBudget:
        least = min((n.verdict for n in timed), key=lambda verdict: verdict.upper_ms)
        return InfeasibleBudget(
            f"no network of {self.supernet.space.name} meets {least.budget_ms:g} ms "
            f"on {self.target.backend} here: the fastest, exported and timed, took up "
            f"to {least.upper_ms:.4g} ms, its uncertainty included. Ask for more; or "
            "the machine may be busy (see `ofa-deploy doctor`), or the latency table "
            "out of date (`ofa-deploy profile`)",
            budget_ms=least.budget_ms,
            fastest_ms=least.upper_ms,
        )

    def _next_config(
        self, budget_ms: float, *, limit_ms: float, seed: int
    ) -> SubnetConfig:
        """The most accurate network predicted to stay within the limit.

        Where the limit is below the fastest network's prediction, but the budget is
        not, that network is worth a measurement.
        """
        self.reporter.begin("searching")
        try:
            result = self.search(limit_ms, seed=seed)
        except InfeasibleBudget as error:
            if error.fastest_ms > budget_ms:
                raise InfeasibleBudget(
                    f"no network of {self.supernet.space.name} meets {budget_ms:g} ms "
                    f"on {self.target.backend} here; the fastest is predicted to take "
                    f"{error.fastest_ms:.4g} ms. Ask for at least "
                    f"{error.fastest_ms * self.predictor.upper_ratio:.4g} ms",
                    budget_ms=budget_ms,
                    fastest_ms=error.fastest_ms,
                ) from error
            return self._fastest_config(seed=seed)
        return self.supernet.space.decode(result.genomes[0])

    def _fastest_config(self, *, seed: int) -> SubnetConfig:
        genome, _, _ = descend_to_fastest(
            self._problem(budget_ms=1.0), np.random.default_rng(seed)
        )
        return self.supernet.space.decode(genome)

    @contextmanager
    def _timed(
        self, config: SubnetConfig, images: NDArray[np.uint8], budget_ms: float
    ) -> Iterator[VerifiedNetwork]:
        """Export a network and time the file; its folder vanishes afterwards."""
        plan = lower(self.supernet.space, config)
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
            self.reporter.begin("exporting and checking")
            exported = export_network(
                self.supernet,
                plan,
                calibration=images,
                target=self.target,
                folder=Path(folder),
            )
            self.reporter.begin("timing the exported file")
            measurement = measure_in_fresh_process(
                exported.folder / exported.model_file,
                backend_name=self.target.backend,
                threads=self.target.threads,
                settings=VERIFY_SETTINGS,
                processes=VERIFY_PROCESSES,
                beta=self.table.beta,
                anchor_reference_ns=self.table.anchor_reference_ns,
                progress=self.reporter.advance,
            )
            yield VerifiedNetwork(
                exported=exported,
                measurement=measurement,
                predicted=self.predictor.estimate(config),
                budget_ms=budget_ms,
                device=self.device,
                runtime=self.runtime,
            )


def reachable_range(
    predictor: LatencyPredictor, *, sample_count: int = 2_000
) -> ReachableRange:
    """The latencies that a space can reach, as predicted."""
    space = predictor.space
    rng = np.random.default_rng(0)
    problem = SearchProblem(
        space=space,
        accuracy=lambda genomes: np.zeros(len(genomes)),  # of no matter here
        latency_ms=predictor.predict_ms,
        budget_ms=1.0,
        promotion=promotion(space, predictor.slot_ms),
    )
    _, fastest_ms, _ = descend_to_fastest(problem, rng)
    drawn = predictor.predict_ms(space.sample(sample_count, rng))
    largest = predictor.predict_ms(space.encode(space.largest())[None])
    return ReachableRange(
        fastest_ms=fastest_ms,
        median_ms=float(np.median(drawn)),
        slowest_ms=max(float(largest[0]), float(drawn.max())),
    )


def _lowered(missed: VerifiedNetwork, timed: Sequence[VerifiedNetwork]) -> float:
    """What the next network may be predicted to take, in ms.

    Lower than the one that missed the budget by as much as it came out too slow, and a
    little more. A single bad timing must not throw the search far down; what all timed
    networks are slower than predicted, though, the next one will be, too.
    """
    excess = missed.verdict.upper_ms / missed.budget_ms
    slowdown = min(n.verdict.upper_ms / n.predicted.ms for n in timed)
    limit_ms = missed.predicted.ms / min(excess, MAX_EXCESS)
    return BUDGET_STEP * min(limit_ms, missed.budget_ms / slowdown)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say where a disk was full, or closed, and that nothing is left."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"the bundle cannot be written to {out}, or its files to "
            f"{tempfile.gettempdir()}: {error}. Nothing was left there; free space, or "
            "name another folder, and run this again"
        ) from error


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


def _opened(supernet: str | Path | StoredSupernet) -> StoredSupernet:
    return supernet if isinstance(supernet, StoredSupernet) else open_supernet(supernet)


def specialize(
    device: str,
    *,
    latency_ms: float,
    out: str | Path,
    supernet: str | Path | StoredSupernet = DEFAULT_SUPERNET,
    calibration: str | Path | NDArray[np.uint8] | None = None,
    eval_data: str | Path | ImageSet | None = None,
    table: str | Path | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Bundle:
    """A verified bundle whose model meets a latency budget on this machine.

    One call of a `Specializer`; keep one for several budgets.

    Args:
        device: Such as `openvino-cpu` or `openvino-cpu?threads=2`.
        latency_ms: Budget for the quiet-state latency of one image.
        out: Folder of the bundle; must not exist, or be empty.
        supernet: Name in the zoo, folder of one that was trained, or one that is open.
        calibration: Images for the batch-norm statistics instead of the supernet's
            own: a folder, .zip or .npz, or `(n, H, W, 3)` uint8.
        eval_data: Labelled images to measure the accuracy on; None to predict it.
        table: A latency table's file to use instead of looking for one.
        seed: Of the search.
        reporter: Told of progress.

    Raises:
        InfeasibleBudget: No network meets the budget; carries the fastest.
        DeployError: Anything else that is wrong; see `ofa_deploy.errors`.
    """
    require_budget(latency_ms)
    require_free(Path(out))
    parse_target(device)
    reporter = reporter or Silent()
    opened = _opened(supernet)
    # What is wrong with them is told before the profiling, not after it.
    images, evaluation = read_inputs(
        opened, calibration=calibration, eval_data=eval_data, reporter=reporter
    )
    session = Specializer(device, supernet=opened, table=table, reporter=reporter)
    return session.specialize(
        latency_ms, out=out, calibration=images, eval_data=evaluation, seed=seed
    )
