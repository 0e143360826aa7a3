"""What a site's noise reaches. Oracles: the answer by hand for small modules, and the full Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.network.reach import Reach, by_channel, channel_axis, probe, token_axis
from bpfree.network.sites import find_sites


def reaches(module: nn.Module, shape: tuple[int, ...], groups: int = 1, *, final: bool = False) -> list[Reach]:
    first = next(module.parameters())
    sites = find_sites(module, torch.zeros(2, *shape, device=first.device), final=final).sites
    return probe(module, sites, torch.Size(shape), groups)


def reach(examples: int, tokens: int, groups: int) -> Reach:
    return Reach(bool(examples), bool(tokens), bool(groups))


class Wired(nn.Module):
    """A linear map at which the noise enters, and a function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(width, width), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def shuffled(x: Tensor) -> Tensor:
    """ShuffleNet's: the first and the last channel stay where they are."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def crossed(source: int, target: int, axis: int) -> Callable[[Tensor], Tensor]:
    """One token or channel is added to another."""

    def function(x: Tensor) -> Tensor:
        out = x.clone()
        out.select(axis, target).add_(x.select(axis, source))
        return out

    return function


VECTORS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), 4, [reach(1, 0, 0), reach(1, 0, 1)]),
    "one group": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()), 1, [reach(1, 0, 0)]),
    "each channel a group": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()), 8, [reach(1, 0, 1)]),
    "groups that do not divide": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()), 3, [reach(1, 0, 0)]),
    "groups that do not divide the site": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.ConstantPad1d((0, 2), 0.0)),
        4,
        [reach(1, 0, 0)],
    ),
    "half as many channels": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (4, 2)), nn.MaxPool1d(2), nn.Flatten()),
        4,
        [reach(1, 0, 1)],
    ),
    "layer norm behind": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8)), 4, [reach(1, 0, 0)]),
    "layer norm between": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU()), 4, [reach(1, 0, 1)]),
    "batch norm behind": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8)), 4, [reach(0, 0, 1)]),
    "batch norm behind, eval": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8).eval()), 4, [reach(1, 0, 1)]),
    "batch norm between": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()),
        4,
        [reach(0, 0, 0), reach(1, 0, 1)],
    ),
    "softmax": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Softmax(1)), 4, [reach(1, 0, 0)]),
    "functional relu": (lambda: nn.Sequential(nn.Linear(6, 8), Wired(F.relu)), 2, [reach(1, 0, 0), reach(1, 0, 1)]),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.99), nn.Linear(8, 8)), 2, [reach(1, 0, 0), reach(1, 0, 1)]),
    "channel shuffle": (lambda: nn.Sequential(nn.Linear(6, 8), Wired(shuffled)), 8, [reach(1, 0, 0), reach(1, 0, 0)]),
    "mean over the batch": (lambda: nn.Sequential(nn.Linear(6, 8), Wired(lambda x: x - x.mean(0))), 2, [reach(0, 0, 0), reach(0, 0, 1)]),
    "batch norm of one's own": (lambda: nn.Sequential(nn.Linear(6, 8), Own()), 2, [reach(0, 0, 1)]),
}


class Own(nn.Module):
    """Centres by the batch when it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.training else x


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name: str, device: torch.device) -> None:
    make, groups, expected = VECTORS[name]
    assert reaches(make().to(device), (6,), groups) == expected


MAPS = {
    "two convolutions": (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)], [reach(1, 0, 0), reach(1, 0, 1)]),
    "grouped": (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2)], [reach(1, 0, 1), reach(1, 0, 1)]),
    "grouped, another number": (lambda: [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3)], [reach(1, 0, 0), reach(1, 0, 1)]),
    "depthwise": (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)], [reach(1, 0, 1), reach(1, 0, 1)]),
    "pooled": (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)], [reach(1, 0, 1)]),
    "group norm behind": (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4)], [reach(1, 0, 1)]),
    "batch norm behind": (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)], [reach(0, 0, 1)]),
    "flattened": (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten()], [reach(1, 0, 1)]),
    "flattened otherwise": (lambda: [nn.Conv2d(2, 4, 3), nn.Flatten(2), Swap()], [reach(1, 0, 0)]),
}


class Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(1)


@pytest.mark.parametrize("name", MAPS)
def test_maps(name: str, device: torch.device) -> None:
    make, expected = MAPS[name]
    first, *rest = make()
    assert reaches(nn.Sequential(first, *rest).to(device), (first.in_channels, 7, 7), 2) == expected


TOKENS: dict[str, tuple[Callable[[Tensor], Tensor], Reach]] = {
    "none": (lambda x: x.relu(), reach(1, 1, 1)),
    "channels": (lambda x: x.softmax(2), reach(1, 1, 0)),
    "tokens": (lambda x: x.softmax(1), reach(1, 0, 1)),
    "both": (lambda x: x.flatten(1).softmax(1).view_as(x), reach(1, 0, 0)),
    "examples": (lambda x: x - x.mean(0), reach(0, 1, 1)),
    "all": (lambda x: x - x.mean(), reach(0, 0, 0)),
    "later tokens": (lambda x: x.cumsum(1), reach(1, 0, 1)),
    "earlier tokens": (lambda x: x.flip(1).cumsum(1).flip(1), reach(1, 0, 1)),
    "reversed": (lambda x: x.flip(1), reach(1, 0, 1)),
    "rolled channels": (lambda x: x.roll(1, 2), reach(1, 1, 0)),
    "fewer tokens": (lambda x: x[:, ::2] + x[:, 1::2], reach(1, 0, 1)),
    "some tokens": (lambda x: x[:, :3], reach(1, 0, 1)),
    "no tokens": (lambda x: x.mean(1), reach(1, 0, 1)),
    "more tokens": (lambda x: torch.cat([x, x[:, :1]], 1), reach(1, 0, 1)),
    "dropped": (lambda x: x + F.dropout(x.sum(1, keepdim=True), 0.999), reach(1, 0, 1)),
    "random depth": (lambda x: x + x.roll(1, 2) * x.new_empty(len(x), 1, 1).bernoulli_(0.001), reach(1, 1, 0)),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name: str, device: torch.device) -> None:
    function, expected = TOKENS[name]
    assert reaches(Wired(function).to(device), (6, 8), 4) == [expected]


@pytest.mark.parametrize("axis", [1, 2])
def test_one_crossing_is_found_wherever_it_is(axis: int, device: torch.device) -> None:
    """Oracle: whether source and target differ, in the middle too."""
    for source in range(6):
        for target in range(6):
            found = reaches(Wired(crossed(source, target, axis), 6).to(device), (6, 6), 6)
            same = source == target
            assert found == [reach(1, same or axis == 2, same or axis == 1)], (source, target)


def test_random_modules_against_their_jacobian(device: torch.device) -> None:
    """Oracle: the blocks of the full Jacobian of output by site, of sparse linear maps over tokens and channels."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(30):
        wires = torch.eye(12).logical_or(torch.rand(12, 12, generator=generator) < 0.01).float()  # (3 tokens, 4 channels) to itself
        mixed = wires.to(device)
        found = reaches(
            Wired(lambda x, mixed=mixed: (x.flatten(1) @ mixed.t().to(x)).view_as(x), 4).to(device),  # type: ignore[misc]
            (3, 4),
            2,
        )
        blocks = wires.view(3, 2, 2, 3, 2, 2).ne(0)
        tokens = not (blocks.any(5).any(4).any(2).any(1) & ~torch.eye(3, dtype=torch.bool)).any()
        groups = not (blocks.any(5).any(3).any(2).any(0) & ~torch.eye(2, dtype=torch.bool)).any()
        assert found == [Reach(True, tokens, groups)]
        seen.add((tokens, groups))
    assert len(seen) == 4


class Branch(nn.Module):
    """x + f(g(x)) with f zero at first, by a layer, or by a scale."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.inner, self.second = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.scale, self.kind = nn.BatchNorm1d(8), nn.Parameter(torch.ones(8)), kind
        zero = {"layer": [self.second.weight, self.second.bias], "scale": [self.scale], "norm": [self.norm.weight]}[kind]
        for parameter in zero:
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(torch.relu(self.inner(x))) * self.scale
        return x + (self.norm(y) if self.kind == "norm" else y)


@pytest.mark.parametrize("kind", ["layer", "scale", "norm"])
def test_a_branch_that_is_zero_at_first_is_seen(kind: str, device: torch.device) -> None:
    module = Branch(kind).to(device)
    independent = kind != "norm"
    assert reaches(module, (6,), 4)[0] == reach(independent, 0, 0)


def test_inactive_units_are_seen(device: torch.device) -> None:
    """All ReLUs are closed at first: biases far below zero."""
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), Wired(lambda x: F.relu(x, inplace=True)), Wired(torch.relu))
    for parameter in module.parameters():
        nn.init.constant_(parameter, -9 if parameter.dim() == 1 else 0.1)
    assert reaches(module.to(device), (6,), 4) == [reach(1, 0, 0)] * 3 + [reach(1, 0, 1)]


def test_a_shared_relu_takes_the_noise_of_each_sum(device: torch.device) -> None:
    """One module under two names, at whose second call a sum takes noise."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.relu = nn.ReLU()
            self.inner = nn.Sequential(self.relu)
            self.again = self.relu

        def forward(self, x: Tensor) -> Tensor:
            return self.again(x + self.b(self.inner(x + self.a(x))))  # type: ignore[no-any-return]

    assert reaches(Shared().to(device), (8,), 4) == [reach(1, 0, 0), reach(1, 0, 1)]


def test_probing_changes_nothing(device: torch.device) -> None:
    """Oracle: state, modes, hooks, gradients and random state before; and the same answer twice."""
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    module = nn.Sequential(*layers).to(device)
    sites = find_sites(module, torch.zeros(2, 2, 7, 7, device=device)).sites
    module[5].eval()
    before = copy.deepcopy(module.state_dict())
    modes, random = [part.training for part in module.modules()], torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    first = probe(module, sites, torch.Size((2, 7, 7)), 2)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert on_device is None or torch.equal(torch.cuda.get_rng_state(device), on_device)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(parameter.grad is None and parameter.device.type == device.type for parameter in module.parameters())
    assert not torch.overrides._get_current_function_mode_stack()
    assert probe(module, sites, torch.Size((2, 7, 7)), 2) == first == [reach(1, 0, 0), reach(1, 0, 1)]
    assert probe(module, [], torch.Size((2, 7, 7)), 2) == []


def test_half_precision_modules_can_be_probed(device: torch.device) -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU()).to(device)
    sites = find_sites(module, torch.zeros(2, 6, device=device)).sites
    assert probe(module.bfloat16(), sites, torch.Size((6,)), 2) == [reach(1, 0, 1)]


@pytest.mark.parametrize(("shape", "channels", "tokens"), [((8,), 0, None), ((3, 8), 1, 0), ((8, 5, 4), 0, None)])
def test_axes(shape: tuple[int, ...], channels: int, tokens: int | None) -> None:
    size = torch.Size(shape)
    assert (channel_axis(size), token_axis(size)) == (channels, tokens)
    numbers = by_channel(size, 4).expand(2, *shape)
    for index in range(8):
        assert (numbers.select(channels + 1, index) == index // 2).all()
