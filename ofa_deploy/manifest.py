"""What a bundle says of itself: `manifest.json`, strictly read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from ofa_deploy.constraints import (
    CONSTRAINT_NAMES,
    Constraints,
    Evidence,
    Verdict,
    binding,
)
from ofa_deploy.errors import FormatError, SpaceError, few_of
from ofa_deploy.export.model_files import model_file_of
from ofa_deploy.plan import NetworkCost
from ofa_deploy.predict.latency import LatencyEstimate
from ofa_deploy.preprocess import Normalisation, decode_normalisation
from ofa_deploy.space_file import MAX_RESOLUTION
from ofa_deploy.verify import AccuracyClaim, Candidate, ParityReport
from profilers.codec import (
    decode_conditions,
    decode_device,
    decode_runtime,
)
from profilers.device import Conditions, DeviceSpec, RuntimeSpec
from profilers.files import MAX_FILE_BYTES
from profilers.json_reader import JsonNode, read_json

FORMAT_VERSION = 4
MANIFEST_FILE = "manifest.json"
# Hundreds of times what one takes; a larger file is none.
MAX_MANIFEST_BYTES = 16_000_000
# More than any machine has; a runtime starts as many as it is told to.
MAX_THREADS = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file's digest and size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLatency:
    """The exported file's latency, timed in fresh processes.

    Args:
        quiet_ms: In the machine's quiet state; what the budget speaks of.
        standard_error_ratio: Of `quiet_ms`.
        median_ms: Of all runs, whatever state the machine was in.
        p90_ms: Percentile of all runs; None where they are too few, or timed in
            several at a time.
        p95_ms: Likewise.
        p99_ms: Likewise.
        sample_count: Timed runs.
        process_count: Fresh processes.
        process_spread_ratio: Slowest process over fastest, minus 1.
        first_inference_ms: After loading.
        load_ms: Loading and compiling.
        memory_mb: Growth of the process's memory by that and by running, at its peak,
            in 10^6 bytes; None where the system does not tell.
        beta: Share of the anchor's slowdown that the model has.
        anchor_reference_ns: The anchor's quiet level that `quiet_ms` speaks of.
        anchor_model_ms: Latency of the anchor model, where that was timed beside this
            one and `quiet_ms` is measured against it; None elsewhere. It is of the
            supernet, or the network before it was shrunk.
        indicative: The host is shared: where there was an anchor model, `quiet_ms` is
            held against it; all else is of the host as well.
        instability: Why the measurement is not stable; empty where it is.
        conditions: Of the machine.
    """

    quiet_ms: float
    standard_error_ratio: float
    median_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    sample_count: int
    process_count: int
    process_spread_ratio: float
    first_inference_ms: float
    load_ms: float
    memory_mb: float | None
    beta: float
    anchor_reference_ns: float
    anchor_model_ms: float | None
    indicative: bool
    instability: tuple[str, ...]
    conditions: Conditions


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything needed to trust and re-check a bundle.

    Args:
        created_at: ISO 8601.
        config_id: The sub-network; of a network that was shrunk, the method and a
            digest of what it kept.
        space_name: The space it is of; of a network that was shrunk, its kind.
        supernet_sha256: Digest of the supernet's description; of a network that was
            shrunk, of the weights that it had before.
        constraints: What was asked for.
        verdicts: What was found of each; all are met.
        candidates: Networks measured on the way, this one among them.
        resolution: Height and width of the input, `(1, 3, resolution, resolution)`.
        normalisation: Applied to RGB 0..255 after a bilinear resize.
        class_names: In output order.
        model_file: The file that the runtime loads.
        files: Every file but the manifest.
        device: Where it was measured.
        runtime: With what.
        anchor_ratio: Latency of the anchor model over that of the latency table, when
            the bundle was made; None if there was none to time.
        measured: Its latency.
        predicted: What the search had expected.
        accuracy: Measured or predicted.
        parity: Against the unfused graph.
        cost: Sizes.
        versions: Of the packages that made it.
    """

    created_at: str
    config_id: str
    space_name: str
    supernet_sha256: str
    constraints: Constraints
    verdicts: tuple[Verdict, ...]
    candidates: tuple[Candidate, ...]
    resolution: int
    normalisation: Normalisation
    class_names: tuple[str, ...]
    model_file: str
    files: Mapping[str, FileRecord]
    device: DeviceSpec
    runtime: RuntimeSpec
    anchor_ratio: float | None
    measured: MeasuredLatency
    predicted: LatencyEstimate
    accuracy: AccuracyClaim
    parity: ParityReport
    cost: NetworkCost
    versions: Mapping[str, str]

    @property
    def binding(self) -> Verdict:
        """The constraint that leaves the least room."""
        return binding(self.verdicts)

    def to_json(self) -> str:
        """The file's text."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            FormatError: Damaged, too large or of another version; names the place.
        """
        if path.is_file() and (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
            raise FormatError(
                f"{size} bytes are no manifest's, which has at most "
                f"{MAX_MANIFEST_BYTES}; the bundle is damaged, make it anew",
                path="",
            ).in_file(path.name)
        return read_json(path, _decode, otherwise="the bundle is damaged, make it anew")


_FIELDS = tuple(Manifest.__dataclass_fields__)


def _decode(node: JsonNode) -> Manifest:
    entries = node.fields("format_version", *_FIELDS)
    if entries["format_version"].integer(minimum=1) != FORMAT_VERSION:
        entries["format_version"].refuse(
            f"this version reads format {FORMAT_VERSION}; install another ofa-deploy"
        )
    files = {
        _file_name(entry, name): _decode_file(entry)
        for name, entry in entries["files"].entries().items()
    }
    model_file = entries["model_file"].text()
    runtime = _decode_runtime(entries["runtime"])
    loaded = model_file_of(runtime.backend)
    if model_file != loaded:
        entries["model_file"].refuse(
            f"{model_file!r} is not what {runtime.backend} loads, which is {loaded!r}"
        )
    if model_file not in files:
        entries["model_file"].refuse(
            f"{model_file!r} is not among the files, {few_of(sorted(files))}"
        )
    return Manifest(
        created_at=entries["created_at"].text(),
        config_id=entries["config_id"].text(),
        space_name=entries["space_name"].text(),
        supernet_sha256=entries["supernet_sha256"].text(),
        constraints=_decode_constraints(entries["constraints"]),
        verdicts=_decode_verdicts(entries["verdicts"], entries["constraints"]),
        candidates=tuple(
            _decode_candidate(item) for item in entries["candidates"].items()
        ),
        resolution=entries["resolution"].integer(minimum=1, maximum=MAX_RESOLUTION),
        normalisation=decode_normalisation(entries["normalisation"]),
        class_names=tuple(item.text() for item in entries["class_names"].items()),
        model_file=model_file,
        files=files,
        device=decode_device(entries["device"]),
        runtime=runtime,
        anchor_ratio=entries["anchor_ratio"].optional(JsonNode.positive),
        measured=_decode_measured(entries["measured"]),
        predicted=_decode_estimate(entries["predicted"]),
        accuracy=_decode_accuracy(entries["accuracy"]),
        parity=_decode_parity(entries["parity"]),
        cost=_decode_cost(entries["cost"]),
        versions={
            name: entry.text() for name, entry in entries["versions"].entries().items()
        },
    )


def _file_name(node: JsonNode, name: str) -> str:
    # A bundle from elsewhere must not make us read, or trust, what is outside it. On
    # Windows a colon names a drive, or a stream beside a file's content.
    if (
        name in ("", ".", "..", MANIFEST_FILE)
        or set(name) & set("/\\:")
        or not name.isprintable()
    ):
        node.refuse(f"{name!r} is not a plain file name inside the bundle")
    return name


def _decode_file(node: JsonNode) -> FileRecord:
    entries = node.fields("sha256", "size_bytes")
    return FileRecord(
        sha256=entries["sha256"].text(),
        size_bytes=entries["size_bytes"].integer(minimum=0, maximum=MAX_FILE_BYTES),
    )


def _decode_runtime(node: JsonNode) -> RuntimeSpec:
    runtime = decode_runtime(node)
    entries = node.fields(*RuntimeSpec.__dataclass_fields__)
    entries["threads"].integer(minimum=1, maximum=MAX_THREADS)
    return runtime


def _decode_measured(node: JsonNode) -> MeasuredLatency:
    entries = node.fields(*MeasuredLatency.__dataclass_fields__)
    return MeasuredLatency(
        quiet_ms=entries["quiet_ms"].positive(),
        standard_error_ratio=entries["standard_error_ratio"].number(minimum=0),
        median_ms=entries["median_ms"].positive(),
        p90_ms=entries["p90_ms"].optional(JsonNode.positive),
        p95_ms=entries["p95_ms"].optional(JsonNode.positive),
        p99_ms=entries["p99_ms"].optional(JsonNode.positive),
        sample_count=entries["sample_count"].integer(minimum=1),
        process_count=entries["process_count"].integer(minimum=1),
        process_spread_ratio=entries["process_spread_ratio"].number(minimum=0),
        first_inference_ms=entries["first_inference_ms"].positive(),
        load_ms=entries["load_ms"].positive(),
        memory_mb=entries["memory_mb"].optional(lambda node: node.number(minimum=0)),
        beta=entries["beta"].number(minimum=0),
        anchor_reference_ns=entries["anchor_reference_ns"].positive(),
        anchor_model_ms=entries["anchor_model_ms"].optional(JsonNode.positive),
        indicative=entries["indicative"].boolean(),
        instability=tuple(item.text() for item in entries["instability"].items()),
        conditions=decode_conditions(entries["conditions"]),
    )


def _decode_constraints(node: JsonNode) -> Constraints:
    entries = node.fields(*Constraints.__dataclass_fields__)
    try:
        return Constraints(
            latency_ms=entries["latency_ms"].optional(JsonNode.positive),
            percentile=entries["percentile"].integer(minimum=1),
            size_bytes=entries["size_bytes"].optional(
                lambda node: node.integer(minimum=1)
            ),
            compressed_bytes=entries["compressed_bytes"].optional(
                lambda node: node.integer(minimum=1)
            ),
            peak_memory_mb=entries["peak_memory_mb"].optional(JsonNode.positive),
            min_accuracy=entries["min_accuracy"].optional(JsonNode.positive),
            rate_hz=entries["rate_hz"].optional(JsonNode.positive),
            sustained_s=entries["sustained_s"].number(minimum=0),
        )
    except SpaceError as error:
        node.refuse(str(error))


def _decode_verdicts(node: JsonNode, constraints: JsonNode) -> tuple[Verdict, ...]:
    asked = _decode_constraints(constraints).limits
    verdicts = tuple(_decode_verdict(item) for item in node.items())
    if {verdict.constraint: verdict.limit for verdict in verdicts} != asked:
        node.refuse(
            f"verdicts must be of what was asked for: {', '.join(map(str, asked))}, "
            "with its limits"
        )
    if not all(verdict.met for verdict in verdicts):
        missed = [verdict.constraint for verdict in verdicts if not verdict.met]
        node.refuse(
            f"a bundle keeps what was asked for; this one misses {', '.join(missed)}. "
            "Make it anew"
        )
    return verdicts


def _decode_verdict(node: JsonNode) -> Verdict:
    entries = node.fields(*Verdict.__dataclass_fields__)
    return Verdict(
        constraint=entries["constraint"].choice(CONSTRAINT_NAMES),
        limit=entries["limit"].positive(),
        found=entries["found"].number(minimum=0),
        bound=entries["bound"].number(minimum=0),
        evidence=entries["evidence"].choice(get_args(Evidence)),
    )


def _decode_candidate(node: JsonNode) -> Candidate:
    entries = node.fields(*Candidate.__dataclass_fields__)
    return Candidate(
        config_id=entries["config_id"].text(),
        predicted_ms=entries["predicted_ms"].positive(),
        confirmed_ms=entries["confirmed_ms"].positive(),
        certified_ms=entries["certified_ms"].optional(JsonNode.positive),
    )


def _decode_estimate(node: JsonNode) -> LatencyEstimate:
    entries = node.fields("ms", "low_ms", "high_ms")
    return LatencyEstimate(
        ms=entries["ms"].positive(),
        low_ms=entries["low_ms"].number(),
        high_ms=entries["high_ms"].positive(),
    )


def _decode_accuracy(node: JsonNode) -> AccuracyClaim:
    entries = node.fields("kind", "value", "low", "high", "image_count")
    return AccuracyClaim(
        kind=entries["kind"].choice(get_args(Evidence)),
        value=entries["value"].number(minimum=0),
        low=entries["low"].number(),
        high=entries["high"].number(),
        image_count=entries["image_count"].integer(minimum=1),
    )


def _decode_parity(node: JsonNode) -> ParityReport:
    entries = node.fields(
        "max_relative_error", "top1_agreement", "image_count", "tolerance"
    )
    return ParityReport(
        max_relative_error=entries["max_relative_error"].number(minimum=0),
        top1_agreement=entries["top1_agreement"].number(minimum=0),
        image_count=entries["image_count"].integer(minimum=1),
        tolerance=entries["tolerance"].positive(),
    )


def _decode_cost(node: JsonNode) -> NetworkCost:
    entries = node.fields("mac_count", "parameter_count", "peak_activation_bytes")
    return NetworkCost(
        mac_count=entries["mac_count"].integer(minimum=1),
        parameter_count=entries["parameter_count"].integer(minimum=1),
        peak_activation_bytes=entries["peak_activation_bytes"].integer(minimum=1),
    )
