"""Receptive fields. Oracle: rows of the Jacobian by autograd, on networks that are linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import bpfree
from bpfree.network import MLPConfig, Network, VGGConfig, mlp, vgg
from bpfree.network import receptive_fields as module
from bpfree.network.receptive_fields import receptive_fields
from bpfree.tasks.task import TaskSpec


def conv(inside: int, outside: int, width: int | tuple[int, int], **options: object) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, width, bias=False, **options)  # type: ignore[arg-type]


def dense(inside: int, outside: int) -> nn.Linear:
    return nn.Linear(inside, outside, bias=False)


def flipped(channels: int) -> nn.BatchNorm2d:
    """Batch norm with statistics and weights of its own, some of them negative."""
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.weight)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


# Each block ends in its last linear map, so that its outputs are its units; (1, 9, 8) or (3, 9, 8) inputs.
LINEAR: dict[str, tuple[int, list[list[nn.Module]]]] = {
    "dense": (1, [[nn.Flatten(), dense(72, 6)], [nn.Identity(), dense(6, 7), nn.Dropout(0.5), dense(7, 5)]]),
    "colours": (3, [[nn.Flatten(), dense(216, 6)], [dense(6, 4)]]),
    "convolutions": (3, [[conv(3, 4, 3, padding=1)], [conv(4, 5, 3, stride=2, padding=1)], [conv(5, 3, (3, 1), padding="same")]]),
    "strides": (1, [[conv(1, 4, (4, 3), stride=(2, 1), dilation=(1, 2))], [conv(4, 4, 2, groups=2)], [conv(4, 2, 1)]]),
    "beyond the border": (1, [[conv(1, 4, 5, padding=2)], [conv(4, 3, 5, padding=2)], [conv(3, 3, 5, padding=2)]]),
    "padding modules": (1, [[nn.ZeroPad2d((1, 2, 0, 1)), conv(1, 4, 3)], [nn.ZeroPad2d((-1, 1, 1, -2)), conv(4, 3, 3)]]),
    "convolution to dense": (3, [[conv(3, 4, 3)], [nn.Flatten(), dense(4 * 7 * 6, 6)], [dense(6, 3)]]),
    "unflattened": (1, [[nn.Flatten(), dense(72, 24)], [nn.Unflatten(1, (2, 4, 3)), conv(2, 3, 3, padding=1)]]),
    "batch norm": (1, [[conv(1, 4, 3)], [flipped(4), conv(4, 3, 3)]]),
    "average pooling": (1, [[conv(1, 4, 3, padding=1)], [nn.AvgPool2d(2), conv(4, 3, 3, padding=1)], [nn.Flatten(), dense(48, 4)]]),
    "overlapping pooling": (1, [[nn.AvgPool2d(3, 2, 1, ceil_mode=True), conv(1, 4, 2)], [nn.AvgPool2d(2, 1), conv(4, 3, 2)]]),
    "pooling without its padding": (1, [[nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.Flatten(), dense(25, 4)]]),
    "adaptive pooling": (3, [[conv(3, 4, 3)], [nn.AdaptiveAvgPool2d((3, 8)), nn.Flatten(), dense(96, 4)]]),
}


def built(channels: int, blocks: list[list[nn.Module]]) -> Network:
    torch.manual_seed(0)
    named = {f"b{index}": nn.Sequential(*copy.deepcopy(layers)) for index, layers in enumerate(blocks, start=1)}
    return Network(named, input_shape=(channels, 9, 8)).double()


def jacobian(network: Network, blocks: int) -> Tensor:
    """(K, *input_shape): derivatives of the outputs of the first blocks, of convolutions at the centre of the map."""

    def units(x: Tensor) -> Tensor:
        for block in list(network.blocks.values())[:blocks]:
            x = block(x)
        return x[0] if x.dim() == 2 else x[0, :, x.shape[2] // 2, x.shape[3] // 2]

    network.eval()
    x = torch.zeros(1, *network.input_shape, dtype=torch.float64)
    return torch.autograd.functional.jacobian(units, x)[:, 0]  # type: ignore[no-any-return]


def seen(network: Network, blocks: int) -> tuple[slice, slice]:
    """The box that the units see: where they depend on inputs, with weights that cannot cancel."""
    network = copy.deepcopy(network)
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    mask = jacobian(network, blocks).ne(0).any(0).any(0)
    rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


@pytest.mark.parametrize("name", list(LINEAR))
def test_rows_of_the_jacobian(name: str) -> None:
    network = built(*LINEAR[name])
    fields = receptive_fields(network, 100)
    assert list(fields) == network.names
    for index, (block, field) in enumerate(fields.items(), start=1):
        rows, columns = seen(network, index)
        torch.testing.assert_close(field, jacobian(network, index)[:, :, rows, columns], msg=lambda text, block=block: f"{block}: {text}")


def test_first_layers_are_the_weights() -> None:
    """Whatever follows in the block; the readout is not drawn; only the first units are."""
    spec = TaskSpec("grey", (1, 8, 8), 10)
    network = mlp(spec, MLPConfig(depth=3, width=12, norm="batch", dropout=0.2))
    fields = receptive_fields(network, 5)
    assert {name: tuple(field.shape) for name, field in fields.items()} == dict.fromkeys(("b1", "b2", "b3"), (5, 1, 8, 8))
    torch.testing.assert_close(fields["b1"], network.blocks.b1[1].weight[:5].view(5, 1, 8, 8), rtol=0, atol=0)
    network = vgg(TaskSpec("colours", (3, 16, 16), 10), VGGConfig(channels=[8, 8], pool_after=[1, 2]))
    fields = receptive_fields(network)
    torch.testing.assert_close(fields["b1"], network.blocks.b1[0].weight, rtol=0, atol=0)
    assert fields["b2"].shape == (8, 3, 8, 8)  # 3x3 on poolings of 2x2, behind 3x3


def test_max_pooling_counts_as_the_mean() -> None:
    """Over the entries of its window that are there."""
    first, last = conv(1, 4, 3), conv(4, 3, 3)
    fields = [
        receptive_fields(built(1, [[first, pool, last]]))["b1"]
        for pool in (nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False))
    ]
    torch.testing.assert_close(*fields)


class Triangle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)).relu()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (Triangle(), True),
        (nn.Sequential(nn.GroupNorm(1, 4), nn.PReLU(), nn.Dropout2d(0.5)), True),
        (Residual(), False),
        (nn.Upsample(scale_factor=2), False),
        (nn.ConvTranspose2d(4, 4, 3), False),
        (nn.Sequential(nn.Flatten(), Halved(168, 5)), False),
        (nn.Flatten(2), False),
    ],
)
def test_what_is_not_known_is_left_out_with_what_lies_above(layer: nn.Module, known: bool) -> None:
    torch.manual_seed(0)
    above = [nn.Flatten(), nn.LazyLinear(5)]
    body = nn.Sequential(conv(1, 4, 3), copy.deepcopy(layer), *above)
    body(torch.zeros(1, 1, 9, 8))  # the lazy layer takes its size
    blocks = {"b1": body[0], "b2": nn.Sequential(conv(4, 4, 1), body[1]) if known else body[1], "b3": body[2:]}
    fields = receptive_fields(Network(blocks, input_shape=(1, 9, 8)))
    assert list(fields) == (["b1", "b2", "b3"] if known else ["b1"])


@pytest.mark.parametrize("shape", [(20,), (2, 9, 8), (4, 9)])
def test_inputs_that_are_no_images_have_none(shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel()
    assert receptive_fields(Network({"b1": nn.Sequential(nn.Flatten(), dense(size, 3))}, input_shape=shape)) == {}


def test_flat_inputs_of_images() -> None:
    network = Network({"b1": dense(72, 4)}, input_shape=(72,))
    assert receptive_fields(network) == {}
    torch.testing.assert_close(receptive_fields(network, image=(1, 9, 8))["b1"], network.blocks.b1.weight.view(4, 1, 9, 8))
    assert receptive_fields(network, image=(1, 9, 9)) == {}


def test_networks_from_torchvision() -> None:
    """VGG11 as a graph of modules: all hidden blocks; a residual network: what lies in front of the first sum."""
    models = pytest.importorskip("torchvision.models")
    network = bpfree.split(models.resnet18(num_classes=3), (3, 32, 32))
    assert {name: tuple(field.shape) for name, field in receptive_fields(network, 2).items()} == {network.names[0]: (2, 3, 7, 7)}
    with torch.device("meta"):
        large = models.vgg11(num_classes=3)
    network = bpfree.split(large.to_empty(device="cpu"), (3, 32, 32))
    assert list(receptive_fields(network, 2)) == network.hidden


def test_fields_that_are_too_large_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 4 * 4 * 5 * 5 - 1)
    network = built(1, [[conv(1, 4, 3)], [conv(4, 4, 5)], [nn.Flatten(), dense(24, 3)]])
    assert "b2" not in receptive_fields(network)
    assert "b1" in receptive_fields(network)


def test_nothing_is_changed(device: torch.device) -> None:
    """Weights, statistics, modes, random state; a parametrised weight does not iterate. Oracle: the state before."""
    network = vgg(TaskSpec("grey", (1, 16, 16), 10), VGGConfig(channels=[8, 8], dropout=0.5)).to(device).train()
    spectral_norm(network.blocks.b1[0])
    network.blocks.b2.eval()
    before = copy.deepcopy(network.state_dict())
    modes = [part.training for part in network.modules()]
    random = torch.get_rng_state()
    fields = receptive_fields(network)
    assert all(not field.requires_grad and field.device.type == device.type for field in fields.values())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert modes == [part.training for part in network.modules()]
    assert torch.equal(random, torch.get_rng_state())


def test_fields_of_lower_precision(device: torch.device) -> None:
    network = built(1, [[conv(1, 4, 3)], [nn.AvgPool2d(2), conv(4, 3, 2)]]).to(device)
    wanted, found = receptive_fields(network), receptive_fields(copy.deepcopy(network).bfloat16())
    for name, field in wanted.items():
        torch.testing.assert_close(found[name], field.float(), rtol=0.05, atol=0.01)
