"""Leaf by leaf is the same as by hooks. Oracle: the same layers inside a module that is no ``nn.Sequential``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bpfree.network.perturb import PerturbedPass, Perturber
from bpfree.network.sequential_jvp import Chain
from bpfree.network.sites import find_sites

MODULES = {
    "mlp": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.ReLU())
    ),
    "own nonlinearity": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 4)),
    "in place": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4), nn.ELU(inplace=True)),
    "tokens": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.ReLU()),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.ReLU(),
        nn.Flatten(),
    ),
}


class Wrapped(nn.Module):
    """Hides the sequence; parameters and modules keep their paths, one level down."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def run(module: nn.Module, directions: int, kind: str, mask: bool, prefix: str, device: torch.device) -> PerturbedPass:
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, device=device)
    sites = find_sites(module, x, final=False).sites if kind != "weights" else ()
    noise = [torch.randn(directions, 5, *site.shape, dtype=torch.float64, device=device) for site in sites]
    names = [name.removeprefix(prefix) for name, _ in module.named_parameters()] if kind != "activities" else []
    shapes = {f"{prefix}{name}": module.get_parameter(f"{prefix}{name}").shape for name in names}
    weights = {name: torch.randn(directions, *shape).double().to(device) for name, shape in shapes.items()}
    record = [source.layer for site in sites for source in site.sources]
    return Perturber(module).execute(x, sites, noise, weights, record=record, mask=mask)


@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("kind", ["activities", "weights", "both"])
@pytest.mark.parametrize("mask", [True, False])
def test_the_same_as_by_hooks(name: str, directions: int, kind: str, mask: bool, device: torch.device) -> None:
    torch.manual_seed(1)
    module = MODULES[name]().double().to(device)
    quick = run(module, directions, kind, mask, "", device)
    slow = run(Wrapped(module), directions, kind, mask, "inner.", device)
    assert quick.tangent is not None
    assert slow.tangent is not None
    assert torch.allclose(quick.output, slow.output)
    assert torch.allclose(quick.tangent, slow.tangent)
    assert [f"inner.{path}" for path in quick.inputs] == list(slow.inputs)
    assert all(torch.allclose(value, slow.inputs[f"inner.{path}"]) for path, value in quick.inputs.items())
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(quick.noise, slow.noise, strict=True))


def test_what_a_chain_fits() -> None:
    """Not what is no sequence, has a leaf twice, or is watched by a hook."""
    relu = nn.ReLU()
    assert Chain(nn.Sequential(nn.Linear(2, 2), relu)).fits((), ["0.weight"], ["0"])
    assert not Chain(nn.Sequential(nn.Linear(2, 2), relu)).fits((), (), ["elsewhere"])
    assert not Chain(nn.Linear(2, 2)).fits((), (), ())
    assert not Chain(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu)).fits((), (), ())
    watched = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    chain = Chain(watched)
    watched[0].register_forward_hook(lambda *_: None)
    assert not chain.fits((), (), ())


class SelfAttention(nn.Module):
    """Of two tokens, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (2, -1))
        return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).flatten(1)


@pytest.mark.parametrize("directions", [1, 3])
def test_attention_behind_the_noise(directions: int, device: torch.device) -> None:
    """The fused kernels have no derivative by forward mode. Oracle: ``torch.func.jvp`` of softmax attention, written out."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(6, 8), SelfAttention()).double().to(device)
    result = run(module, directions, "activities", True, "", device)
    hidden = module[0](result.inputs["0"]).detach()

    def attention(values: Tensor) -> Tensor:
        tokens = values.unflatten(1, (2, 4))
        return ((tokens @ tokens.mT / 2).softmax(2) @ tokens).flatten(1)

    expected = [torch.func.jvp(attention, (hidden,), (noise,))[1] for noise in result.noise[0]]
    assert result.tangent is not None
    assert torch.allclose(result.tangent, torch.stack(expected))
