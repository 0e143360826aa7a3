"""Feedback alignment's step beside BioTorch's, back-propagation's, and the identity that needs no backward pass of its own.

    python benchmarks/feedback_step.py --biotorch FOLDER

BioTorch's two LeNets at a batch of 128, SGD with momentum. FOLDER is a checkout of github.com/jsalbert/biotorch, whose own converted
modules run in this process, on the same weights, feedback weights and batch. In double precision the updates must agree to 1e-6 of their
norm; in single precision ours is to take at most 0.9 of the time. A step is all of it: gradients dropped, forward pass, loss, backward
pass, optimiser. *identity* executes layers as ``layer(x.detach(); W) + layer(x; B) - layer(x; B).detach()``, by autograd alone.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import torch
import torch.nn.functional as F
from bpfree_feedback import base
from bpfree_feedback.fixed import FeedbackAlignment
from bpfree_feedback.networks import LeNetConfig, lenet
from bpfree_feedback.signs import SignSymmetry, SignSymmetryConfig
from torch import Tensor, nn

from bpfree import Batch, Network, OptimizerConfig, Rule, Stepper, TaskSpec
from bpfree.baselines import DFA, Backprop, DFAConfig
from bpfree.network import Replaced, feedback_layers

BATCH, TARGET, AGREE = 128, 0.9, 1e-6
LR, MOMENTUM = 0.01, 0.9
SPECS = {"grey": TaskSpec("grey", (1, 32, 32), 10), "colour": TaskSpec("colour", (3, 32, 32), 10)}
OURS: dict[str, Callable[[Network, TaskSpec], Rule]] = {
    "fa": FeedbackAlignment,
    "usf": lambda network, spec: SignSymmetry(network, spec, SignSymmetryConfig(magnitude="uniform")),
    "frsf": lambda network, spec: SignSymmetry(network, spec, SignSymmetryConfig(magnitude="fixed")),
    "dfa": lambda network, spec: DFA(network, spec, DFAConfig(placement="layers")),
}
"""By BioTorch's names."""


def ours(kind: Callable[[Network, TaskSpec], Rule], variant: Any, device: torch.device, seed: int = 0) -> Stepper:
    """Make a rule on a LeNet, ready to take steps."""
    torch.manual_seed(seed)
    rule = kind(lenet(SPECS[variant], LeNetConfig(variant)), SPECS[variant])
    return Stepper(rule, OptimizerConfig("sgd", lr=LR, momentum=MOMENTUM), device=device)


class Theirs:
    """BioTorch's module with the weights and feedback weights of ours, and a step as its trainer takes it."""

    def __init__(self, folder: Path, name: str, variant: str, rule: Any) -> None:
        sys.path.insert(0, str(folder))
        from biotorch.models.le_net import LeNetCIFAR, LeNetMNIST
        from biotorch.module.biomodule import BioModule

        with contextlib.redirect_stdout(io.StringIO()):
            plain = LeNetMNIST() if variant == "grey" else LeNetCIFAR()
            self.module = BioModule(plain, mode=name, output_dim=10).to(rule.network.blocks["readout"].weight.device)
        self.name = name
        weights = [layer for layer in self.module.modules() if hasattr(layer, "weight_backward")]
        with torch.no_grad():
            for layer, (path, layers) in zip(weights, feedback_layers(rule.network).items(), strict=True):
                layer.weight.copy_(layers[0].weight)
                layer.bias.copy_(layers[0].bias)
                backward = feedback_of(rule, path)
                if backward is not None:
                    layer.weight_backward.copy_(backward.abs() if name == "frsf" else backward)
        learned = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learned, lr=LR, momentum=MOMENTUM)

    def take(self, batch: Batch) -> None:
        """Take a step."""
        loss = nn.functional.cross_entropy
        scores = self.module(batch.inputs, *((batch.targets, loss) if self.name == "dfa" else ()))
        value = loss(scores, batch.targets)
        self.module.zero_grad()
        value.backward()
        self.optimizer.step()


def feedback_of(rule: Any, path: str) -> Tensor | None:
    """Return what is kept for a weight: none for a first layer, or for sign-symmetry of one size."""
    if isinstance(rule, DFA):
        return rule.get_buffer(rule.layers[path])
    name = next((name for name, weight in rule.layers.items() if weight == path), None)
    return rule.feedback[name] if name is not None and name in rule.feedback.keys else None


def disagreement(stepper: Stepper, theirs: Theirs, batch: Batch) -> float:
    """Take a step with both in double precision; return how far the updates differ, over the norm of theirs."""
    stepper.rule.double()
    theirs.module.double()
    batch = Batch(batch.inputs.double(), batch.targets)
    sides = [list(stepper.rule.network.parameters()), [p for p in theirs.module.parameters() if p.requires_grad]]
    before = [[p.detach().clone() for p in side] for side in sides]
    stepper.take(batch)
    theirs.take(batch)
    moved = [
        torch.cat([(p.detach() - q).flatten() for p, q in zip(side, then, strict=True)]) for side, then in zip(sides, before, strict=True)
    ]
    return float((moved[0] - moved[1]).norm() / moved[1].norm())


@contextlib.contextmanager
def by_identity(network: nn.Module, feedback: Mapping[str, Tensor], layers: Mapping[str, Sequence[Any]]) -> Iterator[Replaced]:
    """Do what ``replaced_backward`` does, with autograd alone and one more execution of each layer."""

    def forward(layer: Any, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        def execute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if isinstance(layer, nn.Linear):
                return F.linear(x, weight, bias)
            found: Tensor = layer._conv_forward(x, weight, bias)
            return found

        def work(x: Tensor) -> Tensor:
            other = execute(x, matrix, None)
            return execute(x.detach(), layer.weight, layer.bias) + other - other.detach()

        return work

    with contextlib.ExitStack() as stack:
        for name, matrix in feedback.items():
            for layer in layers[name]:
                layer.forward = forward(layer, matrix)
                stack.callback(vars(layer).pop, "forward")
        yield Replaced(network, feedback)


def identity(stepper: Stepper, batch: Batch) -> Callable[[], Any]:
    """Return a function that takes a step of ours with the identity in place of the backward pass of its own."""

    def work() -> None:
        with mock.patch.object(base, "replaced_backward", by_identity):
            stepper.take(batch)

    return work


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("feedback_step", __doc__, pairs=31)
    benchmark.parser.add_argument("--biotorch", type=Path, metavar="FOLDER", help="a checkout of BioTorch, to be run beside ours")
    options = benchmark.start(arguments)
    device = benchmark.device
    speed: dict[str, Any] = {}
    agreement: dict[str, float] = {}
    for variant, spec in SPECS.items():
        count = 8 if options.quick else BATCH
        batch = Batch(torch.randn(count, *spec.input_shape, device=device), torch.randint(10, (count,), device=device))
        others: dict[str, tuple[Stepper, Callable[[], Any], float | None]] = {}
        reference = ours(Backprop, variant, device)
        others[f"back-propagation, {variant}"] = (ours(FeedbackAlignment, variant, device), lambda s=reference, b=batch: s.take(b), None)
        others[f"identity, {variant}"] = (
            ours(FeedbackAlignment, variant, device),
            identity(ours(FeedbackAlignment, variant, device), batch),
            None,
        )
        for name in OURS if options.biotorch is not None else ():
            stepper = ours(OURS[name], variant, device)
            theirs = Theirs(options.biotorch, name, variant, stepper.rule)
            twin = ours(OURS[name], variant, device)
            agreement[f"{name}, {variant}"] = disagreement(twin, Theirs(options.biotorch, name, variant, twin.rule), batch)
            others[f"BioTorch {name}, {variant}"] = (stepper, lambda t=theirs, b=batch: t.take(b), TARGET)
        for label, (stepper, other, target) in others.items():
            works = [measure.timed(lambda s=stepper, b=batch: s.take(b), device), measure.timed(other, device)]
            for work in works:
                work()
            speed[label] = measure.compared(measure.interleaved(works[0], works[1], options.pairs), target)
    measure.show_ratios(speed)
    for label, value in agreement.items():
        print(f"{label}: updates differ by {value:.1e} of their norm ({'within' if value <= AGREE else 'above'} {AGREE:g})")
    benchmark.finish({"speed": speed, "agreement": agreement})


if __name__ == "__main__":
    main()
