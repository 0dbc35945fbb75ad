"""Freed memory stays in the process, where its allocator can do that."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: the setting outlives a test.
SCRIPT = """
import resource
import numpy as np
from ofa_deploy.train.allocator import keep_freed_memory

if {keep} and not keep_freed_memory():
    print("unsupported")
    raise SystemExit
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    np.ones(16_000_000)
before = faults()
np.ones(16_000_000)
print(faults() - before)
"""


def faults_of_repeating(*, keep: bool) -> int:
    script = SCRIPT.format(keep=keep)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    if done.stdout.strip() == "unsupported":
        pytest.skip("this C library cannot be told to keep freed memory")
    return int(done.stdout)


def test_memory_that_was_freed_is_not_faulted_in_again() -> None:
    kept = faults_of_repeating(keep=True)
    assert kept < 100
    assert kept < faults_of_repeating(keep=False)
