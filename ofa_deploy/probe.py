"""What a runtime makes of operators and widths, before anything is searched.

Small blocks that differ in one operator, or in one width, are measured against each
other: the difference is what the operator costs here, and the steps between widths are
the channels that the runtime's kernels work in.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ofa_deploy.export.runtime_format import Precision, timed_block, write_timed
from ofa_deploy.families.mbv3 import pointwise, squeeze_excite
from ofa_deploy.layers import BlockPlan, ConvLayer, Layer
from ofa_deploy.reporting import Reporter, Silent
from profilers.backends.base import Backend, LayerProfiler
from profilers.errors import RunFailed
from profilers.execute import OrderResult, execute
from profilers.journal import Journal
from profilers.layers import profile_layers_in_fresh_process
from profilers.measurement import Measurement, MeasureSettings
from profilers.order import WorkOrder

_logger = logging.getLogger(__name__)

CHANNELS = 64
SIZE = 28
# An operator that moves data at less than this share of the rate of the 1x1
# convolution beside it would better be avoided.
SLOW_RATE_SHARE = 0.1
# A wider layer that costs at most this much more dominates the narrower one.
SAME_COST = 1.01
# A staircase of n channels saves nothing at steps of n, at least half of what even
# growth does at 2n, and all of it at n / 2.
STEP_SAVES_BELOW = 1 / 3

Progress = Callable[[int, int], None]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedBlock:
    """A block as a model of its own.

    Args:
        block: The block.
        precision: Of its weights and activations.
    """

    block: BlockPlan
    precision: Precision

    @property
    def name(self) -> str:
        """Tells it from others."""
        return f"{self.block.key} {self.precision}"

    def emit(self, backend_name: str) -> bytes:
        """With random weights, in the format that a backend reads."""
        return timed_block(
            self.block,
            backend_name=backend_name,
            rng=np.random.default_rng(0),
            precision=self.precision,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorProbe:
    """Two blocks that differ in one operator.

    Args:
        name: Of the operator.
        block: With it.
        without: Without it.
        precision: Of both.
    """

    name: str
    block: BlockPlan
    without: BlockPlan
    precision: Precision = "float32"

    @property
    def models(self) -> tuple[TimedBlock, TimedBlock]:
        """With and without the operator."""
        return (
            TimedBlock(block=self.block, precision=self.precision),
            TimedBlock(block=self.without, precision=self.precision),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorFact:
    """What a runtime makes of an operator.

    Args:
        name: Of the operator.
        problem: Why the runtime does not run it; empty if it does.
        extra_ms: Quiet-state milliseconds that it adds to a block; None if it does not
            run. Not significant if smaller than `error_ms`.
        error_ms: Standard error of `extra_ms`.
        giga_macs_per_s: Rate of its own multiply-accumulates; None if it has none, or
            costs nothing that could be measured.
        fused: Whether it runs inside another layer; None if the runtime does not tell.
        slow: Whether its rate is below `SLOW_RATE_SHARE` of the 1x1 convolution's, or,
            where it has no multiply-accumulates, it costs more than all the rest.
        fallback: In what way the runtime ran it instead of its fastest; empty if it
            did not.
    """

    name: str
    problem: str
    extra_ms: float | None
    error_ms: float | None
    giga_macs_per_s: float | None
    fused: bool | None
    slow: bool
    fallback: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthFact:
    """What a layer of one width costs.

    Args:
        channels: Output channels.
        quiet_ms: Latency.
        error_ms: Its standard error.
        dominated_by: The widest layer that costs no more; None if there is none.
    """

    channels: int
    quiet_ms: float
    error_ms: float
    dominated_by: int | None


def operator_probes() -> list[OperatorProbe]:
    """The operators that networks of the spaces are made of."""
    plain = _pointwise("in")
    out = _pointwise("out")
    pair = _block(plain, out)
    probes = [
        OperatorProbe(
            name="ReLU",
            block=_block(replace(plain, activation="relu")),
            without=_block(plain),
        ),
        OperatorProbe(
            name="hard-swish",
            block=_block(replace(plain, activation="hswish")),
            without=_block(plain),
        ),
        OperatorProbe(
            name="squeeze-and-excite",
            block=_block(plain, squeeze_excite("se", CHANNELS, SIZE), out),
            without=pair,
        ),
        OperatorProbe(
            name="residual add", block=replace(pair, residual=True), without=pair
        ),
        OperatorProbe(
            name="dense 3x3",
            block=_block(plain, _conv(3, depthwise=False), out),
            without=pair,
        ),
    ]
    probes += [
        OperatorProbe(
            name=f"depthwise {kernel}x{kernel}",
            block=_block(plain, _conv(kernel, depthwise=True), out),
            without=pair,
        )
        for kernel in (3, 5, 7)
    ]
    quantised = [
        replace(probe, name=f"{probe.name}, int8", precision="int8") for probe in probes
    ]
    return probes + quantised


@dataclass(frozen=True, slots=True, kw_only=True)
class Prober:
    """Probes one runtime on this machine.

    Args:
        backend: The runtime.
        threads: Of one inference.
        settings: How carefully to measure.
    """

    backend: Backend
    threads: int
    settings: MeasureSettings

    def probe_operators(
        self,
        probes: Sequence[OperatorProbe] | None = None,
        *,
        reporter: Reporter | None = None,
    ) -> list[OperatorFact]:
        """Measure what each operator adds to a block.

        Args:
            probes: None takes `operator_probes()`.
            reporter: Told of progress; None tells nobody.
        """
        probes = operator_probes() if probes is None else probes
        reporter = reporter or Silent()
        models = {model.name: model for probe in probes for model in probe.models}
        reporter.begin("probing operators")
        result = self._measure(models, reporter.advance)
        measured = [models[name] for name in models if name in result.measurements]
        reporter.begin("counting layers")
        counts = self._count_layers(measured, reporter.advance)
        return [
            _refused(probe, problem)
            if (problem := _problem(probe, result))
            else _judge(probe, result, fused=_is_fused(probe, counts))
            for probe in probes
        ]

    def sweep_widths(
        self,
        widths: Sequence[int] = tuple(range(8, 137, 4)),
        *,
        size: int = 14,
        reporter: Reporter | None = None,
    ) -> list[WidthFact]:
        """Measure a 1x1 convolution at many output widths.

        Args:
            widths: Output channels, ascending.
            size: Height and width of the maps.
            reporter: Told of progress; None tells nobody.

        Raises:
            MeasurementError: Not one width could be measured.
        """
        models = {
            str(width): TimedBlock(
                block=_block(_pointwise("in", width, size)), precision="float32"
            )
            for width in widths
        }
        reporter = reporter or Silent()
        reporter.begin("sweeping widths")
        result = self._measure(models, reporter.advance)
        measured = {
            width: result.measurements[str(width)]
            for width in widths
            if str(width) in result.measurements
        }
        return [
            WidthFact(
                channels=width,
                quiet_ms=entry.quiet_ms,
                error_ms=entry.quiet_ms * entry.standard_error_ratio,
                dominated_by=_dominating(width, measured),
            )
            for width, entry in measured.items()
        ]

    def _measure(
        self, models: Mapping[str, TimedBlock], progress: Progress
    ) -> OrderResult:
        """Measure in worker processes: a probe is what a runtime may crash on."""
        backend_name = self.backend.name

        def write_model(name: str, folder: Path) -> Path:
            model = models[name].emit(backend_name)
            return write_timed(folder, name, model, backend_name=backend_name)

        order = WorkOrder(
            names=tuple(models),
            backend=backend_name,
            threads=self.threads,
            settings=self.settings,
        )
        with (
            tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder,
            Journal(Path(folder) / "journal", subject={}) as journal,
        ):
            return execute(order, write_model, journal=journal, progress=progress)

    def _count_layers(
        self, models: Sequence[TimedBlock], progress: Progress
    ) -> dict[str, int]:
        """Layers that the runtime executes, by model; without those it is silent on.

        In a process for each: a runtime that runs a model may crash on profiling it.
        """
        if not isinstance(self.backend, LayerProfiler):
            return {}
        counts = {}
        for number, model in enumerate(models, start=1):
            try:
                counts[model.name] = self._layer_count(model)
            except RunFailed as error:
                _logger.warning("layers of %s are not known: %s", model.name, error)
            progress(number, len(models))
        return counts

    def _layer_count(self, model: TimedBlock) -> int:
        name = self.backend.name
        with tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder:
            file = write_timed(
                Path(folder), model.name, model.emit(name), backend_name=name
            )
            layers = profile_layers_in_fresh_process(
                file, backend_name=name, threads=self.threads
            )
        return len(layers)


def _is_fused(probe: OperatorProbe, counts: Mapping[str, int]) -> bool | None:
    """Whether the runtime executes no more layers with the operator than without.

    None if it does not tell.
    """
    whole, base = (counts.get(model.name) for model in probe.models)
    return None if whole is None or base is None else whole <= base


def _problem(probe: OperatorProbe, result: OrderResult) -> str:
    """Why the operator cannot be judged; empty if it can."""
    reasons = (result.failures.get(model.name, "") for model in probe.models)
    return next(filter(None, reasons), "")


def _refused(probe: OperatorProbe, problem: str) -> OperatorFact:
    return OperatorFact(
        name=probe.name,
        problem=problem,
        extra_ms=None,
        error_ms=None,
        giga_macs_per_s=None,
        fused=None,
        slow=False,
        fallback="",
    )


def _judge(
    probe: OperatorProbe, result: OrderResult, *, fused: bool | None
) -> OperatorFact:
    whole, base = (result.measurements[model.name] for model in probe.models)
    extra_ms = whole.quiet_ms - base.quiet_ms
    error_ms = float(
        np.hypot(
            whole.quiet_ms * whole.standard_error_ratio,
            base.quiet_ms * base.standard_error_ratio,
        )
    )
    macs = probe.block.mac_count - probe.without.mac_count
    rate = macs / extra_ms / 1e6 if macs and extra_ms > error_ms else None
    base_rate = probe.without.mac_count / base.quiet_ms / 1e6
    slow = (
        rate is not None and rate < SLOW_RATE_SHARE * base_rate
        if macs
        else extra_ms - error_ms > base.quiet_ms
    )
    fallbacks = (visit.fallback for visit in whole.visits if visit.fallback)
    return OperatorFact(
        name=probe.name,
        problem="",
        extra_ms=extra_ms,
        error_ms=error_ms,
        giga_macs_per_s=rate,
        fused=fused,
        slow=slow,
        fallback=next(fallbacks, ""),
    )


def _dominating(width: int, measured: Mapping[int, Measurement]) -> int | None:
    """The widest that costs no more, if any is wider."""
    most_ms = SAME_COST * measured[width].quiet_ms
    return max(
        (
            wider
            for wider, entry in measured.items()
            if wider > width and entry.quiet_ms <= most_ms
        ),
        default=None,
    )


def channel_step(facts: Sequence[WidthFact]) -> int | None:
    """The runtime's step: the largest whose widths in between save nothing.

    Where latency grows evenly, a width below a multiple of the step saves what its
    missing channels cost on average; on a staircase it saves nothing. Summed over all
    widths, which is what the noise of single ones averages out in.

    Args:
        facts: Of a sweep, ascending, not empty.

    Returns:
        Channels, a power of two; None if no step can be told.
    """
    channels = np.array([fact.channels for fact in facts])
    quiet_ms = np.array([fact.quiet_ms for fact in facts])
    if len(channels) < 3:
        return None
    ms_per_channel = np.polyfit(channels, quiet_ms, 1)[0]
    steps = [
        step
        for step in (2**power for power in range(1, int(np.log2(channels[-1]))))
        if _share_saved(channels, quiet_ms, step, ms_per_channel) < STEP_SAVES_BELOW
    ]
    return max(steps, default=None)


def _share_saved(
    channels: IntArray, quiet_ms: FloatArray, step: int, ms_per_channel: float
) -> float:
    """What widths save against the next multiple, as a share of even growth's.

    1 if no width lies between multiples, or wider layers cost no more.
    """
    edges = -(-channels // step) * step
    below = (edges != channels) & np.isin(edges, channels)
    expected_ms = ms_per_channel * (edges - channels)[below].sum()
    if expected_ms <= 0:
        return 1.0
    edge_ms = quiet_ms[np.searchsorted(channels, edges[below])]
    return float((edge_ms - quiet_ms[below]).sum() / expected_ms)


def _block(*layers: Layer) -> BlockPlan:
    first, last = layers[0], layers[-1]
    if not (isinstance(first, ConvLayer) and isinstance(last, ConvLayer)):
        raise TypeError("a probe's block begins and ends with a convolution")
    return BlockPlan(
        name="probe",
        in_channels=first.in_channels,
        out_channels=last.out_channels,
        in_size=first.in_size,
        layers=layers,
        residual=False,
    )


def _pointwise(name: str, channels: int = CHANNELS, size: int = SIZE) -> ConvLayer:
    return pointwise(name, CHANNELS, channels, size)


def _conv(kernel: int, *, depthwise: bool) -> ConvLayer:
    return ConvLayer(
        name="middle",
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        kernel=kernel,
        kernels=(kernel,),
        stride=1,
        depthwise=depthwise,
        batch_norm=True,
        activation="none",
        in_size=SIZE,
    )
