"""Whether the operations of a step agree with the forward passes that were counted in it.

Passes are counted on a block's own weights. A rule that evaluates copies, stacks or candidates of them (``torch.stack``,
``functional_call`` under ``vmap``, weights put together as one matrix) makes passes that are not counted in this way. Their products
show instead: every matrix product and convolution of a step is classified as one of

- a forward product with own weights: what the passes count;
- explained: any other product with own weights (input gradients, weights with weights), one whose result has the size of a weight
  (weight gradients), and gradients of convolutions;
- a copy's: one factor is no weight, but has the shape of one, or of several side by side, and stands as in a forward pass;
- feedback: the rest inside reverse-mode calls, such as input gradients through other matrices;
- other: what remains of the step's total.

Copies leave the number of passes open. So does feedback of more than the forward products, and other work of more than half a forward
pass (direct feedback alignment's has an eighth here). In forward mode a tangent of the weights is such a matrix, and belongs to the
tangent's pass: as many as the passes are explained. A square matrix stands both ways, so that feedback matrices used by hand are
taken for copies: the number of passes is then left open though it may be right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Work", "disagreement", "stands_as_weight"]

OTHER = 0.5
"""Operations of unknown kind, in forward passes, up to which the count of passes is valid."""
ROUNDING = 1e-6
LEFT = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "mv": 0, "addmv": 1}
"""Place of a product's first factor among the arguments."""
Shape = tuple[int, int]


@dataclass
class Work:
    """Operations of matrix products and convolutions, by kind; see the module.

    Attributes:
        total: of the whole step, as a run counts them.
        forward: of forward products, by parameter.
        explained, copies, feedback: of the other kinds.
    """

    total: int = 0
    forward: Counter[str] = field(default_factory=Counter)
    explained: int = 0
    copies: int = 0
    feedback: int = 0

    @property
    def other(self) -> int:
        """Operations of the total that no other count includes."""
        return self.total - sum(self.forward.values()) - self.explained - self.copies - self.feedback

    def merge(self, more: Work) -> None:
        """Add the operations of another step."""
        self.total += more.total
        self.forward.update(more.forward)
        self.explained += more.explained
        self.copies += more.copies
        self.feedback += more.feedback

    def add_foreign(
        self, name: str, args: tuple[Any, ...], result: Any, shapes: Iterable[Shape], operations: int, *, reverse: bool
    ) -> None:
        """Count a product in which no own weights stand.

        Args:
            name: of the operation.
            args: its arguments.
            result: its result.
            shapes: (outputs, inputs) of each weight of the rule.
            operations: that it took.
            reverse: whether it was inside a reverse-mode call.
        """
        shapes = set(shapes)
        if name == "convolution_backward" or (isinstance(result, Tensor) and _is_gradient(name, args, result, shapes)):
            self.explained += operations
        elif reverse:
            self.feedback += operations
        elif stands_as_weight(name, args, shapes):
            self.copies += operations


def _is_gradient(name: str, args: tuple[Any, ...], result: Tensor, shapes: set[Shape]) -> bool:
    """Tell whether a result has the size of a weight, or of several, and no factor stands as one."""
    whole = any(result.numel() % (outputs * inputs) == 0 for outputs, inputs in shapes)
    return whole and not stands_as_weight(name, args, shapes)


def stands_as_weight(name: str, args: tuple[Any, ...], shapes: Iterable[Shape]) -> bool:
    """Tell whether a factor of a product has the shape of one or more weights side by side, and stands as in a forward pass.

    Args:
        name: of the operation.
        args: its arguments.
        shapes: (outputs, inputs) of each weight.
    """
    found: list[Shape] = []
    if name in ("convolution", "_convolution"):
        kernel, transposed = args[1], bool(args[6])
        found = [] if transposed else [(kernel.shape[0], kernel[0].numel())]
    elif name in LEFT:
        left, right = args[LEFT[name]], args[LEFT[name] + 1]
        found = [(left.shape[-2], left.shape[-1])]
        if right.dim() > 1:
            found.append((right.shape[-1], right.shape[-2]))
    return any(_holds(a, outputs) and _holds(b, inputs) for a, b in found for outputs, inputs in shapes)


def _holds(size: int, part: int) -> bool:
    return size > 0 and size % part == 0


def disagreement(work: Work, one_pass: float, most: float, *, forward_mode: bool) -> str:
    """Say why a step's operations disagree with the counted passes; empty if they agree.

    Args:
        work: of the step.
        one_pass: operations of a forward pass through every weight that was used, once for each example.
        most: passes that were counted.
        forward_mode: whether dual numbers were used.
    """
    allowed = most * one_pass if forward_mode else 0.0
    words = "forward passes, where {:g} were counted with its own weights"
    if work.copies > allowed * (1 + ROUNDING):
        share = _passes(work.copies, one_pass)
        return f"it works with copies, stacks or candidates of its weights: products with them take {share} {words.format(most)}"
    if work.feedback > sum(work.forward.values()) * (1 + ROUNDING) + OTHER * one_pass:
        share = _passes(work.feedback, one_pass)
        return f"products with other matrices inside its reverse-mode calls take the operations of {share} {words.format(most)}"
    if work.other > OTHER * one_pass:
        share = _passes(work.other, one_pass)
        return f"products that belong to no pass and no gradient take the operations of {share} {words.format(most)}"
    return ""


def _passes(operations: int, one_pass: float) -> str:
    return f"{operations / one_pass:.2g}" if one_pass else "all of the"
