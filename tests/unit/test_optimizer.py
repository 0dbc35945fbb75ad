"""What steps which parameter of a supernet, and how far."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ofa_deploy.errors import TrainingError
from ofa_deploy.nn.supernet import Supernet, new_supernet
from ofa_deploy.plan import lower
from ofa_deploy.space import SubnetConfig
from ofa_deploy.train.optimizer import HybridOptimizer
from tests.support import tiny
from tests.support.train_tiny import RECIPE

RATE = 0.1
STILL = replace(RECIPE, weight_decay=0.0, muon_weight_decay=0.0)


def after_one_step(
    config: SubnetConfig,
) -> tuple[HybridOptimizer, dict[str, Tensor], dict[str, Tensor]]:
    """The optimiser, and all parameters before and after a step on one network."""
    torch.manual_seed(0)
    supernet = new_supernet(tiny.SPACE)
    optimizer = HybridOptimizer(supernet, STILL)
    before = {k: v.detach().clone() for k, v in supernet.named_parameters()}
    size = config.resolution
    logits = supernet(torch.randn(8, 3, size, size), lower(tiny.SPACE, config))
    (logits**2).mean().backward()
    optimizer.set_learning_rate(RATE)
    optimizer.step()
    return optimizer, before, dict(supernet.named_parameters())


def test_a_step_on_the_full_network_reaches_every_parameter_it_uses() -> None:
    optimizer, before, after = after_one_step(tiny.SPACE.largest())
    stepped = {name for name in before if not torch.equal(before[name], after[name])}
    unused = {name for name in before if "transform" in name}
    # The logits' gradient stops at units that no image of the batch turns on, so some
    # parameters may have a zero gradient; they have momentum all the same.
    assert set(optimizer.momentum()) == set(before) - unused
    assert {name for name in stepped if "transform" in name} == set()
    assert {n for n in before if n.endswith("expand.weight") and "se." not in n} <= (
        stepped
    )


class Named(nn.Module):
    """Of a user's own names."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.transformer(x))
        return found


def test_weights_decay_and_norms_biases_and_kernel_transforms_do_not() -> None:
    for network in (new_supernet(tiny.SPACE), Named()):
        optimizer = HybridOptimizer(network, replace(RECIPE, weight_decay=0.1))
        optimizer.set_learning_rate(RATE)
        before = {k: v.detach().clone() for k, v in network.named_parameters()}
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        decayed = {
            name
            for name, parameter in network.named_parameters()
            if not torch.equal(parameter, before[name])
        }
        vectors = {name for name, parameter in before.items() if parameter.ndim == 1}
        matrices = {name for name in before if ".transform_" in name}
        assert bool(matrices) == isinstance(network, Supernet)
        assert decayed == set(before) - vectors - matrices


def test_parameters_outside_the_network_stay_as_they_are() -> None:
    optimizer, before, after = after_one_step(tiny.SPACE.smallest())
    inside = {layer.name for layer in lower(tiny.SPACE, tiny.SPACE.smallest()).layers}
    outside = [n for n in before if not any(n.startswith(f"{i}.") for i in inside)]
    assert outside
    for name in outside:
        assert torch.equal(before[name], after[name]), name
    assert not set(outside) & set(optimizer.momentum())


def test_a_dense_weight_moves_by_a_nearly_orthogonal_matrix() -> None:
    _, before, after = after_one_step(tiny.SPACE.largest())
    name = "stage1.block1.project.weight"
    matrix = (after[name].detach() - before[name]).flatten(1)
    rows, columns = matrix.shape
    rate = RATE * RECIPE.muon_rate_ratio * max(1.0, rows / columns) ** 0.5
    singular = torch.linalg.svdvals(matrix / rate)
    # Newton and Schulz's few steps bring every singular value near 1, not to it;
    # directions that the gradient lacks stay at 0.
    assert float(singular.max()) < 1.4
    assert float(singular[: len(singular) // 2].min()) > 0.4


def test_momentum_moves_to_another_optimiser_unchanged() -> None:
    optimizer, _, _ = after_one_step(tiny.SPACE.largest())
    other = HybridOptimizer(new_supernet(tiny.SPACE), STILL)
    assert other.momentum() == {}
    other.restore_momentum(optimizer.momentum())
    assert other.momentum().keys() == optimizer.momentum().keys()
    for name, buffer in optimizer.momentum().items():
        assert torch.equal(other.momentum()[name], buffer), name


def test_weights_that_are_not_channels_last_are_refused() -> None:
    with pytest.raises(TrainingError, match="is not stored channels-last"):
        HybridOptimizer(Supernet(tiny.SPACE), STILL)
