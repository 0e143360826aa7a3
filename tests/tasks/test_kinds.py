"""Kinds of targets and inputs: losses and errors against autograd, rules against back-propagation, reloading, wrong data.

Oracles: ``torch.autograd`` for errors, ``torch.nn.functional`` for losses, back-propagation's gradient at the readout for rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfree
from bpfree import Batch, Network, Split, Task, TaskSpec, TrainConfig
from bpfree.errors import BpfreeError, UsageError
from bpfree.plugins import installed_plugins
from bpfree.tasks import augment
from bpfree.tasks.check import check_inputs
from bpfree.tasks.loading import Loader
from bpfree.tasks.spec import IGNORED, InputPart
from bpfree.tasks.splits import DatasetSplit, ItemSplit, StreamedSplit
from bpfree.training.config import BudgetConfig, EvaluationConfig
from bpfree.training.stepper import Stepper
from bpfree.training.trainer import Trainer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Huber(TaskSpec):
    """Real targets with another loss than half the squared error."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert batch.targets is not None
        return F.huber_loss(outputs, batch.targets, delta=0.1)


@dataclass(frozen=True)
class Smoothed(TaskSpec):
    """Classes with smoothed labels."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.targets, label_smoothing=0.6)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Negative(TaskSpec):
    """No targets, and a loss below zero: minus the variance that the outputs keep."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return -outputs.sigmoid().var(0).mean()


def test_a_batch_in_which_no_token_counts_teaches_nothing() -> None:
    spec, outputs = spec_of("tokens"), torch.randn(3, 5, 4, requires_grad=True)
    batch = Batch(torch.zeros(3, 6), torch.full((3, 5), IGNORED))
    loss = spec.loss(outputs, batch)
    assert float(loss) == 0
    assert torch.equal(torch.autograd.grad(loss, outputs)[0], torch.zeros(3, 5, 4))
    assert torch.equal(spec.error(outputs.detach(), batch), torch.zeros(3, 5, 4))


def targets_of(kind: str, generator: torch.Generator, count: int = 12) -> Tensor | None:
    if kind == "classes":
        return torch.randint(4, (count,), generator=generator)
    if kind == "multilabel":
        return torch.randint(2, (count, 4), generator=generator).float()
    if kind == "soft":
        return torch.rand(count, 4, generator=generator).softmax(1)
    if kind == "tokens":
        made = torch.randint(4, (count, 5), generator=generator)
        made[torch.rand(made.shape, generator=generator) < 0.3] = IGNORED
        return made
    return torch.randn(count, 4, generator=generator) if kind == "real" else None


def spec_of(kind: str) -> TaskSpec:
    own = {"huber": (Huber, "real"), "smoothed": (Smoothed, "classes"), "negative": (Negative, "none")}
    cls, targets = own.get(kind, (TaskSpec, kind))
    return cls(kind, (6,), 4, targets)  # type: ignore[arg-type]


KINDS = ("classes", "multilabel", "soft", "real", "tokens", "huber", "smoothed", "negative")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_the_derivative_of_the_loss(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    spec = spec_of(kind)
    shape = (12, 5, 4) if kind == "tokens" else (12, 4)
    outputs = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    targets = targets_of(spec.targets, generator)
    batch = Batch(torch.zeros(12, 6), targets.to(dtype) if targets is not None and targets.is_floating_point() else targets)
    loss = spec.loss(outputs, batch)
    (expected,) = torch.autograd.grad(loss, outputs)
    assert torch.allclose(spec.error(outputs.detach(), batch), expected, atol=1e-6)
    both = spec.loss_and_error(outputs.detach(), batch)
    assert torch.allclose(both[0], loss)
    assert torch.allclose(both[1], expected, atol=1e-6)


def test_losses_of_examples_and_tokens_have_the_loss_as_their_mean() -> None:
    generator = torch.Generator().manual_seed(4)
    for kind in ("classes", "multilabel", "soft", "real", "tokens"):
        spec = spec_of(kind)
        outputs = torch.randn((12, 5, 4) if kind == "tokens" else (12, 4), generator=generator)
        batch = Batch(torch.zeros(12, 6), targets_of(kind, generator))
        single = spec.losses(outputs, batch)
        assert single.mean() == pytest.approx(float(spec.loss(outputs, batch)), rel=1e-5)
        assert len(single) == int(spec.counted(batch))


def learners(spec: TaskSpec) -> dict[str, Any]:
    """A rule of each registered class that takes the task, on a small chain."""
    found = {}
    for name, kind, _ in installed_plugins().items("rules"):
        torch.manual_seed(0)
        network = Network(
            {"b1": nn.Sequential(nn.Linear(6, 8), nn.Tanh()), "b2": nn.Sequential(nn.Linear(8, 8), nn.Tanh()), "readout": nn.Linear(8, 4)},
            input_shape=(6,),
            readout="readout",
        )
        try:
            found[name] = kind(network, spec)
        except UsageError:
            continue
    return found


@pytest.mark.parametrize("kind", ["huber", "smoothed", "multilabel"])
def test_rules_are_taught_the_task_s_own_loss(kind: str) -> None:
    """The gradient that reaches the readout is back-propagation's, for every rule whose readout learns from the output's error."""
    spec, generator = spec_of(kind), torch.Generator().manual_seed(5)
    inputs, targets = torch.randn(12, 6, generator=generator), targets_of(spec.targets, generator)
    known = (
        "backprop",
        "frozen",
        "dfa",
        "forward-gradient",
        "local-backprop",
        "local-forward-gradient",
        "z-il",
        "fixed-prediction",
    )
    rules = learners(spec)
    assert set(known) <= set(rules)
    gradients = {}
    for name in known:
        rule, seen = rules[name], {}
        rule.before_update = lambda groups, rule=rule, seen=seen: seen.update(  # type: ignore[method-assign]
            {key: p.grad.clone() for key, p in rule.network.blocks["readout"].named_parameters() if p.grad is not None}
        )
        stepper = Stepper(rule)
        with stepper.phase(next(iter(rule.phases(bpfree.Budget(epochs=1))))):
            stepper.take(Batch(inputs.clone(), None if targets is None else targets.clone()))
        gradients[name] = torch.cat([seen["weight"].flatten(), seen["bias"]])
    for name, gradient in gradients.items():
        expected = gradients["backprop"]
        assert F.cosine_similarity(gradient, expected, dim=0) > 0.999, name
        assert float(gradient.norm() / expected.norm()) == pytest.approx(1.0, rel=0.05), name


def test_a_rule_with_a_loss_of_its_own_refuses_that_of_a_task() -> None:
    kinds = [kind for _, kind, _ in installed_plugins().items("rules") if not kind.traits_of(kind.Config()).own_loss]
    assert kinds
    for kind in kinds:
        blocks = {"b1": nn.Sequential(nn.Linear(6, 8), nn.Sigmoid()), "readout": nn.Linear(8, 4)}
        network = Network(blocks, input_shape=(6,), readout="readout", chain=kind.traits_of(kind.Config()).chain)
        with pytest.raises(UsageError, match="learns from a loss of its own, but the task brings one: Smoothed"):
            kind(network, spec_of("smoothed"))


def task_of(spec: TaskSpec, count: int = 48) -> Task:
    generator = torch.Generator().manual_seed(6)

    def split(size: int) -> Split:
        return Split(torch.randn(size, 6, generator=generator), targets_of(spec.targets, generator, size))

    return Task(spec, split(count), split(24), split(24))


def trained(rule: Any, task: Task, folder: Path | None = None, **config: Any) -> Trainer:
    trainer = Trainer(rule, task, TrainConfig(budget=BudgetConfig(epochs=2), batch_size=12, **config), folder=folder)
    trainer.fit()
    return trainer


def chain(outputs: int = 4) -> Network:
    torch.manual_seed(0)
    blocks = {"b1": nn.Sequential(nn.Linear(6, 8), nn.Tanh()), "readout": nn.Linear(8, outputs)}
    return Network(blocks, input_shape=(6,), readout="readout")


@pytest.mark.parametrize("kind", ["huber", "negative", "multilabel", "smoothed"])
def test_a_reloaded_run_has_the_loss_that_it_was_trained_with(kind: str, tmp_path: Path) -> None:
    spec = spec_of(kind)
    task = task_of(spec)
    trainer = trained(bpfree.plugins.installed_plugins().get("rules", "backprop")(chain(), spec), task, tmp_path / "run")
    rule = installed_plugins().get("rules", "backprop")(chain(), spec)
    saved = bpfree.load(tmp_path / "run", rule=rule)
    assert type(saved.spec) is type(spec)
    outputs = saved.predict(task.test.batch(torch.arange(24))[0])
    batch = Batch(torch.zeros(24, 6), task.test.targets)
    assert float(saved.spec.loss(outputs, batch)) == pytest.approx(trainer.run.result["test/loss"], rel=1e-5)


def test_a_spec_that_is_not_imported_is_refused(tmp_path: Path) -> None:
    from bpfree.training.checkpoint import read_checkpoint, write_checkpoint

    spec = spec_of("huber")
    trained(installed_plugins().get("rules", "backprop")(chain(), spec), task_of(spec), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    content = dict(read_checkpoint(path))
    for address in ("os.path:join", "no_such_module:Spec", f"{__name__}:KINDS"):
        content["task"] = {**content["task"], "class": address}
        write_checkpoint(path, content)
        with pytest.raises(BpfreeError, match="is not imported here"):
            bpfree.load(path, rule=installed_plugins().get("rules", "backprop")(chain(), spec))


def test_a_negative_loss_is_chosen_and_reported_as_a_loss(tmp_path: Path) -> None:
    spec = spec_of("negative")
    run = trained(installed_plugins().get("rules", "backprop")(chain(), spec), task_of(spec), tmp_path, select="best-val").run
    losses = [metrics["val/loss"] for metrics in run.history]
    assert run.result["val/loss_selected"] == min(losses) < 0
    assert not any("accuracy" in key for key in run.result)
    assert run.primary.name == "loss"


def test_real_targets_beside_a_column_of_outputs_are_refused() -> None:
    spec = TaskSpec("real", (6,), 1, "real")
    with pytest.raises(UsageError, match=r"y_train has shape \(48,\), expected \(N, 1\)"):
        Task(spec, Split(torch.randn(48, 6), torch.randn(48)), None, Split(torch.randn(9, 6), torch.randn(9)))
    with pytest.raises(BpfreeError, match=r"outputs have shape \(9, 1\), but targets \(9,\)"):
        spec.loss(torch.randn(9, 1), Batch(torch.randn(9, 6), torch.randn(9)))


# --- tokens -----------------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Tokens in, a state for each place out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(7, 5), nn.GRU(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.embedding(x))[0]  # type: ignore[no-any-return]


def language(dtype: torch.dtype = torch.uint8, count: int = 40) -> Task:
    """Count upwards modulo seven: the next token follows from the present one; every fourth place does not count."""
    generator = torch.Generator().manual_seed(7)
    spec = TaskSpec("count", (6,), 7, "tokens", vocabulary=7)

    def split(size: int) -> Split:
        first = torch.randint(7, (size, 1), generator=generator)
        made = (first + torch.arange(7)) % 7
        targets = made[:, 1:].clone()
        targets[:, 3] = IGNORED
        return Split(made[:, :-1].to(dtype), targets)

    return Task(spec, split(count), split(16), split(16))


def recurrent_network(spec: TaskSpec) -> Network:
    torch.manual_seed(0)
    blocks = {"b1": Recurrent(), "readout": nn.Linear(6, 7)}
    return Network(blocks, input_shape=spec.input_shape, readout="readout", example=spec.example(1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("rule", ["backprop", "dfa", "z-il"])
def test_a_language_is_learned_by_a_baseline_a_broadcast_and_a_local_rule(rule: str, dtype: torch.dtype) -> None:
    """Token for token: bytes are no pixels, and places that do not count are left out of loss and accuracy."""
    task = language(dtype)
    made = installed_plugins().get("rules", rule)(recurrent_network(task.spec), task.spec)
    config = TrainConfig(
        budget=BudgetConfig(epochs=30),
        batch_size=20,
        optimizer=bpfree.OptimizerConfig("adam", lr=0.03),
        evaluation=EvaluationConfig(every=30),
    )
    trainer = Trainer(made, task, config)
    run = trainer.fit()
    inputs, targets = task.test.batch(torch.arange(16))
    outputs = made.predict(task.spec.normalise(inputs), torch.Generator()).detach()
    assert task.spec.normalise(inputs).dtype == torch.int64
    counts = targets != IGNORED
    expected = (outputs.argmax(-1) == targets)[counts].float().mean()
    assert run.result["test/accuracy"] == pytest.approx(float(expected))
    assert run.result["test/loss"] == pytest.approx(float(F.cross_entropy(outputs[counts], targets[counts])), rel=1e-4)
    assert run.result["test/accuracy"] > 0.7  # chance is 1/7


@pytest.mark.parametrize("rule", ["local-backprop", "forward-gradient", "softhebb", "noprop-dt"])
def test_what_a_rule_cannot_do_is_refused_by_name(rule: str) -> None:
    spec = language().spec
    with pytest.raises(UsageError, match=r"cannot learn from targets of kind 'tokens'|needs inputs that are one tensor of real numbers"):
        installed_plugins().get("rules", rule)(recurrent_network(spec), spec)


def test_integers_outside_of_their_vocabulary_are_refused() -> None:
    task = language()
    with pytest.raises(UsageError, match="integers from 0 to 9, but its vocabulary is 0 to 6"):
        check_inputs(task.spec, torch.tensor([[0, 1, 2, 3, 4, 9]]), "predict")
    with pytest.raises(UsageError, match=r"holds torch.float32, but its numbers are integer"):
        check_inputs(task.spec, torch.zeros(2, 6), "predict")
    wrong = Split(torch.zeros(4, 6, dtype=torch.long), torch.full((4, 6), 8))
    with pytest.raises(UsageError, match="holds tokens from 8 to 8, but those of 7 outputs are 0 to 6"):
        Task(task.spec, wrong, None, wrong)


def test_sequences_of_targets_are_no_classes() -> None:
    spec = TaskSpec("classes", (6,), 7)
    data = Split(torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.long))
    with pytest.raises(UsageError, match=r"y_train has shape \(4, 6\), but classes are \(N,\)"):
        Task(spec, data, None, data)


# --- trees, items of different length, data sets ---------------------------------------------------------------------------------


class Joined(nn.Module):
    """Two tensors in, one out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.map = nn.Embedding(5, 3), nn.Linear(4, 5)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return torch.cat([self.embedding(x["kind"]), self.map(x["numbers"])], dim=1).tanh()


TREE = TaskSpec("tree", (), 3, structure={"kind": InputPart((), "integer", 5), "numbers": InputPart((4,))})


def tree(size: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(5, (size,), generator=generator)
    return Split({"kind": kind, "numbers": torch.randn(size, 4, generator=generator)}, kind % 3)


@pytest.mark.parametrize("rule", ["backprop", "dfa", "local-backprop", "fixed-prediction"])
@pytest.mark.parametrize("resident", [True, False])
def test_inputs_of_several_tensors_are_trained_on(rule: str, resident: bool, tmp_path: Path) -> None:
    task = Task(TREE, tree(60, 0), tree(20, 1), tree(20, 2))
    torch.manual_seed(0)
    network = Network({"b1": Joined(), "readout": nn.Linear(8, 3)}, input_shape=(), readout="readout", example=TREE.example(1))
    made = installed_plugins().get("rules", rule)(network, TREE)
    config = TrainConfig(budget=BudgetConfig(epochs=40), batch_size=20, optimizer=bpfree.OptimizerConfig("adam", lr=0.03))
    run = Trainer(made, task, config, folder=tmp_path / "run", loading=bpfree.training.trainer.Loading(resident=resident)).fit()
    assert run.result["test/accuracy"] > 0.9
    fresh = installed_plugins().get("rules", rule)(
        Network({"b1": Joined(), "readout": nn.Linear(8, 3)}, input_shape=(), readout="readout", example=TREE.example(1)), TREE
    )
    saved = bpfree.load(tmp_path / "run", rule=fresh)
    assert saved.spec == TREE
    outputs = saved.predict(task.test.batch(torch.arange(20))[0])
    assert float((outputs.argmax(1) == task.test.targets).float().mean()) == run.result["test/accuracy"]


def test_trees_that_do_not_fit_their_description_are_refused() -> None:
    good = tree(8, 0)
    cases: list[tuple[Any, str]] = [
        ({"kind": good.inputs["kind"]}, r"parts \['kind'\], but the spec describes \['kind'\], \['numbers'\]"),
        ({**good.inputs, "numbers": torch.zeros(8, 3)}, r"\['numbers'\] has shape \(8, 3\), expected \(N, 4\)"),
        ({**good.inputs, "numbers": torch.full((8, 4), float("nan"))}, "32 values that are NaN"),
        ({**good.inputs, "numbers": torch.zeros(7, 4)}, "hold 7 and 8 examples: they differ"),
        (torch.zeros(8, 4), "have the parts , but the spec describes|one tensor"),
    ]
    for inputs, message in cases:
        with pytest.raises(UsageError, match=message):
            Task(TREE, Split(inputs, good.targets), None, good)


def test_items_of_different_length_are_joined_batch_by_batch() -> None:
    items = [torch.arange(size).float()[:, None] for size in (3, 5, 1, 4)]
    split = ItemSplit(items, torch.tensor([0, 1, 0, 1]))
    inputs, targets = split.batch(torch.tensor([2, 1]))
    assert inputs["lengths"].tolist() == [1, 5]
    assert inputs["values"].shape == (2, 5, 1)
    assert inputs["values"][0, 1:].abs().sum() == 0
    assert targets is not None
    assert targets.tolist() == [0, 1]
    spec = TaskSpec("items", (), 2, structure={"values": InputPart((-1, 1)), "lengths": InputPart((), "integer")})
    task = Task(spec, split, None, split)
    loader = Loader(task.train, spec, batch_size=2, device=CPU, seed=1)
    assert sorted(length for batch in loader for length in batch.inputs["lengths"].tolist()) == [1, 3, 4, 5]
    other = ItemSplit([*items[:3], items[3] + 1], split.targets)
    assert Task(spec, other, None, split).fingerprint() != task.fingerprint()


class Squares(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Items that are made when they are asked for."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.tensor([float(place), float(place**2)]), place % 2


class Numbers(torch.utils.data.IterableDataset[tuple[Tensor, int]]):
    """The same items, one after the other."""

    def __iter__(self) -> Any:
        return ((torch.tensor([float(place), float(place**2)]), place % 2) for place in range(30))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_of_torch_gives_the_batches_of_the_same_tensors(workers: int) -> None:
    spec = TaskSpec("squares", (2,), 2)
    inputs = torch.stack([Squares()[place][0] for place in range(30)])
    plain = Split(inputs, torch.arange(30) % 2)
    expected = [(b.inputs, b.targets) for b in Loader(plain, spec, batch_size=8, device=CPU, seed=3).batches(2)]
    made = [
        (b.inputs, b.targets) for b in Loader(DatasetSplit(Squares()), spec, batch_size=8, device=CPU, seed=3, workers=workers).batches(2)
    ]
    assert len(made) == len(expected) == 4
    for (x, y), (u, v) in zip(made, expected, strict=True):
        assert torch.equal(x, u)
        assert y is not None
        assert v is not None
        assert torch.equal(y, v)


def test_an_iterable_data_set_is_read_in_its_own_order_and_resumed() -> None:
    spec = TaskSpec("numbers", (2,), 2)
    loader = Loader(StreamedSplit(Numbers(), 30), spec, batch_size=8, device=CPU, seed=3)
    first = [batch.inputs[:, 0].tolist() for batch in loader.batches(0)]
    assert [value for batch in first for value in batch] == list(range(30))
    assert [batch.inputs[:, 0].tolist() for batch in loader.batches(0, start=2)] == first[2:]
    with pytest.raises(UsageError, match="ended before its 40 examples"):
        list(Loader(StreamedSplit(Numbers(), 40), spec, batch_size=8, device=CPU, seed=3).batches(0))
    with pytest.raises(UsageError, match="cannot be cut or shuffled"):
        StreamedSplit(Numbers(), 30).subset(torch.tensor([4]))


def test_a_task_is_made_of_data_in_memory() -> None:
    x, y = torch.randn(40, 6).numpy(), (torch.arange(40) % 3).numpy()
    task = Task.of((x, y), (x[:9], y[:9]), validation=0.25, name="mine")
    assert (task.spec.outputs, task.spec.targets, task.spec.input_shape) == (3, "classes", (6,))
    assert (len(task.train), len(task.validation or ()), len(task.test)) == (31, 9, 9) or len(task.validation or ()) in (9, 10)
    sets = Task.of(Squares(), Squares(), validation=None, spec=TaskSpec("squares", (2,), 2))
    assert sets.validation is None
    assert len(sets.train) == 30
    with pytest.raises(UsageError, match="which kind are they"):
        Task.of((x, (torch.arange(80) % 2).reshape(40, 2).numpy()), (x, y))
    with pytest.raises(UsageError, match="is no split"):
        Task.of("data", (x, y))


def test_a_source_may_say_that_there_is_no_validation() -> None:
    one = Split(torch.randn(1, 6), torch.randn(1, 1))
    source = bpfree.DataSource(lambda config, root: TaskSpec("one", (6,), 1, "real"), lambda config, root: (one, None, one))
    task = Task.from_source(source)
    assert task.validation is None
    assert len(task.train) == 1


@pytest.mark.parametrize("rule", ["backprop", "dfa"])
def test_a_plain_module_on_tokens_or_a_tree_is_split(rule: str) -> None:
    """Blocks composed are the module: the same outputs."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.cell, self.out = nn.Embedding(7, 5), nn.Linear(5, 6), nn.Linear(6, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(self.embedding(x)).tanh())  # type: ignore[no-any-return]

    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joined, self.out = Joined(), nn.Linear(8, 3)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.out(self.joined(x))  # type: ignore[no-any-return]

    for module, spec in ((Plain(), language().spec), (Tree(), TREE)):
        x = spec.example(4)
        expected = module(x)
        made = installed_plugins().get("rules", rule)(module, spec)
        assert len(made.network.blocks) > 1
        assert torch.equal(made.network(x), expected)


# --- views ------------------------------------------------------------------------------------------------------------------------


def test_views_are_drawn_independently_and_resume_in_the_middle() -> None:
    """The first view is the batch without views; each is a pure function of (seed, epoch, example, view)."""
    generator = torch.Generator().manual_seed(8)
    spec = TaskSpec("images", (1, 8, 8), 2)
    data = Split(torch.randint(256, (24, 1, 8, 8), generator=generator).to(torch.uint8), torch.arange(24) % 2)
    options: dict[str, Any] = {"batch_size": 10, "device": CPU, "seed": 3, "augment": [augment.FLIP, augment.CROP]}
    plain = list(Loader(data, spec, **options).batches(1))
    viewed = list(Loader(data, spec, views=3, **options).batches(1))
    for one, many in zip(plain, viewed, strict=True):
        assert len(many.views) == 3
        assert torch.equal(one.inputs, many.inputs)
        assert many.views[0] is many.inputs
        assert not torch.equal(many.views[1], many.views[2])
        assert one.views == ()
        assert many.indices is not None
        assert torch.equal(data.targets[many.indices], many.targets)  # type: ignore[index, arg-type]
    again = list(Loader(data, spec, views=3, **options).batches(1, start=2))
    assert torch.equal(again[0].views[2], viewed[2].views[2])
    alone = next(iter(Loader(data, spec, views=2, batch_size=10, device=CPU, seed=3).batches(0)))
    alone.views[0].zero_()
    assert alone.views[1].abs().sum() > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rule_that_asks_for_views_gets_them(accumulate: int) -> None:
    seen: list[tuple[int, bool]] = []

    class Pairs(installed_plugins().get("rules", "backprop")):  # type: ignore[misc]
        traits_of = bpfree.always(bpfree.Traits(views=2))

        def credit(self, batch: Batch, step: Any) -> Any:
            seen.append((len(batch), all(torch.equal(view, batch.inputs) for view in batch.views[:1]) and len(batch.views) == 2))
            return super().credit(batch, step)

    spec = TaskSpec("vectors", (6,), 4)
    trained(Pairs(chain(), spec), task_of(spec), accumulate=accumulate)
    assert {size for size, _ in seen} == {12 // accumulate}
    assert all(good for _, good in seen)
