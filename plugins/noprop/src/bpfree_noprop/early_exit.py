"""Early exit: the chain of an example stops when its answer is settled, and the blocks that are left never look at the example.

The *doubt* about an answer is how far it is from certainty (1 less the lead of the first class), or for real targets how much the last
block has changed it. The doubt up to which a chain stops is measured on the validation split: the score that is lost by stopping at each
of many doubts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bpfree.metric import Accumulator
from bpfree.network.network import Network
from bpfree.step import Batch
from bpfree.tasks.task import Examples, TaskSpec
from bpfree.tasks.trees import leaves, select
from bpfree_noprop.blocks import DenoisingBlock
from bpfree_noprop.embeddings import full_precision
from bpfree_noprop.inference import DiscreteChain, View
from bpfree_noprop.readouts import Judgements

__all__ = ["TRIED", "ExitTrials", "ExitingChain"]

logger = logging.getLogger("bpfree")

NEVER = -1.0
"""A doubt below any, at which no chain stops before its end."""
TRIED = (NEVER, *(10 ** (power / 10) for power in range(-60, 11)))
"""Doubts that are tried: those of classes and labels are within 0 and 1, of real targets in units of the whitened target."""


class ExitingChain(DiscreteChain):
    """What ``noprop-dt`` does at prediction, with early exits.

    Attributes:
        exit_doubt: with ``early_exit``: the doubt up to which a chain stops, measured by :meth:`calibrate`.
    """

    exit_doubt: Tensor

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self._operations: list[float] | None = None
        if self.exits:
            self.register_buffer("exit_doubt", torch.tensor(NEVER))

    @property
    def exits(self) -> bool:
        """Whether predictions stop early."""
        return self.config.early_exit is not None and self.config.inference == "deterministic"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *further: Any) -> None:
        """Load weights also where the run had another ``early_exit``: it stops nowhere if none was measured, with a warning."""
        key = f"{prefix}exit_doubt"
        if self.exits:
            if key not in state_dict:
                logger.warning("rule.early_exit has no effect: this run has not measured when to stop; train with rule.early_exit")
            state_dict.setdefault(key, torch.full_like(self.exit_doubt, NEVER))
        else:
            state_dict.pop(key, None)
        super()._load_from_state_dict(state_dict, prefix, *further)

    def read(self, features: Any, generator: torch.Generator) -> Tensor:
        """Predict from what the blocks see of the inputs."""
        return self.shaped(self.stopped(features)[0]) if self.exits else super().read(features, generator)

    def alternatives(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return those of :class:`DiscreteChain`; beside an early exit also ``whole``, the prediction by all blocks."""
        found = super().alternatives(inputs, generator)
        return found | {"whole": super().read(self.view(inputs), generator)} if self.exits else found

    def stopped(self, seen: Any) -> tuple[Tensor, Tensor]:
        """Follow each example until its answer is settled; blocks look only at the examples that are left.

        Returns:
            The scores (N, m), as if the blocks left out said what the last one did; and the numbers of blocks (N,).
        """
        if torch.compiler.is_compiling():  # a program computes the same for all
            return chosen(*self.settling(seen), self.exit_doubt)
        T, way = self.config.T, Way.begin(self.start(seen, None))
        left = torch.arange(len(way.z), device=way.z.device)
        blocks = torch.full_like(way.z[:, 0], T)
        answers: Tensor | None = None
        for t, block in self.denoisers():
            way = self.settle(View(t, block, block.features(seen)), way)
            answers = torch.empty_like(way.answer) if answers is None else answers
            answers[left] = way.answer
            going = (~(way.doubt <= self.exit_doubt)).nonzero().flatten()
            if t == T or not going.shape[0]:
                blocks[left] = float(t)
                break
            if going.shape[0] < left.shape[0]:
                blocks[left] = float(t)
                left, seen, way = left[going], select(seen, going), way.of(going)
                blocks[left] = float(T)
        assert answers is not None
        return answers, blocks

    def settling(self, seen: Any) -> tuple[Tensor, Tensor]:
        """Return the answers (T, N, m) after each block, and the doubts about them (T, N); the last one is beyond doubt."""
        way, answers, doubts = Way.begin(self.start(seen, None)), [], []
        for view in self.looks(seen):
            way = self.settle(view, way)
            answers.append(way.answer)
            doubts.append(way.doubt if view.t < self.config.T else torch.full_like(way.doubt, -torch.inf))
        return torch.stack(answers), torch.stack(doubts)

    def settle(self, view: View, way: Way) -> Way:
        """Go one block further on the mean path: the state, and the answer if nothing follows but what this block said."""
        readout, z = self.readout, way.z
        if readout in ("mean", "product"):
            said = self.alone(view, None)
        else:
            said = self.ask(view, self.met(z, None))
            z = self.advance(z, said, view.t, None)
        heard = (*way.heard, said) if readout != "chain" else (said,)
        answer = opinion = Judgements(heard, heard, ()).read("mean" if readout == "chain" else readout, self.embed)
        if readout == "chain":
            with full_precision(z.device):
                answer = self.head(self.schedule.finish(z, self.estimate(said), view.t), self.embed)
        return Way(z, heard, answer, opinion, self.embed.doubt(opinion, way.opinion))

    def effort(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return for each example the blocks of an early exit, and its floating-point operations."""
        if not self.exits:
            return {}
        blocks = self.stopped(self.view(inputs))[1]
        operations = torch.tensor(self.operations(inputs), device=blocks.device, dtype=torch.float64).cumsum(0)
        return {"blocks": blocks, "operations": operations[blocks.long()]}

    def operations(self, inputs: Any) -> list[float]:
        """Count the floating-point operations for an example, from its shape: first what blocks share (stem, head), then each block's."""
        if self._operations is None:
            one = select(inputs, torch.zeros(1, dtype=torch.long, device=leaves(inputs)[0].device))
            seen = self.view(one)
            z = self.start(seen, None)
            rest = operations_of(lambda: (self.view(one), self.head(z, self.embed)))
            blocks = [operations_of(partial(self._asked, t, block, seen, z)) for t, block in self.denoisers()]
            self._operations = [rest, *blocks]
        return self._operations

    def _asked(self, t: int, block: DenoisingBlock, seen: Any, z: Tensor) -> Tensor:
        return self.ask(View(t, block, block.features(seen)), z)

    # --- calibration ----------------------------------------------------------------------------------------------------

    @property
    def calibrates(self) -> bool:
        """Whether anything is measured on the validation split: residuals of real targets, or when to stop."""
        return super().calibrates or self.exits

    def calibrate(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        """Measure what blocks for real targets do not know, and the doubt up to which an early exit stops.

        Returns:
            What :class:`DiscreteChain` measures; and score, blocks and operations of the whole chain (``whole``) and of the early exit.
        """
        found = super().calibrate(data, generator)
        return found | self._measure_exit(data, generator) if self.exits and data.targets is not None else found

    def _measure_exit(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        trials = ExitTrials(self.spec, lambda inputs: self.predict(inputs, generator))
        for batch in self.batches(data, generator.device):
            answers, doubts = self.settling(self.view(batch.inputs))
            costs = torch.tensor(self.operations(batch.inputs), dtype=torch.float64).cumsum(0)
            for doubt in trials:
                scores, blocks = chosen(answers, doubts, doubt)
                trials.add(doubt, self.shaped(scores), batch, blocks, costs)
        best = trials.within(float(self.config.early_exit))
        self.exit_doubt.fill_(best)
        return trials.told(best)


@dataclass(frozen=True)
class Way:
    """How far examples have come on the mean path.

    Attributes:
        z: (N, d) state.
        heard: outputs (N, m) of the blocks so far that a readout but the chain's takes together.
        answer: (N, m) scores, if nothing new follows.
        opinion: (N, m) scores by which it is judged whether the answer is settled.
        doubt: (N,) about it.
    """

    z: Tensor
    heard: tuple[Tensor, ...]
    answer: Tensor
    opinion: Tensor | None
    doubt: Tensor

    @classmethod
    def begin(cls, z: Tensor) -> Way:
        """Start at ``z_0``, where nothing has been said."""
        return cls(z, (), z, None, z[:, 0])

    def of(self, places: Tensor) -> Way:
        """Return that of some of the examples."""
        opinion = None if self.opinion is None else self.opinion[places]
        return Way(self.z[places], tuple(each[places] for each in self.heard), self.answer[places], opinion, self.doubt[places])


def chosen(answers: Tensor, doubts: Tensor, limit: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the answer (N, m) after the first block whose doubt is within the limit, and the number of blocks (N,)."""
    first = (doubts <= limit).to(answers.dtype).argmax(0)
    index = first.view(1, -1, 1).expand(1, *answers.shape[1:])
    return answers.gather(0, index).squeeze(0), (first + 1).to(answers.dtype)


@dataclass
class Trial:
    """What stopping at one doubt costs and gives: sums over examples."""

    score: Accumulator
    examples: int = 0
    blocks: float = 0.0
    operations: float = 0.0


class ExitTrials:
    """The scores, blocks and operations of chains that stop at each of the doubts ``TRIED``; iterates over these.

    Args:
        spec: of the task, whose primary metric is the score.
        predict: of the rule, for metrics that need it.
    """

    def __init__(self, spec: TaskSpec, predict: Callable[[Any], Tensor]) -> None:
        self._metric = spec.primary
        assert self._metric.begin is not None
        self._trials = {doubt: Trial(self._metric.begin(spec, predict)) for doubt in TRIED}

    def __iter__(self) -> Iterator[float]:
        return iter(self._trials)

    def add(self, doubt: float, outputs: Tensor, batch: Batch, blocks: Tensor, costs: Tensor) -> None:
        """Add the outputs (N, ...) at a doubt, and the blocks (N,) that they took.

        Args:
            doubt: one of those tried.
            outputs: predictions.
            batch: what they are for.
            blocks: numbers of them.
            costs: (T+1,) operations of an example up to each number of blocks.
        """
        trial = self._trials[doubt]
        trial.score.add(outputs, batch)
        trial.examples += len(blocks)
        trial.blocks += float(blocks.sum())
        trial.operations += float(costs[blocks.long().cpu()].sum())

    def within(self, budget: float) -> float:
        """Return the largest doubt up to which, at all that were tried, no more than the budget is lost of the whole chain's score."""
        sign, best = self._metric.sign, NEVER
        floor = sign * self._trials[NEVER].score.value() - budget
        for doubt, trial in self._trials.items():
            if not sign * trial.score.value() >= floor:
                break
            best = doubt
        return best

    def told(self, doubt: float) -> dict[str, float]:
        """Return score, blocks and operations of an example for the whole chain, and for the exit at this doubt."""
        found = {"exit/doubt": doubt}
        for name, at in (("whole", NEVER), ("exit", doubt)):
            trial = self._trials[at]
            found[f"{name}/{self._metric.name}"] = trial.score.value()
            found |= {f"{name}/blocks": trial.blocks / trial.examples, f"{name}/operations": trial.operations / trial.examples}
        return found


def operations_of(work: Callable[[], object]) -> float:
    """Count the floating-point operations of a call; a multiplication and its addition are two."""
    from bpfree.training.operations import counted_operations  # what trains is not loaded with the rules

    with counted_operations() as count:
        work()
    return float(count())
