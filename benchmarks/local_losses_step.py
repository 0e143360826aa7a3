"""Steps of local errors beside their authors' code and back-propagation; peak bytes of a step of local losses against depth.

    PEERS=FOLDER python benchmarks/local_losses_step.py

FOLDER has a checkout of github.com/anokland/local-loss in ``local-loss``, whose own blocks run in this process on the same weights and
batch: in double precision the updates of three steps must agree to 1e-6 of their norm, and in single precision ours is to take at most
0.9 of the time. Their script is executed up to its training loop, without its data sets. A step is all of it: gradients dropped, forward
passes, losses, backward passes, optimiser (Adam). *Back-propagation* has the same blocks and heads, and one backward pass of the sum of
the same losses through all layers: ours takes at most 1.3 of its time.

*Memory*: the peak of what ``rule.credit`` allocates beyond parameters, buffers and ``.grad``, in networks of 10, 30 and 100 layers of 256
units at a batch of 128; at most 1.1 of that of 10.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import torch
from bpfree_local_losses.local_errors import LocalErrors, LocalErrorsConfig
from bpfree_local_losses.networks import LocalVGGConfig, local_vgg
from bpfree_local_losses.sigprop import Sigprop, SigpropConfig
from forward_gradient_memory import peak
from torch import Tensor, nn

from bpfree import Batch, Network, OptimizerConfig, Rule, Step, Stepper, TaskSpec
from bpfree.baselines import Backprop
from bpfree.cli.output import print_table
from bpfree.network import MLPConfig, mlp, recorded_calls

PEERS = "PEERS"
BATCH, LR, AGREE = 128, 5e-4, 1e-6
STEPS = 3
"""Steps after which weights are compared: decoders begin at zero, so that hidden layers do not learn from ``pred`` in the first."""
FASTER, NO_SLOWER, FLAT = 0.9, 1.3, 1.1
DEPTHS = (10, 30, 100)
CASES: dict[str, tuple[TaskSpec, str]] = {
    "mlp": (TaskSpec("mnist", (1, 28, 28), 10), "--model mlp --dataset MNIST --num-layers 3 --num-hidden 1024"),
    "vgg8b": (TaskSpec("cifar10", (3, 32, 32), 10), "--model vgg8b --dataset CIFAR10 --feat-mult 0.125 --num-layers 1 --num-hidden 128"),
}
"""Task and the authors' options. No dropout, so that both compute the same."""
LOSSES = ("pred", "sim", "predsim")
DECODER_INPUTS = 2048


def network(case: str) -> Network:
    """Make the network: three dense layers, or VGG8b at an eighth of its width."""
    spec = CASES[case][0]
    if case == "mlp":
        return mlp(spec, MLPConfig(depth=3, width=1024, norm="batch", activation="leaky-relu"))
    return local_vgg(spec, LocalVGGConfig(width=0.125, dense=[128]))


class Together(LocalErrors):
    """Back-propagation of the sum of the same losses, on the same blocks and heads."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Add the gradients of one backward pass from all losses at once."""
        x, losses = batch.inputs, []
        for name, place in self.places.items():
            with recorded_calls(place) as calls:
                x = self.network.blocks[name](x)
            losses.append(self._loss(name, calls[place][-1].output, batch))
        losses.append(self.spec.loss(self.network.blocks["readout"](x), batch))
        torch.stack(losses).sum().backward()
        return {}


def ours(kind: type[LocalErrors], case: str, loss: Any, device: torch.device) -> Stepper:
    """Make a rule, ready to take steps; the same weights for all kinds."""
    torch.manual_seed(0)
    config = LocalErrorsConfig(loss=loss, decoder_inputs=DECODER_INPUTS)
    return Stepper(kind(network(case), CASES[case][0], config), OptimizerConfig("adam", lr=LR), device=device)


class Theirs:
    """The authors' model with the weights of ours, and a step as their training loop takes it."""

    def __init__(self, folder: Path, case: str, loss: str, rule: Any) -> None:
        spec, options = CASES[case]
        device = next(rule.parameters()).device
        words = f"{options} --loss-sup {loss} --nonlin leakyrelu --dim-in-decoder {DECODER_INPUTS} --no-print-stats --lr {LR}".split()
        self.names = run_script(folder / "train.py", words, spec, cuda=device.type == "cuda")
        self.model: nn.Module = self.names["model"].to(device, rule.network.dtype).train()
        self.loss = loss
        self.share = 1 - self.names["args"].beta
        adopt(self.model, rule)
        self.optimizer = self.names["optimizer"]

    def take(self, batch: Batch) -> None:
        """Take a step: their blocks update themselves as they are executed, the output layer after that."""
        names = self.names
        onehot = names["to_one_hot"](batch.targets, 10).to(batch.inputs)
        self.optimizer.zero_grad()
        self.model.optim_zero_grad()
        output, _ = self.model(batch.inputs, batch.targets, onehot)
        loss = nn.functional.cross_entropy(output, batch.targets)
        if self.loss == "predsim":
            loss = loss * self.share
        loss.backward()
        self.optimizer.step()


def run_script(path: Path, words: Sequence[str], spec: TaskSpec, *, cuda: bool) -> dict[str, Any]:
    """Execute the authors' script from its options to its optimisers, without data sets and training loop; return its names."""
    source = path.read_text()
    options, _, rest = source.partition("kwargs = {'num_workers'")
    model = rest[rest.index("class LinearFAFunction") : rest.index("def train(epoch, lr):")]
    sizes = f"input_dim, input_ch, num_classes = {spec.input_shape[1]}, {spec.input_shape[0]}, {spec.outputs}\n"
    model = re.sub(r"^print\(.*\)$", "", model, flags=re.MULTILINE)
    names: dict[str, Any] = {"__name__": "local_loss"}
    with mock.patch.object(sys, "argv", [str(path), *words, *([] if cuda else ["--no-cuda"])]):
        exec(compile(options + sizes + model, str(path), "exec"), names)
    return names


def adopt(model: nn.Module, rule: Any) -> None:
    """Give their blocks the weights of ours, by the order in which they are executed."""
    blocks = [part for part in model.modules() if type(part).__name__.startswith("LocalLossBlock")]
    with torch.no_grad():
        for theirs, name in zip(blocks, rule.network.hidden, strict=True):
            layers = [part for part in rule.network.blocks[name].modules() if list(part.parameters(recurse=False))]
            head = rule.heads[name]
            pairs = [(theirs.encoder, layers[0]), (theirs.bn, layers[1])]
            pairs += [(theirs.decoder_y, head.decoder)] if head.decoder is not None else []
            if head.match is not None:
                pairs.append((theirs.conv_loss if isinstance(head.match, nn.Conv2d) else theirs.linear_loss, head.match))
            for to, source in pairs:
                to.load_state_dict(source.state_dict())
        last = [part for part in model.modules() if isinstance(part, nn.Linear)][-1]
        last.load_state_dict([part for part in rule.network.blocks["readout"].modules() if isinstance(part, nn.Linear)][-1].state_dict())


def difference(stepper: Stepper, theirs: Theirs, batch: Batch) -> float:
    """Return the norm of the difference of hidden weights after some steps, over that of our updates."""

    def weights(parts: Sequence[nn.Module]) -> Tensor:
        return torch.cat([part.weight.detach().flatten() for part in parts])

    def linear(module: nn.Module) -> list[nn.Module]:
        return [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]

    rule = stepper.rule
    mine = [linear(rule.network.blocks[name])[0] for name in rule.network.hidden]
    other = [part.encoder for part in theirs.model.modules() if type(part).__name__.startswith("LocalLossBlock")]
    before = weights(mine)
    for _ in range(STEPS):
        stepper.take(batch)
        theirs.take(batch)
    after = weights(mine)
    return float((after - weights(other)).norm() / (after - before).norm())


def deep(depth: int) -> dict[str, Rule]:
    """Make the rules whose memory is measured, each with a network of its own."""
    spec = TaskSpec("vectors", (256,), 10)

    def network(norm: Any = "layer") -> Network:
        return mlp(spec, MLPConfig(widths=[256] * depth, norm=norm, activation="leaky-relu"))

    return {
        "back-propagation": Backprop(network(), spec),
        "local-errors": LocalErrors(network("batch"), spec),
        "sigprop": Sigprop(network(), spec),
        "sigprop, rows of examples": Sigprop(network(), spec, SigpropConfig(rows="examples")),
    }


def memory(depths: Sequence[int], device: torch.device) -> dict[str, dict[str, Any]]:
    """Return the peak bytes of a credit by rule and depth, and how they grow."""
    torch.manual_seed(0)
    batch = Batch(torch.randn(BATCH, 256, device=device), torch.randint(10, (BATCH,), device=device))
    sizes: dict[str, dict[int, int]] = {}
    for depth in depths:
        for name, rule in deep(depth).items():
            sizes.setdefault(name, {})[depth] = peak(rule.to(device), batch, device)
    found: dict[str, dict[str, Any]] = {}
    for name, by_depth in sizes.items():
        growth = by_depth[depths[-1]] / by_depth[depths[0]]
        target = None if name == "back-propagation" else FLAT
        found[name] = {"peak_bytes": by_depth, "growth": growth, "target_growth": target, "reached": target is None or growth <= target}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("local_losses_step", __doc__, pairs=15)
    benchmark.parser.add_argument("--case", choices=list(CASES), help="measure only this network")
    options = benchmark.start(arguments)
    device = benchmark.device
    folder = Path(os.environ[PEERS]) / "local-loss" if os.environ.get(PEERS) else None
    speed: dict[str, Any] = {}
    agreement: dict[str, float] = {}
    for case in [options.case] if options.case else CASES:
        spec = CASES[case][0]
        count = 8 if options.quick else BATCH
        batch = Batch(torch.randn(count, *spec.input_shape, device=device), torch.randint(10, (count,), device=device))
        for loss in LOSSES:
            others: dict[str, tuple[Callable[[], Any], float]] = {}
            together = ours(Together, case, loss, device)
            others[f"back-propagation, {loss}, {case}"] = (lambda s=together, b=batch: s.take(b), NO_SLOWER)
            if folder is not None:
                agreement[f"{loss}, {case}"] = agree(folder, case, loss, batch, device)
                theirs = Theirs(folder, case, loss, ours(LocalErrors, case, loss, device).rule)
                others[f"authors' code, {loss}, {case}"] = (lambda t=theirs, b=batch: t.take(b), FASTER)
            for label, (other, target) in others.items():
                stepper = ours(LocalErrors, case, loss, device)
                works = [measure.timed(lambda s=stepper, b=batch: s.take(b), device), measure.timed(other, device)]
                for work in works:
                    work()
                speed[label] = measure.compared(measure.interleaved(works[0], works[1], options.pairs), target)
    measure.show_ratios(speed)
    for label, value in agreement.items():
        print(f"{label}: updates differ by {value:.1e} of their norm ({'within' if value <= AGREE else 'above'} {AGREE:g})")
    depths = (2, 4) if options.quick else DEPTHS
    sizes = memory(depths, device)
    headers = ["KiB at depth", *map(str, depths), "growth", "target"]
    rows = [
        [
            name,
            *(f"{size / 1024:.0f}" for size in found["peak_bytes"].values()),
            f"{found['growth']:.2f}",
            str(found["target_growth"] or ""),
        ]
        for name, found in sizes.items()
    ]
    print_table(headers, rows)
    benchmark.finish({"speed": speed, "agreement": agreement, "memory": sizes})


def agree(folder: Path, case: str, loss: str, batch: Batch, device: torch.device) -> float:
    """Return how far updates are from theirs in double precision."""
    stepper = ours(LocalErrors, case, loss, device)
    stepper.rule.double()
    theirs = Theirs(folder, case, loss, stepper.rule)
    return difference(stepper, theirs, Batch(batch.inputs.double(), batch.targets))


if __name__ == "__main__":
    main()
