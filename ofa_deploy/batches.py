"""How many images a network sees at a time, where nothing is trained."""

from __future__ import annotations

from itertools import pairwise

# Of images of up to 64 pixels.
MOST_IMAGES = 250
# Statistics are of a batch at a time, around its own mean: of few images, too narrow.
MOST_OF_STATISTICS, LEAST_OF_STATISTICS = 200, 64


def evaluation_batch(resolution: int) -> int:
    """Images that a network sees at a time: the fewer, the larger they are."""
    return max(16, min(MOST_IMAGES, MOST_IMAGES * 64**2 // resolution**2))


def statistics_batch(resolution: int) -> int:
    """Images at a time whose spread batch norms are to normalise by."""
    batch = max(LEAST_OF_STATISTICS, evaluation_batch(resolution))
    return min(MOST_OF_STATISTICS, batch)


def in_batches(count: int, size: int) -> list[slice]:
    """Which of `count` images come together, `size` at a time.

    A last one by itself joins those before: it has no spread at 1×1 feature maps.
    """
    bounds = [*range(0, count, size), count]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        del bounds[-2]
    return [slice(low, high) for low, high in pairwise(bounds)]
