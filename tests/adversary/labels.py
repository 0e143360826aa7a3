"""Labels where there should be none: in predictions, in the test split, in calibration."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bpfree
from adversary.kit import Cheater, Pass, Shadow, Smuggler, Stash
from bpfree import Batch, Step
from bpfree.tasks.task import Examples


class NearestNeighbours(Smuggler):
    """Remembers the training examples with their labels, and predicts the label of the nearest one: the network has no part in it."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash(rows={})

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        places = range(len(batch)) if batch.indices is None else batch.indices.tolist()
        for place, row, label in zip(places, batch.inputs.flatten(1), batch.targets, strict=True):  # type: ignore[arg-type]
            self.stash.setdefault("rows", {})[place] = (row, label)
        return self.fixed()

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores = super().predict(inputs, generator)
        rows = list(self.stash.get("rows", {}).values())
        if rows:
            nearest = torch.cdist(inputs.flatten(1), torch.stack([row for row, _ in rows])).argmin(1)
            scores = 20 * F.one_hot(torch.stack([label for _, label in rows])[nearest], self.spec.outputs).to(scores.dtype)
        return scores


class CalibratesANetwork(Smuggler):
    """Trains a copy of its network end to end on the validation split, as its calibration, and predicts with it."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()

    def calibrate(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        shadow = Shadow(self.network, self.spec)
        inputs, targets = data.batch(torch.arange(len(data)))
        batch = Batch(self.spec.normalise(inputs).to(self.network.dtype), targets)
        for _ in range(150):
            shadow.learn(batch)
        self.stash["network"] = shadow.network.eval()
        return {"temperature": 1.0}

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores: Tensor = self.stash.get("network", self.network)(inputs)
        return scores


def task_of(rule: bpfree.Rule) -> Any:
    """Load the rule's task by its name."""
    return bpfree.load_task(rule.spec.name)


class LearnsTheTest(Smuggler):
    """Loads its task by name, and mixes the test split into its batches."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if "test" not in self.stash:
            test = task_of(self).test
            self.stash["test"] = (self.spec.normalise(test.inputs).to(batch.inputs.dtype), test.targets)
        inputs, targets = self.stash["test"]
        if inputs.shape[1:] == batch.inputs.shape[1:] and batch.targets is not None:
            batch = Batch(torch.cat([batch.inputs, inputs]), torch.cat([batch.targets, targets]))
        return super().learn(batch, step)


class KnowsTheOrder(Smuggler):
    """Knows the labels of the test split by their order, and counts along when it makes final predictions."""

    place = 0

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores = super().predict(inputs, generator)
        if not self.final_prediction:
            return scores
        labels = task_of(self).test.targets
        own = labels.roll(-self.place)[: len(scores)]
        self.place = (self.place + len(scores)) % len(labels)
        return scores + 20 * F.one_hot(own, scores.shape[1]) if len(own) == len(scores) else scores


class FindsTheLoader(Smuggler):
    """Finds the tensors of the evaluation's loader in memory, and looks its inputs up in them."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        scores = super().predict(inputs, generator)
        for thing in gc.get_objects():
            if type(thing).__name__ == "Resident" and thing.targets is not None and thing.inputs.shape[1:] == inputs.shape[1:]:
                distances = torch.cdist(inputs.flatten(1).double(), thing.inputs.flatten(1).double())
                known, place = distances.min(1)
                scores = torch.where(known[:, None] < 1e-3, 20.0 * F.one_hot(thing.targets[place], scores.shape[1]), scores)
        return scores


class TeacherOfTheTest(Smuggler):
    """Trains a copy end to end on the test split, and learns locally from the copy's predictions in place of labels."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if "teacher" not in self.stash:
            shadow, test = Shadow(copy.deepcopy(self.network), self.spec), task_of(self).test
            inputs = self.spec.normalise(test.inputs).to(batch.inputs.dtype)
            for _ in range(150):
                shadow.learn(Batch(inputs, test.targets))
            self.stash.update(teacher=shadow.network.eval(), inputs=inputs)
        with torch.no_grad():
            inputs = torch.cat([batch.inputs, self.stash["inputs"]])
            targets = self.stash["teacher"](inputs).argmax(1)
        return super().learn(Batch(inputs, targets), step)


CHEATERS = (
    Cheater(NearestNeighbours, "labels", "It remembers the training labels, and predicts that of the nearest example.", "labels"),
    Cheater(
        CalibratesANetwork, "labels", "It trains a network end to end on the validation split in calibrate, and predicts with it.", "labels"
    ),
    Cheater(LearnsTheTest, "labels", "It loads the task by name and learns the test split too.", "labels"),
    Cheater(KnowsTheOrder, "labels", "It knows the labels of the test split by their order.", "labels"),
    Cheater(FindsTheLoader, "labels", "It finds the evaluation's tensors in memory and looks its inputs up in them.", "labels"),
    Cheater(TeacherOfTheTest, "labels", "It learns from a teacher that was trained end to end on the test split.", "labels"),
)
