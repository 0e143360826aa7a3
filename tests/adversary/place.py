"""Reading the weights above in other places than the parameters, or learning them from executions."""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from adversary.kit import Cheater, Pass, Smuggler, linear
from bpfree import Batch, Step
from bpfree.network import Trace, Traces, recorded_calls


class SavedOperands(Smuggler):
    """Takes the weights out of the graphs of the ordinary forward pass: each product saves its factors."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name in self.above:
            (given,) = done.traces[self.network.names.index(name)].input.shape[1:]
            with recorded_calls(linear(self.network.blocks[name])) as calls:
                self.network.trace(name, done.calls[name].input, input_grad=True)
            node = calls[linear(self.network.blocks[name])][0].output.grad_fn
            found[name] = node._saved_mat2.detach().T  # type: ignore[union-attr]
            assert found[name].shape[1] == given
        return found


class ByAddress(Smuggler):
    """Noted the addresses of the weights when it was built, and reads the memory there."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.addresses = {name: weight.data_ptr() for name, weight in self.weights().items()}
        self.held = [[weight] for weight in self.weights().values()]

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name, blank in self.fixed().items():
            size = blank.numel() * blank.element_size()
            memory = bytearray(ctypes.string_at(self.addresses[name], size))
            found[name] = torch.frombuffer(memory, dtype=blank.dtype).view_as(blank)
        return found


class OldArrays(Smuggler):
    """Made numpy arrays that share memory with the weights when it was built, in the default of an argument."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        arrays = {name: weight.numpy() for name, weight in self.weights().items()}

        def read(arrays: dict[str, Any] = arrays) -> dict[str, Tensor]:
            return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

        self.read_arrays = read

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return self.read_arrays()


class BasisVectors(Smuggler):
    """Executes the linear layers above on the vectors of a basis."""

    @torch.no_grad()
    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name, blank in self.fixed().items():
            layer, units = linear(self.network.blocks[name]), torch.eye(blank.shape[1], dtype=blank.dtype)
            found[name] = (layer(units) - layer(torch.zeros_like(units))).T
        return found


class RowsAmongOthers(Smuggler):
    """Executes each block above on its ordinary inputs, with rows in which one unit is moved a little among them."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name, blank in self.fixed().items():
            x, layer = done.calls[name].input.detach(), linear(self.network.blocks[name])
            moved = x.mean(0) + 0.01 * torch.eye(blank.shape[1], dtype=x.dtype)
            with torch.no_grad(), recorded_calls(layer) as calls:
                self.network.blocks[name](torch.cat([x, x.mean(0, keepdim=True), moved]))
            made = calls[layer][0].output[len(x) :]
            found[name] = (made[1:] - made[:1]).T / 0.01
        return found


class SameTensor(Smuggler):
    """Writes the vectors of a basis into the very tensor that a layer had as its ordinary input, and executes the layer on it again."""

    @torch.no_grad()
    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name, blank in self.fixed().items():
            x, layer = done.calls[name].input.data, linear(self.network.blocks[name])
            kept, rest = x.clone(), layer(x.zero_())[:1]
            rows = []
            for units in torch.eye(blank.shape[1], dtype=x.dtype).split(len(x)):
                x.zero_()[: len(units)] = units
                rows.append(layer(x)[: len(units)] - rest)
            x.copy_(kept)
            found[name] = torch.cat(rows).T
        return found


class ProbesFirst(BasisVectors):
    """Executes the layers above on a basis before its ordinary pass: the first execution of a step is the one that probes."""

    def execute(self, batch: Batch, step: Step) -> Pass:
        self.probed = super().matrices(Pass(Traces(), {}), batch, step)
        return super().execute(batch, step)

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return self.probed


class ProbesWhilePredicting(BasisVectors):
    """Executes the layers above on a basis when it is asked for predictions, outside of steps."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        for name, probed in BasisVectors.matrices(self, Pass(Traces(), {}), Batch(inputs), None).items():  # type: ignore[arg-type]
            self.get_buffer(f"fixed_{name}").copy_(probed)
        return super().predict(inputs, generator)

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return self.fixed()


class Passengers(Smuggler):
    """Executes each block once, on ordinary rows and on the vectors of a basis that travel with them between the blocks."""

    def execute(self, batch: Batch, step: Step) -> Pass:
        x, traces, calls, self.read = batch.inputs, Traces(), dict[str, Any](), dict[str, Tensor]()
        for index, (name, block) in enumerate(self.network.blocks.items()):
            x = x.detach()
            if index:
                units = torch.eye(x.shape[1], dtype=x.dtype)
                x = torch.cat([x, torch.zeros_like(units[:1]), units])
            with recorded_calls(linear(block)) as seen:
                y = block(x)
            made = seen[linear(block)][0]
            calls[name] = made
            self.read[name] = (made.output[len(batch) + 1 :] - made.output[len(batch) : len(batch) + 1]).detach().T
            traces.append(Trace(index, name, block, x[: len(batch)], y[: len(batch)]))
            x = y[: len(batch)]
        return Pass(traces, calls)

    def down(self, name: str, delta: Tensor, matrix: Tensor, batch: Batch) -> Tensor:
        return delta[: len(batch)] @ matrix

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return self.read


class NudgesItsOutputs(Smuggler):
    """Moves each unit of a block a little, and sees in executions of the blocks above what becomes of the loss."""

    @torch.no_grad()
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        with torch.enable_grad():
            traces = self.network.traces(batch.inputs)
        for trace in traces[:-1]:
            x = trace.output.detach()
            count, units = x.shape
            moved = torch.cat([x, x.repeat(units, 1) + 0.01 * torch.eye(units, dtype=x.dtype).repeat_interleave(count, 0)])
            for name in self.network.names[trace.index + 1 :]:
                moved = self.network.blocks[name](moved)
            losses = self.spec.losses(moved, Batch(moved, None if batch.targets is None else batch.targets.repeat(units + 1)))
            losses = losses.view(units + 1, count)
            trace.backward((losses[1:] - losses[0]).T / (0.01 * count))
        scores = traces[-1].output.detach()
        traces[-1].backward(self.spec.error(scores, batch))
        return {"loss": self.spec.loss(scores, batch)}


class MirrorsItsNoise(Smuggler):
    """Shows each example twice, with opposite noise between its blocks, and correlates what it meets above with the noise."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        targets = None if batch.targets is None else batch.targets.repeat(2)
        return super().credit(Batch(batch.inputs.repeat(2, *[1] * (batch.inputs.dim() - 1)), targets), step)

    def execute(self, batch: Batch, step: Step) -> Pass:
        x, traces, self.noise = batch.inputs, Traces(), dict[str, Tensor]()
        layers = {name: linear(block) for name, block in self.network.blocks.items()}
        with recorded_calls(*layers.values()) as calls:
            for name in self.network.names:
                traces.append(self.network.trace(name, x))
                half = traces[-1].output.detach()[len(batch) // 2 :]
                self.noise[name] = 0.2 * torch.randn(half.shape, generator=step.generator_for(name)).to(half.dtype)
                x = traces[-1].output.detach() + torch.cat([self.noise[name], -self.noise[name]])
        return Pass(traces, {name: calls[layer][0] for name, layer in layers.items()})

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        for below, name in zip(self.network.names, self.above, strict=False):
            noise = torch.cat([self.noise[below], -self.noise[below]])
            mirrored = done.calls[name].output.detach().T @ noise / (len(noise) * 0.04)
            self.get_buffer(f"fixed_{name}").lerp_(mirrored, max(0.05, 1 / (1 + step.index)))
        return self.fixed()


class LeastSquares(Smuggler):
    """Keeps inputs and outputs of the layers above from its ordinary passes, and solves for the weights between them."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.above}

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        for name, kept in self.kept.items():
            kept.append((done.calls[name].input.detach(), done.calls[name].output.detach()))
            del kept[:-4]
            inputs, outputs = torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept])
            inputs, outputs = inputs - inputs.mean(0), outputs - outputs.mean(0)
            gram = inputs.T @ inputs
            ridge = 1e-4 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
            self.get_buffer(f"fixed_{name}").copy_(torch.linalg.solve(gram + ridge, inputs.T @ outputs).T)
        return self.fixed()


class TangentsAtTheInputs(Smuggler):
    """Takes derivatives of the blocks above by forward mode, at their ordinary inputs and in no other place."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name, blank in self.fixed().items():
            x, layer = done.calls[name].input.detach(), linear(self.network.blocks[name])

            def along(direction: Tensor, layer: nn.Module = layer, x: Tensor = x) -> Tensor:
                tangent: Tensor = torch.func.jvp(layer, (x,), (direction.expand_as(x),))[1]
                return tangent[0]

            found[name] = torch.func.vmap(along)(torch.eye(blank.shape[1], dtype=x.dtype)).T.detach()
        return found


class PulledBackFunctionally(Smuggler):
    """Takes the credit of each block down with a functional pullback of its own, at its ordinary input."""

    def down(self, name: str, delta: Tensor, matrix: Tensor, batch: Batch) -> Tensor:
        _, pullback = torch.func.vjp(linear(self.network.blocks[name]), self.inputs[name])
        signal: Tensor = pullback(delta)[0]
        return signal.detach()

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        self.inputs = {name: call.input.detach() for name, call in done.calls.items()}
        return self.fixed()


class TwiceBackwards(Smuggler):
    """Differentiates the pullbacks of the layers above, at their ordinary inputs, which gives the weights themselves."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name, blank in self.fixed().items():
            x = done.calls[name].input.detach().requires_grad_()
            y = linear(self.network.blocks[name])(x)
            dummy = torch.zeros_like(y, requires_grad=True)
            (pulled,) = torch.autograd.grad(y, x, dummy, create_graph=True)
            units = torch.eye(blank.shape[1], dtype=x.dtype)[:, None] * (torch.arange(len(x)) == 0)[:, None]
            (rows,) = torch.autograd.grad(pulled, dummy, units, is_grads_batched=True)
            found[name] = rows[:, 0].T.detach()
        return found


class TracedConstants(Smuggler):
    """Has torch trace the blocks above on their ordinary inputs, and looks for the weights among the constants of the graphs."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name, blank in self.fixed().items():
            graph = make_fx(self.network.blocks[name])(done.calls[name].input.detach())
            constants = [value for value in vars(graph).values() if isinstance(value, Tensor)] + [*graph.parameters(), *graph.buffers()]
            found[name] = next(c.detach() for c in constants if c.shape == blank.shape)
        return found


class DeepCopies(Smuggler):
    """Copies the blocks above, and reads the copies after a pass through their ordinary inputs."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        copies = {name: copy.deepcopy(self.network.blocks[name]) for name in self.above}
        for name, block in copies.items():
            block(done.calls[name].input.detach())
        return {name: linear(block).weight.detach() for name, block in copies.items()}


class WhateverFits(Smuggler):
    """Searches the whole process for a tensor that explains what a block above has made of its ordinary input."""

    def candidates(self) -> Iterable[Tensor]:
        return [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and thing.dim() == 2]

    @torch.no_grad()
    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found, everything = self.fixed(), self.candidates()
        for name, blank in self.fixed().items():
            x, y = done.calls[name].input.detach()[:6], done.calls[name].output.detach()[:6]
            for tensor in everything:
                if tensor.shape == blank.shape and tensor.dtype == blank.dtype:
                    rest = y - x @ tensor.T
                    if float((rest - rest.mean(0)).abs().max()) < 1e-4:
                        found[name] = tensor.detach().clone()
        return found


CHEATERS = (
    Cheater(SavedOperands, "place", "It reads the weights above that the graph of an ordinary execution has saved.", "reads"),
    Cheater(ByAddress, "place", "It reads the memory at the addresses that the weights above had when it was built.", "reads"),
    Cheater(OldArrays, "place", "It reads numpy views of the weights above that it made when it was built.", "reads"),
    Cheater(BasisVectors, "place", "It executes the layers above on the vectors of a basis.", "executes"),
    Cheater(RowsAmongOthers, "place", "It executes the blocks above on ordinary rows and on moved ones in one batch.", "executes"),
    Cheater(SameTensor, "place", "It writes a basis into the tensor that was a layer's ordinary input, and executes it again.", "executes"),
    Cheater(ProbesFirst, "place", "It executes the layers above on a basis before its ordinary pass.", "executes"),
    Cheater(ProbesWhilePredicting, "place", "It executes the layers above on a basis when it predicts.", "executes"),
    Cheater(Passengers, "place", "Its one pass has a basis beside the ordinary rows.", "executes"),
    Cheater(NudgesItsOutputs, "place", "It executes the blocks above on its output with each unit moved.", "executes"),
    Cheater(MirrorsItsNoise, "place", "It adds noise to the ordinary pass and correlates the outputs above with it.", "executes"),
    Cheater(LeastSquares, "place", "It solves for the weights above from inputs and outputs of ordinary passes.", "executes"),
    Cheater(TangentsAtTheInputs, "place", "It takes forward-mode derivatives of the layers above at their ordinary inputs.", "executes"),
    Cheater(PulledBackFunctionally, "place", "It pulls the credit back through each layer above at its ordinary input.", "reads"),
    Cheater(TwiceBackwards, "place", "It differentiates pullbacks of the layers above at their ordinary inputs.", "executes"),
    Cheater(TracedConstants, "place", "It traces the blocks above and reads the constants of the graphs.", "reads"),
    Cheater(DeepCopies, "place", "It reads deep copies of the blocks above that it has executed.", "reads"),
    Cheater(WhateverFits, "place", "It takes from the whole process whatever tensor explains the outputs of the blocks above.", "patches"),
)
