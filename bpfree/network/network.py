"""A network: ordered named blocks, the last of which may be a readout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bpfree.errors import BpfreeError, UsageError, unknown_name
from bpfree.network.forward_mode import differentiable_kernels, prepare
from bpfree.network.trace import Trace, Traces, run_block, run_blocks
from bpfree.tasks.spec import TaskSpec, has_own_loss
from bpfree.tasks.trees import leaves, move

__all__ = ["Network", "check_readout", "evaluating"]

HandOver = Callable[[Trace], Tensor]
Perturb = Callable[[Trace], Tensor | None]


class Network(nn.Module):
    """Blocks in order, each the unit of local credit, and a readout.

    Args:
        blocks: name to module, in order of execution. Names may not contain a dot.
        input_shape: shape of one input, without the batch axis.
        readout: name of the block that makes the scores; it must be the last. ``None``: the network has none.
        chain: whether each block takes the previous one's output, and nothing else. Networks that are no chain are
            executed by their rule, block by block.
        example: inputs of one example (1, ...) for the dry run, where they are no single tensor of real numbers: ``spec.example(1)``.

    Attributes:
        shapes: shape of each block's output without the batch axis, from a dry run in eval mode (chains only).

    Raises:
        UsageError: a name with a dot, a readout that is not the last block, a block that overwrites its input, or
            blocks that do not fit each other or the input.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        *,
        input_shape: Sequence[int],
        readout: str | None = None,
        chain: bool = True,
        example: Any = None,
    ) -> None:
        super().__init__()
        names = list(blocks)
        for name in names:
            if "." in name or "+" in name:
                raise UsageError(f"a block's name may not contain '.' or '+': {name!r}", fix="use '_' instead")
        if readout is not None and (not names or names[-1] != readout):
            raise UsageError(f"the readout {readout!r} is not the last block", where=f"blocks: {', '.join(names)}")
        self.blocks = nn.ModuleDict(blocks)
        self.readout = readout
        self.chain = chain
        self.example = example
        self.input_shape = torch.Size(input_shape)
        self.shapes: dict[str, torch.Size] = self._dry_run(example) if chain else {}

    @property
    def names(self) -> list[str]:
        """Names of all blocks, in order."""
        return list(self.blocks)

    @property
    def hidden(self) -> list[str]:
        """Names of the blocks before the readout."""
        return [name for name in self.blocks if name != self.readout]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the inputs: that of the first floating-point parameter; float32 where there is none."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    def without_readout(self) -> Network:
        """Return the network's blocks without the readout, for a rule that has none; the network itself if it has no readout.

        Raises:
            UsageError: the readout is its only block.
        """
        if self.readout is None:
            return self
        if not self.hidden:
            raise UsageError(
                f"the network has no block but the readout {self.readout!r}", fix="use a deeper network, such as network.depth=2"
            )
        blocks = {name: self.blocks[name] for name in self.hidden}
        return Network(blocks, input_shape=self.input_shape, chain=self.chain, example=self.example)

    def _dry_run(self, example: Any) -> dict[str, torch.Size]:
        shapes = {}
        device, dtype = next((p.device for p in self.parameters()), torch.device("cpu")), self.dtype
        with torch.inference_mode(False), torch.no_grad(), evaluating(self):  # versions are looked at
            x = torch.zeros(1, *self.input_shape, device=device, dtype=dtype) if example is None else move(example, device)
            for name, block in self.blocks.items():
                versions = [leaf._version for leaf in leaves(x)]
                try:
                    y = block(x)
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    raise UsageError(
                        f"block {name!r} cannot take an input of shape {_shapes(x)}",
                        where=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                        fix="choose a network that fits the task's inputs, or change its sizes",
                    ) from error
                if [leaf._version for leaf in leaves(x)] != versions:
                    raise UsageError(
                        f"block {name!r} overwrites its input in place, which would corrupt its neighbour's output",
                        fix="set inplace=False on its first operation, or cut the blocks elsewhere",
                    )
                x = y
                if isinstance(x, Tensor):
                    shapes[name] = x.shape[1:]
        return shapes

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks in order: (N, *input_shape) to the last block's output.

        Raises:
            BpfreeError: if the network is no chain, which only its rule can execute.
        """
        if not self.chain:
            raise BpfreeError("this network is no chain of blocks", fix="call its rule's predict instead")
        for block in self.blocks.values():
            x = block(x)
        return x

    def features(self, x: Tensor) -> Tensor:
        """Compute the readout's input, (N, ...): the output of the last hidden block, or the inputs where there is none."""
        for name in self.hidden:
            x = self.blocks[name](x)
        return x

    def trace(self, names: str | Sequence[str], x: Tensor, *, input_grad: bool = False) -> Trace:
        """Execute a block, or a run of consecutive blocks, on ``x`` with a graph that ends at ``x``.

        The trace of a run has the output of each of its blocks in ``parts``. An extra pass moves running statistics as any pass does,
        unless it is made inside ``kept_buffers``.

        Args:
            names: a block's name, or consecutive ones.
            x: (N, ...) the block's input; it is detached.
            input_grad: whether the trace can return the input's cotangent.

        Raises:
            UsageError: for unknown names, or names that are not consecutive.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        order = self.names
        for name in wanted:
            if name not in self.blocks:
                raise unknown_name("block", name, order)
        first = order.index(wanted[0])
        if order[first : first + len(wanted)] != wanted:
            raise UsageError(f"blocks {wanted} are not consecutive", where=f"blocks: {', '.join(order)}")
        if len(wanted) == 1:
            return run_block(first, wanted[0], self.blocks[wanted[0]], x, input_grad=input_grad)
        return run_blocks(first, {name: self.blocks[name] for name in wanted}, x, input_grad=input_grad)

    def stream(self, x: Tensor, *, grad: bool = True, hand_over: HandOver | None = None) -> Iterator[Trace]:
        """Yield traces block by block, each made on demand, so that one graph at a time is alive.

        Args:
            x: (N, *input_shape).
            grad: ``False`` makes no graph at all.
            hand_over: makes the next block's input from a trace, so that it is not called after the last one; by default its detached
                output.
        """
        last = len(self.blocks) - 1
        for index, (name, block) in enumerate(self.blocks.items()):
            with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                trace = run_block(index, name, block, x)
            yield trace
            if index < last:
                x = trace.output.detach() if hand_over is None else hand_over(trace)
            del trace

    def traces(self, x: Any, *, input_grad: bool | Literal["needed"] = False, perturb: Perturb | None = None) -> Traces:
        """Return the traces of all blocks, from one execution.

        Args:
            x: (N, *input_shape).
            input_grad: whether traces return the cotangent of their input (needed to chain them); ``"needed"``: those above the lowest
                block that learns, which is all that a chain of credit asks for.
            perturb: gives, for each hidden block's trace, a direction of its output's shape (or ``None``). The
                result's ``tangent`` is the derivative of the last output along all of these at once, computed by
                forward mode in the same execution, so that dropout masks and running statistics are met once.
        """
        if perturb is not None:
            return self._perturbed_traces(x, perturb, bool(input_grad))
        result = Traces()
        asked = input_grad is True
        for index, (name, block) in enumerate(self.blocks.items()):
            trace = run_block(index, name, block, x, input_grad=asked)
            result.append(trace)
            x = trace.output
            asked = asked or (input_grad == "needed" and any(p.requires_grad for p in block.parameters()))
        return result

    def _perturbed_traces(self, x: Tensor, perturb: Perturb, input_grad: bool) -> Traces:
        result = Traces()
        tangent: Tensor | None = None
        prepare()
        with differentiable_kernels(self), forward_ad.dual_level():
            for index, (name, block) in enumerate(self.blocks.items()):
                source = x.detach()
                if input_grad:
                    source.requires_grad_()
                dual = source if tangent is None else forward_ad.make_dual(source, tangent)
                output, moved = forward_ad.unpack_dual(block(dual))
                trace = Trace(index, name, block, source, output)
                result.append(trace)
                direction = perturb(trace) if name != self.readout else None
                result.perturbations.append(direction)
                parts = [part.detach() for part in (moved, direction) if part is not None]
                tangent = sum(parts[1:], parts[0]) if parts else None
                x = output
        result.tangent = tangent
        return result


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run the module in eval mode and restore each submodule's own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _shapes(tree: Any) -> str:
    return " and ".join(str(tuple(leaf.shape[1:])) for leaf in leaves(tree))


def check_readout(network: Network, spec: TaskSpec) -> None:
    """Refuse a readout whose outputs are not those of the task (a spec with a loss of its own decides that itself)."""
    shape = network.shapes.get(network.readout or "")
    if shape is None or spec.targets == "none" or has_own_loss(spec):
        return
    if spec.targets == "tokens":
        fits = len(shape) > 1 and shape[-1] == spec.outputs
    elif spec.targets == "real" and spec.output_shape is None:
        fits = shape.numel() == spec.outputs
    else:
        fits = tuple(shape) == spec.output_size
    if not fits:
        wanted = spec.outputs if spec.output_size == (spec.outputs,) else spec.output_size
        raise UsageError(
            f"the readout {network.readout!r} gives outputs of shape {tuple(shape)}, but the task has {wanted}",
            where=f"task {spec.name}, targets={spec.targets!r}",
            fix=f"build the network with {spec.outputs} outputs, or correct the spec",
        )
