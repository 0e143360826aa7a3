"""BurstCCN. Oracles: the published step written out with its sigmoids, back-propagation and feedback alignment by autograd."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bpfree_feedback import burst_plot
from bpfree_feedback.burst_network import BurstCNNConfig, ReLURMS, burst_cnn
from bpfree_feedback.burst_options import BurstCCNConfig
from bpfree_feedback.burstccn import BurstCCN
from drawn import drawn
from torch import Tensor, nn

from bpfree import Batch, Budget, Network, OptimizerConfig, Run, Stepper, TaskSpec, UsageError, new_step
from bpfree.network import MLPConfig, VGGConfig, mlp, replaced_backward, vgg
from bpfree.training.phases import learning
from bpfree.training.updater import ClipConfig

FLAT = TaskSpec("flat", (12,), 4)
IMAGE = TaskSpec("image", (2, 16, 16), 4)
GAIN = {"activation": "sigmoid", "init": "xavier-normal", "init_gain": 3.6}


def batch_of(spec: TaskSpec = FLAT, count: int = 9, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *spec.input_shape, generator=generator, dtype=torch.float64)
    return Batch(inputs, torch.randint(spec.outputs, (count,), generator=generator))


def dense(spec: TaskSpec = FLAT, **options: Any) -> Network:
    return mlp(spec, MLPConfig(**{"widths": [10, 8, 6], **GAIN, **options}))


def rule_of(network: Network | None = None, spec: TaskSpec = FLAT, **options: Any) -> BurstCCN:
    torch.manual_seed(0)
    return BurstCCN((network or dense(spec)).double(), spec, BurstCCNConfig(**options)).double()


def credited(rule: BurstCCN, batch: Batch) -> dict[str, Tensor]:
    rule.zero_grad()
    rule.credit(batch, new_step(rule))
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def true_gradients(rule: BurstCCN, batch: Batch) -> dict[str, Tensor]:
    """By autograd, of the rule's objective."""
    rule.zero_grad()
    rule.objective(batch, new_step(rule)).backward()
    found = {name: p.grad.clone() for name, p in rule.network.named_parameters() if p.grad is not None}
    rule.zero_grad()
    return {f"network.{name}": value for name, value in found.items()}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def by_the_book(rule: BurstCCN, batch: Batch) -> dict[str, Tensor]:
    """The published step of a dense net at p0 = 1/2: rates, potentials and probabilities with their sigmoids, sums over a loop."""
    config, count = rule.config, len(batch)
    sites = [layer.site for layer in rule.layers]
    x = [batch.inputs.flatten(1)]
    for site in sites:
        x.append(torch.sigmoid(x[-1] @ site.weight.T + site.bias))
    y = nn.functional.one_hot(batch.targets, rule.spec.outputs).double()
    e = x[-1]
    p = 0.5 * (config.error_scale * (y - e) * (1 - e) + 1)
    found: dict[str, Tensor] = {}
    names = rule.network.names
    for place in range(len(sites) - 1, -1, -1):
        delta = -(p - 0.5) * e
        prefix = next(name for name, module in rule.named_modules() if module is sites[place])
        found[f"{prefix}.weight"] = sum(torch.outer(delta[n], x[place][n]) for n in range(count)) / count
        found[f"{prefix}.bias"] = delta.sum(0) / count
        if place:
            part = rule.feedback[names[place - 1]]
            above, bursts, e = e, p * e, x[place]
            apical = bursts @ part.Y - above @ part.Q
            p = torch.sigmoid(4.0 * apical * (1 - e))
            if isinstance(part.Q, nn.Parameter):
                found[f"feedback.{names[place - 1]}.Q"] = -above.T @ apical / count
            if isinstance(part.Y, nn.Parameter):
                found[f"feedback.{names[place - 1]}.Y"] = (above if config.Y_learning == "apical-events" else bursts).T @ apical / count
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"Q_learning": "apical"},
        {"Y_std": 0.5, "Q": "random", "Q_learning": "none", "error_scale": 0.5},
        {"Y": "symmetric", "Q": "random", "Q_learning": "apical", "Y_learning": "apical-events"},
        {"Q": "forward", "Q_scale": 2.0, "Q_learning": "none", "Y_learning": "apical"},
        {"Y": "tied", "Q": "tied"},
    ],
    ids=["Q learned", "fixed", "both learned", "Y learned", "tied"],
)
def test_the_published_step(options: dict[str, Any]) -> None:
    rule, batch = rule_of(**options), batch_of()
    ours, book = credited(rule, batch), by_the_book(rule, batch)
    assert ours.keys() == book.keys()
    for name, value in book.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-14)


def networks() -> dict[str, tuple[TaskSpec, Network]]:
    cnn = BurstCNNConfig(channels=[4, 5], kernels=[5, 3], strides=[2, 1], dense=[7])
    pooled = VGGConfig(channels=[3, 4], pool_after=[1, 2], norm="none", **GAIN)
    scaled = BurstCNNConfig(channels=[4, 5], kernels=[5, 3], strides=[2, 1], dense=[7], activation="relu-rms", init="he-normal")
    return {
        "dense": (FLAT, dense()),
        "strides": (IMAGE, burst_cnn(IMAGE, cnn)),
        "pooling": (IMAGE, vgg(IMAGE, pooled)),
        "softplus": (FLAT, dense(activation="softplus", init_gain=1.0)),
        "layer norm": (FLAT, dense(norm="layer")),
        "relu-rms": (IMAGE, burst_cnn(IMAGE, scaled)),
    }


@pytest.mark.parametrize("kind", sorted(networks()))
def test_tied_feedback_is_back_propagation_of_the_squared_error_in_the_limit(kind: str) -> None:
    """As the error scale goes to 0; raw updates over it have p0 of the gradient's norm, also at another p0."""
    torch.manual_seed(0)
    spec, network = networks()[kind]
    for p0 in (0.5, 0.2):
        rule, batch = rule_of(network, spec, Y="tied", Q="tied", error_scale=1e-5, p0=p0), batch_of(spec)
        ours, exact = credited(rule, batch), true_gradients(rule, batch)
        assert ours.keys() == {name for name in exact if kind != "layer norm" or ".1." not in name}  # scales and shifts do not learn
        for name in ours:
            assert cosine(ours[name], exact[name]) > 1 - 1e-6, name
            torch.testing.assert_close(ours[name], exact[name], rtol=1e-3, atol=1e-3 * float(exact[name].abs().max()))


def test_the_error_scale_bends_the_direction() -> None:
    """tanh(2u)/2 = u - (4/3) u^3: the difference to back-propagation falls with the square of the error scale."""
    found = []
    for scale in (1.0, 0.1, 0.01):
        rule, batch = rule_of(dense(), Y="tied", Q="tied", error_scale=scale, updates="gradient"), batch_of()
        ours, exact = credited(rule, batch), true_gradients(rule, batch)
        name = "network.blocks.b1.0.weight"
        found.append(float((ours[name] - exact[name]).norm() / exact[name].norm()))
    assert found[0] > 1e-3
    assert found[1] / found[0] == pytest.approx(0.01, rel=0.2)
    assert found[2] / found[1] == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("kind", ["dense", "strides", "pooling"])
def test_other_feedback_is_feedback_alignment_in_the_limit(kind: str) -> None:
    """Oracle: the core's backward pass through other weights, of the same objective."""
    torch.manual_seed(0)
    spec, network = networks()[kind]
    rule, batch = rule_of(network, spec, error_scale=1e-5, Q_learning="none"), batch_of(spec)
    ours = credited(rule, batch)
    names = {id(layer.site.weight): layer for layer in rule.layers[1:]}
    below = dict(zip((layer.name for layer in rule.layers[1:]), (layer.name for layer in rule.layers), strict=False))
    feedback = {name: rule.feedback[below[names[id(p)].name]].Y for name, p in rule.network.named_parameters() if id(p) in names}
    rule.zero_grad()
    with replaced_backward(rule.network, feedback) as replaced:
        loss = rule.objective(batch, new_step(rule))
    assert len(replaced.met) == len(rule.layers) - 1
    loss.backward()
    for name, parameter in rule.network.named_parameters():
        assert parameter.grad is not None
        assert cosine(ours[f"network.{name}"], parameter.grad) > 1 - 1e-6
        assert float(ours[f"network.{name}"].norm() / parameter.grad.norm()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("p0", [0.5, 0.3])
def test_feedback_at_rest_is_silent_where_it_cancels(p0: float) -> None:
    """Exactly zero without a teacher; a random Q is not silent, and its hidden bursts are those of the book."""
    batch = batch_of()
    for Q, silent in (("symmetric", True), ("tied", True), ("random", False)):
        rule = rule_of(Q=Q, Q_learning="none" if Q != "symmetric" else "apical", p0=p0, rest_every=1, measure_every=1)
        metrics = rule.credit(batch, new_step(rule))
        for name in rule.network.hidden:
            heard = [float(metrics[f"{name}/{key}"]) for key in ("apical", "burst_change")]
            assert (heard == [0.0, 0.0]) is silent
        assert all(p.grad is None for p in rule.network.parameters())


def test_metrics_are_those_of_the_book() -> None:
    rule, batch = rule_of(Q="random", Q_learning="none", measure_every=1), batch_of()
    metrics = rule.credit(batch, new_step(rule))
    x = batch.inputs
    rates = [x := torch.sigmoid(layer.site(x)) for layer in rule.layers]
    y = nn.functional.one_hot(batch.targets, 4).double()
    p = 0.5 * (1 + (y - rates[-1]) * (1 - rates[-1]))
    for place in (2, 1, 0):
        part, name = rule.feedback[rule.network.hidden[place]], rule.network.hidden[place]
        above, e = rates[place + 1], rates[place]
        apical = (p * above) @ part.Y - above @ part.Q
        rest = above @ (0.5 * part.Y - part.Q)
        p = torch.sigmoid(4 * apical * (1 - e))
        expected = {
            "apical": apical.square().mean().sqrt(),
            "event_rate": e.mean(),
            "burst_rate": (p * e).mean(),
            "burst_change": ((p - 0.5) * e).square().mean().sqrt(),
            "rest": rest.norm() / (0.5 * above @ part.Y).norm(),
        }
        for key, value in expected.items():
            assert float(metrics[f"{name}/{key}"]) == pytest.approx(value.item(), rel=1e-5), key


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("kind", ["dense", "strides"])
def test_kolen_pollack_feedback_and_weights_meet(kind: str, clip: float | None) -> None:
    """W - Y, and p0 W - Q, shrink by exactly 1 - lr decay a step, clipped or not (both have the same factor)."""
    torch.manual_seed(0)
    spec, network = networks()[kind]
    rule = rule_of(network, spec, Y_learning="kolen-pollack", Q_learning="kolen-pollack")
    optimizer = OptimizerConfig("sgd", lr=0.3, weight_decay=0.02)
    stepper = Stepper(rule, optimizer, clip=ClipConfig(norm=clip))
    apart = {name: (w - b).detach().clone() for name, (w, b) in rule.feedback_pairs().items()}
    silence = [0.5 * part.Y.detach() - part.Q.detach() for part in rule.feedback.values()]
    for seed in range(3):
        stepper.take(batch_of(spec, seed=seed))
    for name, (weight, feedback) in rule.feedback_pairs().items():
        torch.testing.assert_close(weight - feedback, apart[name] * (1 - 0.3 * 0.02) ** 3, rtol=1e-9, atol=1e-13)
    assert all(float(part.abs().max()) == 0 for part in silence)
    assert all(torch.allclose(0.5 * part.Y, part.Q, atol=1e-14) for part in rule.feedback.values())


@pytest.mark.parametrize(("Y", "Q"), [("tied", "tied"), ("tied", "symmetric"), ("symmetric", "tied"), ("random", "tied")])
def test_what_is_tied_follows_every_update(Y: Any, Q: Any) -> None:
    rule = rule_of(Y=Y, Q=Q, Y_scale=2.0, Q_learning="none")
    before = [part.Y.clone() for part in rule.feedback.values()]
    Stepper(rule, OptimizerConfig("sgd", lr=1.0)).take(batch_of())
    for part, first, (weight, _) in zip(rule.feedback.values(), before, rule.feedback_pairs().values(), strict=True):
        assert torch.equal(part.Y, 2 * weight if Y == "tied" else first)
        assert torch.equal(part.Q, 0.5 * part.Y) is (Q == "tied" or Y != "tied")


def test_apical_learning_silences_the_feedback() -> None:
    """Without a teacher Q (or Y) descends half the squared potential, which a step at a small rate must lower, as its gradient says."""
    batch = batch_of(count=30)
    for options in ({"Q_learning": "apical"}, {"Q_learning": "none", "Y_learning": "apical"}):
        rule = rule_of(Q="random", rest_every=1, measure_every=1, **options)
        part = rule.feedback["b3"]
        trained = part.Q if options["Q_learning"] == "apical" else part.Y

        def energy(rule: BurstCCN = rule, batch: Batch = batch) -> Tensor:
            rates = rule.network(batch.inputs).sigmoid().detach()
            part = rule.feedback["b3"]
            return 0.5 * (0.5 * rates @ part.Y - rates @ part.Q).square().sum() / len(batch)

        expected = torch.autograd.grad(energy(), trained)[0]
        ours = credited(rule, batch)[f"feedback.b3.{'Q' if trained is part.Q else 'Y'}"]
        torch.testing.assert_close(ours, expected)
        loud = float(rule.credit(batch, new_step(rule))["b1/apical"])
        stepper = Stepper(rule, OptimizerConfig("sgd", lr=0.1))
        for group in stepper.updater.optimizers[0].param_groups:
            group["lr"] = 0.1
        for _ in range(100):
            quiet = float(stepper.take(batch)["b1/apical"])
        assert quiet < 0.3 * loud


def test_a_branch_learns_from_its_own_potential() -> None:
    """Oracle: a rule for each branch, whose other units above are cut off."""
    rule, batch = rule_of(Q="random", Q_learning="none", Y_learning="apical", branches=2), batch_of()
    ours = credited(rule, batch)["feedback.b2.Y"]
    rates = [x := batch.inputs] + [x := torch.sigmoid(layer.site(x)) for layer in rule.layers]
    y = nn.functional.one_hot(batch.targets, 4).double()
    p = 0.5 * (1 + (y - rates[4]) * (1 - rates[4]))
    part = rule.feedback["b3"]
    p = torch.sigmoid(4 * ((p * rates[4]) @ part.Y - rates[4] @ part.Q) * (1 - rates[3]))
    part = rule.feedback["b2"]
    for rows in (slice(0, 3), slice(3, 6)):
        bursts, events = (p * rates[3])[:, rows], rates[3][:, rows]
        own = bursts @ part.Y[rows] - events @ part.Q[rows]
        torch.testing.assert_close(ours[rows], (2**0.5 * bursts.T @ own / len(batch)).detach())


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_softmax_output_descends_the_cross_entropy(shift: float) -> None:
    rule, batch = rule_of(Y="tied", Q="tied", output="softmax", output_shift=shift, error_scale=1e-5), batch_of()
    ours, exact = credited(rule, batch), true_gradients(rule, batch)
    for name in exact:
        assert cosine(ours[name], exact[name]) > 1 - 1e-6
        assert float(ours[name].norm() / exact[name].norm()) == pytest.approx(1, abs=1e-3)


def test_updates_of_the_size_of_a_gradient_do_not_depend_on_the_scales() -> None:
    """In the limit: p0, the error scale and the local scales are divided out, as in the journal version."""
    made = []
    for options in ({}, {"p0": 0.3, "local_scales": [2.0, 0.5, 10.0]}, {"error_scale": 1e-6}):
        rule = rule_of(**{"Y": "tied", "Q": "tied", "updates": "gradient", "error_scale": 1e-5, **options})
        made.append(credited(rule, batch_of()))
    for other in made[1:]:
        for name, value in made[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))


def test_a_ramp_spares_units_that_hardly_burst() -> None:
    """Oracle: the journal version's gate of the slope, min(ramp e, 1), on a ReLU net."""
    network = dense(activation="relu", init_gain=1.0, widths=[10])
    x = batch_of()
    weak: dict[str, Any] = {"error_scale": 1e-6, "Q_learning": "none", "updates": "gradient"}
    plain, gated = (credited(rule_of(network, ramp=ramp, **weak), x) for ramp in (0.0, 5.0))
    rate = torch.relu(network.blocks["b1"][0](x.inputs))
    rule, rows = rule_of(network, **weak), nn.functional.one_hot(x.targets, 4)
    error = torch.autograd.functional.jacobian(lambda scores: 0.5 * (rows - scores.sigmoid()).square().sum(), network(x.inputs))
    slope = (error @ rule.feedback["b1"].Y) * (rate > 0)
    for made, gate in ((plain, 1.0), (gated, (5 * rate).clamp_max(1))):
        torch.testing.assert_close(made["network.blocks.b1.0.weight"], (slope * gate).T @ x.inputs / len(x), rtol=1e-4, atol=1e-8)


def test_noise_repeats_with_the_step_and_only_in_training() -> None:
    rule, batch = rule_of(noise=0.1), batch_of()
    again = [credited(rule, batch)["network.blocks.b2.0.weight"] for _ in range(2)]
    clean = credited(rule_of(), batch)["network.blocks.b2.0.weight"]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], clean)
    assert torch.equal(rule.predict(batch.inputs, torch.Generator()), rule.network(batch.inputs))


def test_the_twin_trains_its_readout_alone() -> None:
    rule, batch = rule_of(Y_learning="kolen-pollack", Q_learning="kolen-pollack"), batch_of()
    rule.freeze_features()
    assert set(credited(rule, batch)) == {"network.blocks.readout.weight", "network.blocks.readout.bias"}


def test_groups_and_rates_of_feedback() -> None:
    """What learns from the apical potential has its rate and no decay; what learns as the weights do is in their group."""
    rule = rule_of(Q_learning="apical", Y_learning="kolen-pollack", Q_lr=0.5)
    groups = rule.groups()
    assert list(groups) == ["b1", "b2", "b3", "readout", "Q.b1", "Q.b2", "Q.b3"]
    assert [len(groups[name]) for name in ("b1", "b2", "readout")] == [2, 3, 3]
    assert rule.group_options()["Q.b2"] == {"lr": 0.5, "weight_decay": 0.0, "momentum": 0.0}
    assert {id(p) for members in groups.values() for p in members} == {id(p) for p in rule.parameters()}


def chain(hidden: nn.Module, readout: nn.Module) -> Network:
    return Network({"b1": hidden, "readout": readout}, input_shape=(12,), readout="readout")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (dense(activation="tanh"), "block 'b1' has Tanh"),
        (dense(activation="identity"), "block 'b1' has no nonlinearity"),
        (mlp(FLAT, MLPConfig(depth=0)), "nothing to teach"),
        (chain(nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 5), nn.Sigmoid()), nn.Linear(5, 4)), "2 linear layers"),
        (chain(nn.Sequential(nn.Linear(12, 5), nn.Sigmoid()), nn.Sequential(nn.Linear(5, 4), nn.Tanh())), "goes on after"),
    ],
)
def test_networks_without_event_rates_are_refused(network: Network, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BurstCCN(network, FLAT)


def test_more_local_scales_than_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match="4 scales for 3"):
        rule_of(local_scales=[1.0] * 4)


def test_rates_that_are_scaled_have_unit_mean_square() -> None:
    rate = ReLURMS()(torch.randn(3, 4, 5, 5, dtype=torch.float64))
    torch.testing.assert_close(rate.square().mean((1, 2, 3)), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)
    assert float(rate.min()) == 0


def test_the_published_network() -> None:
    """64 at 5x5/2, 128 at 5x5/2, 256 at 3x3, 1500 units; 3x3 positions are left of 32x32."""
    network = burst_cnn(TaskSpec("cifar", (3, 32, 32), 10))
    assert [tuple(network.shapes[name]) for name in network.names] == [(64, 14, 14), (128, 5, 5), (256, 3, 3), (1500,), (10,)]
    with pytest.raises(UsageError, match="convolution 3"):
        burst_cnn(IMAGE, BurstCNNConfig())


def test_epochs_at_rest_move_feedback_alone() -> None:
    """Oracle: weights before and after; in epochs with a teacher everything moves. A twin has none of them."""
    rule = rule_of(Q="random", rest_epochs=2, Y_learning="kolen-pollack")
    phases = list(rule.phases(Budget(epochs=5)))
    assert [(phase.name, phase.epochs, phase.groups) for phase in phases] == [("rest", 2, ("Q.b1", "Q.b2", "Q.b3")), ("train", 3, None)]
    stepper = Stepper(rule, OptimizerConfig("sgd", lr=0.3))
    moved = []
    for phase in phases:
        before = {name: p.detach().clone() for name, p in rule.named_parameters()}
        stepper.enter(phase)
        stepper.step.phase = phase
        with learning(rule, phase):
            stepper.take(batch_of())
        moved.append({name.split(".")[-1] for name, p in rule.named_parameters() if not torch.equal(p, before[name])})
    assert moved == [{"Q"}, {"Q", "Y", "weight", "bias"}]
    rule.freeze_features()
    assert [phase.name for phase in rule.phases(Budget(epochs=5))] == ["train"]
    for options, message in (({"Q_learning": "none"}, "does nothing"), ({"rest_epochs": 5}, "5 of 5 epochs")):
        with pytest.raises(UsageError, match=message):
            rule_of(**{"Y_learning": "kolen-pollack", "rest_epochs": 1, **options}).phases(Budget(epochs=5))


def test_the_default_rate_goes_with_one_over_the_width() -> None:
    """The authors' 0.3 for 500 units; what sees the inputs does not count."""
    wide = TaskSpec("wide", (2000,), 4)
    assert BurstCCN(mlp(wide, MLPConfig(widths=[500, 100], **GAIN)), wide).optimizer.lr == pytest.approx(0.3)
    assert BurstCCN.optimizer_of(BurstCCNConfig()).lr is None
    assert "readout to b3: Y random, deviation" in rule_of().plan()


# --- the plot ---------------------------------------------------------------------------------------------------------


def history(epochs: int = 3) -> list[dict[str, float]]:
    keys = {"apical": 1.0, "burst_change": 0.1, "burst_rate": 0.2, "rest": 0.0}
    found = [
        {f"rule/b{block}/{key}": block * value * epoch for key, value in keys.items() for block in (1, 2)} for epoch in range(1, epochs + 1)
    ]
    return [{"epoch": float(place + 1), **metrics} for place, metrics in enumerate(found)]


def test_the_plot_shows_each_block_over_epochs(tmp_path: Path) -> None:
    """Oracle: the numbers, read back by the ticks."""
    panels = drawn(burst_plot.draw(history(), tmp_path / "plots" / "bursts.svg", "a title").read_text())
    assert [panel.title for panel in panels] == list(burst_plot.PANELS.values())
    assert panels[2].lines["b2"] == [(pytest.approx(x, abs=0.02), pytest.approx(0.4 * x, abs=0.02)) for x in (1, 2, 3)]
    assert panels[3].lines["b1"] == [(pytest.approx(x, abs=0.02), pytest.approx(0, abs=0.01)) for x in (1, 2, 3)]


def test_runs_of_other_rules_have_no_such_plot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor does one without a folder; a plot that fails is a warning."""
    for folder, found in ((tmp_path, [{"epoch": 1.0, "rule/b1/feedback_angle": 90.0}]), (None, history())):
        run = Run("id", "name", folder=folder, history=found)
        burst_plot.add_plot(run)
        assert not run.artifacts
    run = Run("id", "name", folder=tmp_path, history=history())
    burst_plot.add_plot(run)
    assert run.artifacts.keys() == {"plots/bursts.svg"}
    broken = Run("id", "a-run", folder=tmp_path / "missing" / "folder", history=history())
    with caplog.at_level(logging.WARNING, logger="bpfree"):
        burst_plot.add_plot(broken)
    assert "no plot of the bursts of a-run" in caplog.text
