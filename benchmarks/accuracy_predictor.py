"""How well accuracies are predicted, on sub-networks that the fit has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from inputs import add_supernet, console, new_parser
from numpy.typing import NDArray
from ranking import spearman_rho
from report import Section
from rich.progress import track

from ofa_deploy.plan import lower
from ofa_deploy.predict.accuracy import (
    AccuracySample,
    fit_accuracy_predictor,
    one_hot,
)
from ofa_deploy.predict.evaluation import kendall_tau
from ofa_deploy.space import SearchSpace
from ofa_deploy.zoo import open_supernet

SEEDS = range(5)
MAX_RMSE_POINTS = 0.5
LEAST_TAU = 0.8

Floats = NDArray[np.float64]
PREDICTORS = ("ensemble of MLPs (shipped)", "least squares, same features", "MACs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one predictor on one held-out part."""

    rmse_points: float
    tau: float
    rho: float


def main() -> None:
    """Fit and judge over several splits."""
    parser = new_parser(__doc__)
    add_supernet(parser)
    args = parser.parse_args()
    section = Section("accuracy_predictor", "Accuracy predictor", results=args.results)
    supernet = open_supernet(args.supernet)
    if supernet.samples is None:
        raise SystemExit("the supernet has no accuracy samples")
    sample, space = supernet.samples, supernet.space
    scores: dict[str, list[Score]] = {name: [] for name in PREDICTORS}
    for seed in track(SEEDS, "fitting", console=console, transient=True):
        for name, score in judge(space, sample, seed=seed).items():
            scores[name].append(score)
    describe(section, sample)
    section.table(
        ["predictor", "RMSE, points", "Kendall's tau-b", "Spearman's rho"],
        [
            [
                name,
                _mean_std([score.rmse_points for score in found]),
                _mean_std([score.tau for score in found]),
                _mean_std([score.rho for score in found]),
            ]
            for name, found in scores.items()
        ],
    )
    shipped = scores[PREDICTORS[0]]
    rmse = float(np.mean([score.rmse_points for score in shipped]))
    tau = float(np.mean([score.tau for score in shipped]))
    section.bar(
        f"RMSE at most {MAX_RMSE_POINTS} points on average: {rmse:.3f}",
        passed=rmse <= MAX_RMSE_POINTS,
    )
    section.bar(
        f"tau at least {LEAST_TAU} on average: {tau:.3f}", passed=tau >= LEAST_TAU
    )
    section.publish()


def judge(space: SearchSpace, sample: AccuracySample, *, seed: int) -> dict[str, Score]:
    """Scores on the fifth of the sample that the library's own split holds out."""
    predictor, held_out = fit_accuracy_predictor(
        space, sample, rng=np.random.default_rng(seed)
    )
    seen = np.setdiff1d(np.arange(len(sample.genomes)), held_out)
    hot = one_hot(space, sample.genomes).astype(np.float64)
    macs = [lower(space, space.decode(row)).mac_count for row in sample.genomes]
    log_macs = np.log(np.array(macs, dtype=np.float64))[:, None]
    predictions = (
        predictor.predict(sample.genomes[held_out]),
        _least_squares(hot, sample.accuracy, seen)(hot[held_out]),
        _least_squares(log_macs, sample.accuracy, seen)(log_macs[held_out]),
    )
    truth = sample.accuracy[held_out]
    return {
        name: Score(
            rmse_points=100 * float(np.sqrt(((found - truth) ** 2).mean())),
            tau=kendall_tau(found, truth),
            rho=spearman_rho(found, truth),
        )
        for name, found in zip(PREDICTORS, predictions, strict=True)
    }


def _least_squares(
    features: Floats, target: Floats, seen: NDArray[np.int64]
) -> Callable[[Floats], Floats]:
    mean = float(target[seen].mean())
    centre = features[seen].mean(axis=0)
    # One-hot features depend on each other; lstsq takes the least of the solutions.
    solution = np.linalg.lstsq(
        features[seen] - centre, target[seen] - mean, rcond=None
    )[0]
    return lambda unseen: mean + (unseen - centre) @ solution


def describe(section: Section, sample: AccuracySample) -> None:
    """Say what is predicted, and how noisy it is itself."""
    points = 100 * sample.accuracy
    share = float(sample.accuracy.mean())
    noise = 100 * float(np.sqrt(share * (1 - share) / sample.image_count))
    section.text(
        f"{len(points)} sub-networks, each measured on {sample.image_count:,} "
        f"validation images: {points.min():.2f} to {points.max():.2f} %, mean "
        f"{points.mean():.2f}, standard deviation {points.std():.2f} points. The "
        f"sampling error of one accuracy is {noise:.2f} points, most of it shared by "
        f"all, as the images are the same. Over {len(SEEDS)} random splits, 80 % to "
        "fit and 20 % to judge; mean ± standard deviation. *MACs* is a line through "
        "their logarithm."
    )


def _mean_std(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


if __name__ == "__main__":
    main()
