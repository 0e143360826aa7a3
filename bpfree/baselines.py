"""The core's own rules: the ceiling, an own-prediction twin, and two references.

``backprop`` is the ceiling of every comparison, ``frozen`` (random features with a trained readout) the own-prediction twin of rules on
the common networks; ``linear`` is a linear classifier trained like the others, and ``dfa`` is the shortest honest local rule. None of them
is the floor, which is solved and not trained: :mod:`bpfree.training.floor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.network.replaced_backward import broadcast_backward, broadcast_shapes
from bpfree.network.trace import Traces
from bpfree.options import OptimizerConfig, option
from bpfree.rule import Broadcast, Card, Metrics, Rule, Traits, always
from bpfree.step import Batch, Step
from bpfree.tasks.task import TaskSpec

__all__ = ["DFA", "Backprop", "Frozen", "Linear"]

# A ceiling that is too low would flatter every rule beside it. So the rate of the
# references is back-propagation's best of 0.001, 0.003, 0.01 and 0.03 on the validation split of digits (30 epochs, 5 seeds);
# frozen features take it too. On validation, a linear classifier would like 0.01 on digits (1.0 points more; 97.4 % on test),
# but not on MNIST (2.2 less).


class Backprop(Rule):
    """End-to-end back-propagation: ordinary autograd through the whole network."""

    card = Card(
        "end-to-end back-propagation: the ceiling of every comparison",
        paper="Rumelhart, Hinton, Williams: Learning representations by back-propagating errors. Nature 323 (1986)",
        equation="delta_l = J_{l+1}^T delta_{l+1};  grad W_l = delta_l h_{l-1}^T",
    )
    traits_of = always(Traits(dependence="all", downstream_weights="all", reverse_span="all"))
    optimizer_of = always(OptimizerConfig("adam", lr=3e-3))

    def credit(self, batch: Batch, step: Step) -> Metrics:
        loss = self.spec.loss(self.network(batch.inputs), batch)
        if loss.requires_grad:  # not in a phase in which only frozen blocks would learn
            loss.backward()
        return {"loss": loss.detach()}


class Frozen(Rule):
    """Random features: hidden blocks stay as initialised, the readout is trained on their output."""

    card = Card(
        "random features with a trained readout: the own-prediction twin of rules on the common networks",
        equation="grad W_readout = (softmax(W h) - y) h^T;  hidden blocks: none",
        notes="No floor: a readout that is trained for a few epochs at some rate has not converged. A study measures the floor itself. "
        "Running statistics of batch norm still follow the data.",
    )
    traits_of = always(Traits(dependence="upstream", downstream_weights=0, reverse_span=1))
    optimizer_of = Backprop.optimizer_of

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.freeze_features()

    def credit(self, batch: Batch, step: Step) -> Metrics:
        loss = self.spec.loss(self.network(batch.inputs), batch)
        if loss.requires_grad:  # not in a phase in which only frozen blocks would learn
            loss.backward()
        return {"loss": loss.detach()}


class Linear(Backprop):
    """A linear classifier on the inputs: the accuracy that needs no hidden layer."""

    card = Card("a linear classifier on the raw inputs", equation="grad W = (softmax(W x) - y) x^T")
    traits_of = always(Traits(dependence="independent", downstream_weights=0, reverse_span=1))
    brings_network = True

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        if self.network.hidden:
            raise UsageError(
                f"a linear classifier has no hidden blocks, this network has {len(self.network.hidden)}", fix="use network.depth=0"
            )

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        return {"name": "mlp", "depth": 0}

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        return {"network.name": "mlp", "network.depth": 0} if kind == "dense" else None


@dataclass
class DFAConfig:
    """Options of direct feedback alignment."""

    scale: float = option(1.0, "deviation of the feedback weights times sqrt(number of classes); in layers: over Xavier's", gt=0)
    error: Literal["full", "sign"] = option("full", "what is sent to hidden blocks: the output error, or the signs of its entries")
    placement: Literal["blocks", "layers"] = option(
        "blocks", "where it arrives: at each hidden block's output, or at the input of each linear layer and convolution (as in BioTorch)"
    )


class DFA(Broadcast):
    """Direct feedback alignment: the output error reaches each hidden block through a fixed random matrix."""

    Config = DFAConfig
    card = Card(
        "direct feedback alignment: the output error through fixed random matrices",
        paper="Nokland: Direct feedback alignment provides learning in deep neural networks. NeurIPS 2016, arXiv 1609.01596",
        equation="delta_l = B_l e;  grad W_l = (delta_l * f'(a_l)) h_{l-1}^T",
        notes="rule.placement=layers is BioTorch's: a convolution's matrix has the size of its kernel, and the error arrives at all "
        "positions alike. rule.error=sign is sDFA of Frenkel et al. 2021 (arXiv 1909.01311), times 1/N.",
    )

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        errors = self.network.shapes[self.network.readout or ""].numel()
        if self.config.placement == "layers":
            self.layers = {name: f"feedback_{name.replace('.', '_')}" for name in broadcast_shapes(self.network, errors)}
            for name, shape in broadcast_shapes(self.network, errors).items():
                feedback = nn.init.xavier_uniform_(torch.empty(shape, dtype=self.network.dtype), self.config.scale)
                self.register_buffer(self.layers[name], feedback)
            return
        for name in self.network.hidden:
            size = self.network.shapes[name].numel()
            feedback = (torch.randn(errors, size) * self.config.scale / errors**0.5).to(self.network.dtype)
            self.register_buffer(f"feedback_{name}", feedback)

    def signals(self, traces: Traces, batch: Batch, error: Tensor, step: Step) -> Sequence[Tensor | None]:
        sent = self._sent(error, batch)
        return [(sent @ self.get_buffer(f"feedback_{t.name}")).view_as(t.output) for t in traces[:-1]]

    def credit(self, batch: Batch, step: Step) -> Metrics:
        if self.config.placement == "blocks":
            return super().credit(batch, step)
        with broadcast_backward(self.network, {name: self.get_buffer(key) for name, key in self.layers.items()}) as replaced:
            traces = self.network.traces(batch.inputs, input_grad="needed")
        scores = traces[-1].output.detach()
        loss, error = self.spec.loss_and_error(scores, batch)
        replaced.error = self._sent(error, batch)
        traces.send_down(error)
        return {"loss": loss}

    def _sent(self, error: Tensor, batch: Batch) -> Tensor:
        """Return what hidden blocks get of the output error, (N, C), with the 1/N of the mean."""
        return error.flatten(1) if self.config.error == "full" else error.flatten(1).sign() / len(batch)
