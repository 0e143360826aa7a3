"""The contract of a rule: traces, signals, groups, updates. Oracles: autograd, forward mode, hand-written loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpfree import Batch, BpfreeError, Network, OptimizerConfig, Phase, Rule, Streamed, TaskSpec, UsageError, new_step
from bpfree.baselines import DFA, Backprop, Frozen
from bpfree.network import MLPConfig, mlp
from bpfree.training.accumulation import accumulate
from bpfree.training.optimizers import check_optimizer, make_optimizer
from bpfree.training.updater import ClipConfig, Updater

SPEC = TaskSpec("toy", input_shape=(3, 8, 8), outputs=4)
FLAT = TaskSpec("flat", input_shape=(6,), outputs=3)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def residual_network(device: torch.device) -> Network:
    torch.manual_seed(0)
    blocks = {
        "stem": nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
        "r1": Residual(5),
        "r2": nn.Sequential(Residual(5), nn.AvgPool2d(2)),
        "out": nn.Sequential(nn.Flatten(), nn.Linear(5 * 16, 4)),
    }
    return Network(blocks, input_shape=(3, 8, 8), readout="out").to(device, torch.float64)


def toy_batch(device: torch.device, spec: TaskSpec = SPEC, count: int = 12, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, *spec.input_shape, generator=generator, dtype=dtype)
    return Batch(inputs.to(device), torch.randint(spec.outputs, (count,), generator=generator).to(device))


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class Chained(Rule):
    """Back-propagation as a loop over local VJPs."""

    def credit(self, batch: Batch, step: Any) -> dict[str, Tensor]:
        traces = self.network.traces(batch.inputs, input_grad=True)
        signal = self.spec.error(traces[-1].output, batch)
        for trace in reversed(traces):
            signal = trace.backward(signal)
        return {}


def test_chained_vjps_give_autograds_gradient(device: torch.device) -> None:
    """Oracle: autograd end to end, on a residual convolutional network with batch norm in train mode, float64."""
    batch = toy_batch(device)
    ours, reference = residual_network(device), residual_network(device)
    rule = Chained(ours, SPEC)
    rule.credit(batch, None)
    SPEC.loss(reference(batch.inputs), batch).backward()
    expected = grads(reference)
    assert expected.keys() == grads(ours).keys()
    for name, grad in grads(ours).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-11)


def test_exact_signals_give_autograds_gradient(device: torch.device) -> None:
    """Each block alone, with the exact dLoss/dOutput as its teaching signal, gets autograd's gradient."""
    batch = toy_batch(device)
    ours, reference = residual_network(device), residual_network(device)
    outputs, x = [], batch.inputs
    for block in reference.blocks.values():
        x = block(x)
        x.retain_grad()
        outputs.append(x)
    SPEC.loss(x, batch).backward()
    for trace, output in zip(ours.stream(batch.inputs), outputs, strict=True):
        trace.backward(output.grad)
    expected = grads(reference)
    for name, grad in grads(ours).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-11)


def test_the_closed_form_error_is_the_losss_gradient(device: torch.device) -> None:
    for kind, targets in (("classes", torch.tensor([0, 2, 1])), ("soft", torch.rand(3, 4).softmax(1)), ("real", torch.randn(3, 4))):
        spec = TaskSpec("t", (2,), 4, targets=kind)
        scores = torch.randn(3, 4, device=device, requires_grad=True)
        batch = Batch(torch.zeros(3, 2), targets.to(device))
        spec.loss(scores, batch).backward()
        torch.testing.assert_close(spec.error(scores, batch), scores.grad)


def test_pull_gives_the_cotangent_and_leaves_grad_alone(device: torch.device) -> None:
    network, batch = residual_network(device), toy_batch(device)
    trace = network.trace("stem", batch.inputs, input_grad=True)
    signal = torch.randn_like(trace.output)
    pulled = trace.pull(signal)
    assert all(p.grad is None for p in network.parameters())
    torch.testing.assert_close(trace.pull(2 * signal), 2 * pulled)  # linear, and the graph is still there
    torch.testing.assert_close(trace.backward(signal), pulled)
    assert trace.input.grad is None


def test_a_frozen_block_has_nothing_to_do_and_none_differs_from_zero(device: torch.device) -> None:
    network, batch = residual_network(device), toy_batch(device)
    network.blocks["stem"].requires_grad_(False)
    trace = network.trace("stem", batch.inputs)
    assert trace.backward(torch.ones_like(trace.output)) is None
    assert all(p.grad is None for p in network.blocks["stem"].parameters())


def test_a_trace_over_consecutive_blocks_equals_their_composition(device: torch.device) -> None:
    network, batch = residual_network(device).eval(), toy_batch(device)
    trace = network.trace(["stem", "r1"], batch.inputs)
    torch.testing.assert_close(trace.output, network.blocks["r1"](network.blocks["stem"](batch.inputs)))
    with pytest.raises(UsageError, match="not consecutive"):
        network.trace(["stem", "r2"], batch.inputs)
    with pytest.raises(UsageError, match="did you mean 'r1'"):
        network.trace("r11", batch.inputs)


def test_perturbed_traces_carry_the_forward_mode_tangent(device: torch.device) -> None:
    """Oracle: torch.func.jvp of the network as a function of what is added to each hidden output."""
    torch.manual_seed(0)
    network = mlp(FLAT, MLPConfig(depth=3, width=7, activation="tanh")).to(device, torch.float64)
    x = toy_batch(device, FLAT).inputs
    directions = {name: torch.randn(len(x), 7, dtype=torch.float64, device=device) for name in network.hidden}

    def shifted(*added: Tensor) -> Tensor:
        h = x
        for name, extra in zip(network.hidden, added, strict=True):
            h = network.blocks[name](h) + extra
        return network.blocks["readout"](h)

    zeros = tuple(torch.zeros_like(u) for u in directions.values())
    value, expected = torch.func.jvp(shifted, zeros, tuple(directions.values()))
    traces = network.traces(x, perturb=lambda trace: directions[trace.name])
    torch.testing.assert_close(traces.tangent, expected)
    torch.testing.assert_close(traces[-1].output, value)
    assert traces.perturbations[-1] is None


def test_perturbed_traces_execute_batch_norm_once(device: torch.device) -> None:
    network, batch = residual_network(device), toy_batch(device)
    network.traces(batch.inputs, perturb=lambda trace: torch.ones_like(trace.output))
    assert int(network.blocks["stem"][1].num_batches_tracked) == 1


class Greedy(Streamed):
    """A linear head and the task's loss at every block."""

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.heads = nn.ModuleDict({name: nn.Linear(network.shapes[name].numel(), spec.outputs) for name in network.hidden})

    def local_loss(self, trace: Any, batch: Batch, step: Any) -> Tensor:
        return self.spec.loss(self.heads[trace.name](trace.output.flatten(1)), batch)


def saved_bytes(work: Callable[[], Any]) -> int:
    """Peak of the bytes held for backward at any one time: storages that saved tensors keep alive."""
    alive: dict[int, int] = {}
    peak = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal peak
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            alive[id(self)] = self.size
            peak = max(peak, sum(alive.values()))

        def __del__(self) -> None:
            alive.pop(id(self), None)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        work()
    return peak


def test_a_streamed_rules_saved_bytes_are_flat_in_depth(device: torch.device) -> None:
    """And back-propagation's are not: the comparison keeps the test honest."""
    sizes: dict[str, list[int]] = {"streamed": [], "backprop": []}
    for depth in (2, 32):
        network = mlp(FLAT, MLPConfig(depth=depth, width=64)).to(device)
        batch = toy_batch(device, FLAT, 64, torch.float32)
        streamed, exact = Greedy(network, FLAT).to(device), Backprop(network, FLAT).to(device)
        sizes["streamed"].append(saved_bytes(lambda rule=streamed, b=batch: rule.credit(b, None)))
        sizes["backprop"].append(saved_bytes(lambda rule=exact, b=batch: rule.credit(b, None)))
    assert sizes["streamed"][1] <= 1.05 * sizes["streamed"][0]
    assert sizes["backprop"][1] > 5 * sizes["backprop"][0]


def test_groups_hold_every_trainable_parameter_once(device: torch.device) -> None:
    rule = Greedy(mlp(FLAT), FLAT)
    groups = rule.groups()
    assert set(groups) == {"b1", "b2", "b3", "b4", "readout", "heads.b1", "heads.b2", "heads.b3", "heads.b4"}
    members = [id(p) for group in groups.values() for p in group]
    assert sorted(members) == sorted(id(p) for p in rule.parameters())


def test_a_parameter_in_two_groups_is_refused() -> None:
    class Doubled(Backprop):
        def groups(self) -> dict[str, list[nn.Parameter]]:
            return {**super().groups(), "again": list(self.network.blocks["b1"].parameters())}

    with pytest.raises(BpfreeError, match="in two groups"):
        Updater(Doubled(mlp(FLAT), FLAT))


def test_apply_updates_the_named_groups_only_and_drops_their_grad(device: torch.device) -> None:
    rule = Backprop(mlp(FLAT), FLAT).to(device)
    step = new_step(rule, OptimizerConfig("sgd", lr=0.1))
    before = {name: p.clone() for name, p in rule.named_parameters()}
    rule.credit(toy_batch(device, FLAT, dtype=torch.float32), step)
    step.apply("b2")
    for name, parameter in rule.named_parameters():
        assert torch.equal(parameter, before[name]) != (".b2." in name)
        assert (parameter.grad is None) == (".b2." in name)
    with pytest.raises(UsageError, match="did you mean 'b2'"):
        step.apply("b22")


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_accumulation_equals_the_large_batch(device: torch.device, parts: int) -> None:
    """Also where the micro-batches are of unequal size (12 examples in 5 parts)."""
    results = []
    for pieces in (1, parts):
        torch.manual_seed(0)
        rule = DFA(mlp(FLAT), FLAT).to(device, torch.float64)
        step = new_step(rule, OptimizerConfig("sgd", lr=0.5))
        accumulate(rule, toy_batch(device, FLAT), step, pieces)
        results.append([p.detach().clone() for p in rule.parameters()])
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-13)


def test_clipping_is_per_group_unless_asked_otherwise(device: torch.device) -> None:
    rule = Backprop(mlp(FLAT), FLAT).to(device)
    for scope in ("group", "global"):
        updater = Updater(rule, OptimizerConfig("sgd", lr=1.0), clip=ClipConfig(norm=0.5, scope=scope))
        for parameter in rule.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = {name: [p.clone() for p in members] for name, members in rule.groups().items()}
        updater.apply()
        moved = {
            name: torch.stack([(p - q).norm() for p, q in zip(members, before[name], strict=True)]).norm()
            for name, members in rule.groups().items()
        }
        total = torch.stack(list(moved.values())).norm().item()
        if scope == "group":
            assert all(size.item() == pytest.approx(0.5, rel=1e-3) for size in moved.values())
        else:
            assert total == pytest.approx(0.5, rel=1e-3)


def test_optimiser_state_follows_the_parameters_name_when_a_network_grows(device: torch.device) -> None:
    """Torch's positional state would land on the wrong parameter (same shapes: silently)."""

    class Growing(Backprop):
        def start_phase(self, phase: Phase) -> None:
            if phase.name == "grow":
                self.extra = nn.Linear(6, 6).to(device)

        def groups(self) -> dict[str, list[nn.Parameter]]:
            groups = super().groups()
            return {"extra": groups.pop("extra"), **groups} if "extra" in groups else groups

    rule = Growing(mlp(FLAT, MLPConfig(depth=1, width=6)), FLAT).to(device)
    step_batch = toy_batch(device, FLAT, dtype=torch.float32)
    updater = Updater(rule)
    rule.credit(step_batch, None)
    updater.apply()
    before = updater.state_dict()
    rule.start_phase(Phase("grow"))
    updater.start_phase(Phase("grow"))
    (after,) = updater.state_dict().values()
    (saved,) = before.values()
    for name, state in saved["state"].items():
        torch.testing.assert_close(after["state"][name]["exp_avg"], state["exp_avg"])
    fresh = Updater(rule)
    fresh.load_state_dict(updater.state_dict())
    (loaded,) = fresh.state_dict().values()
    for name, state in saved["state"].items():
        torch.testing.assert_close(loaded["state"][name]["exp_avg"], state["exp_avg"])
    updater.start_phase(Phase("again", reset=("b1",)))
    (reset,) = updater.state_dict().values()
    assert not any(".b1." in name for name in reset["state"])


def test_a_block_that_overwrites_its_input_is_refused() -> None:
    blocks = {"a": nn.Linear(6, 6), "b": nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3))}
    with pytest.raises(UsageError, match="overwrites its input"):
        Network(blocks, input_shape=(6,), readout="b")


def test_networks_that_do_not_fit_say_which_block() -> None:
    with pytest.raises(UsageError, match=r"block 'b' cannot take an input of shape \(5,\)"):
        Network({"a": nn.Linear(6, 5), "b": nn.Linear(4, 3)}, input_shape=(6,), readout="b")
    with pytest.raises(UsageError, match="may not contain"):
        Network({"a.b": nn.Linear(6, 5)}, input_shape=(6,))
    with pytest.raises(UsageError, match="not the last block"):
        Network({"a": nn.Linear(6, 5), "b": nn.Linear(5, 3)}, input_shape=(6,), readout="a")
    with pytest.raises(UsageError, match="needs a network with a readout"):
        Backprop(Network({"a": nn.Linear(6, 5)}, input_shape=(6,)), FLAT)


def test_the_dry_run_leaves_modes_and_running_statistics(device: torch.device) -> None:
    network = residual_network(device)
    assert all(module.training for module in network.modules())
    assert int(network.blocks["stem"][1].num_batches_tracked) == 0
    assert network.shapes == {"stem": (5, 8, 8), "r1": (5, 8, 8), "r2": (5, 4, 4), "out": (4,)}


def test_keyed_generators_do_not_depend_on_the_order(device: torch.device) -> None:
    rule = Frozen(mlp(FLAT), FLAT).to(device)
    step = new_step(rule, seed=3)

    def draws(*names: str) -> dict[str, list[float]]:
        return {name: torch.rand(3, generator=step.generator_for(name), device=device).tolist() for name in names}

    first = draws("t1", "t2", "t3")
    assert draws("t3", "t1", "t2") == first
    assert first["t1"] != first["t2"]
    step.index += 1
    assert draws("t1")["t1"] != first["t1"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam"])
def test_any_optimiser_of_torch_learns(device: torch.device, optimizer: str) -> None:
    torch.manual_seed(0)
    rule = Backprop(mlp(FLAT), FLAT).to(device)
    step = new_step(rule, OptimizerConfig(optimizer, lr=0.01))
    batch = toy_batch(device, FLAT, dtype=torch.float32)
    losses = []
    for _ in range(30):
        losses.append(float(rule.learn(batch, step)["loss"]))
        step.index += 1
    assert losses[-1] < losses[0]


def test_optimisers_and_their_options_are_checked() -> None:
    rule = Backprop(mlp(FLAT), FLAT)
    with pytest.raises(UsageError, match="did you mean 'adamw'"):
        Updater(rule, OptimizerConfig("adamww"))
    with pytest.raises(UsageError, match="unknown option of adam 'momentum'"):
        Updater(rule, OptimizerConfig("adam", momentum=0.9))
    assert OptimizerConfig(lr=0.5).over(OptimizerConfig("sgd", lr=0.1, momentum=0.9)) == OptimizerConfig("sgd", lr=0.5, momentum=0.9)
    assert OptimizerConfig("sgd").over(OptimizerConfig("adam", lr=0.1, options={"betas": (0.5, 0.9)})) == OptimizerConfig("sgd")


def test_optimisers_are_those_of_torch() -> None:
    """Oracle: torch's own classes, of which ours leave out the marks for its compiler: the same bits after three steps."""
    tried = set()
    for name in [name for name in vars(torch.optim) if name[0].isupper()]:
        try:
            check_optimizer(OptimizerConfig(name, lr=0.1))
        except UsageError:  # it cannot work here
            continue
        ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = make_optimizer(OptimizerConfig(name, lr=0.1), {"all": [ours]}, {})
        fused = {"fused": True} if optimizer.defaults.get("fused") else {}
        exact = getattr(torch.optim, name)([theirs], lr=0.1, **fused)
        closure = [lambda: torch.zeros(())] if name == "LBFGS" else []
        for _ in range(3):
            ours.grad, theirs.grad = torch.arange(3.0), torch.arange(3.0)
            optimizer.step(*closure)  # type: ignore[arg-type]
            exact.step(*closure)
        assert torch.equal(ours, theirs)
        assert isinstance(optimizer, type(exact))
        tried.add(name)
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adafactor"} <= tried


def test_micro_batches_have_keyed_noise_of_their_own(device: torch.device) -> None:
    seen: list[float] = []

    class Noisy(Backprop):
        def credit(self, batch: Batch, step: Any) -> dict[str, Tensor]:
            seen.append(torch.rand(1, generator=step.generator_for("t1"), device=device).item())
            return super().credit(batch, step)

    rule = Noisy(mlp(FLAT), FLAT).to(device)
    step = new_step(rule)
    accumulate(rule, toy_batch(device, FLAT, dtype=torch.float32), step, 3)
    assert len(set(seen)) == 3
    rule.credit(toy_batch(device, FLAT, dtype=torch.float32), step)
    assert seen[3] == seen[0]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_gradients_that_come_late(name: str) -> None:
    """A block that first learns in the second step, beside one that learns in both. Oracle: torch's plain loop (fused SGD raises here)."""
    torch.manual_seed(0)
    rule = Backprop(mlp(FLAT, MLPConfig(depth=1, width=3)), FLAT)
    twin = copy.deepcopy(rule)
    options: dict[str, float] = {"lr": 0.1, "weight_decay": 0.01, **({} if name.startswith("adam") else {"momentum": 0.9})}
    step = new_step(rule, OptimizerConfig(name, **options))
    classes = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    exact = classes[name](twin.parameters(), foreach=False, **options)
    for late in (True, False, False):
        for one, other in zip(rule.parameters(), twin.parameters(), strict=True):
            one.grad, other.grad = torch.ones_like(one), torch.ones_like(other)
        if late:
            for module in (rule, twin):
                module.network.blocks["b1"].zero_grad()
        step.apply()
        exact.step()
    for one, other in zip(rule.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_gradient_in_another_memory_layout_moves_the_right_entries(device: torch.device) -> None:
    """Oracle: W - lr G. Torch's fused optimisers walk weights and gradients in memory order, whatever their strides."""
    network = residual_network(device)
    rule = Backprop(network, SPEC)
    updater = Updater(rule, OptimizerConfig("sgd", lr=1.0))
    weight = network.blocks["r1"].conv.weight
    gradient = torch.randn_like(weight).contiguous(memory_format=torch.channels_last)
    assert gradient.stride() != weight.stride()
    expected = weight.detach() - gradient
    weight.grad = gradient
    updater.apply("r1")
    torch.testing.assert_close(weight.detach(), expected)
