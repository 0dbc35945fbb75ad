from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

import profilers.device as device_module
from profilers import (
    Conditions,
    DeviceSpec,
    available_cores,
    backend_names,
    examine,
    get_backend,
    read_conditions,
    this_device,
)
from profilers.codec import decode_conditions, encode_flat
from profilers.device import cgroup_quota_cores, differing_fields, is_shared_host
from profilers.doctor import BackendStatus, diagnose
from profilers.errors import DeviceError, FormatError, MissingDependency
from profilers.json_reader import parse_json
from profilers.steadiness import Steadiness, Throttling, read_throttling, watch
from tests.support import profilers_values as values

QUIET = Conditions(
    governor="performance",
    frequency_mhz=2400.0,
    temperature_c=40.0,
    load_average=0.1,
    affinity_core_count=8,
    cgroup_quota_cores=None,
    shared_host=False,
)
USABLE = (BackendStatus(name="some-cpu", version="1.2", problem=None),)


def device(memory_mb: int = 16_000) -> DeviceSpec:
    return DeviceSpec(
        name="a",
        arch="x86_64",
        cpu_model="c",
        core_count=4,
        accelerator=None,
        memory_mb=memory_mb,
    )


@given(values.devices)
def test_the_fingerprint_is_twelve_hex_digits_of_the_hardware(
    device: DeviceSpec,
) -> None:
    assert len(device.fingerprint) == 12
    assert int(device.fingerprint, 16) >= 0
    assert replace(device, name="another").fingerprint == device.fingerprint
    more = replace(device, core_count=device.core_count + 1)
    assert more.fingerprint != device.fingerprint


def test_a_little_memory_less_is_the_same_hardware() -> None:
    assert device(16_000).fingerprint == device(16_030).fingerprint
    assert device(16_000).fingerprint != device(8_000).fingerprint


@given(values.devices, values.devices)
def test_devices_differ_in_a_field_exactly_where_their_fingerprints_differ(
    one: DeviceSpec, other: DeviceSpec
) -> None:
    assert differing_fields(one, replace(one, name="another")) == ()
    same = one.fingerprint == other.fingerprint
    assert (differing_fields(one, other) == ()) == same


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arch", "riscv64"),
        ("cpu_model", "another"),
        ("core_count", 5),
        ("accelerator", "a card"),
        ("memory_mb", 32_000),
    ],
)
def test_what_makes_a_device_another_one_is_named_with_both_values(
    field: str, value: object
) -> None:
    then = device()
    changes: dict[str, Any] = {field: value}
    now = replace(then, **changes)
    assert differing_fields(then, now) == ((field, getattr(then, field), value),)


@pytest.mark.parametrize("told", ["0", "", "cpu MHz : 0.000"])
def test_a_clock_that_is_not_told_is_none(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some drivers and hypervisors say 0, and what is masked is empty."""
    monkeypatch.setattr(device_module, "_cpuinfo_value", lambda key: "0.000")
    (tmp_path / "scaling_cur_freq").write_text(told)
    assert device_module._frequency_mhz(tmp_path) is None
    (tmp_path / "scaling_cur_freq").write_text("1800000")
    assert device_module._frequency_mhz(tmp_path) == 1800.0


def test_conditions_that_are_masked_can_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_module, "_read_text", lambda path: "")
    found = read_conditions()
    assert found.governor is None
    assert decode_conditions(parse_json(json.dumps(encode_flat(found)))) == found


def test_this_machine_can_be_described() -> None:
    assert this_device("here").name == "here"
    assert this_device() == this_device()
    assert 1 <= available_cores() <= this_device().core_count
    assert isinstance(read_conditions().shared_host, bool)


@pytest.mark.parametrize(
    ("files", "membership", "cores"),
    [
        pytest.param({}, "0::/", None, id="no limit"),
        pytest.param({"cpu.max": "max 100000"}, "0::/", None, id="max"),
        pytest.param({"cpu.max": "150000 100000"}, "0::/", 1.5, id="version 2"),
        pytest.param(
            {"a/cpu.max": "100000 100000", "a/b/cpu.max": "400000 100000"},
            "0::/a/b",
            1.0,
            id="an ancestor binds",
        ),
        pytest.param(
            {"cpu.max": "50000 100000"}, "0::/only/on/the/host", 0.5, id="container"
        ),
        pytest.param(
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
            "4:cpu,cpuacct:/",
            2.0,
            id="version 1",
        ),
        pytest.param(
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            "4:cpu:/",
            None,
            id="version 1 without a limit",
        ),
        pytest.param({"cpu.max": "nonsense"}, "0::/", None, id="unreadable"),
        pytest.param({"cpu.max": "1 0"}, "0::/", None, id="no period"),
    ],
)
def test_the_least_quota_of_the_control_groups_counts(
    files: dict[str, str], membership: str, cores: float | None, tmp_path: Path
) -> None:
    mount = tmp_path / "cgroup"
    for name, text in files.items():
        file = mount / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    listing = tmp_path / "membership"
    listing.write_text(membership + "\n", encoding="utf-8")
    assert cgroup_quota_cores(mount=mount, membership=listing) == cores


def test_no_control_groups_mean_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota_cores(mount=tmp_path, membership=tmp_path / "none") is None


XEON = "flags\t\t: fpu sse avx2\n"
CORTEX = "Features\t: fp asimd\nCPU part\t: 0xd0c\n"


def firmware(**names: str) -> dict[str, str]:
    return {f"sys/class/dmi/id/{name}": text for name, text in names.items()}


@pytest.mark.parametrize(
    ("files", "cores", "quota", "shared"),
    [
        pytest.param({"proc/cpuinfo": XEON}, 64, None, False, id="server"),
        pytest.param({"proc/cpuinfo": CORTEX}, 4, None, False, id="board"),
        pytest.param({"proc/cpuinfo": XEON}, 3, None, True, id="few cores left to it"),
        pytest.param({"proc/cpuinfo": XEON}, 64, 1.5, True, id="quota of a container"),
        pytest.param(
            {"proc/cpuinfo": "flags\t: fpu hypervisor"}, 64, None, True, id="x86"
        ),
        pytest.param(
            {"proc/cpuinfo": CORTEX, "sys/hypervisor/type": "xen"},
            *(64, None, True),
            id="Xen",
        ),
        pytest.param(
            {"proc/cpuinfo": XEON, "sys/hypervisor/properties/features": ""},
            *(64, None, False),
            id="a kernel that could tell of Xen",
        ),
        pytest.param(
            firmware(sys_vendor="QEMU", product_name="KVM Virtual Machine"),
            *(64, None, True),
            id="ARM under QEMU",
        ),
        pytest.param(
            firmware(sys_vendor="Amazon EC2", product_name="m7g.16xlarge"),
            *(64, None, True),
            id="ARM in a cloud",
        ),
        pytest.param(
            firmware(sys_vendor="Amazon EC2", product_name="m7g.metal"),
            *(64, None, False),
            id="bare metal in a cloud",
        ),
        pytest.param(
            firmware(
                sys_vendor="Microsoft Corporation", product_name="Virtual Machine"
            ),
            *(64, None, True),
            id="ARM under Hyper-V",
        ),
        pytest.param(
            firmware(sys_vendor="Microsoft Corporation", product_name="Surface Pro 9"),
            *(8, None, False),
            id="a computer by a vendor of hypervisors",
        ),
        pytest.param(
            {"proc/device-tree/hypervisor/compatible": "linux,kvm\0"},
            *(64, None, True),
            id="device tree of a guest",
        ),
        pytest.param(
            {"proc/device-tree/compatible": "linux,dummy-virt\0"},
            *(64, None, True),
            id="device tree of no board",
        ),
        pytest.param(
            {"proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0"},
            *(4, None, False),
            id="device tree of a board",
        ),
    ],
)
def test_a_host_is_shared_where_others_can_slow_it_down_unseen(
    files: dict[str, str],
    cores: int,
    quota: float | None,
    shared: bool,
    tmp_path: Path,
) -> None:
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    found = is_shared_host(core_count=cores, quota_cores=quota, root=tmp_path)
    assert found == shared


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DeviceError) as refused:
        get_backend("toaster")
    assert str(refused.value) == (
        "there is no backend 'toaster'; choose one of: litert-cpu, "
        "onnxruntime-cpu, openvino-cpu, tensorrt-gpu, tensorrt-rtx-gpu"
    )


def test_every_backend_has_the_name_it_is_found_by() -> None:
    assert [get_backend(name).name for name in backend_names()] == list(backend_names())


def test_a_missing_dependency_ends_with_the_line_to_run() -> None:
    error = MissingDependency("OpenVINO", extra="openvino")
    assert str(error) == (
        "OpenVINO is not installed. Run: pip install 'ofa-deploy[openvino]'"
    )


def test_a_format_error_names_the_place_and_then_the_file() -> None:
    error = FormatError("3 is too small", path="networks[3].samples_ns")
    assert str(error) == "networks[3].samples_ns: 3 is too small"
    assert str(error.in_file("a.json")).startswith("a.json: networks[3]")
    assert error.in_file("a.json").path == error.path


STEADY = Steadiness(
    spread_ratio=0.02,
    throttling=Throttling(event_count=3, active=()),
    new_throttle_events=0,
)


def test_a_quiet_dedicated_device_has_only_good_findings() -> None:
    findings = diagnose(QUIET, core_count=8, backends=USABLE, steadiness=STEADY)
    assert {finding.severity for finding in findings} == {"ok"}


@pytest.mark.parametrize(
    ("conditions", "text"),
    [
        (replace(QUIET, load_average=7.0), "load average 7.00"),
        (replace(QUIET, cgroup_quota_cores=1.5), "limits this process to 1.5 cores"),
        (replace(QUIET, governor="powersave"), "governor is powersave"),
        (replace(QUIET, shared_host=True), "this host is shared"),
    ],
)
def test_each_disturbance_is_one_warning_with_a_cure(
    conditions: Conditions, text: str
) -> None:
    (warning,) = [
        finding
        for finding in diagnose(
            conditions, core_count=8, backends=USABLE, steadiness=STEADY
        )
        if finding.severity != "ok"
    ]
    assert warning.severity == "warning"
    assert text in warning.text
    assert warning.cure


@pytest.mark.parametrize(
    ("steadiness", "text"),
    [
        (replace(STEADY, spread_ratio=0.31), "31% apart"),
        (replace(STEADY, new_throttle_events=2), "2 of them just now"),
        (
            replace(
                STEADY, throttling=Throttling(event_count=None, active=("too hot",))
            ),
            "too hot",
        ),
    ],
)
def test_a_device_that_does_not_hold_its_speed_is_warned_of(
    steadiness: Steadiness, text: str
) -> None:
    findings = diagnose(QUIET, core_count=8, backends=USABLE, steadiness=steadiness)
    (warning,) = [finding for finding in findings if finding.severity != "ok"]
    assert text in warning.text
    assert warning.cure


def test_throttling_is_read_from_kernel_and_firmware(tmp_path: Path) -> None:
    assert read_throttling(tmp_path) == Throttling(event_count=None, active=())
    for core, count in (("cpu0", "4"), ("cpu1", "1"), ("cpu2", "damaged")):
        folder = tmp_path / "devices/system/cpu" / core / "thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text(f"{count}\n")
    firmware = tmp_path / "devices/platform/soc/soc:firmware"
    firmware.mkdir(parents=True)
    (firmware / "get_throttled").write_text("50005\n")  # now, and in the past
    found = read_throttling(tmp_path)
    assert found.event_count == 5
    assert found.active == (
        "the supply voltage is too low",
        "the processor is slowed down",
    )


class AlternatingAnchor:
    """Takes 100 and 150 ns in turn."""

    def __init__(self) -> None:
        self.count = 0

    def measure_ns(self) -> int:
        self.count += 1
        return 100 + 50 * (self.count % 2)


def test_watching_tells_the_spread_and_what_was_throttled_meanwhile() -> None:
    ticks = itertools.count(step=1_000)
    counts = iter((7, 9))
    found = watch(
        duration_s=1e-3,
        anchor=AlternatingAnchor(),
        clock=lambda: next(ticks),
        throttling=lambda: Throttling(event_count=next(counts), active=()),
    )
    assert found.spread_ratio == pytest.approx(0.4, abs=0.11)
    assert found.new_throttle_events == 2


def test_no_usable_backend_is_an_error_with_the_line_to_run() -> None:
    missing = MissingDependency("OpenVINO", extra="openvino")
    status = BackendStatus(name="openvino-cpu", version=None, problem=str(missing))
    finding = diagnose(QUIET, core_count=8, backends=(status,), steadiness=STEADY)[0]
    assert finding.severity == "error"
    assert "pip install" in finding.cure


def test_the_examination_covers_every_backend() -> None:
    diagnosis = examine()
    assert [status.name for status in diagnosis.backends] == list(backend_names())
    assert diagnosis.fit == any(status.version for status in diagnosis.backends)
