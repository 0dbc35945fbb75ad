"""After the training: calibration images, measured accuracies, accuracy predictor.

Each part is a file in the run's folder; what is there is not made again, so this too
goes on after a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ofa_deploy.batches import in_batches, statistics_batch
from ofa_deploy.dataset import ImageSet
from ofa_deploy.evaluation import Evaluator
from ofa_deploy.nn.supernet import Supernet, new_supernet
from ofa_deploy.plan import lower
from ofa_deploy.predict.accuracy import AccuracySample, fit_accuracy_predictor
from ofa_deploy.space import first_of_each
from ofa_deploy.stored import (
    CALIBRATION_FILE,
    WEIGHTS_FILE,
    StoredSupernet,
    read_supernet,
    write_supernet,
)
from ofa_deploy.train.augment import network_input
from ofa_deploy.train.calibration_set import synthesise_images
from ofa_deploy.train.evaluate import collect_statistics, recalibrate_supernet
from profilers.backends.base import Backend

CALIBRATION_COUNT = 500
# Of these, a fifth is held out to judge the predictor by.
SAMPLE_COUNT = 500
SAMPLES_JOURNAL = "accuracy-samples.jsonl"
_STATISTICS_IMAGES = 2_000
Progress = Callable[[str, int, int], None]


def finish_supernet(
    folder: Path,
    *,
    training: ImageSet,
    validation: ImageSet,
    backend: Backend,
    threads: int,
    seed: int,
    bf16: bool = False,
    calibration_count: int = CALIBRATION_COUNT,
    sample_count: int = SAMPLE_COUNT,
    progress: Progress | None = None,
) -> StoredSupernet:
    """Complete a trained supernet's folder.

    Args:
        folder: Of the run; `folder/supernet` holds the trained supernet.
        training: Images for the full network's statistics, which the synthesised
            images are to reproduce.
        validation: Images that accuracies are measured on.
        backend: Runs the sub-networks.
        threads: Of the backend.
        seed: Of images, sampled networks and predictor.
        bf16: Synthesise in bfloat16; worth it where the CPU has it.
        calibration_count: Images to synthesise.
        sample_count: Sub-networks to evaluate.
        progress: Called with a part's name, done and total.
    """
    target = folder / "supernet"
    supernet = read_supernet(target)
    if supernet.calibration is None:
        images = _synthesise(
            supernet,
            training,
            count=calibration_count,
            seed=seed,
            bf16=bf16,
            progress=progress,
        )
        supernet = replace(supernet, calibration=images)
        write_supernet(target, supernet)
    if supernet.accuracy is not None:
        return supernet
    sample = _sample_accuracies(
        supernet,
        validation,
        journal=folder / SAMPLES_JOURNAL,
        subject=_digest(target),
        count=sample_count,
        backend=backend,
        threads=threads,
        seed=seed,
        progress=progress,
    )
    if progress:
        progress("fitting the accuracy predictor", 0, 1)
    predictor, _ = fit_accuracy_predictor(
        supernet.space, sample, rng=np.random.default_rng(seed)
    )
    supernet = replace(supernet, accuracy=predictor, samples=sample)
    write_supernet(target, supernet)
    return read_supernet(target)


def load_supernet_module(stored: StoredSupernet) -> Supernet:
    """The torch supernet with the stored weights."""
    supernet = new_supernet(stored.space)
    supernet.load_state_dict(
        {name: torch.from_numpy(array.copy()) for name, array in stored.weights.items()}
    )
    return supernet


def _synthesise(
    stored: StoredSupernet,
    training: ImageSet,
    *,
    count: int,
    seed: int,
    bf16: bool,
    progress: Progress | None,
) -> NDArray[np.uint8]:
    supernet = load_supernet_module(stored)
    rng = np.random.default_rng(seed)
    picked = rng.permutation(len(training))[:_STATISTICS_IMAGES]

    def batches(resolution: int) -> Iterator[torch.Tensor]:
        for part in in_batches(len(picked), statistics_batch(resolution)):
            images = training.images[picked[part]]
            pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            yield network_input(
                pixels,
                resolution=resolution,
                normalisation=stored.normalisation,
            )

    statistics = {}
    resolutions = stored.space.resolutions
    for number, resolution in enumerate(resolutions, 1):
        config = replace(stored.space.largest(), resolution=resolution)
        plan = lower(stored.space, config)
        recalibrate_supernet(supernet, plan, batches(resolution))
        statistics[resolution] = collect_statistics(supernet)
        if progress:
            progress("reading statistics", number, len(resolutions))
    return synthesise_images(
        supernet,
        statistics,
        normalisation=stored.normalisation,
        count=count,
        seed=seed,
        bf16=bf16,
        progress=(
            None
            if progress is None
            else lambda done, total: progress("synthesising images", done, total)
        ),
    )


def _sample_accuracies(
    stored: StoredSupernet,
    validation: ImageSet,
    *,
    journal: Path,
    subject: str,
    count: int,
    backend: Backend,
    threads: int,
    seed: int,
    progress: Progress | None,
) -> AccuracySample:
    """Measure random networks, one line of a journal each.

    `subject` is what the accuracies are of; lines of another subject do not count.
    """
    space = stored.space
    rng = np.random.default_rng(seed)
    # The extremes too: a predictor is asked about them, and they are rare draws.
    extremes = [space.encode(space.largest()), space.encode(space.smallest())]
    drawn = np.concatenate([np.stack(extremes), space.sample(2 * count, rng)])
    genomes = drawn[first_of_each(drawn)[:count]]
    done = _read_journal(journal, subject)
    evaluator = Evaluator(
        stored,
        data=validation,
        calibration=stored.calibration,
        backend=backend,
        threads=threads,
    )
    accuracies = []
    with journal.open("a", encoding="utf-8") as file:
        if file.tell() and not journal.read_bytes().endswith(b"\n"):
            file.write("\n")  # else the next line would be lost with the cut-off one
        for index, genome in enumerate(genomes):
            config = space.decode(genome)
            if config.id not in done:
                done[config.id] = evaluator.accuracy(lower(space, config))
                line = {
                    "id": config.id,
                    "accuracy": done[config.id],
                    "subject": subject,
                }
                file.write(json.dumps(line) + "\n")
                file.flush()
            accuracies.append(done[config.id])
            if progress:
                progress("measuring accuracies", index + 1, len(genomes))
    return AccuracySample(
        genomes=genomes, accuracy=np.array(accuracies), image_count=len(validation)
    )


def _digest(folder: Path) -> str:
    """Of all that a network's accuracy depends on: weights and calibration images."""
    files = (folder / WEIGHTS_FILE, folder / CALIBRATION_FILE)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _read_journal(path: Path, subject: str) -> dict[str, float]:
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            if entry["subject"] == subject:
                found[str(entry["id"])] = float(entry["accuracy"])
        except (ValueError, KeyError, TypeError):
            continue  # the line that a kill cut off: its network is measured again
    return found
