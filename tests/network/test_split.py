"""Cutting modules into blocks. Oracles: the module itself (values, autograd, running statistics), and names written down by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bpfree import Network, UsageError, split
from bpfree.network.split import plan


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x + self.conv2(self.norm(self.conv1(x)).relu_()))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.stages = nn.ModuleList([Residual(4), Residual(4)])
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.act(self.conv(x))
        for stage in self.stages:
            x = stage(x)
        x = x * self.scale
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Sequential(Residual(4), nn.Dropout(0.3)),
        nn.Flatten(),
        nn.Linear(4 * 16, 6),
        nn.Tanh(),
        nn.Linear(6, 5),
    )


SHAPE = (3, 8, 8)


def batch(device: torch.device) -> Tensor:
    return torch.randn(6, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)


def results(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, the parameters' gradients and the buffers, after one pass with a fixed seed of dropout."""
    torch.manual_seed(0)
    module.zero_grad()
    output = run(x)
    (output * torch.linspace(-1, 1, output.numel(), device=x.device, dtype=x.dtype).view_as(output)).sum().backward()
    return [output.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None), *(b.clone() for b in module.buffers())]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [Net, sequential])
def test_the_blocks_compose_to_the_module_in_value_and_gradient(
    make: Callable[[], nn.Module], training: bool, device: torch.device
) -> None:
    torch.manual_seed(3)
    module = make().to(device, torch.float64).train(training)
    twin = copy.deepcopy(module)
    network = split(twin, SHAPE).train(training)
    original = results(module, module, batch(device))
    assert len(original) == 1 + len(list(module.parameters())) + len(list(module.buffers()))
    torch.testing.assert_close(results(network, twin, batch(device)), original, rtol=0, atol=0)


def chained(network: Network, x: Tensor) -> None:
    """Back-propagation by hand over the blocks' traces."""
    traces = network.traces(x, input_grad=True)
    output = traces[-1].output
    signal: Tensor | None = torch.linspace(-1, 1, output.numel(), device=x.device, dtype=x.dtype).view_as(output)
    for trace in reversed(traces):
        assert signal is not None
        signal = trace.backward(signal)


def test_chained_traces_give_the_modules_gradient(device: torch.device) -> None:
    module = Net().to(device, torch.float64)
    network = split(module, SHAPE)
    results(module, module, batch(device))
    expected = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    chained(network, batch(device))
    torch.testing.assert_close([p.grad for p in module.parameters()], expected)


def test_training_the_network_trains_the_module_in_place(device: torch.device) -> None:
    module = Net().to(device, torch.float64)
    network = split(module, SHAPE)
    assert {id(p) for p in network.parameters()} == {id(p) for p in module.parameters()}
    assert {id(b) for b in network.buffers()} == {id(b) for b in module.buffers()}
    before = module(batch(device)).detach()
    chained(network, batch(device))
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    after = module.eval()(batch(device))
    assert not torch.allclose(before, after)
    torch.testing.assert_close(network.eval()(batch(device)), after, rtol=0, atol=0)


def test_blocks_begin_at_layers_with_weights_and_residual_blocks_stay_whole() -> None:
    network = split(Net(), SHAPE)
    assert network.names == ["stem", "stages_0", "stages_1", "fc"]
    assert (network.readout, network.hidden) == ("fc", ["stem", "stages_0", "stages_1"])
    assert {name: tuple(shape) for name, shape in network.shapes.items()} == {
        "stem": (4, 8, 8),
        "stages_0": (4, 8, 8),
        "stages_1": (4,),
        "fc": (5,),
    }


def test_a_sequential_keeps_norm_activation_and_pooling_with_their_layer() -> None:
    network = split(sequential(), SHAPE)
    assert network.names == ["b0", "b4", "b6", "b8"]
    assert network.readout == "b8"
    assert [tuple(shape) for shape in network.shapes.values()] == [(4, 4, 4), (64,), (6,), (5,)]


def test_a_block_that_is_exactly_one_submodule_is_that_submodule() -> None:
    module = Net()
    network = split(module, SHAPE)
    assert network.blocks["fc"] is module.fc
    assert network.blocks["stages_0"] is module.stages[0]
    assert isinstance(network.blocks["stages_1"], fx.GraphModule)  # with scale and pooling


def test_named_submodules_begin_blocks(device: torch.device) -> None:
    module = Net().to(device, torch.float64)
    network = split(module, SHAPE, at=["fc", "stages.1"])
    assert network.names == ["stem", "stages_1", "fc"]
    assert split(module, SHAPE, at=["conv", "fc"]).names == ["conv", "fc"]
    torch.testing.assert_close(network.eval()(batch(device)), module.eval()(batch(device)), rtol=0, atol=0)


def test_the_readout_can_be_named_or_denied() -> None:
    assert split(Net(), SHAPE, readout=None).readout is None
    assert split(Net(), SHAPE, at=["stages.1"], readout="stages.1").readout == "stages_1"
    assert split(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU()), (4,)).readout is None
    with pytest.raises(UsageError, match="not the last block"):
        split(Net(), SHAPE, readout="stem")


def test_the_module_is_left_as_it_was() -> None:
    module = Net().eval()
    module.stages[0].train()
    modes, attributes = [part.training for part in module.modules()], set(vars(module))
    buffers = [buffer.clone() for buffer in module.buffers()]
    split(module, SHAPE)
    assert [part.training for part in module.modules()] == modes
    assert set(vars(module)) == attributes
    assert all(torch.equal(one, other) for one, other in zip(buffers, module.buffers(), strict=True))


def test_networks_can_be_copied_and_pickled(device: torch.device) -> None:
    network = split(Net().to(device, torch.float64), SHAPE).eval()
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in network.parameters()}
        torch.testing.assert_close(twin(batch(device)), network(batch(device)), rtol=0, atol=0)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, training=self.training)


@pytest.mark.parametrize("part", [Untraceable, FunctionalDropout])
@pytest.mark.parametrize("training", [True, False])
def test_parts_that_a_graph_cannot_hold_are_kept_whole(part: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(part(), nn.Tanh()), nn.Linear(6, 3))
    network = split(module, (6,))
    assert network.names == ["b0", "b2", "b3"]
    module.train(training)
    x = torch.randn(5, 6)
    torch.testing.assert_close(results(network.train(training), network, x), results(module, module, x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("part", "reason"), [(Untraceable, "cannot be traced: TraceError"), (FunctionalDropout, "depends on self.training")]
)
def test_modules_whose_own_forward_a_graph_cannot_hold_are_refused(part: type[nn.Module], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        split(part(), (6,))
    assert "at=[...]" in caught.value.fix
    assert "bpfree_blocks()" in caught.value.fix


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y + self.b(x + y)


class Pair(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear, self.outputs = nn.Linear(4, 4), outputs

    def forward(self, x: Tensor, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.linear(x)
        return x + y if self.outputs == 1 else (x, x)


def tied() -> nn.Module:
    first = nn.Linear(4, 4)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), first)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Dense, {}, "no single tensor passes"),
        (Dense, {"at": ["b"]}, r"cannot cut before 'b'.*\n.*\n.*none is possible"),
        (Dense, {"at": ["c"]}, r"unknown module 'c'"),
        (tied, {}, "share the parameter"),
        (lambda: Pair(1), {}, "one input, not 2"),
        (lambda: Pair(2), {}, "one tensor"),
        (lambda: nn.Linear(5, 5), {}, r"cannot take an input of shape \(4,\)"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), {"at": ["1"]}, "overwrites its input"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(
    make: Callable[[], nn.Module], options: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        split(make(), (4,), at=options.get("at"))


def test_an_unknown_cut_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'stages\.1'"):
        split(Net(), SHAPE, at=["stage.1"])
    module = Net()
    module.spare = nn.Linear(3, 3)
    with pytest.raises(UsageError, match=r"never called[^$]*stages\.0, [^$]*fc"):
        split(module, SHAPE, at=["spare"])


def test_a_module_of_one_layer_is_one_block() -> None:
    network = split(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2))
    assert (network.names, network.readout) == (["b1"], "b1")


def test_weights_used_by_a_function_count_as_a_layer(device: torch.device) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((x @ self.weight.t()).tanh())

    module = Functional().to(device)
    network = split(module, (4,))
    assert network.names == ["stem", "out"]
    assert next(network.blocks["stem"].parameters()) is module.weight
    x = torch.randn(3, 4, device=device)
    assert torch.equal(network(x), module(x))


def test_the_plan_is_a_table_of_blocks() -> None:
    lines = [line.split() for line in plan(split(Net(), SHAPE)).splitlines()]
    assert lines[0] == ["block", "output", "parameters", "layers"]
    assert lines[1] == ["stem", "4x8x8", "112", "Conv2d,", "ReLU"]
    assert lines[2][:3] == ["stages_0", "4x8x8", str(2 * (4 * 4 * 9 + 4) + 8)]
    assert lines[4] == ["fc", "(readout)", "5", "25", "Linear"]
    assert lines[5] == ["total", str(112 + 2 * 304 + 4 + 25)]
