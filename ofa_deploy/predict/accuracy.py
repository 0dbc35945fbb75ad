"""Accuracy of a sub-network from its choices: an MLP, trained and run in numpy.

Source: Once-for-All (ICLR 2020), section 3.4: 3 hidden layers of 400 units on one-hot
features, trained on pairs of sub-network and measured accuracy; base accuracy added to
the output as in the authors' code. Beside the MLP a linear path leads from the features
to the output: it is fitted first, and with a few hundred samples it takes most of the
error away. The prediction is the mean of a few MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.errors import FormatError
from ofa_deploy.space import Genomes, SearchSpace

HIDDEN_UNITS = 400
HIDDEN_LAYERS = 3
# Chosen on random splits of an earlier sample of the same networks; held-out errors
# on such splits are therefore a little flattered.
WEIGHT_DECAY = 10.0
RIDGE_STRENGTH = 1.0
Floats = NDArray[np.float32]


def feature_count(space: SearchSpace) -> int:
    """Width of the one-hot features."""
    per_slot = sum(
        s.max_depth * (len(s.kernels) + len(s.expands)) for s in space.stages
    )
    return len(space.resolutions) + per_slot


def one_hot(space: SearchSpace, genomes: Genomes) -> Floats:
    """Features `(n, feature_count)`: resolution, then kernel and expand of each slot.

    Unused slots are all zero; depth needs no feature of its own.
    """
    genes = np.concatenate([genomes[:, :1], genomes[:, space.first_slot_gene :]], 1)
    used = np.repeat(space.active_slots(genomes), 2, axis=1)
    used = np.concatenate([np.ones_like(used[:, :1]), used], axis=1)
    counts = np.delete(space.choice_counts, np.arange(1, space.first_slot_gene))
    columns = np.concatenate([[0], np.cumsum(counts)[:-1]]) + genes
    features = np.zeros((len(genomes), counts.sum()), dtype=np.float32)
    np.put_along_axis(features, columns, used.astype(np.float32), axis=1)
    return features


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AccuracySample:
    """Measured accuracies of sub-networks.

    Args:
        genomes: `(n, genes)`.
        accuracy: `(n,)`, 0..1, on the validation split, recalibrated.
        image_count: Images each accuracy was measured on.
    """

    genomes: Genomes
    accuracy: NDArray[np.float64]
    image_count: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AccuracyPredictor:
    """An ensemble of MLPs over one-hot features.

    Args:
        space: Whose genomes it takes.
        linear: The linear path, `(feature_count, 1)`.
        weights: Per member, matrices and biases of each layer in turn.
        base_accuracy: Mean of the training labels, added to the output.
        residual_std: Of predictions on held-out samples, 0..1.
    """

    space: SearchSpace
    linear: Floats
    weights: tuple[tuple[Floats, ...], ...]
    base_accuracy: float
    residual_std: float

    def predict(self, genomes: Genomes) -> NDArray[np.float64]:
        """Predicted accuracies `(n,)`, 0..1, of genomes `(n, genes)`."""
        features = one_hot(self.space, genomes)
        outputs = [_forward(member, features)[-1][:, 0] for member in self.weights]
        mean: NDArray[np.float64] = np.mean(outputs, axis=0, dtype=np.float64)
        straight: NDArray[np.float64] = (features @ self.linear)[:, 0].astype(
            np.float64
        )
        return self.base_accuracy + straight + mean

    def to_arrays(self) -> dict[str, Floats]:
        """Everything but the space, for a safetensors file."""
        arrays = {
            f"member{index}.tensor{place}": tensor
            for index, member in enumerate(self.weights)
            for place, tensor in enumerate(member)
        }
        arrays["linear"] = self.linear
        arrays["base_accuracy"] = np.array([self.base_accuracy], dtype=np.float32)
        arrays["residual_std"] = np.array([self.residual_std], dtype=np.float32)
        return arrays

    @classmethod
    def from_arrays(
        cls, space: SearchSpace, arrays: Mapping[str, NDArray[np.floating]]
    ) -> AccuracyPredictor:
        """The inverse of `to_arrays`.

        Raises:
            FormatError: Arrays are missing or of another space.
        """
        tensor_count = 2 * HIDDEN_LAYERS + 1
        member_count = sum(name.endswith(".tensor0") for name in arrays)
        try:
            weights = tuple(
                tuple(
                    arrays[f"member{index}.tensor{place}"].astype(np.float32)
                    for place in range(tensor_count)
                )
                for index in range(member_count)
            )
            linear = arrays["linear"].astype(np.float32)
            base, spread = (
                float(arrays[name][0]) for name in ("base_accuracy", "residual_std")
            )
        except (KeyError, IndexError) as error:
            raise FormatError(
                f"missing array {error}; the folder is damaged, copy or train it again",
                path="accuracy",
            ) from error
        width = feature_count(space)
        wanted = _shapes(width)
        fits = all([t.shape for t in member] == wanted for member in weights)
        if not weights or not fits or linear.shape != (width, 1):
            raise FormatError(
                f"the predictor does not take the {width} features of space "
                f"{space.name}",
                path="accuracy",
            )
        numbers = (linear, *chain.from_iterable(weights), np.array([base, spread]))
        if not all(np.isfinite(array).all() for array in numbers):
            raise FormatError(
                "the predictor holds NaN or Infinity; it is damaged, train it anew",
                path="accuracy",
            )
        return cls(
            space=space,
            linear=linear,
            weights=weights,
            base_accuracy=base,
            residual_std=spread,
        )


def _shapes(width: int) -> list[tuple[int, ...]]:
    """Shapes of one member's tensors, for features of this width."""
    shapes: list[tuple[int, ...]] = []
    for inputs, outputs in pairwise([width] + [HIDDEN_UNITS] * HIDDEN_LAYERS):
        shapes += [(inputs, outputs), (outputs,)]
    return [*shapes, (HIDDEN_UNITS, 1)]


def _forward(weights: Sequence[Floats], x: Floats) -> list[Floats]:
    """Activations of every layer, the input first and the output `(n, 1)` last."""
    values = [x]
    for layer in range(HIDDEN_LAYERS):
        matrix, bias = weights[2 * layer], weights[2 * layer + 1]
        values.append(np.maximum(values[-1] @ matrix + bias, 0))
    values.append(values[-1] @ weights[-1])
    return values


def fit_accuracy_predictor(
    space: SearchSpace,
    sample: AccuracySample,
    *,
    rng: np.random.Generator,
    members: int = 2,
    held_out_share: float = 0.2,
    epochs: int = 150,
) -> tuple[AccuracyPredictor, NDArray[np.int64]]:
    """Train on a part of the sample and judge on the rest.

    Returns:
        The predictor, and the indices of the samples it has not seen, whose residuals
        give its `residual_std`; of a single sample, that one.
    """
    count = len(sample.genomes)
    order = rng.permutation(count)
    held_out, seen = np.split(order, [max(1, round(count * held_out_share))])
    if not len(seen):  # a space of one network
        seen = held_out
    features = one_hot(space, sample.genomes)
    base = float(sample.accuracy[seen].mean())
    targets = (sample.accuracy - base).astype(np.float32)[:, None]
    linear = _ridge(features[seen], targets[seen])
    remaining = targets[seen] - features[seen] @ linear
    weights = tuple(
        _train(features[seen], remaining, rng=rng, epochs=epochs)
        for _ in range(members)
    )
    predictor = AccuracyPredictor(
        space=space,
        linear=linear,
        weights=weights,
        base_accuracy=base,
        residual_std=0.0,
    )
    residual = predictor.predict(sample.genomes[held_out]) - sample.accuracy[held_out]
    judged = replace(predictor, residual_std=float(np.sqrt((residual**2).mean())))
    return judged, held_out


def _ridge(x: Floats, y: Floats) -> Floats:
    """Least squares with a penalty on the weights, `(features, 1)`."""
    gram = (x.T @ x).astype(np.float64) + RIDGE_STRENGTH * np.eye(x.shape[1])
    solution: Floats = np.linalg.solve(gram, x.T @ y).astype(np.float32)
    return solution


def _train(
    x: Floats,
    y: Floats,
    *,
    rng: np.random.Generator,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = WEIGHT_DECAY,
) -> tuple[Floats, ...]:
    """Adam with decoupled weight decay and a cosine schedule, on squared error."""
    # Targets are hundredths: in units of their own spread the rate suits them.
    scale = float(y.std()) or 1.0
    weights = _initialise(x.shape[1], rng)
    first = [np.zeros_like(w) for w in weights]
    second = [np.zeros_like(w) for w in weights]
    step, total = 0, epochs * -(-len(x) // batch_size)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x), batch_size):
            part = order[start : start + batch_size]
            gradients = _gradients(weights, x[part], y[part] / np.float32(scale))
            step += 1
            rate = learning_rate * 0.5 * (1 + np.cos(np.pi * step / total))
            for i, gradient in enumerate(gradients):
                first[i] += 0.1 * (gradient - first[i])
                second[i] += 0.001 * (gradient**2 - second[i])
                update = (first[i] / (1 - 0.9**step)) / (
                    np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8
                )
                weights[i] -= np.float32(rate) * (
                    update.astype(np.float32) + np.float32(weight_decay) * weights[i]
                )
    weights[-1] *= np.float32(scale)
    return tuple(weights)


def _initialise(width: int, rng: np.random.Generator) -> list[Floats]:
    sizes = [width] + [HIDDEN_UNITS] * HIDDEN_LAYERS
    weights: list[Floats] = []
    for inputs, outputs in pairwise(sizes):
        spread = np.float32((2.0 / inputs) ** 0.5)
        weights.append(rng.standard_normal((inputs, outputs), np.float32) * spread)
        weights.append(np.zeros(outputs, dtype=np.float32))
    last = rng.standard_normal((HIDDEN_UNITS, 1), np.float32)
    weights.append(last * np.float32(HIDDEN_UNITS**-0.5))
    return weights


def _gradients(weights: Sequence[Floats], x: Floats, y: Floats) -> list[Floats]:
    values = _forward(weights, x)
    flowing: Floats = np.float32(2 / len(x)) * (values[-1] - y)
    last: Floats = values[-2].T @ flowing
    gradients = [last]
    flowing = flowing @ weights[-1].T
    for layer in reversed(range(HIDDEN_LAYERS)):
        flowing = flowing * (values[layer + 1] > 0).astype(np.float32)
        matrix: Floats = values[layer].T @ flowing
        gradients = [matrix, flowing.sum(0), *gradients]
        flowing = flowing @ weights[2 * layer].T
    return gradients
