"""The rules: forward gradients of one loss, forward gradients of local losses, and back-propagation of the same local losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bpfree import Batch, Card, Network, Rule, Step, Traits
from bpfree.errors import UsageError
from bpfree.network.closed_form import is_linear
from bpfree.network.perturb import frozen_statistics
from bpfree.network.reach import channel_axis
from bpfree.tasks.task import TaskSpec
from bpfree_forward_gradient.losses import Head, group_count, refuse_patches
from bpfree_forward_gradient.noise import Noise
from bpfree_forward_gradient.options import ForwardGradientConfig, LocalBackpropConfig, LocalForwardGradientConfig
from bpfree_forward_gradient.plan import describe
from bpfree_forward_gradient.scope import Scope

__all__ = ["ForwardGradient", "LocalBackprop", "LocalForwardGradient"]

OF_EXAMPLES = ("classes", "multilabel", "soft", "real")
"""Kinds of targets that a head on the features of a whole example can be taught."""
BAYDIN = "Baydin, Pearlmutter, Syme, Wood, Torr: Gradients without backpropagation. 2022, arXiv 2202.08587"
REN = "Ren, Kornblith, Liao, Hinton: Scaling forward gradient with local losses. ICLR 2023, arXiv 2210.03310"


class ForwardGradient(Rule):
    """Forward gradients of the task's loss: noise times the loss's derivative along it, from one pass forwards."""

    Config = ForwardGradientConfig
    card = Card(
        "forward gradient of the task's loss: noise times the derivative along it, no backward pass",
        paper=f"{BAYDIN}; with noise on activities: {REN}",
        equation="grad a_n = (dL/du . u)_n u_n, u_n random signs or N(0, 1) on pre-activations a_n of example n;  "
        "grad W = sum_n grad a_n h_n^T",
        notes="Unbiased, unless norm_gradient=ignored; its variance grows with the number of perturbed units (activities) or "
        "parameters (weights). The readout's last "
        "linear map takes its exact gradient in closed form, as in the published code of Ren et al.",
    )
    config: ForwardGradientConfig

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        """Declare the traits: passes are one forward pass, and one for each tangent."""
        return Traits("all", downstream_weights="all", reverse_span=0, passes=1 + config.tangents, inputs="real")

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.config.check()
        self.scopes = self._scopes()

    def _scopes(self) -> list[Scope]:
        return [Scope(dict(self.network.blocks.items()), self.network.input_shape, self.config, scores=True)]

    def plan(self) -> str:
        return describe(self.scopes, self.config)

    def _noise(self, step: Step) -> Any:
        return lambda block: Noise(self.config, step.generator_for(block))

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return self._output_credit(self.scopes[-1], batch.inputs, batch, step)

    def objective(self, batch: Batch, step: Step) -> Tensor | None:
        """Return the task's loss with the configured batch norms; ``None`` (the plain task's loss) where they use batch statistics."""
        if self.config.batch_norm == "batch-scalar":
            return None
        with self._statistics(batch):
            return self.spec.loss(self.network(batch.inputs), batch)

    def _statistics(self, batch: Batch) -> AbstractContextManager[None]:
        """Use inside the batch norms' statistics that :meth:`credit` uses."""
        frozen = self.config.batch_norm == "frozen-statistics"
        return frozen_statistics(self.network, batch.inputs) if frozen else nullcontext()

    @torch.no_grad()
    def _output_credit(self, scope: Scope, x: Tensor, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Add to ``.grad`` the credit of the scope that ends with the scores; returns the loss."""
        execution = scope.run(x, self._noise(step))
        loss, error = self.spec.loss_and_error(execution.output, batch)
        execution.credit(error)
        return {"loss": loss}


class LocalForwardGradient(ForwardGradient):
    """Forward gradients of greedy local losses: each block has a linear head, and no derivative crosses a block's border."""

    Config = LocalForwardGradientConfig
    card = Card(
        "forward gradients of greedy local losses per block, patch and group of channels",
        paper=REN,
        equation="grad a_{n,p,g} = (dL_{p,g}/du . u)_{n,p,g} u_{n,p,g};  L_{p,g}: cross-entropy of a linear head on the block's pooled "
        "features, of which only patch p and group g pass credit",
        notes="Heads and readout take their exact gradients in closed form, as in the published code. The readout sees the last block's "
        "output behind a stop-gradient. Where a site reaches several of these losses (a dense layer inside a block, token mixing), its "
        "derivative is their sum: bpfree train --print-plan says which.",
    )
    config: LocalForwardGradientConfig

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        """Tangents begin behind a block's first linear map, so that in a block with one of them none goes through weights."""
        deep = network is None or any(sum(map(is_linear, network.blocks[name].modules())) > 1 for name in network.hidden)
        return Traits(
            "upstream", downstream_weights=0, reverse_span=0, passes=1 + config.tangents * deep, inputs="real", targets=OF_EXAMPLES
        )

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.heads = local_heads(self.network, spec, self.config.pool)

    def _scopes(self) -> list[Scope]:
        network, config = self.network, self.config
        refuse_patches(config.losses, {name: network.shapes[name] for name in network.hidden})
        shapes = [network.input_shape, *network.shapes.values()]
        scopes = []
        for (name, block), entry, shape in zip(network.blocks.items(), shapes, shapes[1:], strict=False):
            local = name != network.readout
            channels = shape[channel_axis(shape)]
            groups = group_count(channels, config.losses, config.group_size, getattr(block, "groups", None)) if local else 1
            tokens = shape[0] if local and len(shape) == 2 and config.losses in ("patchwise", "all") else 0
            scopes.append(Scope({name: block}, entry, config, scores=not local, groups=groups, tokens=tokens))
        return scopes

    @torch.no_grad()
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        x = batch.inputs
        for name, scope in zip(self.network.hidden, self.scopes, strict=False):
            execution = scope.run(x, self._noise(step))
            head: Head = self.heads[name]  # type: ignore[assignment]
            pooled = head.pooled(execution.output)
            scores = head.linear(pooled)
            metrics[f"{name}/loss"], error = self.spec.loss_and_error(scores, batch)
            head.credit(pooled, error)
            execution.credit(error, head)
            x = execution.output
            del execution
        return metrics | self._output_credit(self.scopes[-1], x, batch, step)

    def objective(self, batch: Batch, step: Step) -> Tensor:
        with self._statistics(batch):
            losses = local_losses(self.network, self.heads, self.spec, batch, greedy=True)
            return torch.stack([loss for _, loss in losses]).sum()

    def alternatives(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return local_scores(self.network, self.heads, inputs)


class LocalBackprop(Rule):
    """The same local losses by back-propagation: what the local forward gradients estimate."""

    Config = LocalBackpropConfig
    card = Card(
        "back-propagation of local losses: inside each block (greedy), or through all blocks below",
        paper=f"{REN}: rows LG-BP (greedy) and L-BP",
        equation="grad W_l = dL_l/dW_l (greedy), or sum over m >= l of dL_m/dW_l;  L_l: cross-entropy of a linear head on block l",
        notes="Per patch and group these losses have the same gradients as per block: the parts add up to the whole.",
    )
    config: LocalBackpropConfig

    @classmethod
    def traits_of(cls, config: LocalBackpropConfig, network: Network | None = None) -> Traits:
        if config.greedy:
            return Traits(dependence="upstream", downstream_weights=0, reverse_span=1, targets=OF_EXAMPLES)
        return Traits(dependence="all", downstream_weights="all", reverse_span="all", targets=OF_EXAMPLES)

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.heads = local_heads(self.network, spec, self.config.pool)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        losses = local_losses(self.network, self.heads, self.spec, batch, greedy=self.config.greedy)
        metrics: dict[str, Tensor] = {}
        kept: list[Tensor] = []
        for name, loss in losses:
            metrics["loss" if name == self.network.readout else f"{name}/loss"] = loss.detach()
            if not self.config.greedy:
                kept.append(loss)
            elif loss.requires_grad:  # at once, so that one block's graph is alive at a time
                loss.backward()  # type: ignore[no-untyped-call]
        if kept and (whole := torch.stack(kept).sum()).requires_grad:
            whole.backward()  # type: ignore[no-untyped-call]
        return metrics

    def alternatives(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return local_scores(self.network, self.heads, inputs)


def local_heads(network: Network, spec: TaskSpec, pool: int) -> nn.ModuleDict:
    """Make a head for each hidden block."""
    if pool > 1 and all(len(network.shapes[name]) < 3 for name in network.hidden):
        raise UsageError(f"rule.pool={pool} does nothing on a network without feature maps", where="rule.pool", fix="leave it out")
    if spec.output_size != (spec.outputs,):
        what = f"local heads give (N, {spec.outputs}), but the task has outputs of shape {spec.output_size}"
        raise UsageError(what, where=f"task {spec.name}", fix="choose a rule without heads, such as forward-gradient")
    return nn.ModuleDict({name: Head(network.shapes[name], spec.outputs, pool) for name in network.hidden})


def local_scores(network: Network, heads: nn.ModuleDict, x: Tensor) -> dict[str, Tensor]:
    """Return the scores (N, C) of each head, by block."""
    scores = {}
    for name in network.hidden:
        x = network.blocks[name](x)
        scores[name] = heads[name](x)
    return scores


def local_losses(network: Network, heads: nn.ModuleDict, spec: TaskSpec, batch: Batch, *, greedy: bool) -> Iterator[tuple[str, Tensor]]:
    """Return each head's loss and the readout's by block, by autograd; the readout's input is behind a stop-gradient."""
    x = batch.inputs
    for name in network.hidden:
        x = network.blocks[name](x)
        yield name, spec.loss(heads[name](x), batch)
        x = x.detach() if greedy else x
    readout = network.readout or ""
    yield readout, spec.loss(network.blocks[readout](x.detach()), batch)
