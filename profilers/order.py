"""Work orders: what a device is asked to measure, as a JSON message.

The models travel as files beside the order; a job names one by its key and tells it
by its digest.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from typing import Literal

from profilers.codec import decode_settings, encode_flat
from profilers.json_reader import JsonNode, parse_json
from profilers.measurement import MeasureSettings

__all__ = ["Job", "WorkOrder", "check_sha256"]

FORMAT_VERSION = 1

JobKind = Literal["block", "network"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One model to measure.

    Attributes:
        key: Names the model in the order and in the table.
        kind: Part of a network, or a whole one.
        sha256: Digest of the model file.
    """

    key: str
    kind: JobKind
    sha256: str

    def __post_init__(self) -> None:
        if not self.key:
            raise ValueError("key is empty; name the model")
        if self.kind not in ("block", "network"):
            raise ValueError(f"kind={self.kind!r}; give 'block' or 'network'")
        check_sha256(self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOrder:
    """Models to measure together, and how.

    Attributes:
        jobs: With different keys within a kind.
        settings: How carefully.
        backend: Name of the backend.
        threads: Threads of one inference.
    """

    jobs: tuple[Job, ...]
    settings: MeasureSettings
    backend: str
    threads: int

    def __post_init__(self) -> None:
        if not self.jobs:
            raise ValueError("jobs is empty; give at least one model to measure")
        if len({(job.kind, job.key) for job in self.jobs}) < len(self.jobs):
            raise ValueError("two jobs of one kind share a key; give each its own")
        if not self.backend:
            raise ValueError("backend is empty; give a backend's name")
        if self.threads < 1:
            raise ValueError(f"threads={self.threads}; give at least 1")

    def to_json(self) -> str:
        """Encode the order; equal orders give equal texts."""
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "backend": self.backend,
                "jobs": [
                    {"key": job.key, "kind": job.kind, "sha256": job.sha256}
                    for job in self.jobs
                ],
                "settings": encode_flat(self.settings),
                "threads": self.threads,
            },
            indent=2,
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> WorkOrder:
        """Decode an order.

        Raises:
            FormatError: The text is not an order of this version.
        """
        node = parse_json(text)
        fields = node.fields("format_version", "backend", "jobs", "settings", "threads")
        version = fields["format_version"]
        if version.integer(minimum=1) != FORMAT_VERSION:
            version.refuse(
                f"{version.value} is not supported; this version reads "
                f"{FORMAT_VERSION}; use equal versions on host and device"
            )
        return node.build(
            lambda: cls(
                jobs=tuple(map(_decode_job, fields["jobs"].items())),
                settings=decode_settings(fields["settings"]),
                backend=fields["backend"].text(),
                threads=fields["threads"].integer(minimum=1),
            )
        )


def check_sha256(digest: str) -> None:
    """Raise `ValueError` unless `digest` is 64 lowercase hex digits."""
    if len(digest) != 64 or set(digest) - set(string.digits + "abcdef"):
        raise ValueError(f"sha256={digest!r}; give 64 lowercase hex digits")


def _decode_job(node: JsonNode) -> Job:
    fields = node.fields("key", "kind", "sha256")
    kind: JobKind = (
        "block" if fields["kind"].choice("block", "network") == "block" else "network"
    )
    return node.build(
        lambda: Job(key=fields["key"].text(), kind=kind, sha256=fields["sha256"].text())
    )
