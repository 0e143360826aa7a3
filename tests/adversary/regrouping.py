"""Networks whose blocks are not what they seem: merged, emptied, reversed, tied, or with another network beside them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from adversary.kit import LOCAL, Cheater, Pass, Smuggler, linear
from bpfree import Batch, Card, Network, Phase, Rule, Step, always
from bpfree.network import add_gradient


class Local(Rule):
    """Each block learns alone from the error, as far as it can see."""

    card = Card("each block learns alone", equation="grad W_l = d loss_l / d W_l")
    traits_of = always(LOCAL)

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        return super().specimen(kind, depth, width) if kind == "dense" else None

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Let the readout learn from the error, and each hidden block from a random projection of it."""
        traces = self.network.traces(batch.inputs)
        scores = traces[-1].output.detach()
        error = self.spec.error(scores, batch)
        for trace in traces[:-1]:
            units = trace.output[0].numel()
            feedback = torch.randn(error.shape[1], units, generator=torch.Generator().manual_seed(trace.index)) / units**0.5
            trace.backward((error @ feedback.to(error.dtype)).view_as(trace.output))
        traces[-1].backward(error)
        return {"loss": self.spec.loss(scores, batch)}


class OneReadout(Local):
    """Takes the whole network as its readout, so that credit within a block is credit everywhere."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        whole = nn.Sequential(*network.blocks.values())
        super().__init__(Network({"readout": whole}, input_shape=network.input_shape, readout="readout"), spec, config)


class EmptiesBlocks(Local):
    """Moves all layers into the readout when training begins; the other blocks hand over what they are given."""

    def start_phase(self, phase: Phase) -> None:
        blocks = self.network.blocks
        if not any(isinstance(blocks[name], nn.Identity) for name in self.network.hidden):
            blocks["readout"] = nn.Sequential(*blocks.values())
            for name in self.network.hidden:
                blocks[name] = nn.Identity()


class Borrows(nn.Module):
    """A block without parameters, which executes a module of another block."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.lent = [module]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.lent[0](x)
        return made


class EverythingBelow(Local):
    """Keeps the parameters of all blocks in the first one, from which the others borrow theirs: none is above."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        first = self.network.blocks[self.network.names[0]]
        rest = self.network.names[1:]
        kept = [self.network.blocks[name] for name in rest]
        self.network.blocks[self.network.names[0]] = First(first, kept)
        for name, module in zip(rest, kept, strict=True):
            self.network.blocks[name] = Borrows(module)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.network(batch.inputs), batch)
        for parameter, gradient in zip(self.network.parameters(), torch.autograd.grad(loss, [*self.network.parameters()]), strict=True):
            add_gradient(parameter, gradient)
        return {"loss": loss.detach()}


class First(nn.Module):
    """A block that holds more than it executes."""

    def __init__(self, own: nn.Module, bank: list[nn.Module]) -> None:
        super().__init__()
        self.own, self.bank = own, nn.ModuleList(bank)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.own(x)
        return made


class LooksAhead(Local):
    """Each block's own loss is that of the blocks above on its output, with their weights held fixed."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        traces, names = self.network.traces(batch.inputs), self.network.names
        for trace in traces:
            x = trace.output
            for name in names[trace.index + 1 :]:
                x = self.network.blocks[name](x)
            own = [p for p in trace.block.parameters() if p.requires_grad]
            if own:
                for parameter, gradient in zip(own, torch.autograd.grad(self.spec.loss(x, batch), own), strict=True):
                    add_gradient(parameter, gradient)
        return {"loss": self.spec.loss(traces[-1].output.detach(), batch)}


class Upwards(Network):
    """A network that executes its blocks from the last to the first."""

    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks.values()):
            x = block(x)
        return x

    def features(self, x: Tensor) -> Tensor:
        for name in reversed(self.hidden):
            x = self.blocks[name](x)
        return x


class UpsideDown(Local):
    """Lists its blocks from the readout down, so that those above come before those below."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.network.blocks = nn.ModuleDict(dict(reversed(self.network.blocks.items())))
        self.network.__class__ = Upwards

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.network(batch.inputs), batch)
        loss.backward()
        return {"loss": loss.detach()}


class SharedStorage(Smuggler):
    """Has feedback parameters of its own that lie in the same memory as the weights above."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.feedback = nn.ParameterDict({name: nn.Parameter(weight) for name, weight in self.weights().items()})

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return {name: matrix.detach() for name, matrix in self.feedback.items()}


class Spying(nn.Linear):
    """A linear layer that notes the weight with which it is executed."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        self.__dict__.setdefault("noted", []).append(weight.detach().clone())
        return F.linear(x, weight, bias)


class SwapsClasses(Smuggler):
    """Makes the layers above layers of its own kind, which note the weights of the ordinary pass."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found, layers = self.fixed(), {name: linear(self.network.blocks[name]) for name in self.above}
        for name, layer in layers.items():
            if isinstance(layer, Spying):
                found[name] = layer.__dict__.pop("noted")[-1]
            layer.__class__ = Spying
        return found


class DeepHead(Smuggler):
    """Has a head that is a deep network on the raw inputs, and predicts with it."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        sizes = [spec.input_size, *(self.network.shapes[name].numel() for name in self.network.hidden)]
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.head = nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], spec.outputs)).to(self.network.dtype)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        self.spec.loss(self.head(batch.inputs), batch).backward()
        return metrics

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores: Tensor = self.head(inputs)
        return scores


class Carries(nn.Module):
    """A block that hands the raw inputs on beside its output."""

    def __init__(self, block: nn.Module, inputs: int, first: bool) -> None:
        super().__init__()
        self.block, self.inputs, self.first = block, inputs, first

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        own = x if self.first else x[:, : -self.inputs]
        return torch.cat([self.block(own), x[:, -self.inputs :]], 1)


class OnlyItsTail(nn.Module):
    """A readout that is deep, and reads the raw inputs alone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.layers = nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, outputs))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x[:, -self.inputs :])
        return scores


class CarriesTheInputs(Local):
    """Hands the raw inputs on from block to block, up to a readout that is a deep network on them."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        size, dtype = spec.input_size, network.dtype
        blocks = {name: Carries(network.blocks[name], size, index == 0) for index, name in enumerate(network.hidden)}
        deep = {**blocks, "readout": OnlyItsTail(size, spec.outputs).to(dtype)}
        super().__init__(Network(deep, input_shape=network.input_shape, readout="readout"), spec, config)


class Tells(nn.Module):
    """A parametrization that changes nothing, and notes what it is given."""

    def forward(self, weight: Tensor) -> Tensor:
        self.__dict__["told"] = weight.detach().clone()
        return weight


class Parametrised(Smuggler):
    """Registers parametrizations for the weights above, which are told these whenever a layer is executed."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.told = {name: Tells() for name in self.above}
        for name, part in self.told.items():
            register_parametrization(linear(self.network.blocks[name]), "weight", part)

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return {name: part.__dict__["told"] for name, part in self.told.items()}


class TiedBlocks(Smuggler):
    """Ties the hidden layers of one size to each other: what is above is a block's own weight."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        layers = [linear(self.network.blocks[name]) for name in self.network.hidden[1:]]
        self.tied = [layer for layer in layers if layer.weight.shape == layers[0].weight.shape][1:]
        for layer in self.tied:
            layer.weight = layers[0].weight

    def groups(self) -> dict[str, list[nn.Parameter]]:
        taken: set[int] = set()
        found: dict[str, list[nn.Parameter]] = {}
        for name, members in super().groups().items():
            found[name] = [p for p in members if id(p) not in taken]
            taken.update(map(id, members))
        return found

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        own = self.weights()[self.above[0]]
        return {name: own if matrix.shape == own.shape else matrix for name, matrix in self.fixed().items()}


class Decoy(nn.Module):
    """A block whose own weights hardly matter: it executes a layer that lies elsewhere."""

    def __init__(self, block: nn.Sequential, elsewhere: nn.Module) -> None:
        super().__init__()
        self.block, self.lent = block, [elsewhere]

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.lent[0](x) + 1e-3 * (self.block(x) if isinstance(self.block, nn.Linear) else self.block[0](x))
        return mixed if isinstance(self.block, nn.Linear) else mixed.relu()


class Decoys(Smuggler):
    """Keeps the weights that matter in modules of its own, as if they were feedback; the blocks above have others beside them."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        layers = {name: linear(self.network.blocks[name]) for name in self.above}
        made = {name: nn.Linear(layer.in_features, layer.out_features, bias=False) for name, layer in layers.items()}
        self.feedback = nn.ModuleDict(made).to(self.network.dtype)
        for name in self.above:
            self.network.blocks[name] = Decoy(self.network.blocks[name], self.feedback[name])

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return {name: part.weight.detach() for name, part in self.feedback.items()}  # type: ignore[misc, operator]

    def before_update(self, groups: Sequence[str]) -> None:
        for name in self.above:
            self.feedback[name].weight.grad = linear(self.network.blocks[name]).weight.grad  # type: ignore[assignment]

    def down(self, name: str, delta: Tensor, matrix: Tensor, batch: Batch) -> Tensor:
        return 1e3 * delta @ matrix


class FatFirstBlock(Local):
    """Makes its first block a deep network that ends with scores; what is above hands on what it makes."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        rest = {name: network.blocks[name] for name in network.hidden[1:]}
        units = network.shapes[network.names[0]].numel()
        deep = [part for _ in range(3) for part in (nn.Linear(units, units), nn.ReLU())]
        first = nn.Sequential(*network.blocks[network.names[0]], *deep).to(network.dtype)
        blocks = {network.names[0]: first, **rest, "readout": network.blocks[network.readout]}
        super().__init__(Network(blocks, input_shape=network.input_shape, readout="readout"), spec, config)
        for block in rest.values():
            nn.init.eye_(linear(block).weight)
        self.head = nn.Linear(units, spec.outputs).to(network.dtype)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        first = self.network.trace(self.network.names[0], batch.inputs)
        self.spec.loss(self.head(first.output), batch).backward()
        x = first.output.detach()
        for name in self.network.names[1:]:
            trace = self.network.trace(name, x)
            x = trace.output.detach()
        trace.backward(self.spec.error(x, batch))
        return {"loss": self.spec.loss(x, batch)}


CHEATERS = (
    Cheater(OneReadout, "regrouping", "It takes the whole network as one block, its readout.", "network"),
    Cheater(EmptiesBlocks, "regrouping", "It moves all layers into the readout when training begins.", "network"),
    Cheater(EverythingBelow, "regrouping", "It keeps all parameters in the first block, from which the others borrow them.", "network"),
    Cheater(LooksAhead, "regrouping", "Its local losses are those of the blocks above on a block's output.", "reads"),
    Cheater(UpsideDown, "regrouping", "It lists the blocks in reversed order, so that those above seem to be below.", "reads"),
    Cheater(SharedStorage, "regrouping", "Its feedback parameters lie in the memory of the weights above.", "reads"),
    Cheater(SwapsClasses, "regrouping", "It makes the layers above note the weights with which they are executed.", "reads"),
    Cheater(Parametrised, "regrouping", "It parametrizes the weights above, and records them when they are executed.", "reads"),
    Cheater(TiedBlocks, "regrouping", "It ties hidden layers, so that its own weight is that of the layers above.", "reads"),
    Cheater(
        Decoys, "regrouping", "Its blocks execute layers that lie in the rule, as feedback, beside weights that hardly matter.", "network"
    ),
    Cheater(FatFirstBlock, "regrouping", "Its first block is a deep network that makes the scores.", "network"),
    Cheater(DeepHead, "regrouping", "It predicts with a head that is a deep network on the raw inputs.", "network"),
    Cheater(CarriesTheInputs, "regrouping", "It hands the raw inputs on to a readout that is a deep network.", "network"),
)
