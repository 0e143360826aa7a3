"""The rule. Oracles: known weights, ``numpy.linalg.lstsq``, a batch beside a stream, counted rows, what the run spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpfree_sampled import pictures
from bpfree_sampled.rule import Sampled, SampledConfig
from bpfree_sampled.task import HamiltonianSpec
from sampled_kit import energy_rule, plain_network, solved, system, trained
from torch import Tensor

import bpfree
from bpfree import Batch, BudgetConfig, Split, StreamedSplit, Task, TaskSpec, TrainConfig, Trainer, UsageError
from bpfree.network.network import Network, evaluating
from bpfree.training.operations import counted_operations

Double = torch.float64


def energies(rule: Sampled, states: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(rule):
        return rule.predict(states, torch.Generator())[:, 0]


# --- Hamiltonian systems ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [[20], [15, 20]])
@pytest.mark.parametrize("streamed", [False, True])
def test_known_weights_are_found(widths: list[int], streamed: bool) -> None:
    """Targets are the field of the same sampled network with other output weights, M = 20; its constant is that of the state 0."""
    task = system("pendulum", box=[-2, 2])
    rule = energy_rule(task, network={"widths": widths}, streamed=streamed)
    inputs, targets = task.train.batch(torch.arange(200))
    assert targets is not None
    readout = rule._readout
    a = torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=Double)
    with torch.no_grad():
        rule._sample(inputs, None, torch.Generator().manual_seed(1))
        readout.weight.copy_(a)
        readout.bias.fill_(0.0)
        known = rule.network(inputs)
        constant = rule.network(torch.zeros(1, 2, dtype=Double))[0, 0]
        readout.weight.fill_(0.0)
    assert isinstance(task.spec, HamiltonianSpec)
    solved(rule, inputs, known, sampled=False)
    torch.testing.assert_close(readout.weight[0], a, rtol=0, atol=1e-8 * float(a.norm()))
    torch.testing.assert_close(readout.bias[0], task.spec.origin_energy - constant, rtol=0, atol=1e-7)


def test_the_solution_is_that_of_the_published_system() -> None:
    """numpy.linalg.lstsq of rows [J_p, 0] = q', [-J_q, 0] = p' and a last row [phi(0), 1] = H(0), rcond 1e-13."""
    task = system("spring", examples=60)
    rule = energy_rule(task, width=12)
    trained(rule, task)
    inputs, targets = task.train.batch(torch.arange(60))
    assert targets is not None
    weight, bias = rule._layers[0][1].weight.detach(), rule._layers[0][1].bias.detach()
    units = torch.tanh(inputs @ weight.T + bias)
    slopes = (1 - units.square())[:, :, None] * weight  # (N, M, D)
    rows = torch.cat([slopes[..., 1], -slopes[..., 0]])
    origin = torch.tanh(bias)
    system_rows = torch.cat(
        [torch.cat([rows, torch.zeros(120, 1, dtype=Double)], 1), torch.cat([origin, torch.ones(1, dtype=Double)])[None]]
    )
    right = torch.cat([targets[:, 1], targets[:, 2], torch.zeros(1, dtype=Double)])
    expected = torch.from_numpy(np.linalg.lstsq(system_rows.numpy(), right.numpy(), rcond=1e-13)[0])
    made = units @ expected[:-1] + expected[-1]
    torch.testing.assert_close(energies(rule, inputs), made, rtol=0, atol=1e-8 * float(made.norm()))


@pytest.mark.parametrize("sampling", ["u-swim", "swim", "elm"])
def test_streamed_equals_batch(sampling: Any) -> None:
    """In the fitted energy to 1e-10 of its norm, with batches of 64 and of 7."""
    task = system("pendulum", box=[-2, 2], examples=300)
    states = task.test.batch(torch.arange(200))[0]
    found = []
    first = energy_rule(task, sampling=sampling, streamed=True)
    for streamed, size in ((True, 64), (True, 7), (False, 64)):
        rule = energy_rule(task, sampling=sampling, streamed=streamed)
        if found:  # the same hidden units
            rule.network.load_state_dict(first.network.state_dict())
            rule.freeze_features()
        else:
            rule = first
        trained(rule, task, batch_size=size)
        found.append(energies(rule, states))
    assert all(float((each - found[0]).norm()) < 1e-10 * float(found[0].norm()) for each in found[1:])


def test_energies_are_learned() -> None:
    """The pendulum within half a turn, 60 units: every sampling is below 5 thousandths, in one pass; and they differ."""
    task = system("pendulum", box=[-3, 3])
    found = {}
    for sampling in ("u-swim", "swim", "a-swim", "elm"):
        result = trained(energy_rule(task, sampling=sampling, **({"scale": 0.3} if sampling == "elm" else {})), task)
        found[sampling] = result["test/energy_error"]
        assert found[sampling] < 5e-3
        assert result["train/samples"] == 200
    assert len(set(found.values())) == 4


def test_differences_along_trajectories_suffice() -> None:
    """By midpoints; and by (q of the second, p of the first), which without its correction is worse."""
    found = {}
    for observe in ("derivatives", "midpoints", "euler"):
        task = system("pendulum", box=[-3, 3], observe=observe, step=0.1)
        found[observe] = trained(energy_rule(task, width=80), task)["test/energy_error"]
    assert found["derivatives"] < 1e-3
    assert found["midpoints"] < 0.01
    assert found["euler"] < 0.01
    uncorrected = system("pendulum", box=[-3, 3], observe="euler", step=0.1)
    object.__setattr__(uncorrected.spec, "correction", 0.0)
    assert trained(energy_rule(uncorrected, width=80), uncorrected)["test/energy_error"] > 2 * found["euler"]


def test_only_swim_sees_the_energies() -> None:
    """Wrong energies in the targets change what ``swim`` samples, and nothing of the others."""
    task = system("spring", examples=80)
    assert isinstance(task.train, Split)
    assert task.train.targets is not None
    wrong = task.train.targets.clone()
    wrong[:, 0] = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=Double)
    other = Task(task.spec, Split(task.train.inputs, wrong), None, task.test)
    for sampling, same in (("u-swim", True), ("a-swim", True), ("elm", True), ("swim", False)):
        one, two = energy_rule(task, width=15, sampling=sampling), energy_rule(task, width=15, sampling=sampling)
        trained(one, task)
        trained(two, other)
        assert torch.equal(one._layers[0][1].weight, two._layers[0][1].weight) is same


def test_single_precision_is_coarser() -> None:
    task = system("pendulum", box=[-2, 2], examples=400)
    single = trained(energy_rule(task, width=200, precision="float32", network={"dtype": "float32"}), task)["test/energy_error"]
    double = trained(energy_rule(task, width=200), task)["test/energy_error"]
    assert double < single / 10 < 1e-3


# --- classes and real values ------------------------------------------------------------------------------------------------


def blobs(count: int = 150, seed: int = 0, kind: str = "classes") -> Task:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator)
    classes = (inputs[:, 0].abs() + inputs[:, 1] > 0.7).long() + (inputs[:, 2] > 1).long()
    targets = {"classes": classes, "real": inputs[:, :2].sin(), "multilabel": torch.stack([classes > 0, classes > 1], 1).float()}[kind]
    spec = TaskSpec("blobs", (5,), 3 if kind == "classes" else 2, kind, scale=1.0)  # type: ignore[arg-type]
    parts = [Split(inputs[places], targets[places]) for places in torch.arange(count).chunk(3)]
    return Task(spec, *parts)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("kind", ["classes", "real", "multilabel"])
def test_the_readout_is_ridge_regression_on_the_features(kind: str, activation: str) -> None:
    """By normal equations, of one-hot rows for classes, at a penalty at which they are exact enough."""
    task = blobs(kind=kind)
    rule = Sampled(plain_network(task.spec, activation, (12, 10)), task.spec, SampledConfig(penalties=[0.01], sampling="swim"))
    inputs, targets = task.train.batch(torch.arange(50))
    solved(rule, inputs.to(Double), targets)  # type: ignore[arg-type]
    x = rule.features(inputs.to(Double)).detach()
    y = task.spec.target_rows(Batch(inputs, targets), Double)
    centred = x - x.mean(0)
    weight = torch.linalg.solve(centred.T @ centred + 50 * 0.01 * torch.eye(10, dtype=Double), centred.T @ (y - y.mean(0))).T
    torch.testing.assert_close(rule._readout.weight.detach(), weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(rule._readout.bias.detach(), y.mean(0) - weight @ x.mean(0), rtol=1e-7, atol=1e-9)


def test_deep_layers_are_sampled_from_images() -> None:
    """The second layer has -1/2 and 1/2 at images of two points under the first: each unit takes these values somewhere."""
    task = blobs()
    network = plain_network(task.spec, widths=(8, 30))
    rule = Sampled(network, task.spec, SampledConfig())
    solved(rule, *task.train.batch(torch.arange(50)))  # type: ignore[arg-type]
    with torch.no_grad():
        units = network.features(task.train.batch(torch.arange(50))[0].to(Double))
    for value in (-0.5, 0.5):
        assert float((units - value).abs().amin(0).max()) < 1e-9


@pytest.mark.parametrize("choose", ["leave-one-out", "generalised", "validation"])
def test_a_penalty_is_chosen(choose: Any) -> None:
    """More units than examples and noisy targets: the smallest and the largest penalty are both worse than the chosen one."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(240, 3, generator=generator)
    noisy = inputs[:, :1].sin() + 0.3 * torch.randn(240, 1, generator=generator)
    parts = [Split(inputs[places], noisy[places]) for places in torch.arange(240).chunk(3)]
    task = Task(TaskSpec("noisy", (3,), 1, "real", scale=1.0), *parts)
    penalties = [1e-8, 1e-4, 1e-2, 1e-1, 10.0]
    found = {}
    for given in (penalties, penalties[:1], penalties[-1:]):
        rule = Sampled(plain_network(task.spec, widths=(120,)), task.spec, SampledConfig(penalties=given, choose=choose))
        result = trained(rule, task)
        found[tuple(given)] = result["test/loss"]
        if choose == "validation" and len(given) > 1:
            assert result["calibration/penalty"] == penalties[int(rule.chosen)]
            losses = []
            validation = task.validation
            assert validation is not None
            x, y = validation.batch(torch.arange(80))
            for place in range(5):
                rule.chosen.fill_(place)
                losses.append(float((rule.predict(x.to(Double), torch.Generator()) - y).square().mean()))  # type: ignore[operator]
            assert penalties[int(np.argmin(losses))] == result["calibration/penalty"]
    chosen, small, large = found.values()
    assert chosen < small
    assert chosen < large


def test_a_saved_rule_predicts_by_the_chosen_penalty(tmp_path: Path) -> None:
    task = blobs(kind="real")
    rule = Sampled(plain_network(task.spec), task.spec, SampledConfig(choose="validation"))
    trained(rule, task)
    again = Sampled(plain_network(task.spec), task.spec, SampledConfig(choose="validation"))
    again.load_state_dict(rule.state_dict())
    x = task.test.batch(torch.arange(10))[0].to(Double)
    assert torch.equal(again.predict(x, torch.Generator()), rule.predict(x, torch.Generator()))


def test_digits_are_learned_above_chance_and_twins_are_random_features(digits: Task) -> None:
    """The twin keeps the hidden units that the network was made with."""
    network = plain_network(digits.spec, widths=(150,), dtype=torch.float32)
    before = network.blocks["b1"][1].weight.detach().clone()  # type: ignore[index]
    config = TrainConfig(budget=BudgetConfig(epochs=1), device="cpu", twin=True)
    twin = Trainer(Sampled(network, digits.spec), digits, config).fit().result
    assert torch.equal(network.blocks["b1"][1].weight, before)  # type: ignore[index]
    result = trained(Sampled(plain_network(digits.spec, widths=(150,), dtype=torch.float32), digits.spec), digits)
    assert result["test/accuracy"] > 0.9
    assert twin["test/accuracy"] > 0.7


# --- streams, costs, refusals -----------------------------------------------------------------------------------------------


class Counted(torch.utils.data.IterableDataset[Any]):
    """A data set that is read item by item, and counts what is read."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.read = inputs, targets, 0

    def digest(self) -> str:
        return "counted"

    def __iter__(self) -> Any:
        for item in zip(self.inputs, self.targets, strict=True):
            self.read += 1
            yield item


def test_a_stream_is_learned_in_one_pass() -> None:
    """Of 300 examples 40 are read to sample from, then all once; the result is that of the same examples in memory."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 4, generator=generator)
    targets = inputs[:, :2].sin()
    data = Counted(inputs, targets)
    spec = TaskSpec("stream", (4,), 2, "real", scale=1.0)
    options = SampledConfig(streamed=True, points=40, penalties=[1e-3])
    rule = Sampled(plain_network(spec), spec, options)
    test = Split(inputs[:50], targets[:50])
    config = TrainConfig(budget=BudgetConfig(epochs=1), batch_size=32, device="cpu", select="last")
    task = Task(spec, StreamedSplit(data, 300), None, test)
    before = data.read
    run = Trainer(rule, task, config).fit()
    assert run.result["train/samples"] == 300
    assert data.read - before >= 340
    again = Sampled(plain_network(spec), spec, options)
    again.network.load_state_dict(rule.network.state_dict())
    solved(again, inputs.to(Double), targets, sampled=False)
    torch.testing.assert_close(again._readout.weight, rule._readout.weight, rtol=1e-8, atol=1e-10)


def test_memory_of_a_stream_does_not_grow_with_the_data() -> None:
    found = {}
    for streamed in (True, False):
        for count in (400, 3200):
            task = system("spring", examples=count, test_examples=10)
            rule = energy_rule(task, width=40, streamed=streamed, points=100)
            found[streamed, count] = trained(rule, task, batch_size=100)["train/peak_memory_mb"]
    assert found[True, 3200] < 1.1 * found[True, 400]
    assert found[False, 3200] > 2 * found[False, 400]


def test_costs_are_those_that_were_spent() -> None:
    """Operations of a run, beside those of its parts: sampling, rows, QR, singular values; memory holds the rows and their copy."""
    task = system("spring", examples=500)
    rule = energy_rule(task, width=50)
    result = trained(rule, task)
    n, m = 1000, 50
    with counted_operations() as count:
        torch.linalg.qr(torch.zeros(n, m + 1, dtype=Double), mode="r")
        torch.linalg.svd(torch.zeros(m, m, dtype=Double))
    assert count() < result["train/operations"] < 1.2 * count()
    assert result["train/peak_memory_mb"] > 2 * n * m * 8 / 2**20
    assert result["train/seconds"] > 0
    assert result["train/processor_seconds"] > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"streamed": True, "sampling": "a-swim"}, "twice"),
        ({"streamed": True}, "once more"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], match: str) -> None:
    spec = blobs().spec
    with pytest.raises(UsageError, match=match):
        Sampled(plain_network(spec), spec, SampledConfig(**options))


def test_other_networks_and_losses_are_refused() -> None:
    spec = blobs().spec

    class Own(TaskSpec):
        def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
            return outputs.sum()

    for build, match in (
        (lambda: Sampled(plain_network(spec, "sigmoid"), spec), "tanh or ReLU"),
        (lambda: Sampled(Network({"readout": torch.nn.Linear(5, 3)}, input_shape=(5,), readout="readout"), spec), "hidden layer"),
        (lambda: Sampled(plain_network(spec), Own("own", (5,), 3)), "loss of its own"),
        (lambda: Sampled(energy_rule(system()).network, system().spec, SampledConfig(choose="validation", penalties=[0, 1])), "energy"),
    ):
        with pytest.raises(UsageError, match=match):
            build()
    network = Network({"b1": torch.nn.Conv2d(1, 2, 3), "readout": torch.nn.Linear(2, 3)}, input_shape=(5,), readout="readout", chain=False)
    with pytest.raises(UsageError):
        Sampled(network, spec)


def test_the_plan_says_what_is_sampled(digits: Task) -> None:
    text = Sampled(plain_network(digits.spec), digits.spec, SampledConfig(control="rotated")).plan()
    assert "b1: 40 tanh units, from pairs (u-swim, rotated)" in text
    assert "readout: solved for outputs, 9 penalties, leave-one-out" in text
    assert "normal weights" not in text


# --- pictures ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equations", ["pendulum", "henon-heiles"])
def test_pictures_show_what_was_learned(equations: str, tmp_path: Path) -> None:
    """A figure of three panels. Oracle of the map: the error at its corners, computed here a second time."""
    task = system(equations, rollout=12, box=[-1, 1])
    rule = energy_rule(task)
    trained(rule, task)
    assert isinstance(task.spec, HamiltonianSpec)
    path = pictures.keep(tmp_path, rule, task.spec)
    content = json.loads(path.read_text())
    assert len(content["learned"]) == 3
    assert len(content["learned"][0]) == 13
    assert max(map(max, content["energies"])) < 0.1
    corners = torch.zeros(2, task.spec.input_size, dtype=Double)
    corners[:, 0] = -1
    corners[:, task.spec.system.freedoms] = torch.tensor([-1.0, 1.0])
    true = task.spec.system.energy(corners)
    shown = [row[0] for row in (content["errors"][0], content["errors"][-1])]  # rows in the order of their labels
    states = torch.zeros(len(content["places"]) ** 2, task.spec.input_size, dtype=Double)
    places = torch.tensor(content["places"], dtype=Double)
    states[:, [0, task.spec.system.freedoms]] = torch.cartesian_prod(places, places)
    largest = float(task.spec.system.energy(states).abs().max())
    assert shown == pytest.approx(((energies(rule, corners) - true).abs() / largest).tolist(), rel=1e-3)
    assert abs(shown[0] - shown[1]) > 0.01 * max(shown)  # or the order could not be told
    drawn = pictures.draw(path, "a run").read_text()
    assert drawn.count('class="head"') == 3
    _, p = content["names"]
    assert 0 < drawn.index(f"{p} -1.00, ") < drawn.index(f"{p} +1.00, ")
    for text in ("phase portrait", "change of the true energy", "error of the energy"):
        assert text in drawn


@pytest.mark.slow
def test_a_run_keeps_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"network.width": 30, "task.examples": 60, "task.rollout": 4, "tracking.enabled": False}
    run = bpfree.train("sampled", task="hamiltonian", settings=settings, progress=False).run
    assert run.folder is not None
    assert run.status == "finished"
    assert {"hamiltonian.json", "plots/hamiltonian.svg"} <= set(run.artifacts)
    again = bpfree.load(run.folder)
    x = torch.zeros(3, 2, dtype=Double)
    assert torch.as_tensor(again.predict(x)).shape == (3, 3)
