"""Losses of many candidates: how a network is executed while it is searched, and the mean loss of each candidate.

Candidates are compared in eval mode: nothing is dropped, and batch norm takes its running statistics, which follow the batch first, by
one more forward pass. So all candidates of a step are measured by the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bpfree import Batch, Network, TaskSpec
from bpfree.errors import UsageError
from bpfree.network import evaluating
from bpfree.network.closed_form import is_batch_norm
from bpfree.network.perturb import frozen_statistics
from bpfree.tasks.spec import has_own_loss

__all__ = ["follows_statistics", "losses", "outputs_of_stacks", "searched"]


def follows_statistics(network: nn.Module) -> bool:
    """Tell whether a step takes one more pass, in which the running statistics of batch norms follow the batch."""
    return any(is_batch_norm(part) and part.running_mean is not None for part in network.modules())


@contextmanager
def searched(network: nn.Module, inputs: Any) -> Iterator[None]:
    """Execute the network in eval mode and without a graph inside, after its running statistics have followed the batch.

    Args:
        network: in train mode, or with parts in eval mode, whose statistics stay.
        inputs: (N, ...) of the batch.
    """
    with torch.no_grad(), frozen_statistics(network, inputs), evaluating(network):
        yield


def losses(spec: TaskSpec, outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the mean loss over the batch of each of M candidates: (M,).

    Args:
        spec: whose loss it is.
        outputs: (M, N, ...) of the candidates, each on the same N examples.
        batch: these examples.
    """
    if has_own_loss(spec) or spec.targets == "tokens" or batch.targets is None:
        return _one_by_one(lambda each: spec.loss(each, batch), outputs)
    count = len(outputs)
    repeated = batch.targets.repeat(count, *[1] * (batch.targets.dim() - 1))
    found = spec.losses(outputs.flatten(0, 1), replace(batch, targets=repeated, views=(), indices=None))
    return found.view(count, -1).mean(1)


def _one_by_one(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """Map a loss that somebody else has written over candidates: as one batched computation where torch can do that."""
    try:
        return torch.vmap(loss)(outputs)  # type: ignore[no-any-return]
    except (RuntimeError, ValueError):  # it looks at values, say
        return torch.stack([loss(each) for each in outputs])


def outputs_of_stacks(network: Network, stacks: Mapping[str, Tensor], inputs: Any, *, together: bool = True) -> Tensor:
    """Execute the network with M sets of parameters on the same inputs: (M, N, ...).

    Args:
        network: whose other parameters and buffers are shared.
        stacks: (M, ...) by the parameters' names.
        inputs: (N, ...).
        together: as one batched computation (``torch.vmap``), or one set after the other.

    Raises:
        UsageError: a layer cannot be executed with a batch of parameters.
    """

    def execute(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(network, parameters, (inputs,))  # type: ignore[no-any-return]

    if not together:
        count = len(next(iter(stacks.values())))
        return torch.stack([execute({name: stack[index] for name, stack in stacks.items()}) for index in range(count)])
    try:
        return torch.vmap(execute)(dict(stacks))  # type: ignore[no-any-return]
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the network cannot be executed with several sets of parameters at once: {str(error).splitlines()[0]}",
            where="rule.together",
            fix="set rule.together=false, which executes them one after the other",
        ) from error
