"""Ten honest rules of the literature, and the truth of each in words: what a hidden block reads and learns of the weights above it.

An examiner of rules is to raise no false alarm on any of them. Difference target propagation is there in two forms. Blocks are executed
as modules, never by products made by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bpfree import Batch, Card, Network, OptimizerConfig, Rule, Step, Streamed, TaskSpec, Trace, Traits, always
from bpfree.network import add_gradient, feedback_weights, kept_buffers, recorded_calls, replaced_backward
from bpfree.network.closed_form import is_linear, parameter_gradients

__all__ = ["HONEST", "Honest"]


def layer_of(block: nn.Module) -> nn.Module:
    """Return the block's first linear layer or convolution."""
    return next(part for part in block.modules() if is_linear(part))


def on_mlp(**options: Any) -> Any:
    """Make a rule's ``network_options``: a multilayer perceptron with these."""
    return classmethod(lambda cls, spec, config: {"name": "mlp", **options})


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers of a tensor's shape."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


# --- local losses ---------------------------------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    """Scale each example to a mean square of one."""
    size = x.flatten(1).square().mean(1).sqrt() + 1e-6
    return x / size.view(-1, *[1] * (x.dim() - 1))


def goodness(h: Tensor) -> Tensor:
    """Sum the squares of each example's units, less one for each unit."""
    return h.flatten(1).square().sum(1) - h[0].numel()


class ForwardForward(Streamed):
    """Each block raises its activity for inputs with the right label written on them, and lowers it for wrong ones."""

    MARK = 4.0
    card = Card(
        "forward-forward: sums of squares, high for right labels and low for wrong ones, block by block",
        paper="Hinton: The forward-forward algorithm: some preliminary investigations. 2022, arXiv 2212.13345",
        equation="loss_l = mean softplus(-g_l(right)) + mean softplus(g_l(wrong));  g_l = sum h_l^2 - units",
        notes="The label takes the place of the first numbers of an input. Predicts the class whose label makes the largest goodness.",
    )
    traits_of = always(Traits("upstream", 0, 1, passes=2, readout="none", targets=("classes",), inputs="real", own_loss=False))
    optimizer_of = always(OptimizerConfig("adam", lr=3e-3))

    def labelled(self, inputs: Tensor, classes: Tensor) -> Tensor:
        marks = self.MARK * F.one_hot(classes, self.spec.outputs).to(inputs.dtype)
        return unit(torch.cat([marks, inputs.flatten(1)[:, self.spec.outputs :]], 1).view_as(inputs))

    def encode(self, batch: Batch, step: Step) -> Tensor:
        generator, right, classes = step.generator_for("wrong labels"), batch.targets, self.spec.outputs
        shift = torch.randint(1, classes, (len(batch),), generator=generator, device=generator.device)
        return torch.cat([self.labelled(batch.inputs, right), self.labelled(batch.inputs, (right + shift) % classes)])

    def local_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        right, wrong = goodness(trace.output).chunk(2)
        return F.softplus(-right).mean() + F.softplus(wrong).mean()

    def hand_over(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        return unit(trace.output.detach())

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores = []
        for label in range(self.spec.outputs):
            x = self.labelled(inputs, torch.full((len(inputs),), label, device=inputs.device))
            stream = list(self.network.stream(x, grad=False, hand_over=lambda trace: unit(trace.output)))
            scores.append(torch.stack([goodness(trace.output) for trace in stream]).sum(0))
        return torch.stack(scores, 1)


def similarity(rows: Tensor) -> Tensor:
    """Return the cosines (N, N) of rows that are centred each by itself."""
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    return rows @ rows.t()


class LocalErrors(Streamed):
    """Each block has a head that predicts the label, and a map whose outputs are to be as similar as the labels are."""

    BETA = 0.99
    card = Card(
        "local errors: prediction and similarity losses, block by block",
        paper="Nokland, Eidnes: Training neural networks with local error signals. ICML 2019",
        equation="loss_l = (1 - beta) loss(V_l h_l, y) + beta |S(R_l h_l) - S(y)|^2 / N^2;  S: cosines of centred rows",
        notes="All maps are dense; the paper's are convolutions where the block is one.",
    )
    traits_of = always(Traits("upstream", 0, 1, targets=("classes", "soft"), own_loss=False))
    optimizer_of = always(OptimizerConfig("adam", lr=3e-3))

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        sizes = {name: self.network.shapes[name].numel() for name in self.network.hidden}
        self.heads = nn.ModuleDict({name: nn.Linear(size, spec.outputs) for name, size in sizes.items()})
        self.maps = nn.ModuleDict({name: nn.Linear(size, size, bias=False) for name, size in sizes.items()})

    def local_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        h = trace.output.flatten(1)
        wanted = similarity(self.spec.target_rows(batch, h.dtype))
        alike = F.mse_loss(similarity(self.maps[trace.name](h)), wanted)
        return (1 - self.BETA) * self.spec.loss(self.heads[trace.name](h), batch) + self.BETA * alike


# --- other feedback -------------------------------------------------------------------------------------------------------


class FeedbackAlignment(Rule):
    """Signals go down block by block through fixed random matrices in place of the transposed weights."""

    card = Card(
        "feedback alignment: the backward pass goes through fixed random matrices",
        paper="Lillicrap, Cownden, Tweed, Akerman: Random synaptic feedback weights support error backpropagation for deep learning. 2016",
        equation="delta_l = (B_{l+1}^T delta_{l+1}) * f'(u_l);  grad W_l = delta_l h_{l-1}^T",
    )
    traits_of = always(Traits("all", 0, 1, inputs="real"))

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.keys = {name: name.replace(".", "_") for name in feedback_weights(self.network)}
        for name, weight in feedback_weights(self.network).items():
            self.register_buffer(self.keys[name], torch.randn_like(weight) / weight[0].numel() ** 0.5)

    def feedback(self) -> dict[str, Tensor]:
        """Return the matrices through which signals go down, by the names of the weights that they stand for."""
        return {name: getattr(self, key).detach() for name, key in self.keys.items()}

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        with replaced_backward(self.network, self.feedback()):
            traces = self.network.traces(batch.inputs, input_grad=True)
        scores = traces[-1].output.detach()
        signal: Tensor | None = self.spec.error(scores, batch)
        for trace in reversed(traces):
            if signal is not None:
                signal = trace.backward(signal)
        return {"loss": self.spec.loss(scores, batch)}


class KolenPollack(FeedbackAlignment):
    """Feedback matrices get the updates of the weights that they stand for; decay of both lets them meet."""

    card = Card(
        "Kolen-Pollack: weights and feedback get the same updates, and both decay",
        paper="Akrout, Wilson, Humphreys, Lillicrap, Tweed: Deep learning without weight transport. NeurIPS 2019; Kolen, Pollack 1994",
        equation="delta_l = (B_{l+1}^T delta_{l+1}) * f'(u_l);  grad B_l = grad W_l;  W - B shrinks by 1 - lr decay at each step",
        notes="Clipping by group, or another decay for the feedback, would break the symmetry. The factor is exact without momentum.",
    )
    optimizer_of = always(OptimizerConfig("sgd", lr=0.05, momentum=0.9, weight_decay=3e-3))

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        for key in self.keys.values():
            matrix = self.get_buffer(key)
            delattr(self, key)
            self.register_parameter(key, nn.Parameter(matrix))

    def before_update(self, groups: Sequence[str]) -> None:
        if "rule" in groups:
            for name, key in self.keys.items():
                gradient = self.network.get_parameter(name).grad
                self.get_parameter(key).grad = None if gradient is None else gradient.clone()


class WeightMirror(FeedbackAlignment):
    """Feedback matrices are learned from how the forward layers respond to noise."""

    RATE = 0.1
    card = Card(
        "weight mirror: the feedback of a layer is the correlation of its responses to noise with the noise",
        paper="Akrout, Wilson, Humphreys, Lillicrap, Tweed: Deep learning without weight transport. NeurIPS 2019",
        equation="B_l <- (1 - a) B_l + a mean u x^T,  u = W_l x + b_l,  x standard normal noise",
        notes="The response is the layer's pre-activation, so that B tends to W itself and not to a multiple; as many noises as examples.",
    )
    traits_of = always(Traits("all", "all", 1, passes=2, inputs="real"))

    def mirror(self, step: Step, count: int) -> None:
        """Execute each block but the first on noise of the shape of its input, and move its feedback towards the correlation."""
        names = {id(weight): name for name, weight in feedback_weights(self.network).items()}
        for below, name in pairwise(self.network.names):
            block = self.network.blocks[name]
            layer: Any = layer_of(block)
            noise = normal_like(layer.weight.new_empty(count, *self.network.shapes[below]), step.generator_for(f"mirror {name}"))
            with torch.no_grad(), kept_buffers(block), recorded_calls(layer) as calls:
                block(noise)
            source, response = calls[layer][0]
            seen = parameter_gradients(layer, source, response)["weight"] * response.shape[1] / response.numel()
            self.get_buffer(self.keys[names[id(layer.weight)]]).lerp_(seen, self.RATE)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        self.mirror(step, len(batch))
        return metrics


class Pepita(Rule):
    """A second forward pass with the error added to the input; each layer learns from what that changes in its output."""

    SCALE = 0.05
    card = Card(
        "PEPITA: two forward passes, the second with the output error projected onto the input",
        paper="Dellaferrera, Kreiman: Error-driven input modulation. ICML 2022",
        equation="x' = x + F e;  grad W_l = mean (h_l - h'_l) h'_{l-1}^T;  readout: (softmax(s') - y) h'_{L-1}^T",
        notes="The derivative of the nonlinearity is part of the update here, which the paper leaves out.",
    )
    traits_of = always(Traits("all", 0, 1, passes=2, inputs="real"))
    optimizer_of = always(OptimizerConfig("sgd", lr=0.1, momentum=0.9))
    network_options = on_mlp(depth=2)

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        outputs = self.network.shapes[self.network.readout or ""].numel()
        bound = self.SCALE * (6 / spec.input_size) ** 0.5
        self.register_buffer("projection", (torch.rand(outputs, spec.input_size) * 2 - 1).to(self.network.dtype) * bound)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        plain = [trace.output for trace in self.network.stream(batch.inputs, grad=False)]
        error, count = self.spec.error(plain[-1], batch), len(batch)
        pushed = batch.inputs + (count * error.flatten(1) @ self.get_buffer("projection")).view_as(batch.inputs)
        with kept_buffers(self.network):
            for before, trace in zip(plain, self.network.stream(pushed), strict=True):
                after = trace.output.detach()
                trace.backward(self.spec.error(after, batch) if trace.name == self.network.readout else (before - after) / count)
        return {"loss": self.spec.loss(plain[-1], batch)}


# --- relaxations and targets ----------------------------------------------------------------------------------------------


def executed(network: Network, x: Any, states: Sequence[Tensor]) -> list[Trace]:
    """Execute each block on the state of the block below it."""
    pairs = zip(network.names, [x, *states], strict=False)
    with torch.enable_grad():
        return [network.trace(name, below, input_grad=index > 0) for index, (name, below) in enumerate(pairs)]


class EquilibriumPropagation(Rule):
    """The states of all blocks settle together, freely and nudged towards and from lower loss; weights learn from the difference."""

    FREE, NUDGED, BETA = 12, 4, 0.5
    card = Card(
        "equilibrium propagation, centred: the difference of two nudged equilibria of an energy",
        paper="Scellier, Bengio: Equilibrium propagation: bridging the gap between energy-based models and backpropagation. 2017",
        equation="s_l = tanh(F_l(s_{l-1}) + J_{l+1}^T s_{l+1});  grad = (dE(+beta) - dE(-beta)) / 2 beta,  dE = -d sum_l s_l F_l(s_{l-1})",
        notes="Blocks F_l are linear by default. The last state is linear, and nudged by -beta times the task's error.",
    )
    traits_of = always(Traits("all", "all", 1, passes=3 + FREE + 2 * NUDGED))

    network_options = on_mlp(depth=2, width=64, activation="identity")

    def relax(self, x: Any, states: list[Tensor], steps: int, beta: float = 0.0, batch: Batch | None = None) -> list[Tensor]:
        for _ in range(steps):
            traces = executed(self.network, x, states)
            down = [above.pull(state) for above, state in zip(traces[1:], states[1:], strict=True)]
            new = [(trace.output.detach() + signal).tanh() for trace, signal in zip(traces, down, strict=False)]
            nudge = 0.0 if batch is None else beta * len(batch) * self.spec.error(states[-1], batch)
            new.append(traces[-1].output.detach() - nudge)
            states = [(old + fresh) / 2 for old, fresh in zip(states, new, strict=True)]
        return states

    def settle(self, x: Any) -> list[Tensor]:
        start = self.network.stream(x, grad=False, hand_over=lambda trace: trace.output.tanh())
        return self.relax(x, [t.output if t.name == self.network.readout else t.output.tanh() for t in start], self.FREE)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        free = self.settle(batch.inputs)
        for beta in (self.BETA, -self.BETA):
            nudged = self.relax(batch.inputs, free, self.NUDGED, beta, batch)
            for trace, state in zip(executed(self.network, batch.inputs, nudged), nudged, strict=True):
                trace.backward(-state / (2 * beta * len(batch)))
        return {"loss": self.spec.loss(free[-1], batch)}

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        return self.settle(inputs)[-1]


class LearnedInverses(Rule):
    """Rules with inverses of blocks, each learned by executing the block on its noised inputs."""

    NOISE = 0.1

    network_options = on_mlp(activation="tanh")

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        sizes = {name: shape.numel() for name, shape in self.network.shapes.items()}
        made = {name: nn.Sequential(nn.Linear(sizes[name], sizes[below]), nn.Tanh()) for below, name in pairwise(self.inverted())}
        self.inverses = nn.ModuleDict(made)

    def inverted(self) -> list[str]:
        """Return the blocks through which targets go down, and the first."""
        return self.network.hidden

    def invert(self, trace: Trace, output: Tensor) -> Tensor:
        found: Tensor = self.inverses[trace.name](output.flatten(1)).view_as(trace.input)
        return found

    def fit_inverse(self, trace: Trace, step: Step) -> None:
        source = trace.input.detach()
        source = source + self.NOISE * normal_like(source, step.generator_for(f"inverse of {trace.name}"))
        with torch.no_grad(), kept_buffers(trace.block):
            output = trace.block(source)
        (0.5 * (self.invert(trace, output) - source).square().sum() / len(source)).backward()


class DifferenceTargets(LearnedInverses):
    """Each block has a target, which learned inverses of the blocks above make of the one at the top."""

    RATE = 0.1
    card = Card(
        "difference target propagation: targets go down through learned inverses",
        paper="Lee, Zhang, Fischer, Bengio: Difference target propagation. 2015",
        equation="t_{l-1} = h_{l-1} + G_l(t_l) - G_l(h_l);  loss_l = |h_l - t_l|^2 / 2;  G_l: least |G_l(F_l(h + noise)) - (h + noise)|^2",
        notes="The last hidden block's target is a step of gradient descent on the loss, through the readout's own weights.",
    )
    traits_of = always(Traits("all", "all", 1, passes=2, inputs="real"))

    def first_target(self, readout: Trace, error: Tensor) -> Tensor:
        """Train the readout on the output error, and return the target of the block below it."""
        slope = readout.backward(error)
        assert slope is not None
        return readout.input.detach() - self.RATE * len(error) * slope

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        traces = self.network.traces(batch.inputs, input_grad=True)
        for trace in traces:
            if trace.name in self.inverses:
                self.fit_inverse(trace, step)
        scores = traces[-1].output.detach()
        target = self.first_target(traces[-1], self.spec.error(scores, batch))
        for trace in reversed(traces[:-1]):
            output = trace.output.detach()
            trace.backward((output - target) / len(batch))
            if trace.index:
                with torch.no_grad():
                    target = trace.input + self.invert(trace, target) - self.invert(trace, output)
        return {"loss": self.spec.loss(scores, batch)}


class TargetsThroughout(DifferenceTargets):
    """The same with a learned inverse of the readout, too, so that no update needs another block's transposed weights."""

    RATE = 1.0
    card = Card(
        "difference target propagation, from a target for the scores: each target through a learned inverse",
        paper="Lee, Zhang, Fischer, Bengio: Difference target propagation. 2015",
        equation="t_L = s - rate (softmax(s) - y);  t_{l-1} = h_{l-1} + G_l(t_l) - G_l(h_l)",
        notes="The paper takes a gradient for the topmost hidden target; here it comes through an inverse like the others.",
    )

    def inverted(self) -> list[str]:
        return self.network.names

    def first_target(self, readout: Trace, error: Tensor) -> Tensor:
        scores = readout.output.detach()
        readout.backward(error)
        with torch.no_grad():
            moved = self.invert(readout, scores - self.RATE * len(error) * error)
            return readout.input.detach() + moved - self.invert(readout, scores)


# --- values of the loss alone ---------------------------------------------------------------------------------------------


@torch.no_grad()
def shift(rule: Rule, step: Step, direction: int, by: Tensor | float, *, at_rate: bool = False) -> None:
    """Move all weights in place along a direction, which is drawn again from its seed at each call in a step."""
    for name, members in rule.groups().items():
        generator = step.generator_for(f"{name} {direction}")
        for weight in members:
            z = normal_like(weight, generator)
            if weight.requires_grad:
                weight.add_(z * by * (step.lr(name) if at_rate else 1.0))


class MeZO(Rule):
    """All weights move along random directions and back, in place; how the loss changes says how far to go along each."""

    EPSILON, DIRECTIONS = 1e-3, 8
    card = Card(
        "MeZO: simultaneous perturbation in place, with directions drawn again from their seeds",
        paper="Malladi et al.: Fine-tuning language models with just forward passes. 2023; SPSA: Spall 1992",
        equation="g = (L(W + eps z) - L(W - eps z)) / 2 eps;  W <- W - lr mean g z",
        notes="The paper fine-tunes large models; here a small network learns from scratch, with several directions a step.",
    )
    traits_of = always(Traits("all", "all", 0, update="in-place", passes=2 * DIRECTIONS))
    optimizer_of = always(OptimizerConfig("sgd", lr=0.03))

    network_options = on_mlp(depth=1, width=32)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        raise NotImplementedError("learn moves the weights itself")

    @torch.no_grad()
    def slope(self, batch: Batch, step: Step, direction: int) -> tuple[Tensor, Tensor]:
        """Return the derivative of the loss along a direction by a central difference, and the loss; the weights come back."""
        shift(self, step, direction, self.EPSILON)
        above = self.spec.loss(self.network(batch.inputs), batch)
        shift(self, step, direction, -2 * self.EPSILON)
        below = self.spec.loss(self.network(batch.inputs), batch)
        shift(self, step, direction, self.EPSILON)
        return (above - below) / (2 * self.EPSILON), (above + below) / 2

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        found = [self.slope(batch, step, direction) for direction in range(self.DIRECTIONS)]
        for direction, (slope, _) in enumerate(found):
            shift(self, step, direction, -slope / self.DIRECTIONS, at_rate=True)
        return {"loss": torch.stack([loss for _, loss in found]).mean()}


class Candidates(Rule):
    """Of many candidates near the present weights the best few are kept; the weights become their mean."""

    COUNT, BEST, SIZE = 32, 8, 0.05
    card = Card(
        "evolution strategy: the weights go to the mean of the best candidates around them",
        paper="Rechenberg: Evolutionsstrategie. 1973; on training networks with particles: Kumar 2024, arXiv 2412.05667",
        equation="W_k = W + size z_k;  W <- mean of the W_k with the lowest losses on the batch",
        notes="No swarm is kept between batches. The step is a gradient: at SGD's rate 1 without momentum exactly the equation.",
    )
    traits_of = always(Traits("all", "all", 0, passes=COUNT))
    optimizer_of = always(OptimizerConfig("sgd", lr=1.0))

    network_options = on_mlp(depth=1, width=32)

    @torch.no_grad()
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        weights = {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}
        offsets: list[dict[str, Tensor]] = []
        losses: list[Tensor] = []
        for number in range(self.COUNT):
            generator = step.generator_for(f"candidate {number}")
            offsets.append({name: self.SIZE * normal_like(weight, generator) for name, weight in weights.items()})
            candidate = {name: weight + offsets[-1][name] for name, weight in weights.items()}
            losses.append(self.spec.loss(functional_call(self.network, candidate, (batch.inputs,)), batch))
        best = torch.stack(losses).topk(self.BEST, largest=False).indices
        for name, weight in weights.items():
            add_gradient(weight, -torch.stack([offset[name] for offset in offsets])[best].mean(0))
        return {"loss": torch.stack(losses).mean()}


# --- the truth about each -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Honest:
    """A rule and the truth about it.

    Attributes:
        rule: the rule.
        reads: of which blocks above it the update of a hidden block reads weights directly, through transposes, cotangents, tangents or
            parameters: ``nothing``, ``next`` or ``all``.
        learns: of which blocks above it learns by executing them on other inputs or weights than the ordinary pass: ``nothing``, ``next``
            or ``all``.
        truth: the same in words.
        settings: of the rule, where not the default ones are meant.
    """

    rule: type[Rule]
    reads: str
    learns: str
    truth: str
    settings: tuple[str, ...] = ()


HONEST = (
    Honest(
        ForwardForward,
        "nothing",
        "nothing",
        "The loss of a block is a function of its own output; blocks above, which run on that output scaled, are not asked for anything.",
    ),
    Honest(
        LocalErrors,
        "nothing",
        "nothing",
        "The loss of a block is a function of its own output, its own head and map, and the label.",
    ),
    Honest(
        FeedbackAlignment,
        "nothing",
        "nothing",
        "The output error comes down through fixed random matrices, and past the derivative of each nonlinearity above at its value in the "
        "ordinary pass; no weights above are read.",
    ),
    Honest(
        KolenPollack,
        "nothing",
        "nothing",
        "The error comes down through feedback matrices that come to agree with the weights above, because they get the same updates; the "
        "weights themselves are not read, and no block is executed on other inputs.",
    ),
    Honest(
        WeightMirror,
        "nothing",
        "all",
        "The error comes down through feedback matrices that are learned from the responses of all blocks above to noise; no transpose is "
        "read.",
    ),
    Honest(
        Pepita,
        "nothing",
        "nothing",
        "A block learns from its own output in two forward passes; of the blocks above it gets the output error of the first pass alone, "
        "through a fixed random matrix and the blocks below. No transpose is needed.",
    ),
    Honest(
        EquilibriumPropagation,
        "all",
        "all",
        "The relaxation needs the transposed weights of all blocks above: at each of its iterations a state gets the next one through the "
        "transpose of the block between, so that after several the states of all above have come down; blocks run on relaxing states too.",
    ),
    Honest(
        DifferenceTargets,
        "all",
        "all",
        "Targets come down through inverses that are learned from the responses of all hidden blocks above to noised inputs; the topmost "
        "one is a gradient through the readout's transposed weights, the only ones that are read, and every hidden block depends on it.",
    ),
    Honest(
        TargetsThroughout,
        "nothing",
        "all",
        "Targets come down from the scores through inverses that are learned from the responses of all blocks above, the readout too, to "
        "noised inputs; no transpose is read.",
    ),
    Honest(
        MeZO,
        "nothing",
        "all",
        "All weights are moved in place along random directions and back; the update is the change of the loss times the direction, so "
        "that the weights above count as far as the loss of the perturbed network depends on them. No transpose is read.",
    ),
    Honest(
        Candidates,
        "nothing",
        "all",
        "The network is executed with candidates of all its weights at once, which are chosen by their losses; the weights above count as "
        "far as these losses depend on them. No transpose is read.",
    ),
)
