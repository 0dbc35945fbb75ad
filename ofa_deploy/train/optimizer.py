"""The optimiser of a network: Muon for the dense convolutions, SGD for the rest.

Over a few epochs Muon brought full networks much further than SGD alone did. Source:
K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
It is of matrices, as which convolution weights are seen here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ofa_deploy.errors import TrainingError
from ofa_deploy.nn.elastic import ElasticConv, is_transform
from ofa_deploy.nn.memory_format import as_matrix
from ofa_deploy.train.muon import new_muon
from ofa_deploy.train.recipe import Recipe


class HybridOptimizer:
    """Steps all parameters of a supernet, or of any other network.

    Args:
        network: Whose parameters; they must keep their storage from now on. Weights of
            dense convolutions are stored channels-last.
        recipe: Momentum, weight decay and the ratio of the two rates.
        rates: Of parameters that have a rate of their own, which no schedule changes
            and no decay pulls at, by name.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        *,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        dense = _dense_weights(network)
        self._parameters = dict(network.named_parameters())
        self._matrices = {
            name: nn.Parameter(as_matrix(self._parameters[name].data)) for name in dense
        }
        for name, matrix in self._matrices.items():
            if matrix.data_ptr() != self._parameters[name].data_ptr():
                raise TrainingError(f"{name} is not stored channels-last")
        self._rate_ratio = recipe.muon_rate_ratio
        # Of no parameters there is no optimiser.
        self._muon = (
            new_muon(
                self._matrices.values(),
                momentum=recipe.muon_momentum,
                weight_decay=recipe.muon_weight_decay,
            )
            if self._matrices
            else None
        )
        self._sgd = _sgd(
            {k: v for k, v in self._parameters.items() if k not in dense},
            recipe,
            rates=rates or {},
        )

    def set_learning_rate(self, rate: float) -> None:
        """Set SGD's rate, and Muon's in the recipe's ratio to it."""
        for group in self._sgd.param_groups:
            if not group["fixed"]:
                group["lr"] = rate
        for group in () if self._muon is None else self._muon.param_groups:
            group["lr"] = rate * self._rate_ratio

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def step(self) -> None:
        """Apply the gradients; parameters without one stay as they are."""
        for name, matrix in self._matrices.items():
            gradient = self._parameters[name].grad
            matrix.grad = None if gradient is None else as_matrix(gradient)
        if self._muon is not None:
            self._muon.step()  # type: ignore[no-untyped-call]
        self._sgd.step()

    def momentum(self) -> dict[str, Tensor]:
        """Momentum buffers by parameter name, of those stepped so far."""
        return {
            name: state["momentum_buffer"]
            for name, (optimizer, parameter) in self._owners().items()
            if (state := optimizer.state.get(parameter))
        }

    def restore_momentum(self, momentum: dict[str, Tensor]) -> None:
        """Continue from what `momentum()` returned."""
        for name, (optimizer, parameter) in self._owners().items():
            if name in momentum:
                optimizer.state[parameter]["momentum_buffer"] = momentum[name].clone(
                    memory_format=torch.preserve_format
                )

    def _owners(self) -> dict[str, tuple[torch.optim.Optimizer, Tensor]]:
        owners: dict[str, tuple[torch.optim.Optimizer, Tensor]] = {}
        for name, parameter in self._parameters.items():
            if self._muon is not None and name in self._matrices:
                owners[name] = (self._muon, self._matrices[name])
            else:
                owners[name] = (self._sgd, parameter)
        return owners


def _dense_weights(network: nn.Module) -> frozenset[str]:
    """Names of the weights that Muon steps: of normalised, ungrouped convolutions."""
    found = {
        f"{name}.weight": module.weight
        for name, module in network.named_modules()
        if _is_normalised(module)
    }
    # Not of what is computed from other parameters.
    parameters = dict(network.named_parameters())
    return frozenset(
        name
        for name, weight in found.items()
        if name in parameters and isinstance(weight, Tensor) and weight.shape[1] > 1
    )


def _is_normalised(module: nn.Module) -> bool:
    """Whether a module is a convolution with a batch norm behind it."""
    if isinstance(module, ElasticConv):
        return module.norm is not None
    # A bias would be for nothing before a batch norm.
    return isinstance(module, nn.Conv2d) and module.bias is None and module.groups == 1


def _is_masked(name: str) -> bool:
    """Whether a parameter is what a parametrization starts from."""
    return name.endswith(".parametrizations.weight.original")


def _sgd(
    parameters: Mapping[str, nn.Parameter],
    recipe: Recipe,
    *,
    rates: Mapping[str, float],
) -> torch.optim.SGD:
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in parameters.items():
        if name in rates:
            continue
        # Decay would pull the kernel transforms from identity towards zero, and weights
        # that are masked from what they were; whoever masks them decays the others.
        exempt = parameter.ndim == 1 or is_transform(name) or _is_masked(name)
        (plain if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay, "fixed": False},
        {"params": plain, "weight_decay": 0.0, "fixed": False},
    ]
    groups += [
        {"params": [parameters[name]], "weight_decay": 0.0, "lr": rate, "fixed": True}
        for name, rate in rates.items()
    ]
    return torch.optim.SGD(
        groups,
        lr=1.0,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )
