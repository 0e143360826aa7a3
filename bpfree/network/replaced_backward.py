"""A backward pass through other weights than the forward pass: feedback alignment, sign-symmetry, Kolen-Pollack and their kin.

Inside :func:`replaced_backward` a linear layer or convolution y = W x + b passes dLoss/dx = B^T dLoss/dy for the B that is given, while
y and the gradients of W and b are unchanged. With B = W this is back-propagation, exactly. Other layers that have weights and pass credit
through them (attention, recurrent layers, transposed convolutions) are found by name, and reported as not replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bpfree.errors import UsageError, unknown_name
from bpfree.network.closed_form import CONVOLUTIONS, is_linear, linear_input_gradient

__all__ = ["Replaced", "feedback_weights", "replaced_backward"]

PASS_NOTHING = (nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm, nn.GroupNorm)
"""Layers with weights that carry no credit to another layer as a matrix: tables of integers' rows, and scales."""


class Replaced:
    """The weights replaced so far inside :func:`replaced_backward`.

    Attributes:
        met: names of the weights in whose place others have passed credit, in order.
        unmet: every other weight that can pass credit, with the reason: no feedback was given, the layer was not called, or it is of a
            kind whose backward pass is not replaced.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self._reasons = dict(reasons)
        self.met: list[str] = []

    @property
    def unmet(self) -> dict[str, str]:
        """Weights without feedback, with the reason; see the class."""
        return {name: reason for name, reason in self._reasons.items() if name not in self.met}


def feedback_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return weights of linear layers and convolutions by name, for which :func:`replaced_backward` takes feedback of their shape.

    Attention keeps its projections to itself, also the ``out_proj`` that looks like a layer.
    """
    inside = {id(part) for attention in module.modules() if isinstance(attention, nn.MultiheadAttention) for part in attention.modules()}
    found: dict[str, nn.Parameter] = {}
    for path, layer in module.named_modules():
        known = (type(layer) is nn.Linear or type(layer) in CONVOLUTIONS) and is_linear(layer) and id(layer) not in inside
        if known and not any(layer.weight is weight for weight in found.values()):
            found[f"{path}.weight".lstrip(".")] = layer.weight  # type: ignore[assignment]
    return found


@contextmanager
def replaced_backward(module: nn.Module, feedback: Mapping[str, Tensor]) -> Iterator[Replaced]:
    """Let linear layers and convolutions that are executed inside pass credit through other weights.

    ::

        with replaced_backward(self.network, self.feedback) as replaced:
            loss = self.spec.loss(self.network(batch.inputs), batch)
        loss.backward()

    Executions outside, such as for a diagnostic's true gradient, are not affected. Forward mode is not supported inside.

    Args:
        module: a network, or a block of it.
        feedback: by name of the weight, as :func:`feedback_weights` has them; of its shape.

    Yields:
        The record of replaced weights; check ``unmet`` after the first pass, and refuse or report what it names.

    Raises:
        UsageError: an unknown name, a weight whose backward pass cannot be replaced, or feedback of another shape.
    """
    weights, reasons = feedback_weights(module), _reasons(module)
    for name, matrix in feedback.items():
        if name not in weights:
            if name in reasons:
                raise UsageError(f"no feedback can be given for {name}: {reasons[name]}", fix=f"give it for: {', '.join(weights)}")
            raise unknown_name("weight", name, list(weights), where="feedback")
        if matrix.shape != weights[name].shape:
            raise UsageError(f"feedback of shape {tuple(matrix.shape)} for {name} of shape {tuple(weights[name].shape)}", where="feedback")
        reasons[name] = "its layer was not called"
    replaced = Replaced(reasons)
    names = {id(weights[name]): name for name in feedback}
    with ExitStack() as stack:
        for layer in module.modules():
            met = names.get(id(getattr(layer, "weight", None)))
            if met is not None and is_linear(layer):
                for handle in _hook(layer, met, feedback[met], replaced):
                    stack.callback(handle.remove)
        yield replaced


def _reasons(module: nn.Module) -> dict[str, str]:
    """Say for each weight that can pass credit why it is not replaced, unless feedback is given for it."""
    weights = feedback_weights(module)
    reasons: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        path = name.rpartition(".")[0]
        owner = module.get_submodule(path)
        if name in weights:
            reasons[name] = "no feedback was given"
        elif parameter.dim() > 1 and not isinstance(owner, PASS_NOTHING):
            reasons[name] = f"the backward pass of {_outer(module, path)} is not replaced"
    return reasons


def _outer(module: nn.Module, path: str) -> str:
    """Name the kind of the layer that a parameter belongs to: of the attention, for its projections."""
    parts = path.split(".") if path else []
    owners = [module.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    attention = next((owner for owner in owners if isinstance(owner, nn.MultiheadAttention)), owners[-1])
    return type(attention).__name__


def _hook(layer: nn.Module, name: str, matrix: Tensor, replaced: Replaced) -> tuple[Any, Any]:
    taken: list[Tensor] = []

    def before(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        taken.append(arguments[0])
        return (arguments[0].detach(),)

    def after(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        x = taken.pop()
        if name not in replaced.met:
            replaced.met.append(name)
        return _Feedback.apply(output, x, matrix, layer) if x.requires_grad and torch.is_grad_enabled() else output  # type: ignore[no-any-return, no-untyped-call]

    return layer.register_forward_pre_hook(before), layer.register_forward_hook(after)


class _Feedback(torch.autograd.Function):
    """Returns a layer's output unchanged, but sends its cotangent to the layer's input through another matrix."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, matrix: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x.detach(), matrix.detach())
        ctx.mark_dirty(output)  # and not a view, which what follows could not overwrite
        return output

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x, matrix = ctx.saved_tensors
        return signal, linear_input_gradient(ctx.layer, x, signal, matrix).to(x.dtype), None, None
