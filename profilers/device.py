"""What a device is, and the conditions it is in while something is timed.

Everything here is read and recorded, never changed: governor, clocks, and limits are
the owner's business. What cannot be read is None, not a guess.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

__all__ = [
    "Conditions",
    "DeviceSpec",
    "RuntimeSpec",
    "available_cores",
    "cgroup_quota_cores",
    "differing_fields",
    "is_shared_host",
    "is_virtual_machine",
    "read_conditions",
    "this_device",
]

# With fewer cores than this, the timed process shares them with the system's own work.
DEDICATED_CORE_COUNT = 4

MEBIBYTES_PER_GIBIBYTE = 1024

# How the firmware of virtual machines begins to call itself: that of hypervisors, and
# of clouds that put their own name in its place. Whole vendors would not do: Microsoft,
# Google and Apple sell computers, too.
VIRTUAL_NAMES = (
    *("Alibaba Cloud ECS", "Amazon EC2", "Apple Virtualization", "BHYVE", "Bochs"),
    *("DigitalOcean", "Google Compute Engine", "KVM", "KubeVirt", "OpenStack"),
    *("Parallels", "QEMU", "VMW", "Virtual Machine", "VirtualBox", "Xen"),
    *("innotek GmbH", "vServer"),
)
# Of a cloud's machine without a hypervisor.
BARE_METAL_SUFFIX = ".metal"

# Fields of a `DeviceSpec` that say which one it is, not what it is.
_DEVICE_IDENTITY = ("name",)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """The hardware a measurement belongs to.

    Attributes:
        name: What people call it; does not enter the fingerprint.
        arch: As `platform.machine()` gives it, for instance `x86_64` or `aarch64`.
        cpu_model: The processor's own name, and what tells its generation.
        core_count: Logical cores of the machine, whatever a process may use of them.
        accelerator: The GPU or NPU that is measured, and what else of it makes times
            incomparable, such as its driver; None for the CPU.
        memory_mb: Installed memory as the system reports it.
    """

    name: str
    arch: str
    cpu_model: str
    core_count: int
    accelerator: str | None
    memory_mb: int

    def __post_init__(self) -> None:
        for field in ("name", "arch", "cpu_model"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty; give the device's {field}")
        if self.core_count < 1:
            raise ValueError(f"core_count={self.core_count}; a device has at least 1")
        if self.memory_mb < 1:
            raise ValueError(f"memory_mb={self.memory_mb}; a device has at least 1")

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that are equal for equal hardware.

        Memory is rounded to GiB: the kernel keeps a varying share of it for itself.
        """
        hardware = (
            self.arch,
            self.cpu_model,
            self.core_count,
            self.accelerator,
            _gibibytes(self.memory_mb),
        )
        return hashlib.sha256(json.dumps(hardware).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSpec:
    """The software a measurement belongs to.

    Attributes:
        backend: Name of the backend, as `get_backend` takes it.
        version: The runtime's version.
        provider: The runtime's own name of what executes, for instance `CPU`.
        threads: Threads of one inference.
        precision: Arithmetic of one inference, for instance `f32`.
    """

    backend: str
    version: str
    provider: str
    threads: int
    precision: str

    def __post_init__(self) -> None:
        for field in ("backend", "version", "provider", "precision"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty; give the runtime's {field}")
        if self.threads < 1:
            raise ValueError(f"threads={self.threads}; an inference has at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The state of the device while something was timed; None where unreadable.

    Attributes:
        governor: Frequency policy of the first core that may be used.
        frequency_mhz: Present frequency of that core.
        temperature_c: The hottest thermal zone.
        load_average: Runnable processes, averaged over the last minute.
        affinity_core_count: Cores that this process may run on.
        cgroup_quota_cores: CPU time that the control group allows, in cores.
        shared_host: Whether others' work can slow this device down unseen; see
            `is_shared_host`.
    """

    governor: str | None
    frequency_mhz: float | None
    temperature_c: float | None
    load_average: float | None
    affinity_core_count: int | None
    cgroup_quota_cores: float | None
    shared_host: bool


def differing_fields(
    then: DeviceSpec | RuntimeSpec, now: DeviceSpec | RuntimeSpec
) -> tuple[tuple[str, object, object], ...]:
    """In what two devices, or two runtimes, differ that latency depends on.

    Returns:
        A field's name with both values, for each; of devices, those that their
        fingerprints are made of.
    """
    return tuple(
        (field.name, before, after)
        for field in fields(then)
        if field.name not in _DEVICE_IDENTITY
        and (before := getattr(then, field.name)) != (after := getattr(now, field.name))
        and not (field.name == "memory_mb" and _gibibytes(before) == _gibibytes(after))
    )


def this_device(name: str = "local", *, accelerator: str | None = None) -> DeviceSpec:
    """Describe the machine that this process runs on.

    Args:
        name: What people call it.
        accelerator: As the backend tells it that is measured with.
    """
    return DeviceSpec(
        name=name,
        arch=platform.machine() or "unknown",
        cpu_model=_cpu_model(),
        core_count=os.cpu_count() or 1,
        accelerator=accelerator,
        memory_mb=_memory_mb(),
    )


def available_cores() -> int:
    """Cores that this process can really use: affinity and quota, at least 1."""
    cores = _affinity_core_count() or os.cpu_count() or 1
    quota = cgroup_quota_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def read_conditions() -> Conditions:
    """Read the present conditions; takes a few milliseconds."""
    core = min(_affinity() or {0})  # of those that may be used: clusters differ
    frequency_directory = Path(f"/sys/devices/system/cpu/cpu{core}/cpufreq")
    quota_cores = cgroup_quota_cores()
    return Conditions(
        governor=_read_text(frequency_directory / "scaling_governor") or None,
        frequency_mhz=_frequency_mhz(frequency_directory),
        temperature_c=_temperature_c(Path("/sys/class/thermal")),
        load_average=_load_average(),
        affinity_core_count=_affinity_core_count(),
        cgroup_quota_cores=quota_cores,
        shared_host=is_shared_host(
            core_count=available_cores(), quota_cores=quota_cores
        ),
    )


def is_shared_host(
    *, core_count: int, quota_cores: float | None, root: Path = Path("/")
) -> bool:
    """Whether others' work can slow this process down unseen.

    It can in a virtual machine, under a quota, which a container on somebody's machine
    has, and where there are too few cores to leave one to the system.

    Args:
        core_count: Cores that this process may use: those that a container, or
            whoever pinned it, left it.
        quota_cores: CPU time that the control group allows, in cores; None without
            a limit.
        root: Of the file system.
    """
    return (
        core_count < DEDICATED_CORE_COUNT
        or quota_cores is not None
        or is_virtual_machine(root)
    )


def is_virtual_machine(root: Path = Path("/")) -> bool:
    """Whether a hypervisor, the firmware or the device tree says that this is one.

    Args:
        root: Of the file system.
    """
    if "hypervisor" in _cpuinfo_value("flags", root).split():  # on x86
        return True
    # The folder alone means only that the kernel could tell.
    if _read_text(root / "sys/hypervisor/type"):
        return True
    tree = root / "proc/device-tree"  # of ARM machines that have no firmware tables
    # A board without hardware of its own is what QEMU and its like describe.
    boards = (_read_text(tree / "compatible") or "").split("\0")
    if (tree / "hypervisor").exists() or "linux,dummy-virt" in boards:
        return True
    firmware = root / "sys/class/dmi/id"
    product, *vendors = (
        _read_text(firmware / name) or ""
        for name in ("product_name", "sys_vendor", "board_vendor", "bios_vendor")
    )
    if product.endswith(BARE_METAL_SUFFIX):
        return False
    return any(name.startswith(VIRTUAL_NAMES) for name in (product, *vendors))


def cgroup_quota_cores(
    *,
    mount: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
) -> float | None:
    """CPU time that the control groups allow, in cores; None without a limit.

    Args:
        mount: Where the control group file systems are mounted.
        membership: The kernel's list of the groups that this process is in.
    """
    quotas = []
    for line in (_read_text(membership) or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            root, read = mount, _quota_version_2
        elif "cpu" in controllers.split(","):
            root, read = mount / controllers, _quota_version_1
            if not root.is_dir():
                root = mount / "cpu"
        else:
            continue
        # A limit of any ancestor binds too. Inside a container the group's path can
        # be the host's, which does not exist here; the mount's root then applies.
        directory = root / group.strip("/")
        quotas += [
            read(level)
            for level in (directory, *directory.parents)
            if level == root or root in level.parents
        ]
    limits = [quota for quota in quotas if quota is not None]
    return min(limits) if limits else None


def _quota_version_2(directory: Path) -> float | None:
    fields = (_read_text(directory / "cpu.max") or "").split()
    if len(fields) != 2 or fields[0] == "max":
        return None
    return _ratio(fields[0], fields[1])


def _quota_version_1(directory: Path) -> float | None:
    return _ratio(
        _read_text(directory / "cpu.cfs_quota_us"),
        _read_text(directory / "cpu.cfs_period_us"),
    )


def _ratio(quota_us: str | None, period_us: str | None) -> float | None:
    try:
        quota, period = int(quota_us or ""), int(period_us or "")
    except ValueError:
        return None
    # Version 1 writes -1 for "no limit".
    return quota / period if quota > 0 and period > 0 else None


def _affinity() -> set[int] | None:
    # Not on macOS and Windows.
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _affinity_core_count() -> int | None:
    cores = _affinity()
    return None if cores is None else len(cores)


def _load_average() -> float | None:
    try:
        return float(os.getloadavg()[0])
    except (AttributeError, OSError):
        return None


def _frequency_mhz(directory: Path) -> float | None:
    frequency_khz = _read_text(directory / "scaling_cur_freq") or ""
    try:
        if frequency_khz.isdigit():
            frequency_mhz = int(frequency_khz) / 1000
        else:
            frequency_mhz = float(_cpuinfo_value("cpu MHz"))
    except ValueError:
        return None
    # Some drivers and hypervisors say 0 of what they do not tell.
    return frequency_mhz if 0 < frequency_mhz < math.inf else None


def _temperature_c(directory: Path) -> float | None:
    readings = []
    for file in directory.glob("thermal_zone*/temp"):
        try:
            readings.append(int(_read_text(file) or "") / 1000)
        except ValueError:
            continue
    return max(readings) if readings else None


def _cpu_model() -> str:
    # Boards with ARM cores name themselves in the device tree, not in cpuinfo.
    tree = (_read_text(Path("/proc/device-tree/model")) or "").rstrip("\0")
    name = (
        _cpuinfo_value("model name")
        or _cpuinfo_value("Model")
        or tree
        or _apple_chip()
        or platform.processor()
        or "unknown"
    )
    return " ".join((name, *_microarchitecture()))


def _apple_chip() -> str:
    """Of a Mac, whose processors all call themselves the same; empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip()


def _microarchitecture() -> tuple[str, ...]:
    """What tells generations apart where a virtual machine hides the product's name.

    Two machines that both called themselves `AMD EPYC` were 1.8 times apart.
    """
    keys = ("cpu family", "model", "stepping")  # x86
    numbers = tuple(f"{key} {v}" for key in keys if (v := _cpuinfo_value(key)))
    parts = sorted(_cpuinfo_values("CPU part"))  # ARM, one for each kind of core
    return (*numbers, *(f"part {part}" for part in parts))


def _cpuinfo_value(key: str, root: Path = Path("/")) -> str:
    return next(iter(_cpuinfo_values(key, root)), "")


def _cpuinfo_values(key: str, root: Path = Path("/")) -> dict[str, None]:
    """Different values of a key over all cores, in their order."""
    lines = (_read_text(root / "proc/cpuinfo") or "").splitlines()
    entries = (line.partition(":") for line in lines)
    return {v.strip(): None for name, _, v in entries if name.strip() == key}


def _gibibytes(memory_mb: int) -> int:
    return round(memory_mb / MEBIBYTES_PER_GIBIBYTE)


def _memory_mb() -> int:
    try:
        size_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1
    return max(1, size_bytes // 2**20)


def _read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
