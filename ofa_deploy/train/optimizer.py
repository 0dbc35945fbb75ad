"""The optimiser of a supernet: Muon for the dense convolutions, SGD for the rest.

Over a few epochs Muon brought the full network much further than SGD alone did. Source:
K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024;
`torch.optim.Muon` implements it for matrices, as which convolution weights are seen
here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ofa_deploy.errors import TrainingError
from ofa_deploy.nn.elastic import ElasticConv
from ofa_deploy.nn.supernet import Supernet
from ofa_deploy.train.recipe import Recipe


class SupernetOptimizer:
    """Steps all parameters of a supernet.

    Args:
        supernet: Whose parameters; they must keep their storage from now on.
        recipe: Momentum, weight decay and the ratio of the two rates.
    """

    def __init__(self, supernet: Supernet, recipe: Recipe) -> None:
        dense = _dense_weights(supernet)
        self._parameters = dict(supernet.named_parameters())
        self._matrices = {
            name: nn.Parameter(_as_matrix(self._parameters[name].data))
            for name in dense
        }
        for name, matrix in self._matrices.items():
            if matrix.data_ptr() != self._parameters[name].data_ptr():
                raise TrainingError(f"{name} is not stored channels-last")
        self._rate_ratio = recipe.muon_rate_ratio
        self._muon = torch.optim.Muon(
            self._matrices.values(),
            lr=1.0,
            weight_decay=recipe.muon_weight_decay,
            momentum=recipe.muon_momentum,
        )
        self._sgd = _sgd(
            {k: v for k, v in self._parameters.items() if k not in dense}, recipe
        )

    def set_learning_rate(self, rate: float) -> None:
        """Set SGD's rate, and Muon's in the recipe's ratio to it."""
        for group in self._sgd.param_groups:
            group["lr"] = rate
        for group in self._muon.param_groups:
            group["lr"] = rate * self._rate_ratio

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def step(self) -> None:
        """Apply the gradients; parameters without one stay as they are."""
        for name, matrix in self._matrices.items():
            gradient = self._parameters[name].grad
            matrix.grad = None if gradient is None else _as_matrix(gradient)
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
            if name in self._matrices:
                owners[name] = (self._muon, self._matrices[name])
            else:
                owners[name] = (self._sgd, parameter)
        return owners


def _dense_weights(supernet: Supernet) -> frozenset[str]:
    """Names of the weights that Muon steps: of normalised, ungrouped convolutions."""
    return frozenset(
        f"{name}.weight"
        for name, module in supernet.named_modules()
        if isinstance(module, ElasticConv)
        and module.norm is not None
        and module.weight.shape[1] > 1
    )


def _as_matrix(weight: Tensor) -> Tensor:
    """`(O, I, K, K)` as `(O, K·K·I)`; a view where it is stored channels-last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _sgd(parameters: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.SGD:
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in parameters.items():
        # Decay would pull the kernel transforms from identity towards zero.
        exempt = parameter.ndim == 1 or "transform" in name
        (plain if exempt else decayed).append(parameter)
    return torch.optim.SGD(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=1.0,
        momentum=recipe.momentum,
        nesterov=True,
    )
