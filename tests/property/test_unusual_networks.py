"""Networks that are built in unusual ways are taken as they are, or refused for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofa_deploy.errors import ModelRejected, TraceError
from ofa_deploy.export.onnx import INPUT_NAME
from ofa_deploy.fuse import fuse
from ofa_deploy.nn.onnx_module import write_module
from ofa_deploy.nn.static import FusedNet
from ofa_deploy.shrink import device_prices
from ofa_deploy.shrink.channel_prices import timed_layer
from ofa_deploy.shrink.counts import mac_count, parameter_count
from ofa_deploy.shrink.coupling import trace_channels
from ofa_deploy.shrink.finetuning import freeze
from ofa_deploy.shrink.ranking import writers
from ofa_deploy.shrink.sparse import SparsityPull, SparsitySettings
from ofa_deploy.shrink.tas_choices import searched_by_tas
from ofa_deploy.shrink.tas_network import reset_parameters
from ofa_deploy.shrink.user_module import plain_copy
from ofa_deploy.target import Target
from profilers.backends import get_backend
from tests.support import own_networks, tiny
from tests.support.searching import owned, searched
from tests.support.shrinking import SIZE, branched, own_network, products

IMAGE = torch.zeros(1, 3, SIZE, SIZE)
SHAPE = (3, SIZE, SIZE)


class Net(nn.Module):
    """A convolution, something else, and a classifier of three classes."""

    def __init__(self, between: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.last, self.head = nn.Conv2d(16, 8, 3, 1, 1), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.norm(self.conv(x)))
        return cast(Tensor, self.head(F.relu(self.last(x)).mean((2, 3))))


# -- prices ----------------------------------------------------------------------------


def grouped_norms(width: int) -> nn.Module:
    """Its widths are in no layer that can be narrowed."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1),
        nn.GroupNorm(4, width),
        nn.ReLU(),
        nn.Conv2d(width, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()


@pytest.mark.parametrize("narrowed", [True, False])
def test_prices_are_of_all_widths_those_that_stay_included(narrowed: bool) -> None:
    networks = [
        own_network(grouped_norms(width), narrowed=narrowed) for width in (8, 16, 16)
    ]
    digests = {
        device_prices._digest(own, device_prices.timed_forms(own, step=4), step=4)
        for own in networks
    }
    assert len(digests) == 2


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=pairs,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size=st.integers(9, 33),
)
def test_a_layer_is_timed_as_it_goes_over_its_map(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    size: int,
) -> None:
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation)
    network = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    (layer,) = trace_channels(network, input_shape=(3, size, size)).layers
    timed = timed_layer(layer, read=3, written=4)
    written = conv(torch.zeros(1, 3, size, size))
    assert timed.in_size == (size, size)
    assert (4, *timed.out_size) == written.shape[1:]
    assert timed.weight_shape == conv.weight.shape
    assert products(timed) == mac_count(network, torch.zeros(1, 3, size, size))


class PaddingItself(nn.Conv2d):
    """Pads in its forward, as some libraries' convolutions do."""

    def forward(self, input: Tensor) -> Tensor:
        """Twice as many columns behind as before."""
        return super().forward(F.pad(input, (1, 2, 0, 1)))


def set_afterwards() -> nn.Conv2d:
    """As torch takes it, too."""
    conv = nn.Conv2d(3, 4, 3)
    conv.padding, conv.dilation = cast(Any, 1), cast(Any, 2)
    return conv


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "conv",
    [
        PaddingItself(3, 4, (2, 4), (1, 2)),
        nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(3, 4, (2, 3), padding="valid"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        set_afterwards(),
    ],
    ids=["itself", "same", "valid", "reflect", "afterwards"],
)
def test_whatever_pads_it_a_layer_is_timed_at_as_many_places(conv: nn.Conv2d) -> None:
    network = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    (layer,) = trace_channels(network, input_shape=SHAPE).layers
    timed = timed_layer(layer, read=3, written=4)
    assert timed.out_size == tuple(conv(IMAGE).shape[2:])
    assert products(timed) == mac_count(network, IMAGE)


def quadrants(x: Tensor) -> Tensor:
    """Of each image, in the batch's place."""
    count, channels, height, width = x.shape
    parts = x.view(count, channels, 2, height // 2, 2, width // 2)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


class Folded(Net):
    """Computes quadrants by themselves."""

    def forward(self, x: Tensor) -> Tensor:
        parts = self.last(quadrants(F.relu(self.norm(self.conv(x)))))
        found = parts.mean((2, 3)).view(-1, 4, parts.shape[1]).mean(1)
        return cast(Tensor, self.head(found))


def test_parts_of_an_image_in_the_batchs_place_are_all_counted() -> None:
    network = Folded().eval()
    layers = {
        layer.name: layer for layer in trace_channels(network, input_shape=SHAPE).layers
    }
    assert layers["conv"].places == layers["last"].places == SIZE**2
    macs = 9 * SIZE**2 * (3 * 16 + 16 * 8) + 8 * 3
    assert mac_count(network, IMAGE) == macs


# -- counts ----------------------------------------------------------------------------


def test_whatever_multiplies_is_counted_and_what_is_not_called_is_not() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 2, 2, bias=False), nn.BatchNorm2d(8)
            self.up = nn.ConvTranspose2d(8, 4, 2, 2)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head, self.unused = nn.Linear(4, 3), nn.Linear(100, 100)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
            found, _ = self.attention(x, x, x, need_weights=False)
            return cast(Tensor, self.head(found.mean(1)))

    network, places = Mixed().eval(), SIZE**2
    macs = (
        2 * 2 * 3 * 8 * places // 4  # from a quarter of the places, and back
        + 2 * 2 * 8 * 4 * places // 4
        + 4 * 4 * 4 * places  # queries, keys, values and what leaves
        + 2 * 4 * places**2  # each with each
        + 4 * 3
    )
    assert mac_count(network, IMAGE) == macs
    weights = 2 * 2 * 3 * 8 + 8 + 2 * 2 * 8 * 4 + 4 + (16 + 4) * 4 + 4 * 3 + 3
    assert parameter_count(network, IMAGE) == weights


def test_what_is_called_without_gradients_is_counted_once() -> None:
    class Frozen(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.last(self.norm(self.conv(x)))
            return cast(Tensor, self.head(F.relu(x).mean((2, 3))))

    network = Frozen().eval()
    weights = sum(one.numel() for one in network.parameters())
    assert parameter_count(network, IMAGE) == weights - 16  # factors of the norm

    def checkpointed(x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(F.relu, x, use_reentrant=True))

    assert parameter_count(Net(checkpointed).eval(), IMAGE) == weights - 16


# -- what is taken ---------------------------------------------------------------------


class ShuffleUnit(nn.Module):
    """As ShuffleNetV2 has them: one half passes, and both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *own_networks.conv(half, half, 1),
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            *own_networks.conv(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        x = torch.cat((first, self.branch(second)), dim=1)
        count, channels, height, width = x.shape
        x = x.view(count, 2, channels // 2, height, width).transpose(1, 2)
        return x.reshape(count, channels, height, width)


def test_shuffled_channels_stay_and_what_is_beside_them_goes() -> None:
    network = nn.Sequential(
        *own_networks.conv(3, 16),
        ShuffleUnit(16),
        ShuffleUnit(16),
        *own_networks.conv(16, 24, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    own = own_network(own_networks.randomise(network))
    assert 24 in [group.channels for group in own.graph.groups]


class Transformer(nn.Module):
    """Patches, torch's own encoder, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return cast(Tensor, self.head(self.encoder(tokens).mean(1)))


def test_what_feeds_forward_in_torchs_own_transformer_is_narrowed(
    tmp_path: Path,
) -> None:
    own = own_network(Transformer().eval())
    names = [f"encoder.layers.{number}.linear1" for number in range(2)]
    assert [group.name for group in own.graph.groups] == names
    masked = own.masked()
    freeze(masked, [torch.arange(0, 48, 4), torch.arange(20)])
    left = own.remainder(masked, masked.kept()).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = masked.module.eval()(x)
        torch.testing.assert_close(left(x), expected, atol=1e-5, rtol=1e-5)
    target = Target(backend="onnxruntime-cpu", threads=1)
    file = write_module(left, resolution=SIZE, target=target, folder=tmp_path)
    with get_backend(target.backend).load(tmp_path / file, threads=1) as session:
        (found,) = session.run({INPUT_NAME: x.numpy()}).values()
    assert found == pytest.approx(expected.numpy(), abs=1e-4)


def test_counters_among_the_parameters_are_left_alone() -> None:
    network = Net()
    network.counter = nn.Parameter(torch.tensor(3), requires_grad=False)
    assert own_network(network.eval()).graph.groups


class InPlaceBlock(nn.Module):
    """Writes into what it reads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.norm(self.conv(self.relu(x))))


def test_rows_of_blocks_that_write_into_their_inputs_are_searched() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1),
        nn.BatchNorm2d(16),
        nn.Sequential(*(InPlaceBlock(16) for _ in range(3))),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    own = searched_by_tas(
        owned(own_networks.randomise(network), resolution=SIZE, class_count=3)
    )
    net = searched(own)
    assert net.stages
    net.module.train()
    for logits in net.module.parameters():
        logits.requires_grad_(True)
    torch.autograd.backward(net.module(torch.randn(4, *SHAPE)).square().sum())
    assert all(one.logits.grad is not None for one in net.module.distributions)


def test_weights_of_a_layer_under_two_names_go_under_both() -> None:
    network = own_networks.ALL["aliased"]().eval()
    pull = SparsityPull(
        plain_copy(network), target_share=0.2, steps=10, settings=SparsitySettings()
    )
    left = pull.narrowed_to(pull.weight_count // 5)
    assert left.state_dict().keys() == network.state_dict().keys()
    kept = sum(int((w != 0).sum()) for w in left.parameters() if w.ndim > 1)
    assert kept == pull.weight_count // 5


def test_a_network_that_was_fused_is_ranked_as_it_is() -> None:
    network = branched()
    fused = FusedNet(network.plan, fuse(network.weights(), network.plan)).eval()
    own = own_network(fused)
    assert len(writers(own.module, own.graph)) == len(own.graph.groups)


def test_parameters_are_drawn_anew_by_modules_that_can_without_being_told() -> None:
    class Told(nn.Linear):
        def reset_parameters(self, value: float = 1.0, *, of: str = "") -> None:
            nn.init.constant_(self.weight, value)

    class Asking(Told):
        def reset_parameters(self, value: float) -> None:  # type: ignore[override]
            nn.init.constant_(self.weight, value)

    told, asking = Told(2, 2), Told(2, 2)
    asking.__class__ = Asking
    for layer in (told, asking):
        nn.init.zeros_(layer.weight)
    reset_parameters(nn.Sequential(told, asking))
    assert told.weight.eq(1).all()
    assert asking.weight.eq(0).all()


# -- what is refused -------------------------------------------------------------------


class WithoutReturn(Net):
    """Keeps its batch norms as they are, in a way that is seen often."""

    def train(self, mode: bool = True) -> WithoutReturn:
        super().train(mode)
        self.norm.eval()
        return None  # type: ignore[return-value]


class InPlace(Net):
    """Normalises what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return super().forward(x)


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (WithoutReturn, "let it end with `return self`"),
        (InPlace, "InPlace writes into its input, which others read, too; write"),
    ],
)
def test_what_others_would_trip_over_is_told(
    network: Callable[[], nn.Module], told: str
) -> None:
    module = network()
    module.training = False
    with pytest.raises(TraceError, match=told):
        own_network(module)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_outputs_that_are_more_than_logits_are_told_with_the_cure(kind: str) -> None:
    class More(Net):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return (logits, None) if kind == "tuple" else {"logits": logits}

    with pytest.raises(TraceError) as caught:
        own_network(More().eval())
    assert str(caught.value) == (
        f"More gives {kind}, not a tensor; wrap it in a module that gives the logits "
        "alone"
    )


def test_images_of_another_size_are_told_of() -> None:
    network = nn.Sequential(
        *own_networks.conv(3, 8), nn.Flatten(), nn.Linear(8 * (SIZE + 4) ** 2, 3)
    )
    with pytest.raises(TraceError, match=r"\(3, 12, 12\).*takes such images$"):
        own_network(network.eval())


def test_what_the_exporter_does_not_know_is_told_in_its_words(tmp_path: Path) -> None:
    network = Net(lambda x: torch.cummax(x, 2).values).eval()
    own = own_network(network)
    with pytest.raises(ModelRejected, match=r"cannot write Net as ONNX: .*in other op"):
        write_module(
            own.module,
            resolution=tiny.IMAGE_SIZE,
            target=Target(backend="onnxruntime-cpu", threads=1),
            folder=tmp_path,
        )
    assert not list(tmp_path.iterdir())
