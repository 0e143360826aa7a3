"""The rules on networks and tasks: no reverse-mode call, what the plan says, training, evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bpfree_forward_gradient.mixer import LocalMixerConfig, local_mixer
from bpfree_forward_gradient.options import ForwardGradientConfig, LocalBackpropConfig, LocalForwardGradientConfig
from bpfree_forward_gradient.rules import ForwardGradient, LocalBackprop, LocalForwardGradient
from estimates import batch_for, credit_of, gradient_of, mlp, random_heads
from torch import Tensor, nn

import bpfree
from bpfree import Batch, BudgetConfig, Network, Task, TaskSpec, TrainConfig, UsageError, installed_plugins, new_step
from bpfree.baselines import Backprop
from bpfree.config import parse_words, resolve
from bpfree.network.builders import VGGConfig
from bpfree.tasks.digits import DIGITS
from bpfree.training.trainer import Trainer


def rules_on(network: Network, spec: TaskSpec) -> list[Any]:
    """Every kind of estimate."""
    return [
        ForwardGradient(network, spec, ForwardGradientConfig(tangents=2)),
        ForwardGradient(network, spec, ForwardGradientConfig(perturb="weights", tangents=1)),
        LocalForwardGradient(network, spec, LocalForwardGradientConfig()),
        LocalForwardGradient(network, spec, LocalForwardGradientConfig(perturb="weights", tangents=2)),
    ]


class ReverseCalls:
    """Counts entries into the reverse-mode engine, through whatever function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        engine = torch.autograd.graph._engine_run_backward

        def run(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return engine(*args, **kwargs)

        for place in (torch.autograd.graph, torch.autograd):
            monkeypatch.setattr(place, "_engine_run_backward", run)


@pytest.mark.parametrize("norm", [None, nn.LayerNorm, nn.BatchNorm1d])
def test_no_reverse_mode_call_in_a_step(spec: TaskSpec, norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = mlp(spec, 16, 8, norm=norm).float()
    calls = ReverseCalls(monkeypatch)
    batch = batch_for(spec, dtype=torch.float32)
    for rule in rules_on(network, spec):
        random_heads(rule)
        step = new_step(rule)
        before = [parameter.clone() for parameter in rule.parameters()]
        rule.learn(batch, step)
        assert all(not torch.equal(old, new) for old, new in zip(before, rule.parameters(), strict=True))
    assert calls.count == 0
    reference = Backprop(network, spec)
    reference.learn(batch, new_step(reference))
    assert calls.count == 1  # the count does see one


def test_a_parameter_that_is_replaced_learns(spec: TaskSpec) -> None:
    rule = ForwardGradient(mlp(spec, 8), spec).double()
    rule.credit(batch_for(spec), new_step(rule))
    layer: Any = rule.network.blocks["b1"][0]  # type: ignore[index]
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert "network.blocks.b1.0.weight" in credit_of(rule, batch_for(spec), new_step(rule))


def test_nothing_keeps_a_graph(spec: TaskSpec) -> None:
    rule = LocalForwardGradient(mlp(spec, 8), spec).double()
    metrics = rule.credit(batch_for(spec), new_step(rule))
    assert set(metrics) == {"loss", "b1/loss"}
    assert not any(value.requires_grad for value in metrics.values())
    assert not any(p.grad is not None and p.grad.requires_grad for p in rule.parameters())


def test_credit_adds_to_what_is_there(spec: TaskSpec) -> None:
    """As accumulation over micro-batches needs it. Oracle: the sum of two calls that start from nothing."""
    batches = [batch_for(spec, seed=seed) for seed in (0, 1)]
    for rule in rules_on(mlp(spec, 8, 6, norm=nn.LayerNorm), spec):
        random_heads(rule.double())
        first, second = (credit_of(rule, batch, new_step(rule)) for batch in batches)
        credit_of(rule, batches[0], new_step(rule))
        rule.credit(batches[1], new_step(rule))
        for name, parameter in rule.named_parameters():
            assert torch.allclose(parameter.grad, first[name] + second[name]), name


def test_local_rules_do_not_see_what_is_above(spec: TaskSpec) -> None:
    """Oracle: the same step with other parameters above leaves a block's credit as it is, bit for bit."""
    rule = LocalForwardGradient(mlp(spec, 8, 6), spec).double()
    random_heads(rule)
    first = credit_of(rule, batch_for(spec), new_step(rule))
    with torch.no_grad():
        for name in ("network.blocks.b2", "network.blocks.readout", "heads.b2"):
            for parameter in rule.get_submodule(name).parameters():
                parameter.add_(torch.randn_like(parameter))
    second = credit_of(rule, batch_for(spec), new_step(rule))
    assert all(torch.equal(first[name], second[name]) for name in first if "b1" in name)
    assert not torch.equal(first["network.blocks.b2.0.weight"], second["network.blocks.b2.0.weight"])


@pytest.mark.parametrize("greedy", [True, False])
def test_local_backprop(spec: TaskSpec, greedy: bool) -> None:
    """Oracle: autograd of the written-out sums of losses; greedily, block 1 has its own head's loss alone."""
    rule = LocalBackprop(mlp(spec, 8, 6), spec, LocalBackpropConfig(greedy=greedy)).double()
    random_heads(rule)
    batch = batch_for(spec)
    first = rule.network.blocks["b1"](batch.inputs)
    losses = [spec.loss(rule.heads["b1"](first), batch), spec.loss(rule.heads["b2"](rule.network.blocks["b2"](first)), batch)]
    weight = rule.network.blocks["b1"][0].weight  # type: ignore[index]
    expected = torch.autograd.grad(losses[0] if greedy else losses[0] + losses[1], weight)[0]
    assert torch.allclose(credit_of(rule, batch, new_step(rule))["network.blocks.b1.0.weight"], expected)
    assert rule.traits.reverse_span == (1 if greedy else "all")


def test_the_objective_is_what_local_backprop_descends(spec: TaskSpec) -> None:
    torch.manual_seed(0)
    network = mlp(spec, 8, 6)
    forward, reverse = LocalForwardGradient(network, spec).double(), LocalBackprop(network, spec).double()
    random_heads(forward)
    reverse.heads.load_state_dict(forward.heads.state_dict())
    batch = batch_for(spec)
    expected = credit_of(reverse, batch, new_step(reverse))
    found = gradient_of(forward, forward.objective(batch, new_step(forward)))
    assert all(torch.allclose(found[name], value) for name, value in expected.items())


# --- plans ----------------------------------------------------------------------------------------------------------


def test_the_plan_says_where_noise_goes(spec: TaskSpec) -> None:
    plan = LocalForwardGradient(mlp(spec, 16, norm=nn.LayerNorm), spec).plan()
    assert plan.splitlines() == [
        "forward gradients: noise (rademacher) on activities; of its own for each example; 1 direction per step",
        "b1: local losses of 2 groups of channels, at a linear head",
        "  0: noise behind 1, on active units, exactly back through 1, whose scale and shift take the same estimate, "
        "one derivative per example and group",
        "readout: the loss of the task",
        "  readout: exact gradient in closed form",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["one derivative per batch (examples meet behind the noise)", "batch norm: statistics of the batch"]),
        ({"batch_norm": "frozen-statistics"}, ["one derivative per example", "running statistics, which take one more forward pass"]),
        ({"norm_gradient": "ignored"}, ["ignoring b1.1"]),
        ({"norm_scales": "weights"}, ["b1.1.weight, b1.1.bias, b2.1.weight, b2.1.bias: noise of their own, one derivative per batch"]),
        ({"perturb": "weights"}, ["noise (rademacher) on weights; shared by the batch", "b1.0.weight, b1.0.bias, b1.1.weight, b1.1.bias"]),
        ({"tangents": 2, "antithetic": True}, ["2 directions per step, antithetic"]),
    ],
)
def test_the_plan_follows_the_options(spec: TaskSpec, options: dict[str, Any], words: list[str]) -> None:
    plan = ForwardGradient(mlp(spec, 6, 6, norm=nn.BatchNorm1d), spec, ForwardGradientConfig(**options)).plan()
    assert all(word in plan for word in words), plan
    assert ("per batch (examples meet" in plan) == (options.get("batch_norm") is None and options.get("perturb") is None)


def test_the_plan_of_the_mixer(images: TaskSpec) -> None:
    """A token-mixing patch takes the sum of its groups' losses; a dense layer in front of a group-linear one has groups of its own."""
    network = local_mixer(images, LocalMixerConfig(blocks=2, patches=2, channels=8, groups=2))
    plan = LocalForwardGradient(network, images).plan()
    assert "b2: local losses of 2 groups of channels x 4 patches, at a linear head" in plan
    lines = {line.split(":")[0].strip(): line for line in plan.split("b2: ")[1].splitlines()}
    assert lines["layers.token"].endswith("one derivative per example and patch")
    assert lines["layers.channel"].endswith("one derivative per example and patch and group")
    assert lines["layers.group"].endswith("one derivative per example and patch and group")
    assert "noise before relu" in lines["layers.group"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_settings_that_exclude_each_other(spec: TaskSpec) -> None:
    network = mlp(spec, 6, 6, norm=nn.BatchNorm1d)
    with pytest.raises(UsageError, match="come in pairs"):
        ForwardGradient(network, spec, ForwardGradientConfig(antithetic=True, tangents=3))
    with pytest.raises(UsageError, match="independent noise for each example"):
        ForwardGradient(network, spec, ForwardGradientConfig(independent=False))
    with pytest.raises(UsageError, match="no derivative of its own"):
        ForwardGradient(network, spec, ForwardGradientConfig(perturb="weights", independent=True))
    ForwardGradient(network, spec, ForwardGradientConfig(perturb="weights", independent=True, batch_norm="frozen-statistics"))


class Centre(nn.Module):
    """Examples meet, and no batch norm says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize("options", [{"independent": False}, {"perturb": "weights", "independent": True}])
@pytest.mark.parametrize("layer", [Centre, lambda: nn.BatchNorm1d(6, track_running_stats=False)])
def test_wherever_examples_meet(spec: TaskSpec, layer: Any, options: dict[str, Any]) -> None:
    """Also in layers that have no statistics to freeze."""
    network = mlp(spec, 6)
    network.blocks["b1"].append(layer().double())  # type: ignore[operator]
    for statistics in ("batch-scalar", "frozen-statistics"):
        with pytest.raises(UsageError, match=r"of its own|independent noise for each example"):
            ForwardGradient(network, spec, ForwardGradientConfig(batch_norm=statistics, **options))  # type: ignore[arg-type]


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Task:
    return Task.from_source(DIGITS)


def test_registered() -> None:
    plugins = installed_plugins()
    for name, rule in {
        "forward-gradient": ForwardGradient,
        "local-forward-gradient": LocalForwardGradient,
        "local-backprop": LocalBackprop,
    }.items():
        assert plugins.get("rules", name) is rule
        assert plugins.owner("rules", name).distribution == "bpfree-forward-gradient"
    assert "local-mixer" in plugins.names("networks")


@pytest.mark.parametrize("name", ["local", "global"])
def test_learns_digits(digits: Task, name: str) -> None:
    """Far above chance after a few epochs, every head too; random features under a trained readout stay below 70 % here."""
    torch.manual_seed(0)
    network = bpfree.mlp(digits.spec)
    rule: Any = (LocalForwardGradient if name == "local" else ForwardGradient)(network, digits.spec)
    run = Trainer(rule, digits, TrainConfig(budget=BudgetConfig(epochs=8))).fit()
    assert run.result["test/accuracy"] > 0.75
    if name == "local":
        assert all(run.result[f"test/b{index}/accuracy"] > 0.7 for index in range(1, 5))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_trains_convolutions(norm: Any, precision: Any, images: TaskSpec, device: torch.device) -> None:
    """Every rule on a small VGG, in both precisions: finite gradients for every parameter."""
    torch.manual_seed(0)
    network = bpfree.vgg(images, VGGConfig(channels=[8, 8], pool_after=[2], norm=norm))
    batch = batch_for(images, dtype=torch.float32)
    batch = Batch(batch.inputs.to(device), None if batch.targets is None else batch.targets.to(device))
    for rule in rules_on(network, images):
        rule.to(device).train()
        random_heads(rule)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            found = credit_of(rule, batch, new_step(rule))
        assert found.keys() == {name for name, _ in rule.named_parameters()}
        assert all(bool(value.isfinite().all()) and value.dtype == torch.float32 for value in found.values())


def test_trains_a_split_torchvision_model() -> None:
    """Residual blocks with batch norm: noise in front of the ReLU behind each sum, and one derivative per batch where needed."""
    torchvision = pytest.importorskip("torchvision")
    spec = TaskSpec(name="toy", input_shape=(3, 32, 32), outputs=5)
    torch.manual_seed(0)
    network = bpfree.split(torchvision.models.resnet18(num_classes=5), (3, 32, 32))
    rule = LocalForwardGradient(network, spec)
    random_heads(rule)
    found = credit_of(rule, batch_for(spec, 4, dtype=torch.float32), new_step(rule))
    assert found.keys() == {name for name, _ in rule.named_parameters()}
    assert all(value.any() for name, value in found.items())
    assert "conv2 + downsample.0: noise before relu, on active units" in rule.plan()


def test_trains_attention() -> None:
    """The fused attention kernels have no derivative by forward mode, so the plain one is used; every parameter gets a gradient."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.out(self.attention(x, x, x, need_weights=False)[0]))

    spec = TaskSpec(name="tokens", input_shape=(5, 8), outputs=3)
    torch.manual_seed(0)
    network = Network({"b1": Attention(), "readout": nn.Sequential(nn.Flatten(), nn.Linear(40, 3))}, input_shape=(5, 8), readout="readout")
    for rule in rules_on(network, spec):
        random_heads(rule)
        found = credit_of(rule, batch_for(spec, dtype=torch.float32), new_step(rule))
        assert found.keys() == {name for name, _ in rule.named_parameters()}


def test_running_statistics_follow_each_batch_once(spec: TaskSpec) -> None:
    """Whatever the number of directions. Oracle: one plain forward pass in train mode."""
    for config in (ForwardGradientConfig(tangents=3), ForwardGradientConfig(tangents=3, batch_norm="frozen-statistics")):
        network = mlp(spec, 6, norm=nn.BatchNorm1d)
        expected = mlp(spec, 6, norm=nn.BatchNorm1d).train()
        rule = ForwardGradient(network, spec, config).double().train()
        batch = batch_for(spec)
        rule.credit(batch, new_step(rule))
        expected(batch.inputs)
        for found, reference in zip(network.buffers(), expected.buffers(), strict=True):
            assert torch.allclose(found, reference)


def test_micro_batches_and_phases(digits: Task) -> None:
    """Gradient accumulation draws other noise for each part, and an own-prediction twin trains its readout alone."""
    torch.manual_seed(0)
    rule = LocalForwardGradient(bpfree.mlp(digits.spec), digits.spec)
    before = rule.network.blocks["b2"][0].weight.clone()  # type: ignore[index]
    Trainer(rule, digits, TrainConfig(budget=BudgetConfig(epochs=1), accumulate=2)).fit()
    moved: Tensor = rule.network.blocks["b2"][0].weight  # type: ignore[index]
    assert not torch.equal(before, moved)
    rule.freeze_features()
    kept = moved.clone()
    Trainer(rule, digits, TrainConfig(budget=BudgetConfig(epochs=1))).fit()
    assert torch.equal(kept, moved)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("rule.perturb=weights rule.mask=false", "rule.mask=false does nothing with rule.perturb=weights"),
        ("rule.perturb=weights rule.norm_gradient=ignored", "rule.norm_gradient=ignored does nothing with rule.perturb=weights"),
        ("rule.perturb=weights rule.norm_scales=weights", "rule.norm_scales=weights does nothing with rule.perturb=weights"),
        (
            "rule.perturb=weights rule.independent=true rule.together=false",
            "rule.together=false does nothing with rule.perturb=weights and rule.independent=true",
        ),
        ("rule.losses=blockwise rule.group_size=4", "rule.group_size=4 does nothing with rule.losses=blockwise"),
        (
            "network=local-mixer network.preset=M/1/16 network.blocks=1 network.patches=2 network.channels=8 network.groups=2",
            "network.preset=M/1/16 does nothing with network.blocks=1",
        ),
    ],
)
def test_an_option_that_another_makes_meaningless_is_refused(words: str, reason: str) -> None:
    """Oracle: where the rule's code branches, written out by hand."""
    with pytest.raises(UsageError) as caught:
        resolve(parse_words(["rule=local-forward-gradient", *words.split()]))
    assert reason in str(caught.value)
