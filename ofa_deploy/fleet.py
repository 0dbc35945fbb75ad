"""One supernet, many devices: the few networks that keep every device's limits.

Each model that is shipped has to be tested, signed and maintained. With a network for
each device accuracy is highest; with fewer, some devices run one that was chosen with
others in mind. Which devices share one is decided exactly, over all ways to group them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.assembly import VerifiedNetwork, assemble_bundle
from ofa_deploy.bundle import Bundle, new_bundle_folder, require_output, writing
from ofa_deploy.constraints import Constraints
from ofa_deploy.dataset import ImageSet
from ofa_deploy.device_bench import DeviceBench
from ofa_deploy.errors import (
    DeployError,
    InfeasibleBudget,
    SpaceError,
    StaleTable,
)
from ofa_deploy.evidence import EXPECTED_RATIO
from ofa_deploy.fleet_groups import Planner, search_together
from ofa_deploy.pipeline import (
    DEFAULT_SUPERNET,
    OnDrift,
    Specializer,
    opened,
    read_inputs,
    require_seed,
)
from ofa_deploy.reporting import Reporter, Silent
from ofa_deploy.space import SubnetConfig
from ofa_deploy.stored import StoredSupernet
from ofa_deploy.target import parse_target
from ofa_deploy.verify import ParityReport
from profilers.backends import get_backend

FLEET_FILE = "fleet.json"
# All groupings are looked at: 2 to the power of this.
MAX_DEVICES = 12
# Networks looked for, for a group, before it is given up.
MAX_TRIES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetMember:
    """A device, and what it runs.

    Args:
        device: As it was named.
        config_id: The network.
        model_number: Of the network, from 1 on; devices with the same share it.
        latency_ms: Budget.
        measured_ms: What was certified, its uncertainty included.
        accuracy: Of the network, as its bundle tells.
        accuracy_alone: Predicted, of the network that this device would get for itself.
        folder: Of its bundle, inside the fleet's.
    """

    device: str
    config_id: str
    model_number: int
    latency_ms: float
    measured_ms: float
    accuracy: float
    accuracy_alone: float
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Bundles for several devices.

    Args:
        path: Folder with a bundle for each, and `fleet.json`.
        members: In the order that devices were named.
    """

    path: Path
    members: tuple[FleetMember, ...]

    @property
    def model_count(self) -> int:
        """Different networks."""
        return len({member.config_id for member in self.members})

    def bundle(self, device: str) -> Bundle:
        """Open a device's bundle.

        Raises:
            DeployError: No such device.
        """
        for member in self.members:
            if member.device == device:
                return Bundle.open(self.path / member.folder)
        raise DeployError(
            f"device {device!r} is not in the fleet; there are "
            f"{', '.join(member.device for member in self.members)}"
        )


def specialize_fleet(
    devices: Mapping[str, float],
    *,
    out: str | Path,
    max_models: int | None = None,
    supernet: str | Path | StoredSupernet = DEFAULT_SUPERNET,
    calibration: str | Path | NDArray[np.uint8] | None = None,
    eval_data: str | Path | ImageSet | None = None,
    on_drift: OnDrift = "refuse",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Fleet:
    """A bundle for each device, of at most so many different networks.

    Args:
        devices: Budgets in ms by device, such as `{"openvino-cpu": 0.5}`.
        out: Folder of the bundles; must not exist, or be empty.
        max_models: Different networks at most; None for one a device.
        supernet: Name in the zoo, folder of one that was trained, or one that is open.
        calibration: Images for the batch-norm statistics instead of the supernet's own.
        eval_data: Labelled images to measure accuracies on; None to predict them.
        on_drift: See `Specializer`.
        seed: Of searches.
        reporter: Told of progress.

    Raises:
        SpaceError: Budgets, `max_models` or the seed make no sense.
        InfeasibleBudget: A device's budget cannot be kept, or a group's together.
        DeployError: Anything else that is wrong.
    """
    budgets_ms = {
        name: Constraints(latency_ms=budget_ms).limits["latency"]
        for name, budget_ms in devices.items()
    }
    count = _require_count(len(devices), max_models)
    require_seed(seed)
    out, reporter = Path(out).resolve(), reporter or Silent()
    require_output(out)
    source = opened(supernet)
    images, evaluation = read_inputs(
        source, calibration=calibration, eval_data=eval_data, reporter=reporter
    )
    for name in devices:  # before any of them is profiled, which takes minutes
        target = parse_target(name)
        get_backend(target.backend).runtime(threads=target.threads)
    sessions = {
        name: Specializer(name, supernet=source, on_drift=on_drift, reporter=reporter)
        for name in devices
    }
    call = _Call(
        sessions=sessions,
        budgets_ms=budgets_ms,
        images=images,
        evaluation=evaluation,
        count=count,
        seed=seed,
    )
    with writing(out):
        try:
            return call.make(out, reporter)
        except StaleTable:
            if on_drift != "reprofile":
                raise
            for session in sessions.values():
                session.require_current()
            return call.make(out, reporter)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """What a fleet is made from."""

    sessions: Mapping[str, Specializer]
    budgets_ms: Mapping[str, float]
    images: NDArray[np.uint8]
    evaluation: ImageSet | None
    count: int
    seed: int

    def make(self, out: Path, reporter: Reporter) -> Fleet:
        """Group the devices, find each group its network, write all bundles."""
        planner = Planner.of(self.sessions, self.budgets_ms, seed=self.seed)
        networks: dict[str, VerifiedNetwork] = {}
        with ExitStack() as stack:
            try:
                groups = planner.groups(self.count)
            except InfeasibleBudget:
                for session in self.sessions.values():
                    session.drift_check().check()  # stale tables have no say in that
                raise
            for group in groups:
                networks |= self._fulfil(group, stack)
            parities = {
                name: self.sessions[name].compare(network, self.images)
                for name, network in networks.items()
            }
            reporter.begin("writing the bundles")
            return _write(out, planner, self.sessions, networks, parities)

    def _bench(self, name: str, stack: ExitStack) -> DeviceBench:
        return self.sessions[name].bench(
            self._asked(name),
            images=self.images,
            evaluation=self.evaluation,
            stack=stack,
        )

    def _asked(self, name: str) -> Constraints:
        return Constraints(latency_ms=self.budgets_ms[name])

    def _fulfil(
        self, group: tuple[str, ...], stack: ExitStack
    ) -> dict[str, VerifiedNetwork]:
        if len(group) == 1:
            (name,) = group
            network = self.sessions[name].fulfil(
                self._asked(name),
                images=self.images,
                evaluation=self.evaluation,
                stack=stack,
                seed=self.seed,
            )
            return {name: network}
        benches = {name: self._bench(name, stack) for name in group}
        return fulfil_together(self.sessions, self.budgets_ms, benches, seed=self.seed)


def _require_count(device_count: int, max_models: int | None) -> int:
    if not 1 <= device_count <= MAX_DEVICES:
        raise SpaceError(
            f"{device_count} devices; give 1 to {MAX_DEVICES}, or split the fleet"
        )
    if max_models is None:
        return device_count
    if max_models < 1:
        raise SpaceError(f"max_models={max_models}; give at least 1")
    return min(max_models, device_count)


def fulfil_together(
    sessions: Mapping[str, Specializer],
    budgets_ms: Mapping[str, float],
    benches: Mapping[str, DeviceBench],
    *,
    seed: int,
) -> dict[str, VerifiedNetwork]:
    """One network that was shown to keep every budget of a group.

    Each answer of a device corrects what is expected of it, as in `contract.fulfil`.

    Raises:
        InfeasibleBudget: None does, by prediction, or of those tried.
    """
    level = dict.fromkeys(benches, EXPECTED_RATIO)
    # What each network took on each device, its uncertainty included.
    tried: dict[str, dict[str, float]] = {}
    for _ in range(MAX_TRIES):
        try:
            config = _best_together(sessions, budgets_ms, level, seed=seed)
        except InfeasibleBudget:
            if not tried:
                raise
            break  # what was measured says more than what is predicted by it
        if config.id in tried:
            level = {name: ratio * EXPECTED_RATIO for name, ratio in level.items()}
            continue
        # A network that the runtime fails on raises: it is the only one.
        quiet_ms = {
            name: bench.confirm([config])[config.id].quiet_ms
            for name, bench in benches.items()
        }
        taken_ms = {name: EXPECTED_RATIO * ms for name, ms in quiet_ms.items()}
        tried[config.id] = taken_ms
        level = {
            name: ms / sessions[name].predictor.estimate(config).ms
            for name, ms in taken_ms.items()
        }
        if any(ms > budgets_ms[name] for name, ms in taken_ms.items()):
            continue
        networks = {name: bench.certify(config) for name, bench in benches.items()}
        if all(network.met for network in networks.values()):
            return networks
        for name, network in networks.items():
            tried[config.id][name] = network.verdict("latency").bound
            level[name] = EXPECTED_RATIO * tried[config.id][name] / network.predicted.ms
    raise _not_together(tried, budgets_ms)


def _not_together(
    tried: Mapping[str, Mapping[str, float]], budgets_ms: Mapping[str, float]
) -> InfeasibleBudget:
    """The refusal of a group, with the network that came nearest."""

    def used(name: str) -> float:
        return max(ms / budgets_ms[device] for device, ms in tried[name].items())

    nearest = min(tried, key=used)
    told = ", ".join(
        f"{ms:.4g} ms on {device} ({budgets_ms[device]:g} ms are asked for)"
        for device, ms in tried[nearest].items()
    )
    return InfeasibleBudget(
        f"no network was shown to keep the budgets of {', '.join(tried[nearest])} "
        f"together, of {len(tried)} that were measured: the nearest, {nearest}, took "
        f"up to {told}. Ask for more milliseconds, or allow more models",
        budget_ms=None,
        fastest_ms=None,
        nearest=nearest,
    )


def _best_together(
    sessions: Mapping[str, Specializer],
    budgets_ms: Mapping[str, float],
    level: Mapping[str, float],
    *,
    seed: int,
) -> SubnetConfig:
    """The most accurate network expected to keep a group's budgets."""
    genomes = search_together(sessions, budgets_ms, level, seed=seed)
    return next(iter(sessions.values())).supernet.space.decode(genomes[0])


def _write(
    out: Path,
    planner: Planner,
    sessions: Mapping[str, Specializer],
    networks: Mapping[str, VerifiedNetwork],
    parities: Mapping[str, ParityReport],
) -> Fleet:
    """All bundles and the list of who runs what, whole or not at all."""
    numbers: dict[str, int] = {}
    for name in sessions:
        numbers.setdefault(networks[name].config.id, len(numbers) + 1)
    members = tuple(
        FleetMember(
            device=name,
            config_id=networks[name].config.id,
            model_number=numbers[networks[name].config.id],
            latency_ms=networks[name].verdict("latency").limit,
            measured_ms=networks[name].verdict("latency").bound,
            accuracy=networks[name].accuracy.value,
            accuracy_alone=planner.best_accuracy((index,)),
            folder=re.sub(r"[^A-Za-z0-9.]+", "-", name),
        )
        for index, name in enumerate(sessions)
    )
    with new_bundle_folder(out) as folder:
        for member in members:
            session = sessions[member.device]
            assemble_bundle(
                folder / member.folder,
                networks[member.device],
                parity=parities[member.device],
                source=session.supernet,
                extra_files=session.report(networks[member.device]),
            ).close()
        content = {
            "format_version": 1,
            "members": [asdict(member) for member in members],
        }
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / FLEET_FILE).write_text(text, encoding="utf-8")
    return Fleet(path=out, members=members)
