"""States between a clamped input and a clamped output, relaxed down their energy.

For blocks f_1 ... f_L, the input h_0 and states h_1 ... h_{L-1}: predictions mu_l = f_l(h_{l-1}), errors e_l = h_l - mu_l, and

    F = sum_{l<L} |e_l|^2 / 2 + E(mu_L),    dF/dh_l = e_l - J_{l+1}^T e_{l+1},    e_L = -dE/dmu_L

per example, so that the rate of the states does not depend on the batch size (Whittington & Bogacz 2017). The weights' gradient,
-(df_l/dW_l)^T e_l, is taken once the states are where they are wanted. Since the states begin as predictions, an error reaches one more
block with each step; what it has not reached yet is not computed.

Far from the output errors are small: with h and mu in single precision their difference would be rounding noise a few blocks down. So a
state is kept as its beginning and an offset, and the error is the difference of the offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bpfree_predictive_coding.execution import Execution, Executor
from bpfree_predictive_coding.output import Output, TaskOutput

__all__ = ["ErrorRelaxation", "Relaxation"]

Gradients = dict[int, Tensor]
"""Of the energy by the states, by index."""


class Relaxation:
    """States and what they predict, for one batch.

    Args:
        execute: the blocks, executed by index.
        inputs: (N, ...) h_0.
        output: the energy at the top; given the first scores, so that it may depend on them.
        lr: rate of the states.
        momentum: of the states; their velocity begins at zero.
        hold: predictions and Jacobians stay those of the beginning ("fixed prediction").
        states: (N, ...) for each hidden block, instead of the predictions.

    Attributes:
        executions: the last one of each block.
        states: h_1 ... h_{L-1}.
        errors: e_1 ... e_L; ``None`` is zero.
        scores: (N, C) of the first execution.
    """

    def __init__(
        self,
        execute: Executor,
        inputs: Tensor,
        output: Callable[[Tensor], Output | TaskOutput],
        *,
        lr: float,
        momentum: float = 0.0,
        hold: bool = False,
        states: Sequence[Tensor] | None = None,
    ) -> None:
        self._execute, self._inputs = execute, inputs
        self._lr, self._momentum, self._hold = lr, momentum, hold
        count = len(execute)
        self._velocities: dict[int, Tensor] = {}
        self.executions: list[Execution] = []
        self.states: list[Tensor] = []
        self.errors: list[Tensor | None] = [None] * (count - 1)
        x = inputs
        for index in range(count):
            self.executions.append(execute(index, x))
            x = self.executions[-1].output
            if index < count - 1:
                self.states.append(_precise(x))
        self.scores = x
        self.output = output(x)
        self.errors.append(self.output.error(x))
        self._origins, self._offsets = list(self.states), dict[int, Tensor]()
        if states is not None:
            self.place(states)

    # --- the energy -------------------------------------------------------------------------------------------------

    def gradient(self, index: int) -> Tensor | None:
        """Return dF/dh of a state, per example; ``None`` is zero."""
        error, above = self.errors[index], self.errors[index + 1]
        if above is None:
            return None
        pulled = _precise(self.executions[index + 1].pull(above))
        return pulled.neg() if error is None else error - pulled

    def gradients(self) -> Gradients:
        """Return dF/dh of all states, by index; zero gradients are left out."""
        found = ((index, self.gradient(index)) for index in range(len(self.states)))
        return {index: gradient for index, gradient in found if gradient is not None}

    def energies(self) -> list[Tensor]:
        """Return the energy of each block's prediction, a mean over the examples."""
        zero = self.scores.new_zeros((), dtype=self.states[0].dtype if self.states else None)
        hidden = [zero if error is None else 0.5 * error.square().sum() / len(error) for error in self.errors[:-1]]
        return [*hidden, self.output.energy(self.executions[-1].output)]

    # --- moving -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Move all states by one step at once, and predict again what depends on them."""
        gradients = self.gradients()
        self.move(gradients)
        self.refresh(gradients)

    def place(self, states: Sequence[Tensor]) -> None:
        """Restart from these states, (N, ...) for each hidden block."""
        self.states, self._origins = list(states), list(states)
        self._offsets.clear()
        self._velocities.clear()
        self.refresh(range(len(states)))

    def move(self, gradients: Gradients) -> None:
        """Move the states down the gradients, without new predictions."""
        for index, gradient in gradients.items():
            offset = self._offsets[index] = self._stepped(index, self._offsets.get(index), gradient)
            self.states[index] = self._origins[index] + offset

    def _stepped(self, index: int, value: Tensor | None, gradient: Tensor) -> Tensor:
        if self._momentum:
            velocity = self._velocities.get(index)
            gradient = gradient if velocity is None else velocity.mul_(self._momentum).add_(gradient)
            self._velocities[index] = gradient
        return gradient * -self._lr if value is None else torch.sub(value, gradient, alpha=self._lr)

    def refresh(self, moved: Iterable[int]) -> None:
        """Predict again from the states that moved, and compute the errors that changed."""
        moved = list(moved)
        stale = set() if self._hold else {index + 1 for index in moved}
        for index in stale:
            self.executions[index] = self._execute(index, self.states[index - 1])
        self.compare({*moved, *stale})

    def refresh_all(self) -> None:
        """Predict again from all states and compute all errors, after the weights moved."""
        for index in range(len(self.executions)):
            self.executions[index] = self._execute(index, self.states[index - 1] if index else self._inputs)
        self.compare(range(len(self.executions)))

    def compare(self, indices: Iterable[int]) -> None:
        """Compute the errors of blocks again, by index."""
        for index in indices:
            made = self.executions[index].output
            self.errors[index] = self._error(index, made) if index < len(self.states) else self.output.error(made)

    def _error(self, index: int, made: Tensor) -> Tensor:
        """Return h - mu as (h - origin) - (mu - origin): the former keeps its own precision, however small it is beside h."""
        origin, offset = self._origins[index], self._offsets.get(index)
        difference = origin - made
        return difference if offset is None else difference.add_(offset)

    # --- the weights ------------------------------------------------------------------------------------------------

    def backward(self, index: int, scale: float) -> None:
        """Add dF/dW of a block, a mean over the examples times ``scale``, to ``.grad``. Its execution is used up.

        A block that no error has reached gets nothing.
        """
        error = self.errors[index]
        if error is not None:
            self.executions[index].backward(error * (-scale / len(self.scores)))


class ErrorRelaxation(Relaxation):
    """Relaxes the errors instead of the states: h_l = e_l + f_l(h_{l-1}), from the bottom up (Goemaere et al. 2025).

    dF/de_l = e_l - (dh_{L-1}/dh_l)^T J_L^T e_L: the output's error is pulled through all blocks above, so a step reaches all of them.
    """

    def gradients(self) -> Gradients:
        """Return dF/de of all hidden blocks, by index."""
        result = {}
        signal = self.errors[-1]
        for index in reversed(range(len(self.states))):
            assert signal is not None
            signal = _precise(self.executions[index + 1].pull(signal))
            error = self.errors[index]
            result[index] = signal.neg() if error is None else error - signal
        return result

    def step(self) -> None:
        """Move all errors by one step at once; then the states follow, from the bottom up."""
        gradients = self.gradients()
        for index in range(len(self.states)):
            error = self.errors[index] = self._stepped(index, self.errors[index], gradients[index])
            self.states[index] = self.executions[index].output + error
            self.executions[index + 1] = self._execute(index + 1, self.states[index])
        self.compare([len(self.states)])


def _precise(x: Tensor) -> Tensor:
    """Convert to at least single precision, which a small step needs."""
    return x if x.dtype.itemsize >= 4 else x.float()
