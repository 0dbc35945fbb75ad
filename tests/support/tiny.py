"""A space, a supernet, images and a latency table small enough for a law per second."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ofa_deploy.dataset import ImageSet
from ofa_deploy.fuse import fuse
from ofa_deploy.layers import (
    BlockPlan,
    ConvLayer,
    Layer,
    LinearLayer,
    PoolLayer,
    RepConvLayer,
    SqueezeExciteLayer,
)
from ofa_deploy.materialise import NORM_TENSORS, materialise
from ofa_deploy.plan import NetworkPlan, all_blocks, lower
from ofa_deploy.predict.accuracy import (
    AccuracyPredictor,
    AccuracySample,
    fit_accuracy_predictor,
)
from ofa_deploy.preprocess import Normalisation
from ofa_deploy.space import (
    Genomes,
    HeadSpace,
    SearchSpace,
    StageSpace,
    StemSpace,
    SubnetConfig,
)
from ofa_deploy.space_file import space_sha256
from ofa_deploy.stored import StoredSupernet
from profilers import (
    Conditions,
    DeviceSpec,
    Drift,
    LatencyTable,
    Measurement,
    MeasureSettings,
    RuntimeSpec,
    Stability,
    Visit,
)
from profilers.table import Origin

Floats = NDArray[np.float32]

CLASS_NAMES = ("blue", "green", "red")
IMAGE_SIZE = 12
NORMALISATION = Normalisation(mean=(100.0, 110.0, 120.0), std=(60.0, 50.0, 55.0))

# 504 networks: 2 resolutions x (2 + 2^2) dense stages x (6 + 6^2) depthwise stages.
SPACE = SearchSpace(
    name="tiny",
    resolutions=(8, 12),
    stem=StemSpace(out_channels=8, stride=1, activation="hswish", block_channels=8),
    stages=(
        StageSpace(
            out_channels=16,
            stride=2,
            kernels=(3,),
            expands=(1, 2),
            depths=(1, 2),
            activation="relu",
            squeeze_excite=False,
            block="fused_mbconv",
        ),
        StageSpace(
            out_channels=24,
            stride=2,
            kernels=(3, 5, 7),
            expands=(2, 3),
            depths=(1, 2),
            activation="hswish",
            squeeze_excite=True,
        ),
    ),
    head=HeadSpace(
        expand_channels=32, feature_channels=32, activation="hswish", class_count=3
    ),
)
NETWORK_COUNT = 504


def random_configs(
    space: SearchSpace, count: int, *, seed: int = 0
) -> list[SubnetConfig]:
    """Some networks of a space."""
    rng = np.random.default_rng(seed)
    return [space.decode(row) for row in space.sample(count, rng)]


def random_supernet_weights(
    space: SearchSpace, rng: np.random.Generator
) -> dict[str, Floats]:
    """Weights with random statistics and transforms, exact in float16."""
    return random_supernet_weights_of(lower(space, space.largest()), rng)


def random_supernet_weights_of(
    largest: NetworkPlan, rng: np.random.Generator
) -> dict[str, Floats]:
    """The same for the plan of a space's largest network."""
    weights: dict[str, Floats] = {}
    for layer in largest.layers:
        for name, array in _random_layer(layer, rng).items():
            rounded = array.astype(np.float16).astype(np.float32)
            weights[f"{layer.name}.{name}"] = rounded
    return weights


def fused_shapes(largest: NetworkPlan) -> list[tuple[int, ...]]:
    """Shapes of all tensors that a fused network holds."""
    weights = random_supernet_weights_of(largest, np.random.default_rng(0))
    return [a.shape for a in fuse(materialise(weights, largest), largest).values()]


def _random_layer(layer: Layer, rng: np.random.Generator) -> dict[str, Floats]:
    if isinstance(layer, PoolLayer):
        return {}
    if isinstance(layer, LinearLayer):
        shape = (layer.out_channels, layer.in_channels)
        return {"weight": _dense(shape, rng), "bias": _around(0, shape[0], rng)}
    if isinstance(layer, SqueezeExciteLayer):
        channels, middle = layer.channels, layer.middle_channels
        return {
            "reduce.weight": _dense((middle, channels, 1, 1), rng),
            "reduce.bias": _around(0, middle, rng),
            "expand.weight": _dense((channels, middle, 1, 1), rng),
            "expand.bias": _around(0, channels, rng),
        }
    if isinstance(layer, RepConvLayer):
        return _random_branches(layer, rng)
    return _random_conv(layer, rng)


def _random_branches(
    layer: RepConvLayer, rng: np.random.Generator
) -> dict[str, Floats]:
    arrays = {
        f"{branch.name}.{name}": array
        for branch in layer.branches
        for name, array in _random_conv(branch, rng).items()
    }
    if layer.identity_channels:
        for name, array in _random_norm(layer.identity_channels, rng).items():
            arrays[f"{layer.identity_name}.{name}"] = array
    return {name.removeprefix(f"{layer.name}."): a for name, a in arrays.items()}


def _random_conv(layer: ConvLayer, rng: np.random.Generator) -> dict[str, Floats]:
    arrays = {"weight": _dense(layer.weight_shape, rng)}
    for smaller, larger in zip(layer.kernels, layer.kernels[1:], strict=False):
        size = smaller**2
        noise = rng.standard_normal((size, size), dtype=np.float32)
        matrix = np.eye(size, dtype=np.float32) + 0.1 * noise
        arrays[f"transform_{larger}to{smaller}"] = matrix
    if layer.batch_norm:
        arrays |= _random_norm(layer.out_channels, rng)
    return arrays


def _random_norm(channels: int, rng: np.random.Generator) -> dict[str, Floats]:
    centres = {"gamma": 1.0, "beta": 0.0, "mean": 0.0, "variance": 1.0}
    return {
        f"norm.{name}": _around(centres[name], channels, rng) for name in NORM_TENSORS
    }


def _dense(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    values = rng.standard_normal(shape, dtype=np.float32)
    scaled: Floats = values * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    return scaled


def _around(centre: float, count: int, rng: np.random.Generator) -> Floats:
    return rng.uniform(centre - 0.5, centre + 0.5, count).astype(np.float32)


def images(*, per_class: int = 20, seed: int = 0, size: int = IMAGE_SIZE) -> ImageSet:
    """Noisy plain colours, one per class, which a tiny network tells apart."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(3, dtype=np.int64), per_class)
    pixels = rng.integers(0, 120, (len(labels), size, size, 3), dtype=np.uint8)
    # Class 0 is blue, the last channel.
    pixels[np.arange(len(labels)), :, :, 2 - labels] += 100
    return ImageSet(images=pixels, labels=labels, class_names=CLASS_NAMES)


def accuracy_of(space: SearchSpace, genomes: Genomes) -> NDArray[np.float64]:
    """An accuracy that grows with the logarithm of the work: 0.5 to 0.9."""
    macs = [lower(space, space.decode(row)).mac_count for row in genomes]
    ends = [lower(space, c).mac_count for c in (space.smallest(), space.largest())]
    low, high = np.log(ends)
    shares: NDArray[np.float64] = (np.log(macs) - low) / (high - low)
    return 0.5 + 0.4 * shares


@lru_cache
def sample() -> AccuracySample:
    """Accuracies of some networks, by `accuracy_of`."""
    genomes = np.unique(SPACE.sample(80, np.random.default_rng(1)), axis=0)
    return AccuracySample(
        genomes=genomes, accuracy=accuracy_of(SPACE, genomes), image_count=1000
    )


@lru_cache
def predictor() -> AccuracyPredictor:
    """A predictor fitted to `sample`."""
    fitted, _ = fit_accuracy_predictor(
        SPACE, sample(), rng=np.random.default_rng(2), members=1, epochs=40
    )
    return fitted


def stored(rng: np.random.Generator | None = None) -> StoredSupernet:
    """A supernet of `SPACE` with all that specialising needs; not trained."""
    rng = rng or np.random.default_rng(3)
    return StoredSupernet(
        space=SPACE,
        weights=random_supernet_weights(SPACE, rng),
        normalisation=NORMALISATION,
        class_names=CLASS_NAMES,
        calibration=images(per_class=14, seed=4).images,
        accuracy=predictor(),
        samples=sample(),
    )


DEVICE = DeviceSpec(
    name="board",
    arch="aarch64",
    cpu_model="A76",
    core_count=4,
    accelerator=None,
    memory_mb=8000,
)
RUNTIME = RuntimeSpec(
    backend="fake", version="1", provider="CPU", threads=1, precision="f32"
)


CONDITIONS = Conditions(
    governor=None,
    frequency_mhz=None,
    temperature_c=None,
    load_average=None,
    affinity_core_count=4,
    cgroup_quota_cores=None,
    shared_host=False,
)


def measurement(name: str, quiet_ms: float) -> Measurement:
    """A measurement of one sample, that says `quiet_ms`."""
    visit = Visit(
        time_ns=0,
        anchor_before_ns=250_000,
        anchor_after_ns=250_000,
        inner_loops=1,
        samples_ns=(max(1, round(quiet_ms * 1e6)),),
    )
    return Measurement(
        name=name,
        visits=(visit,),
        quiet_ms=quiet_ms,
        standard_error_ratio=0.01,
        median_ms=quiet_ms,
        stability=Stability(verdict="stable"),
    )


def work_ms(block: BlockPlan) -> float:
    """A block's latency in a made-up device: a constant, and time per work."""
    return 0.01 + block.mac_count * 1e-6


def latency_table(
    space: SearchSpace,
    *,
    networks: Iterable[SubnetConfig],
    network_ms: Callable[[SubnetConfig], float],
    block_ms: Callable[[BlockPlan], float] = work_ms,
    device: DeviceSpec = DEVICE,
    runtime: RuntimeSpec = RUNTIME,
    origin: Origin = "synthetic",
    anchor_reference_ns: float = 250_000.0,
) -> LatencyTable:
    """A table by formulas."""
    blocks = all_blocks(space)
    return LatencyTable(
        origin=origin,
        space_name=space.name,
        space_sha256=space_sha256(space),
        device=device,
        runtime=runtime,
        settings=MeasureSettings.screen(),
        conditions_before=CONDITIONS,
        conditions_after=CONDITIONS,
        drift=Drift(
            window_count=1, flagged_count=0, discarded_count=0, largest_ratio=0.0
        ),
        beta=1.0,
        anchor_reference_ns=anchor_reference_ns,
        created_at="2026-01-31T12:00:00+00:00",
        blocks={k: measurement(k, block_ms(b)) for k, b in blocks.items()},
        networks={c.id: measurement(c.id, network_ms(c)) for c in networks},
        random_networks=(),
        failures={},
    )
