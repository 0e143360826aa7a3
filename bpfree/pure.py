"""Rules whose step is a pure function of parameters, buffers, batch and noise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bpfree.rule import Metrics, Rule
from bpfree.step import Batch, Step

__all__ = ["Gradients", "Pure"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Gradients:
    """The results of a pure step.

    Attributes:
        parameters: the gradient of each parameter that learns, by its name in ``rule.named_parameters()``; those without are left out.
        buffers: new values of buffers that have changed, by name.
        metrics: scalars.
    """

    parameters: Tensors
    buffers: Tensors = field(default_factory=dict)
    metrics: Tensors = field(default_factory=dict)


class Pure(Rule):
    """A rule that is given by one pure function, :meth:`gradients`.

    The function reads and writes no attribute that changes: everything comes in as an argument, and goes out as a result. So it can be
    compiled as a whole (``compile``), executed on other parameters (``torch.func.vmap`` over seeds or candidates), and tried out without
    a trainer. Trainer, certificate and alignment call :meth:`credit`, which calls it.
    """

    _step: _Step

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        object.__setattr__(self, "_step", _Step(self))  # no child: it would hold this module, and parameters twice

    @abstractmethod
    def gradients(self, parameters: Tensors, buffers: Tensors, batch: Batch, noise: Tensors) -> Gradients:
        """Compute a step.

        Args:
            parameters, buffers: of the rule, by name, detached; execute blocks on them with :meth:`run`.
            batch: the batch.
            noise: standard normal numbers, as :meth:`noise` asked for them.
        """

    def noise(self, batch: Batch) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each tensor of noise by a name of its own; none by default."""
        return {}

    def run(self, name: str, parameters: Tensors, buffers: Tensors, x: Any) -> Tensor:
        """Execute a block of the network on given parameters and buffers.

        Running statistics that the block would write are written into these buffers, not into the module.
        """
        prefix = f"network.blocks.{name}."
        own = {key.removeprefix(prefix): value for key, value in (*parameters.items(), *buffers.items()) if key.startswith(prefix)}
        output: Tensor = functional_call(self.network.blocks[name], own, (x,))
        return output

    def draw(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Draw the noise of a step, from generators that are keyed by its names."""
        shapes = self.noise(batch)
        return {
            name: torch.randn(shape, generator=(made := step.generator_for(name)), device=made.device, dtype=self.network.dtype)
            for name, shape in shapes.items()
        }

    def credit(self, batch: Batch, step: Step) -> Metrics:
        """Compute the step, add its gradients to ``.grad``, and take over its buffers."""
        learning = {name: p for name, p in self.named_parameters() if p.requires_grad}
        parameters = {name: p.detach() for name, p in self.named_parameters()}
        buffers = {name: b.clone() for name, b in self.named_buffers()}
        made: Gradients = self._step(parameters, buffers, batch, self.draw(batch, step))
        with torch.no_grad():
            for name, gradient in made.parameters.items():
                if name in learning:
                    parameter = learning[name]
                    parameter.grad = gradient.to(parameter.dtype) if parameter.grad is None else parameter.grad + gradient
            for name, value in {**buffers, **made.buffers}.items():
                own = self.get_buffer(name)
                if own is not value:
                    own.copy_(value)
        return {name: value.detach() for name, value in made.metrics.items()}

    def compiled(self) -> Iterable[nn.Module]:
        """Compile the step as a whole."""
        return [self._step]


class _Step(nn.Module):
    """The function as a module, which is what is compiled."""

    def __init__(self, rule: Pure) -> None:
        super().__init__()
        self._of = [rule]

    def forward(self, parameters: Tensors, buffers: Tensors, batch: Batch, noise: Tensors) -> Gradients:
        return self._of[0].gradients(parameters, buffers, batch, noise)
