"""A backward pass through other weights than the forward pass: feedback alignment, sign-symmetry, Kolen-Pollack and their kin.

Inside :func:`replaced_backward` a linear layer or convolution y = W x + b passes dLoss/dx = B^T dLoss/dy for the B that is given, while
y and the gradients of W and b are unchanged. With B = W this is back-propagation, exactly. Other layers that have weights and pass credit
through them (attention, recurrent layers, transposed convolutions) are found by name, and reported as not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bpfree.errors import UsageError, unknown_name
from bpfree.network.closed_form import CONVOLUTIONS, is_linear

__all__ = ["Replaced", "broadcast_backward", "broadcast_shapes", "feedback_layers", "feedback_weights", "replaced_backward"]

PASS_NOTHING = (nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm, nn.GroupNorm)
"""Layers with weights that carry no credit to another layer as a matrix: tables of integers' rows, and scales."""


class Replaced:
    """The weights replaced so far inside :func:`replaced_backward` or :func:`broadcast_backward`.

    Attributes:
        met: names of the weights in whose place others pass credit, in order of their execution.
        used: those of them whose input asked for a cotangent: not a network's first layer, below which no credit goes.
        error: (N, C) what :func:`broadcast_backward` sends; set it before the backward pass.
    """

    def __init__(self, module: nn.Module, feedback: Mapping[str, Tensor]) -> None:
        self._module, self._feedback = module, feedback
        self.met: list[str] = []
        self.used: set[str] = set()
        self.error: Tensor | None = None

    @property
    def unmet(self) -> dict[str, str]:
        """Every other weight that can pass credit, with the reason: no feedback, a layer that was not called, or one of another kind."""
        reasons = _reasons(self._module) | dict.fromkeys(self._feedback, "its layer was not called")
        return {name: reason for name, reason in reasons.items() if name not in self.met}


def feedback_layers(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the linear layers and convolutions for which :func:`replaced_backward` takes feedback, by the name of their weight.

    Several layers that share a weight are under one name. Attention keeps its projections to itself, also the ``out_proj`` that looks
    like a layer.
    """
    inside = {id(part) for attention in module.modules() if isinstance(attention, nn.MultiheadAttention) for part in attention.modules()}
    found: dict[str, list[nn.Module]] = {}
    names: dict[int, str] = {}
    for path, layer in module.named_modules():
        if (type(layer) is nn.Linear or type(layer) in CONVOLUTIONS) and is_linear(layer) and id(layer) not in inside:
            name = names.setdefault(id(layer.weight), f"{path}.weight".lstrip("."))
            found.setdefault(name, []).append(layer)
    return found


def feedback_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return weights of linear layers and convolutions by name, for which :func:`replaced_backward` takes feedback of their shape."""
    return {name: layers[0].weight for name, layers in feedback_layers(module).items()}  # type: ignore[misc]


def broadcast_shapes(module: nn.Module, outputs: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices that :func:`broadcast_backward` takes, by the same names as :func:`feedback_weights`.

    They are (C, inputs of the layer), and (C, channels of the input, kernel) of a convolution.
    """
    shapes = {}
    for name, weight in feedback_weights(module).items():
        layer = module.get_submodule(name.rpartition(".")[0])
        shapes[name] = (outputs, weight.shape[1] * int(getattr(layer, "groups", 1)), *weight.shape[2:])
    return shapes


@contextmanager
def replaced_backward(
    module: nn.Module, feedback: Mapping[str, Tensor], layers: Mapping[str, Sequence[nn.Module]] | None = None
) -> Iterator[Replaced]:
    """Let linear layers and convolutions that are executed inside pass credit through other weights.

    ::

        with replaced_backward(self.network, self.feedback) as replaced:
            loss = self.spec.loss(self.network(batch.inputs), batch)
        loss.backward()

    Executions outside, such as for a diagnostic's true gradient, are not affected. Forward mode is not supported inside.

    Args:
        module: a network, or a block of it.
        feedback: by name of the weight, as :func:`feedback_weights` has them; of its shape.
        layers: what :func:`feedback_layers` returns for the module, where it is kept; searching takes as long as executing small layers.

    Yields:
        The record of replaced weights; check ``unmet`` after the first pass, and refuse or report what it names.

    Raises:
        UsageError: an unknown name, a weight whose backward pass cannot be replaced, or feedback of another shape.
    """
    replaced = Replaced(module, feedback)
    with _executing(module, feedback, layers or feedback_layers(module), lambda name, weight: tuple(weight.shape), replaced, None):
        yield replaced


@contextmanager
def broadcast_backward(module: nn.Module, feedback: Mapping[str, Tensor]) -> Iterator[Replaced]:
    """Let linear layers and convolutions that are executed inside send the output error down, whatever comes from above.

    The cotangent of a layer's input is the error times the layer's matrix; of a convolution, the transposed convolution of the matrix
    with the error repeated over all positions of the output (BioTorch's reading of direct feedback alignment). ::

        with broadcast_backward(self.network, self.feedback) as sent:
            scores = self.network(batch.inputs)
        sent.error = self.spec.error(scores.detach(), batch)
        scores.backward(sent.error)

    Args:
        module: a network, or a block of it.
        feedback: by name of the weight, of the shapes of :func:`broadcast_shapes`.

    Yields:
        The record of replaced weights, whose ``error`` is to be set before the backward pass.

    Raises:
        UsageError: as :func:`replaced_backward`.
    """
    outputs = next((len(matrix) for matrix in feedback.values()), 0)
    shapes = broadcast_shapes(module, outputs)
    replaced = Replaced(module, feedback)
    with _executing(module, feedback, feedback_layers(module), lambda name, weight: shapes[name], replaced, replaced):
        yield replaced


@contextmanager
def _executing(
    module: nn.Module,
    feedback: Mapping[str, Tensor],
    layers: Mapping[str, Sequence[nn.Module]],
    shape: Callable[[str, Tensor], tuple[int, ...]],
    replaced: Replaced,
    sent: Replaced | None,
) -> Iterator[None]:
    """Execute the layers of these weights by :class:`_Feedback` inside."""
    with ExitStack() as stack:
        for name, matrix in feedback.items():
            if name not in layers:
                reason = _reasons(module).get(name)
                if reason is not None:
                    raise UsageError(f"no feedback can be given for {name}: {reason}", fix=f"give it for: {', '.join(layers)}")
                raise unknown_name("weight", name, list(layers), where="feedback")
            wanted = shape(name, layers[name][0].weight)  # type: ignore[arg-type]
            if tuple(matrix.shape) != wanted:
                raise UsageError(f"feedback of shape {tuple(matrix.shape)} for {name}, where {wanted} is wanted", where="feedback")
            for layer in layers[name]:
                layer.forward = _forward(layer, name, matrix.detach(), replaced, sent)  # type: ignore[method-assign]
                stack.callback(vars(layer).pop, "forward")
        yield


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


def _forward(layer: Any, name: str, matrix: Tensor, replaced: Replaced, sent: Replaced | None) -> Callable[[Tensor], Tensor]:
    """Make a layer's ``forward`` whose cotangents go another way."""

    def forward(x: Tensor) -> Tensor:
        if name not in replaced.met:
            replaced.met.append(name)
        if x.requires_grad and torch.is_grad_enabled():
            replaced.used.add(name)
        sizes: tuple[Any, ...] = ()
        if not isinstance(layer, nn.Linear):
            padding = layer.padding
            if isinstance(padding, str) or layer.padding_mode != "zeros":  # autograd passes the padding
                mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
                x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * (x.dim() - 2)
            sizes = (list(layer.stride), list(padding), list(layer.dilation), False, [0] * (x.dim() - 2), layer.groups)
        output: Tensor = _Feedback.apply(x, layer.weight, layer.bias, matrix, sizes, sent)  # type: ignore[no-untyped-call]
        return output

    return forward


_CODE = _forward(None, "", torch.empty(0), Replaced(nn.Identity(), {}), None).__code__


def is_replaced(layer: nn.Module, *, code: Any = _CODE) -> bool:
    """Tell whether a layer is executed inside :func:`replaced_backward` or :func:`broadcast_backward`: its values are its own."""
    forward: Any = vars(layer).get("forward")
    return getattr(forward, "__code__", None) is code and forward.__globals__ is globals()


class _Feedback(torch.autograd.Function):
    """A linear map or convolution whose cotangent of the input goes through another matrix.

    One backward kernel serves all of a convolution's gradients, as autograd's own does; summing a second execution of the layer through
    the other weights, ``layer(x.detach(); W) + layer(x; B) - layer(x; B).detach()``, says the same and takes longer
    (``benchmarks/feedback_step.py``).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, matrix: Tensor, sizes: tuple[Any, ...], sent: Replaced | None
    ) -> Tensor:
        ctx.save_for_backward(x, matrix)
        ctx.sizes, ctx.sent, ctx.dtype, ctx.shape = sizes, sent, weight.dtype, weight.shape
        return torch.convolution(x, weight, bias, *sizes) if sizes else F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        low, matrix = x.to(signal.dtype), matrix.to(signal.dtype)  # autocast may have lowered the signal
        wanted = list(ctx.needs_input_grad[:3])
        pulled = None
        if ctx.sent is not None and wanted[0]:
            pulled, wanted[0] = _broadcast(ctx.sent.error, low, signal, matrix, ctx.sizes), False
        if ctx.sizes:
            stand_in = matrix if ctx.sent is None else low.new_empty(ctx.shape)  # its values matter for the cotangent of the input alone
            found = torch.ops.aten.convolution_backward.default(signal, low, stand_in, [len(stand_in)], *ctx.sizes, wanted)
        else:
            rows = signal.reshape(-1, signal.shape[-1])
            found = [
                signal @ matrix if wanted[0] else None,
                rows.t() @ low.reshape(-1, low.shape[-1]) if wanted[1] else None,
                rows.sum(0) if wanted[2] else None,
            ]
        gradients = [None if value is None or not want else value for value, want in zip(found, wanted, strict=True)]
        pulled = gradients[0] if pulled is None else pulled
        parameters = [None if value is None else value.to(ctx.dtype) for value in gradients[1:]]
        return None if pulled is None else pulled.to(x.dtype), *parameters, None, None, None


def _broadcast(error: Tensor | None, x: Tensor, signal: Tensor, matrix: Tensor, sizes: tuple[Any, ...]) -> Tensor:
    """Return the error through a layer's matrix, of the shape of the layer's input."""
    if error is None:
        raise UsageError("the error that broadcast_backward sends is not set", fix="set .error of what it yields before the backward pass")
    error = error.flatten(1).to(signal.dtype)
    if not sizes:
        places = (1,) * (x.dim() - 2)
        return (error @ matrix).view(len(error), *places, -1).expand_as(x)
    error = error.view(*error.shape, *(1,) * (x.dim() - 2)).expand(*error.shape, *signal.shape[2:])
    pulled: Tensor = torch.ops.aten.convolution_backward.default(error, x, matrix, None, *sizes[:-1], 1, [True, False, False])[0]
    return pulled
