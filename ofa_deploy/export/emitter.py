"""What every writer of a model format does alike: walk a block's layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from ofa_deploy.layers import (
    BlockPlan,
    ConvLayer,
    Layer,
    LinearLayer,
    PoolLayer,
    RepConvLayer,
    SqueezeExciteLayer,
)

# How a format names the result of an operator.
Value = TypeVar("Value")


class Emitter(ABC, Generic[Value]):
    """Adds the operators of layers to a graph under construction."""

    def add_block(self, block: BlockPlan, value: Value) -> Value:
        """Add a block's layers, and its shortcut."""
        entered = value
        for layer in block.layers:
            value = self._add_layer(layer, value)
        return self.add_sum(block, value, entered) if block.residual else value

    def _add_layer(self, layer: Layer, value: Value) -> Value:
        if isinstance(layer, RepConvLayer):
            return self.add_rep_conv(layer, value)
        if isinstance(layer, ConvLayer):
            return self.add_conv(layer, value)
        if isinstance(layer, SqueezeExciteLayer):
            return self.add_gate(layer, value)
        if isinstance(layer, PoolLayer):
            return self.add_pool(layer, value)
        return self.add_linear(layer, value)

    @abstractmethod
    def add_conv(self, layer: ConvLayer, value: Value) -> Value:
        """Add a convolution with its batch norm and activation."""

    def add_rep_conv(self, layer: RepConvLayer, value: Value) -> Value:
        """Add a convolution of several branches, merged."""
        return self.add_conv(layer.merged, value)

    @abstractmethod
    def add_gate(self, layer: SqueezeExciteLayer, value: Value) -> Value:
        """Add a squeeze-and-excite gate."""

    @abstractmethod
    def add_pool(self, layer: PoolLayer, value: Value) -> Value:
        """Add a global average pool."""

    @abstractmethod
    def add_linear(self, layer: LinearLayer, value: Value) -> Value:
        """Add a classifier."""

    @abstractmethod
    def add_sum(self, block: BlockPlan, value: Value, entered: Value) -> Value:
        """Add what entered a block to its result."""
