"""Small tasks and networks, and predictive coding by the book: the energy written out, all its gradients by autograd."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bpfree_predictive_coding.networks import ResidualMLPConfig, VGGConfig, residual_mlp, vgg
from bpfree_predictive_coding.relaxation import Relaxation
from torch import Tensor, nn

from bpfree import Batch, Network, OptimizerConfig, Rule, TaskSpec, new_step
from bpfree.network import MLPConfig, mlp

DEVICE = torch.device(os.environ.get("BPFREE_TEST_DEVICE", "cpu"))
FLAT = TaskSpec("flat", (6,), 3)
REAL = TaskSpec("real", (6,), 3, targets="real")
SOFT = TaskSpec("soft", (6,), 3, targets="soft")
IMAGE = TaskSpec("image", (3, 8, 8), 4)
LARGE = TaskSpec("large", (2, 32, 32), 4)

Top = Callable[[Tensor], Tensor]
"""The output's energy of all examples together, given the scores."""


def network_of(kind: str, spec: TaskSpec = FLAT, *, seed: int = 0, gain: float = 1.0, **sizes: Any) -> Network:
    """A small network in float64: an ``mlp`` unless said otherwise, with weights ``gain`` times the usual ones."""
    torch.manual_seed(seed)
    if kind == "residual-mlp":
        network = residual_mlp(spec, ResidualMLPConfig(**{"depth": 4, "width": 7, "activation": "tanh", **sizes}))
    elif kind in ("vgg5", "vgg7"):
        network = vgg(spec, VGGConfig(**{"preset": kind, "scale": 1 / 64, **sizes}))  # type: ignore[arg-type]
    else:
        network = mlp(spec, MLPConfig(**{"depth": 3, "width": 8, "activation": kind, **sizes}))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(gain)
    return network.to(DEVICE, torch.float64)


def batch_of(spec: TaskSpec = FLAT, count: int = 7, seed: int = 1) -> Batch:
    """Random inputs and targets of the task's kind, float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *spec.input_shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, spec.outputs, generator=generator, dtype=torch.float64)
    targets = {"classes": noise.argmax(1), "soft": noise.softmax(1), "real": noise}[spec.targets]
    return Batch(inputs.to(DEVICE), targets.to(DEVICE))


def part(batch: Batch, start: int, end: int) -> Batch:
    """Some consecutive examples."""
    assert batch.targets is not None
    return Batch(batch.inputs[start:end], batch.targets[start:end])


def rule_of(factory: type[Rule], kind: str = "tanh", spec: TaskSpec = FLAT, *, network: Network | None = None, **options: Any) -> Any:
    """A rule on a small network; ``options`` are its own, with states at rate 0.1 unless said otherwise."""
    if hasattr(factory.Config, "state_lr"):
        options = {"state_lr": 0.1, **options}
    return factory(network or network_of(kind, spec), spec, factory.Config(**options))


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """The ``.grad`` of a module's parameters, by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def credited(rule: Rule, batch: Batch) -> dict[str, Tensor]:
    """What one call of ``credit`` leaves in ``.grad``."""
    rule.zero_grad()
    rule.credit(batch, new_step(rule))
    found = gradients_of(rule.network)
    rule.zero_grad()
    return found


def moved(rule: Rule, batch: Batch, optimizer: OptimizerConfig | None = None) -> dict[str, Tensor]:
    """What one step of SGD at rate 1 subtracts from the parameters (which are put back): a gradient, for rules that apply themselves."""
    before = {name: p.detach().clone() for name, p in rule.network.named_parameters()}
    rule.learn(batch, new_step(rule, optimizer or OptimizerConfig("sgd", lr=1.0)))
    change = {name: before[name] - p.detach() for name, p in rule.network.named_parameters()}
    with torch.no_grad():
        for name, p in rule.network.named_parameters():
            p.copy_(before[name])
    return change


def true_gradients(network: Network, loss: Callable[[Tensor], Tensor], inputs: Tensor) -> dict[str, Tensor]:
    """Reverse mode through the whole network, of a loss of its scores."""
    parameters = dict(network.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss(network(inputs)), list(parameters.values())), strict=True))


def assert_same(ours: dict[str, Tensor], exact: dict[str, Tensor], rtol: float = 1e-9) -> None:
    """Equal by name, each tensor within ``rtol`` of the length of the exact one (which may be zero but for rounding)."""
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert (ours[name] - value).norm().item() <= rtol * value.norm().item() + 1e-14, name


def differ(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Largest relative distance of a tensor from the exact one."""
    return max(float((ours[name] - value).norm() / value.norm()) for name, value in exact.items())


def by_block(network: Network, gradients: dict[str, Tensor]) -> list[Tensor]:
    """One flat vector per block, first to last."""
    return [
        torch.cat([value.flatten() for name, value in gradients.items() if name.startswith(f"blocks.{block}.")]) for block in network.names
    ]


def compare(network: Network, ours: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[list[float], list[float]]:
    """Cosine and ratio of norms for each block, first to last."""
    pairs = list(zip(by_block(network, ours), by_block(network, exact), strict=True))
    cosines = [float(torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-300)) for a, b in pairs]
    return cosines, [float(a.norm() / b.norm()) for a, b in pairs]


# --- predictive coding by the book ---------------------------------------------------------------------------------------


def squared(target: Tensor, precision: float = 1.0) -> Top:
    """Half the squared distance to the target."""
    return lambda scores: precision * 0.5 * ((target - scores) ** 2).sum()


def cross_entropy(target: Tensor, precision: float = 1.0) -> Top:
    """Of the scores, with target rows."""
    return lambda scores: -precision * (target * torch.log(scores.exp() / scores.exp().sum(1, keepdim=True))).sum()


def rows(batch: Batch, spec: TaskSpec = FLAT) -> Tensor:
    """Targets as rows, float64."""
    assert batch.targets is not None
    return F.one_hot(batch.targets, spec.outputs).double() if spec.targets == "classes" else batch.targets


def energies(network: Network, inputs: Tensor, states: Sequence[Tensor], top: Top) -> list[Tensor]:
    """Of each block, summed over the examples."""
    blocks, x, found = list(network.blocks.values()), inputs, []
    for block, state in zip(blocks, states, strict=False):
        found.append(0.5 * ((state - block(x)) ** 2).sum())
        x = state
    return [*found, top(blocks[-1](x))]


def predictions(network: Network, inputs: Tensor) -> list[Tensor]:
    """Outputs of the hidden blocks in a forward pass, the states' beginning."""
    states, x = [], inputs
    with torch.no_grad():
        for block in list(network.blocks.values())[:-1]:
            x = block(x)
            states.append(x)
    return states


def by_the_book(
    network: Network,
    inputs: Tensor,
    top: Top,
    *,
    T: int,
    lr: float,
    momentum: float = 0.0,
    states: Iterable[Tensor] | None = None,
) -> tuple[list[Tensor], dict[str, Tensor], list[list[float]]]:
    """States after T steps of ``torch.optim.SGD`` on the summed energy, the weights' gradients of the mean, and mean energies."""
    states = [state.detach().clone().requires_grad_() for state in (predictions(network, inputs) if states is None else states)]
    optimizer = torch.optim.SGD(states, lr=lr, momentum=momentum)
    table = []
    for _ in range(T):
        found = energies(network, inputs, states, top)
        table.append([value.item() / len(inputs) for value in found])
        for state, gradient in zip(states, torch.autograd.grad(sum(found), states), strict=True):  # type: ignore[arg-type]
            state.grad = gradient
        optimizer.step()
    states = [state.detach() for state in states]
    found = energies(network, inputs, states, top)
    table.append([value.item() / len(inputs) for value in found])
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(sum(found) / len(inputs), list(parameters.values()))  # type: ignore[arg-type]
    return states, dict(zip(parameters, gradients, strict=True)), table


def relaxed(relaxation: Relaxation, steps: int) -> Relaxation:
    """The same relaxation after this many steps."""
    with torch.no_grad():
        for _ in range(steps):
            relaxation.step()
    return relaxation


def placed(relaxation: Relaxation, states: Sequence[Tensor]) -> Relaxation:
    """The same relaxation with its states elsewhere."""
    with torch.no_grad():
        relaxation.place(states)
    return relaxation


def weight_gradients(network: Network, relaxation: Relaxation, scale: float = 1.0) -> dict[str, Tensor]:
    """What the relaxation's errors teach all blocks."""
    network.zero_grad()
    for index in range(len(network.names)):
        relaxation.backward(index, scale)
    found = gradients_of(network)
    network.zero_grad()
    return found
