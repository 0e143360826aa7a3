"""Prediction in discrete time: drawn classes with exact blocks, early exit, the folded chain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bpfree_noprop.blocks import NETWORKS, DenoisingBlock
from bpfree_noprop.dt import NoPropDT, NoPropDTConfig
from bpfree_noprop.early_exit import TRIED
from bpfree_noprop.modern import NETWORKS as MODERN
from bpfree_noprop.stems import NETWORKS as STEMS
from torch import Tensor, nn

import bpfree
from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.options import OptimizerConfig
from bpfree.step import Batch
from bpfree.tasks.task import Split, Task, TaskSpec

MakeRule = Callable[..., NoPropDT]
ALL = {**NETWORKS, **MODERN, **STEMS}
PROBABILITIES = torch.tensor([0.97, 0.02, 0.007, 0.003], dtype=torch.float64)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape))
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(len(weight)).to(weight) if bias is None else bias)
    return layer


def exact_rule(T: int, embedding: str = "one-hot", *, targets: str = "classes", d: int = 4, **options: Any) -> NoPropDT:
    """Return a rule whose inputs are logits of ``p(y|x)``, and whose blocks give ``p(y|x, z_{t-1})`` by Bayes' theorem.

    Of several labels the logits are of each label alone, and embeddings must be orthonormal.
    """
    spec = TaskSpec("exact", (4,), 4, targets)  # type: ignore[arg-type]
    config = NoPropDTConfig(T=T, state="noised", embedding=embedding, embedding_dim=d, **options)  # type: ignore[arg-type]
    if embedding == "prototype":
        d = 4

    def block() -> DenoisingBlock:
        eye = torch.eye(4)
        parts = {"stem": nn.Identity(), "label": linear(torch.zeros(4, d)), "fuse": linear(torch.cat([eye, eye], 1)), "out": linear(eye)}
        return DenoisingBlock(**parts, state_dim=d)  # type: ignore[arg-type]

    network = Network({f"t{t}": block() for t in range(1, T + 1)}, input_shape=(4,), readout=None, chain=False)
    rule = NoPropDT(network, spec, config).double().eval()
    rule.requires_grad_(False)
    W = rule.embed.weight
    rule.head.align(rule.embed)
    rule.head.linear.weight.mul_(1e3)
    rule.head.linear.bias.mul_(1e3)
    for t, each in rule.denoisers():
        abar = rule.schedule.abar[t - 1]
        prior = W.pow(2).sum(1) * abar / (1 - abar) / 2
        each.label.weight.copy_(W * abar.sqrt() / (1 - abar))
        each.label.bias.copy_(-prior)
    return rule


def drawn(rule: NoPropDT, count: int, logits: Tensor | None = None) -> Tensor:
    """Predict for ``count`` copies of one input."""
    logits = PROBABILITIES.log() if logits is None else logits
    with torch.no_grad():
        return rule.predict(logits.expand(count, -1), torch.Generator().manual_seed(1))


def bound(p: float, count: int) -> float:
    """Five standard errors of a frequency."""
    return 5 * math.sqrt(p * (1 - p) / count)


# --- drawn classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 10, 50])
@pytest.mark.parametrize("embedding", ["one-hot", "learned", "prototype"])
def test_drawn_classes_have_their_probabilities(T: int, embedding: str) -> None:
    """Oracle: with exact blocks the chain is the joint distribution of classes and states, so that it ends in y with probability p(y|x)."""
    rule, count = exact_rule(T, embedding, inference="class-sampled"), 40_000
    classes = drawn(rule, count).argmax(1).bincount(minlength=4) / count
    assert all(abs(float(found - p)) < bound(float(p), count) for found, p in zip(classes, PROBABILITIES, strict=True))


@pytest.mark.parametrize(("T", "more"), [(2, 0.0298), (10, 0.01), (50, 0.002)])
def test_eq_3_with_the_mean_of_a_belief_is_underdispersed(T: int, more: float) -> None:
    """The control: exact blocks, and the paper's chain, which draws the likeliest class too often, by more than ``more``."""
    count = 40_000
    found = float((drawn(exact_rule(T, inference="sampled"), count).argmax(1) == 0).double().mean())
    assert found > 0.97 + bound(0.97, count)


@pytest.mark.parametrize("embedding", ["one-hot", "learned"])
def test_drawn_sets_of_independent_labels_have_their_probabilities(embedding: str) -> None:
    """Oracle: labels that are independent given x; orthonormal embeddings keep them so given x and z."""
    probabilities, count = torch.tensor([0.9, 0.5, 0.2, 0.03], dtype=torch.float64), 20_000
    rule = exact_rule(5, embedding, targets="multilabel", inference="class-sampled")
    sets = (drawn(rule, count, probabilities.logit()) > 0).double()
    assert all(abs(float(found - p)) < bound(float(p), count) for found, p in zip(sets.mean(0), probabilities, strict=True))
    assert abs(float((sets[:, 0] * sets[:, 1]).mean()) - 0.45) < bound(0.45, count)


def test_many_draws_are_those_of_the_chain() -> None:
    """Oracle: frequencies of ``p(y|x)`` for each of several inputs; draws differ from each other."""
    rule = exact_rule(4)
    inputs = torch.stack([PROBABILITIES.log(), PROBABILITIES.flip(0).log(), torch.zeros(4, dtype=torch.float64)])
    draws = rule.sample(inputs, 12_000, torch.Generator().manual_seed(0)).argmax(2)
    assert draws.shape == (12_000, 3)
    for place, p in enumerate((0.97, 0.003, 0.25)):
        assert abs(float((draws[:, place] == 0).double().mean()) - p) < bound(p, 12_000)


def test_real_targets_have_no_classes_to_draw() -> None:
    spec = TaskSpec("real", (4,), 2, "real")
    config = NoPropDTConfig(T=2, inference="class-sampled")
    builder = NETWORKS["noprop-mlp"]
    with pytest.raises(UsageError, match=r"rule\.inference=sampled"):
        NoPropDT(builder.build(spec, builder.Config(blocks=2, width=2)), spec, config)


# --- early exit -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sure(make_rule: MakeRule) -> MakeRule:
    """A rule that stops early, whose blocks are more and more sure of what the first one says."""

    def make(**options: Any) -> NoPropDT:
        rule = make_rule(T=5, early_exit=0.0, **options).eval().requires_grad_(False)
        first = rule.network.blocks["t1"].state_dict()
        for t, block in rule.denoisers():
            block.load_state_dict(first)
            block.out.weight.mul_(5 * t)
        return rule

    return make


def settled(rule: NoPropDT, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the answer that is given after each block (T, N, m), and the doubt about it, from Eq. 3 written out step by step."""
    s, W = rule.schedule, rule.embed.weight
    z, answers, doubts = torch.zeros(len(inputs), W.shape[1], device=W.device), [], []
    for t, block in rule.denoisers():
        belief = block(inputs, z).softmax(1)
        end = z = s.a[t] * belief @ W + s.b[t] * z
        for later in range(t + 1, rule.config.T + 1):  # as if each repeated what this one said
            end = s.a[later] * belief @ W + s.b[later] * end
        answers.append(rule.head.linear(end).log_softmax(1))
        top = belief.sort(1, descending=True).values
        doubts.append(1 - (top[:, 0] - top[:, 1]))
    return torch.stack(answers), torch.stack(doubts)


@pytest.mark.parametrize("embedding", ["one-hot", "learned"])
def test_each_example_stops_when_its_answer_is_settled(embedding: str, sure: MakeRule, device: torch.device) -> None:
    """Oracle: all blocks for all examples by :func:`settled`, of which the first below the doubt is taken; the lazy path saves the rest."""
    rule, generator = sure(embedding=embedding), torch.Generator(device)
    inputs = torch.randn(100, 1, 6, 6, generator=torch.Generator().manual_seed(3)).to(device)
    answers, doubts = settled(rule, inputs)
    rule.exit_doubt.fill_(float(doubts[:4].quantile(0.3)))
    doubts[-1] = -1
    first = (doubts <= rule.exit_doubt).int().argmax(0)
    assert first.unique().numel() > 2
    seen = [0] * 5
    for t, block in rule.denoisers():
        block.stem.register_forward_hook(lambda module, args, output, t=t: seen.__setitem__(t - 1, len(output)))
    torch.testing.assert_close(rule.predict(inputs, generator), answers[first, torch.arange(100, device=device)])
    assert seen == [int((first >= t).sum()) for t in range(5)]
    assert torch.equal(rule.effort(inputs, generator)["blocks"], (first + 1).float())


@pytest.mark.parametrize("readout", ["path", "mean", "product"])
def test_other_readouts_stop_early_too(readout: str, sure: MakeRule, device: torch.device) -> None:
    """Oracle: rules of the first t of the blocks with this readout, of which each example gets that of its number of blocks."""
    rule = sure(readout=readout)
    inputs = torch.randn(50, 1, 6, 6, generator=torch.Generator().manual_seed(3)).to(device)
    found = rule.judgements(rule.views(inputs), None)
    answers = [replace(found, alone=found.alone[:t], path=found.path[:t]).read(rule.readout, rule.embed) for t in range(1, 6)]
    top = torch.stack(answers).exp().topk(2, dim=2).values
    rule.exit_doubt.fill_(float((1 - top[:4, :, 0] + top[:4, :, 1]).quantile(0.3)))
    blocks = rule.effort(inputs, torch.Generator(device))["blocks"]
    assert blocks.unique().numel() > 1
    wanted = torch.stack([answers[int(t) - 1][n] for n, t in enumerate(blocks)])
    torch.testing.assert_close(rule.predict(inputs, torch.Generator(device)), wanted)


def test_without_a_measured_doubt_the_whole_chain_answers(sure: MakeRule, batch: Batch) -> None:
    rule = sure()
    generator = torch.Generator(batch.inputs.device)
    whole = rule.last(rule.views(batch.inputs), None)
    assert torch.equal(rule.predict(batch.inputs, generator), whole)
    assert torch.equal(rule.alternatives(batch.inputs, generator)["whole"], whole)


def test_an_exit_that_was_never_measured_is_told(sure: MakeRule, caplog: pytest.LogCaptureFixture) -> None:
    """Weights of a run without ``early_exit``, loaded with one: the request has no effect."""
    state = {name: value for name, value in sure().state_dict().items() if name != "exit_doubt"}
    sure().load_state_dict(sure().state_dict())
    assert not caplog.records
    sure().load_state_dict(state)
    assert "rule.early_exit has no effect" in caplog.text


def test_the_doubt_is_the_largest_within_the_budget(sure: MakeRule, batch: Batch) -> None:
    """Oracle: accuracy and blocks by :func:`settled`, for each doubt that is tried; operations by hand, from the layers' sizes."""
    rule = sure()
    inputs = torch.randn(400, 1, 6, 6, generator=torch.Generator().manual_seed(3)).to(batch.inputs.device)
    answers, doubts = settled(rule, inputs)
    labels = answers[-1].argmax(1)
    doubts[-1] = -1

    def at(doubt: float) -> tuple[float, float]:
        first = (doubts <= doubt).int().argmax(0)
        right = answers[first, torch.arange(400)].argmax(1) == labels
        return float(right.double().mean()), float((first + 1).double().mean())

    for budget in (0.0, 0.05):
        rule.config.early_exit = budget
        found = rule.calibrate(Split(inputs.cpu(), labels.cpu()), torch.Generator(batch.inputs.device))
        wanted = [doubt for doubt in TRIED if at(doubt)[0] >= 1 - budget]
        wanted = wanted[: next((n for n, (one, other) in enumerate(zip(wanted, TRIED, strict=False)) if one != other), len(wanted))]
        assert found["exit/doubt"] == pytest.approx(float(rule.exit_doubt)) == pytest.approx(wanted[-1])
        assert (found["exit/accuracy"], found["exit/blocks"]) == pytest.approx(at(wanted[-1]))
        assert (found["whole/accuracy"], found["whole/blocks"]) == (1.0, 5.0)
        block = 2 * (36 * 64 + 4 * 64 + 128 * 64 + 2 * 64 * 64 + 64 * 4)
        assert found["whole/operations"] == 5 * block + 2 * 4 * 4
        assert found["exit/operations"] == pytest.approx(found["exit/blocks"] * block + 2 * 4 * 4)
    assert found["exit/blocks"] < 5


@pytest.mark.parametrize("targets", ["classes", "multilabel", "real"])
def test_a_run_reports_its_early_exit_beside_the_whole_chain(targets: str, tmp_path: Path) -> None:
    # Oracle: the record of the run, and predictions of the loaded rule with and without the exit.
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    y = {"classes": (x[:, 0] > 0).long(), "multilabel": (x[:, :2] > 0).float(), "real": x[:, :1].tanh()}[targets]
    parts = [Split(x[a:b], y[a:b]) for a, b in ((0, 200), (200, 250), (250, 300))]
    task = Task(TaskSpec("made", (6,), 1 if targets == "real" else 2, targets), *parts)  # type: ignore[arg-type]
    config = NoPropDTConfig(T=4, early_exit=0.5)
    options = NoPropDT.network_options(task.spec, config)
    builder = NETWORKS[options.pop("name")]
    rule = NoPropDT(builder.build(task.spec, builder.Config(**options, width=16, depth=1)), task.spec, config)
    settings = bpfree.TrainConfig(budget=bpfree.BudgetConfig(epochs=5), optimizer=OptimizerConfig(lr=1e-2), batch_size=20, device="cpu")
    result = bpfree.Trainer(rule, task, settings).fit().result
    name = task.spec.primary.name
    assert 1 <= result["test/effort/blocks"] < 4 == result["calibration/whole/blocks"]
    assert result["test/effort/operations"] < result["calibration/whole/operations"]
    assert {f"test/{name}", f"calibration/exit/{name}", f"calibration/whole/{name}"} <= set(result)
    assert targets == "real" or f"test/whole/{name}" in result  # alternatives are scored where a task has a metric beside its loss
    bare = NoPropDT(builder.build(task.spec, builder.Config(**options, width=16, depth=1)), task.spec, NoPropDTConfig(T=4))
    bare.load_state_dict(rule.state_dict())  # a run with the exit, without it
    rule.load_state_dict(bare.state_dict())  # and the other way round: it never stops
    generator = torch.Generator()
    with torch.no_grad():
        assert torch.equal(rule.eval().predict(x, generator), bare.eval().predict(x, generator))


# --- the folded chain -----------------------------------------------------------------------------------------------------


def trained_statistics(rule: NoPropDT) -> NoPropDT:
    """Give batch norms other weights and statistics than those of the start."""
    for module in rule.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for value, low in ((module.running_mean, -1), (module.running_var, 0.5), (module.weight.data, -1), (module.bias.data, -1)):
                value.uniform_(low, 2)
    return rule.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("network", "embedding"),
    [
        ("noprop-mlp", "one-hot"),
        ("noprop-cnn", "learned"),
        ("noprop-paper", "prototype"),
        ("noprop-residual", "prototype"),
        ("noprop", "learned"),
        ("shared", "one-hot"),
    ],
)
def test_the_folded_chain_is_the_chain(network: str, embedding: str) -> None:
    """Oracle: ``predict``, the loop over the blocks: to 1e-10 in double, 1e-5 in single precision. No dense layer has a batch norm."""
    spec, config = TaskSpec("images", (2, 16, 16), 4), NoPropDTConfig(T=3, embedding=embedding)  # type: ignore[arg-type]
    options = {**NoPropDT.network_options(spec, config), "name": "noprop" if network == "shared" else network}
    if network in ("noprop", "shared"):
        options |= {"stem": "vgg", "shared": network == "shared", "options": {"channels": [4]}}
    builder = ALL[options.pop("name")]
    torch.manual_seed(0)
    rule = trained_statistics(NoPropDT(builder.build(spec, builder.Config(**options)), spec, config))
    x = torch.randn(7, 2, 16, 16)
    torch.testing.assert_close(rule.folded()(x), rule.predict(x, torch.Generator()), rtol=1e-5, atol=1e-5)
    double = rule.double().folded()
    torch.testing.assert_close(double(x.double()), rule.predict(x.double(), torch.Generator()), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in double.modules())


@pytest.mark.parametrize(
    "options", [{"state": "analytic"}, {"state": "noise"}, {"state": "crossfit", "readout": "path"}, {"readout": "mean"}]
)
def test_the_folded_chain_of_other_states_and_readouts(options: dict[str, Any], make_rule: MakeRule, batch: Batch) -> None:
    """Oracle: ``predict``."""
    rule = trained_statistics(make_rule(**options))
    torch.testing.assert_close(rule.folded()(batch.inputs), rule.predict(batch.inputs, torch.Generator(batch.inputs.device)))


@pytest.mark.parametrize("targets", ["multilabel", "real"])
def test_the_folded_chain_of_other_targets(targets: str) -> None:
    """Oracle: ``predict``."""
    spec = TaskSpec("made", (6,), 2, targets, **({"output_shape": (2, 1)} if targets == "real" else {}))  # type: ignore[arg-type]
    builder = NETWORKS["noprop-mlp"]
    rule = trained_statistics(NoPropDT(builder.build(spec, builder.Config(blocks=3, depth=0)), spec, NoPropDTConfig(T=3)))
    x = torch.randn(5, 6)
    torch.testing.assert_close(rule.folded()(x), rule.predict(x, torch.Generator()))


def test_the_folded_chain_is_one_graph(make_rule: MakeRule, batch: Batch) -> None:
    """Oracle: ``predict``, for another number of examples than the program was made with; the compiler is given one whole graph."""
    rule = trained_statistics(make_rule()).cpu()
    x, wanted = batch.inputs.cpu(), rule.predict(batch.inputs.cpu(), torch.Generator())
    program = torch.export.export(rule.folded(), (x[:5],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(program(x), wanted)
    compiled = torch.compile(rule.folded(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), wanted)


def test_a_program_of_an_early_exit_answers_the_same(sure: MakeRule) -> None:
    """Oracle: ``predict``, which leaves out blocks where a program computes all of them for all examples."""
    rule = sure().cpu()
    inputs = torch.randn(100, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    rule.exit_doubt.fill_(float(settled(rule, inputs)[1][:4].quantile(0.3)))
    program = torch.export.export(rule.folded(), (inputs[:5],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    wanted = rule.predict(inputs, torch.Generator())
    torch.testing.assert_close(program(inputs), wanted)
    torch.testing.assert_close(torch.compile(rule.folded(), fullgraph=True, backend="eager")(inputs), wanted)


@pytest.mark.parametrize("options", [{"inference": "sampled"}, {"inference": "class-sampled"}])
def test_a_chain_with_draws_is_not_folded(options: dict[str, Any], make_rule: MakeRule) -> None:
    with pytest.raises(UsageError, match=r"rule\.inference=deterministic"):
        make_rule(**options).folded()
