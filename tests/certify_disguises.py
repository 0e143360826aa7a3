"""Back-propagation in disguise: rules that say they are local, and carry credit through the weights above in one way or another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from certify_cheaters import LocalHeads
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bpfree import Batch, Card, Phase, Rule, Step, Trace, Traits, always

LOCAL = Traits(dependence="all", downstream_weights=0, reverse_span=1)


class Liar(Rule):
    """Says that it is local; what descends is in ``gradients``."""

    card = Card("a liar", equation="none")
    traits_of = always(LOCAL)

    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """By parameter of the network."""
        raise AssertionError

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        for name, gradient in self.gradients(batch, step).items():
            p = self.network.get_parameter(name)
            if p.requires_grad:
                p.grad = gradient.detach().clone() if p.grad is None else p.grad + gradient.detach()
        with torch.no_grad():
            return {"loss": self.spec.loss(self.network(batch.inputs), batch)}

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.network.named_parameters()}

    def loss_of(self, values: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.spec.loss(functional_call(self.network, values, (batch.inputs,)), batch)


class Autograd(Liar):
    """Plainly."""

    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        named = dict(self.network.named_parameters())
        loss = self.spec.loss(self.network(batch.inputs), batch)
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


class FuncGrad(Liar):
    """torch.func.grad."""

    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        found: dict[str, Tensor] = torch.func.grad(self.loss_of)(self.values(), batch)
        return found


class Vmapped(Liar):
    """torch.func.grad per example, under vmap."""

    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        def one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.loss_of(values, Batch(x[None], y[None]))

        parts = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(self.values(), batch.inputs, batch.targets)
        return {name: part.mean(0) for name, part in parts.items()}


class RawEngine(Liar):
    """The engine behind torch.autograd, called directly."""

    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        named = dict(self.network.named_parameters())
        loss = self.spec.loss(self.network(batch.inputs), batch)
        engine = torch.autograd.Variable._execution_engine
        found = engine.run_backward((loss,), (torch.ones_like(loss),), False, False, tuple(named.values()), False, accumulate_grad=False)
        return dict(zip(named, found, strict=True))


class Checkpointed(Liar):
    """Every block in a reentrant checkpoint, so that each inner call crosses one."""

    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        x = batch.inputs.clone().requires_grad_()
        for block in self.network.blocks.values():
            x = checkpoint(block, x, use_reentrant=True)
        self.spec.loss(x, batch).backward()
        found = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        for p in self.network.parameters():
            p.grad = None
        return found


class CopiedWeights(Liar):
    """End to end through a copy of the network, made at each step."""

    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        other = copy.deepcopy(self.network)
        other.requires_grad_(True)
        named = dict(other.named_parameters())
        loss = self.spec.loss(other(batch.inputs), batch)
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


class _Nested(torch.autograd.Function):
    """A block whose backward runs a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.block(x).backward(signal)
        return x.grad, None


class NestedFunctions(Liar):
    """Custom functions within custom functions."""

    function: Any = _Nested

    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        x = batch.inputs.clone().requires_grad_()
        for block in self.network.blocks.values():
            x = self.function.apply(x, block)
        self.spec.loss(x, batch).backward()
        found = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        for p in self.network.parameters():
            p.grad = None
        return found


class _NestedRaw(_Nested):
    """The same with the engine called directly."""

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.Variable._execution_engine.run_backward((y,), (signal,), False, False, (), True, accumulate_grad=True)
        return x.grad, None


class NestedEngine(NestedFunctions):
    """Custom functions that call the engine, one block each."""

    function = _NestedRaw


def layers(rule: Rule) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of an MLP with tanh."""
    for name, module in rule.network.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


class HandWritten(Liar):
    """The chain rule by hand, without autograd: spans nothing."""

    traits_of = always(Traits(dependence="all", downstream_weights=0, reverse_span=0))

    @torch.no_grad()
    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        h, seen = batch.inputs.flatten(1), []
        found = list(layers(self))
        for index, (_, layer) in enumerate(found):
            seen.append(h)
            h = layer(h) if index == len(found) - 1 else layer(h).tanh()
        delta, result = self.spec.error(h, batch), {}
        for index in range(len(found) - 1, -1, -1):
            name, layer = found[index]
            result[f"{name}.weight"], result[f"{name}.bias"] = delta.T @ seen[index], delta.sum(0)
            delta = (delta @ self.transposed(index, layer)) * (1 - seen[index].square())
        return result

    def transposed(self, index: int, layer: nn.Linear) -> Tensor:
        return layer.weight.clone()


class PhaseCopies(HandWritten):
    """The transposed weights above, copied once when a phase begins."""

    def start_phase(self, phase: Phase) -> None:
        self.copies = [layer.weight.detach().clone() for _, layer in layers(self)]

    def transposed(self, index: int, layer: nn.Linear) -> Tensor:
        return self.copies[index]


class ForwardBasis(Liar):
    """The whole Jacobian by forward mode: all basis directions of a block's output, one after the other in a batch."""

    traits_of = always(Traits(dependence="all", downstream_weights=0, reverse_span=0))

    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        names, result, x = self.network.names, {}, batch.inputs
        for place, name in enumerate(names):
            trace = self.network.trace(name, x)
            x = trace.output.detach()
            signal, (count, units) = torch.zeros_like(x), x.shape
            with forward_ad.dual_level(), torch.no_grad():
                directions = torch.eye(units, dtype=x.dtype).repeat_interleave(count, 0)
                h = forward_ad.make_dual(x.repeat(units, 1), directions)  # the batch once for each direction
                for above in names[place + 1 :]:
                    h = self.network.blocks[above](h)
                output, tangent = forward_ad.unpack_dual(h)
                if tangent is not None:
                    error = self.spec.error(output[:count], batch)
                    signal = (tangent.view(units, count, -1) * error).sum(2).T
            with torch.no_grad():
                self._local(name, trace.input.flatten(1), x, signal, result)
        return result

    def _local(self, name: str, source: Tensor, output: Tensor, signal: Tensor, result: dict[str, Tensor]) -> None:
        own = next(path for path, _ in layers(self) if f"{path}.".startswith(f"blocks.{name}."))
        delta = signal if name == self.network.readout else signal * (1 - output.square())
        result[f"{own}.weight"], result[f"{own}.bias"] = delta.T @ source, delta.sum(0)


class OneTooMany(LocalHeads):
    """Local losses, but each block's reaches one block below: it forgets to detach where it should."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        x, previous = batch.inputs, None
        loss: Tensor = torch.zeros(())
        for index, (name, block) in enumerate(self.network.blocks.items()):
            entry = x if previous is None else previous
            y = block(entry)
            trace = Trace(index, name, block, entry, y)
            part = self.spec.loss(y, batch) if name == self.network.readout else self.local_loss(trace, batch, step)
            part.backward()
            loss = part.detach()
            previous = block(entry.detach())
        return {"loss": loss}


class Chained(Liar):
    """Vector-Jacobian products, one block at a time: span one, and exactly back-propagation."""

    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        traces = self.network.traces(batch.inputs, input_grad=True)
        signal: Any = self.spec.error(traces[-1].output, batch)
        for trace in reversed(traces):
            signal = trace.backward(signal)
        found = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        for p in self.network.parameters():
            p.grad = None
        return found


DISGUISES = [
    *(Autograd, FuncGrad, Vmapped, RawEngine, Checkpointed, CopiedWeights, NestedFunctions),
    *(HandWritten, PhaseCopies, ForwardBasis, Chained),
]
