"""Whether a latency table still holds: one of its networks is timed again.

Alone, or beside files that are timed against each other anyway.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ofa_deploy.errors import RunFailed, StaleTable, UnstableMeasurement
from ofa_deploy.export.runtime_format import timed_network, write_timed
from ofa_deploy.plan import lower
from ofa_deploy.profiling import anchor_network
from ofa_deploy.reporting import Reporter
from ofa_deploy.space import SearchSpace, SubnetConfig
from ofa_deploy.target import Target
from profilers.device import read_conditions
from profilers.execute import OrderResult, execute
from profilers.fresh import AnchorModel
from profilers.journal import Journal
from profilers.measurement import MeasureSettings
from profilers.order import WorkOrder
from profilers.summary import fit_visits
from profilers.table import LatencyTable

# Some seconds in all, spread so that no one phase of the machine is all there is.
CONFIRM_SETTINGS = replace(
    MeasureSettings.confirm(),
    target_relative_error=0.04,
    max_seconds=3.0,
    pass_seconds=0.1,
)
# Further from its table, the anchor model says that the table is of another machine.
MAX_DRIFT_RATIO = 0.05
_ANCHOR = "the anchor model"


@dataclass(slots=True, kw_only=True)
class DriftCheck:
    """A table's anchor model, timed once, with or without files of networks.

    Args:
        space: The table's.
        target: What files are for.
        table: Whose quiet level latencies speak of.
        profile_command: What measures it anew, for people.
        reporter: Told of progress.
        max_drift_ratio: Of the anchor model against the table; None to accept any.
        anchor_ratio: Its latency over that of the table, once it was timed.
    """

    space: SearchSpace
    target: Target
    table: LatencyTable
    profile_command: str
    reporter: Reporter
    max_drift_ratio: float | None
    anchor_ratio: float | None = None

    def check(self) -> None:
        """Time the anchor model alone, unless it was timed already, or any would do.

        Raises:
            StaleTable: It is not as fast as in the table, or fails.
        """
        if self.anchor_ratio is not None or self.max_drift_ratio is None:
            return
        self.reporter.begin("timing the anchor model")
        try:
            self.time_with({})
        except UnstableMeasurement as error:
            raise self._untimed(str(error)) from error

    def ratio_now(self) -> float:
        """Latency of the anchor model over the table's, timed unless it was.

        For whoever accepts drift; 1 where it cannot be timed.
        """
        if self.anchor_ratio is None:
            self.reporter.begin("timing the anchor model")
            with suppress(RunFailed, UnstableMeasurement):
                self.time_with({})
        return 1.0 if self.anchor_ratio is None else self.anchor_ratio

    def time_with(self, files: Mapping[str, Path]) -> dict[str, float]:
        """Quiet-state latencies in ms of networks' files, by name.

        The anchor model is with them; files that the runtime fails on are left out.

        Raises:
            StaleTable: The anchor model is not as fast as in the table, or fails.
            RunFailed: The runtime fails on all files.
        """
        result = self._time(files)
        quiet_ms = self._quiet_ms(result)
        if files and not quiet_ms.keys() - {_ANCHOR}:
            raise RunFailed(
                f"{self.target.backend} failed on all of {len(files)} networks: "
                f"{next(iter(result.failures.values()))}"
            )
        if self.anchor_ratio is None:  # once a call: later it can only be noise
            if _ANCHOR in quiet_ms:
                self._compare(quiet_ms[_ANCHOR])
            elif self.max_drift_ratio is not None:
                raise self._untimed(result.failures[_ANCHOR])
        anchor_ms, level_ms = quiet_ms.pop(_ANCHOR, None), self._level_ms
        if anchor_ms is None or level_ms is None:
            return quiet_ms
        return {name: ms * level_ms / anchor_ms for name, ms in quiet_ms.items()}

    def anchor_model(self, new_folder: Callable[[], Path]) -> AnchorModel | None:
        """The anchor model, to be timed beside a file and say how slow memory is.

        Args:
            new_folder: Gives one that gets its file.

        Returns:
            None where it says nothing: on a machine of one's own, which is as slow as
            it is; before it was timed; or where bundles could not tell which network
            it was.
        """
        level_ms = self._level_ms
        if level_ms is None or self._anchor != anchor_network(self.space):
            return None
        path = write_anchor_model(self.space, self.target, new_folder())
        return AnchorModel(path=path, quiet_ms=level_ms)

    @property
    def reference_ns(self) -> float | None:
        """Level of the anchor's kernel that latencies speak of: the table's.

        None for that of each run on a machine of one's own, whose clock nobody else
        slows down: what it has lost is no phase that passes.
        """
        shared = read_conditions().shared_host
        return self.table.anchor_reference_ns if shared else None

    @property
    def _level_ms(self) -> float | None:
        """Latency of the anchor model that all others are held against.

        On a shared host others' work is what it is slower by from moment to moment,
        and the table tells its quiet latency. Where the table is of another machine,
        which was accepted, it is what this call found first.
        """
        ratio = self.anchor_ratio
        if ratio is None or not read_conditions().shared_host:
            return None
        holds = abs(ratio - 1) <= MAX_DRIFT_RATIO
        return self._table_anchor_ms * (1.0 if holds else ratio)

    @property
    def _table_anchor_ms(self) -> float:
        return self.table.networks[self._anchor].quiet_ms

    @property
    def _anchor(self) -> str:
        """Id of the network that stands for the table.

        Where the anchor model could not be profiled, one of middling latency does.
        """
        networks, anchor = self.table.networks, anchor_network(self.space)
        if anchor in networks:
            return anchor
        by_latency = sorted(networks, key=lambda name: networks[name].quiet_ms)
        return by_latency[len(by_latency) // 2]

    def _anchor_file(self, folder: Path) -> Path:
        return _write_network(self.space, self._anchor, self.target, folder)

    def _time(self, files: Mapping[str, Path]) -> OrderResult:
        """Files and the anchor model, in a process of their own."""
        order = WorkOrder(
            names=(*files, _ANCHOR),
            backend=self.target.backend,
            threads=self.target.threads,
            settings=CONFIRM_SETTINGS,
            anchor_name=_ANCHOR,
        )
        with (
            tempfile.TemporaryDirectory(prefix="ofa-deploy-") as folder,
            Journal(Path(folder) / "journal", subject={}) as journal,
        ):
            return execute(
                order,
                lambda name, folder: files.get(name) or self._anchor_file(folder),
                journal=journal,
                progress=self.reporter.advance,
            )

    def _quiet_ms(self, result: OrderResult) -> dict[str, float]:
        """Latencies at the quiet level that is spoken of."""
        fit = fit_visits(
            [found.visits for found in result.measurements.values()],
            beta=self.table.beta,
            anchor_reference_ns=self.reference_ns,
        )
        return {
            name: math.exp(effect) / 1e6
            for name, effect in zip(result.measurements, fit.effect_log, strict=True)
        }

    def _compare(self, anchor_ms: float) -> None:
        ratio = anchor_ms / self._table_anchor_ms
        self.anchor_ratio = ratio
        limit = self.max_drift_ratio
        if limit is not None and abs(ratio - 1) > limit:
            raise self._stale(
                f"is out of date: its anchor model takes {ratio - 1:+.1%} now (allowed "
                f"±{limit:.0%})",
                ratio=ratio,
            )

    def _untimed(self, reason: str) -> StaleTable:
        return self._stale(
            f"cannot be held against this machine: its anchor model, {self._anchor}, "
            f"does not run any more ({reason})",
            ratio=None,
        )

    def _stale(self, found: str, *, ratio: float | None) -> StaleTable:
        return StaleTable(
            f"the latency table of {self.table.created_at[:16]} {found}, so its "
            f"predictions do not hold. Measure anew with `{self.profile_command}`, or "
            'by on_drift="reprofile" (--reprofile); or use it as it is by '
            'on_drift="accept" (--accept-drift): what is predicted is then off, what '
            "is timed is not",
            ratio=ratio,
        )


def write_anchor_model(space: SearchSpace, target: Target, folder: Path) -> Path:
    """Write the anchor model of a space; its weights are random, and always the same.

    Args:
        space: Any.
        target: What the file is for.
        folder: Gets it.
    """
    return _write_network(space, anchor_network(space), target, folder)


def _write_network(
    space: SearchSpace, config_id: str, target: Target, folder: Path
) -> Path:
    model = timed_network(
        lower(space, SubnetConfig.from_id(config_id)),
        backend_name=target.backend,
        rng=np.random.default_rng(0),
    )
    return write_timed(folder, _ANCHOR, model, backend_name=target.backend)
