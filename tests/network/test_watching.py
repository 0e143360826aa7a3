"""Modules that torch.fx cannot trace. Oracle: their own forward, bit for bit in eval mode, and its gradients in train mode."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Network, TaskSpec, UsageError, split
from bpfree.baselines import Backprop
from bpfree.network.watching import main_output

models = pytest.importorskip("torchvision.models")
SHAPE = (3, 8, 8)


class Transformer(nn.Module):
    """As image transformers are written: shapes are unpacked and asserted, tokens are added, the forward has options and a dict output."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True) for _ in range(3)]
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_dict: bool = True) -> Any:
        count, _, height, width = x.shape
        assert (height, width) == (8, 8), "wrong size"
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(count, -1, -1), x], dim=1) + self.position
        if mask is not None:
            x = x * mask
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        scores = self.head(x[:, 0].reshape(count, 8))
        return {"logits": scores, "hidden": x} if return_dict else scores


class Normed(nn.Module):
    """Batch norm, dropout, control flow over shapes and attributes, changes in place, a plain tensor; returns a data class."""

    @dataclass
    class Output:
        output: Tensor
        loss: None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.drop = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout2d(0.3)
        self.stages = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1))
        self.scale = torch.tensor(0.5)
        self.fc = nn.Linear(4, 5)
        self.depth = 2

    def forward(self, x: Tensor) -> Any:
        if x.dim() != 4 or x.shape[1] not in (1, 3):
            raise ValueError("images")
        x = self.drop(self.norm1(self.conv1(x))).relu_()
        for _ in range(self.depth if x.size(-1) > 4 else 1):
            x = F.max_pool2d(x, 2)
        x = self.stages(x)
        x *= self.scale.item() if self.depth == 0 else self.scale
        x[:, 0] = 0.25
        pooled = x.mean(dim=(2, 3))
        mask = torch.ones(len(pooled), 1, device=x.device)
        return self.Output(self.fc(pooled * mask))


def output(module: nn.Module, x: Tensor) -> Tensor:
    return main_output(module(x))


CASES: list[tuple[type[nn.Module], list[str], list[str]]] = [
    (Transformer, ["blocks.0", "blocks.2", "head"], ["patch", "blocks_0", "blocks_2", "head"]),
    (Normed, ["stages.0", "stages.2", "fc"], ["stem", "stages_0", "stages_2", "fc"]),
]


@pytest.mark.parametrize(("kind", "at", "names"), CASES, ids=[case[0].__name__ for case in CASES])
def test_the_blocks_are_the_module(kind: type[nn.Module], at: list[str], names: list[str], device: torch.device) -> None:
    torch.manual_seed(0)
    module = kind().to(device)
    before, mode = copy.deepcopy(module.state_dict()), module.training
    random = torch.get_rng_state()
    with pytest.raises(UsageError, match=r"at=\[\.\.\.\].*bpfree_blocks"):
        split(module, SHAPE)
    network = split(module, SHAPE, at=at)
    assert network.names == names
    assert network.readout == names[-1]  # a linear layer makes the scores
    assert torch.equal(random, torch.get_rng_state())
    assert module.training == mode
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    for count in (1, 5):  # other numbers of examples than were watched
        x = torch.randn(count, *SHAPE, device=device)
        assert torch.equal(network.eval()(x), output(module, x))
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), output(module, x))


@pytest.mark.parametrize(("kind", "at", "names"), CASES, ids=[case[0].__name__ for case in CASES])
def test_the_blocks_train_as_the_module_does(kind: type[nn.Module], at: list[str], names: list[str]) -> None:
    """Values, gradients and running statistics in train mode, with dropout's masks from the same seed."""
    torch.manual_seed(0)
    module = kind().train()
    network = split(copy.deepcopy(module), SHAPE, at=at)
    x = torch.randn(6, *SHAPE)
    results = []
    for run, one in ((lambda x: output(module, x), module), (network, network)):
        torch.manual_seed(1)
        scores = run(x)
        F.cross_entropy(scores, torch.arange(6) % 5).backward()
        norms = [part for part in one.modules() if isinstance(part, nn.BatchNorm2d)]
        results.append([scores.detach(), *(p.grad for p in one.parameters()), *(b for norm in norms for b in norm.buffers())])
    assert len(results[0]) == len(results[1])
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its)
    Backprop(network, TaskSpec("toy", SHAPE, 5))


@pytest.mark.parametrize(
    ("name", "at", "names"),
    [
        ("googlenet", ["inception3a", "inception5a", "fc"], ["conv1", "inception3a", "inception5a", "fc"]),
        ("fcn", ["backbone.layer2", "backbone.layer4", "classifier"], ["backbone", "backbone_layer2", "backbone_layer4", "classifier"]),
    ],
)
def test_models_of_torchvision_that_fx_cannot_trace(name: str, at: list[str], names: list[str]) -> None:
    """One with auxiliary heads in train mode alone, and one that returns a dictionary."""
    torch.manual_seed(0)
    if name == "googlenet":
        module: nn.Module = models.googlenet(num_classes=10, init_weights=False)
    else:
        module = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=4)
    network = split(module, (3, 64, 64), at=at)
    assert network.names == names
    x = torch.randn(3, 3, 64, 64)
    module.eval(), network.eval()
    with torch.no_grad():
        assert torch.equal(network(x), output(module, x))


def test_optional_arguments_are_traced_with_their_defaults() -> None:
    """No watching is needed: a mask that is not given is not there."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, double: bool = False) -> Tensor:
            x = self.one(x) * scale
            if mask is not None:
                x = x.masked_fill(mask, 0)
            return self.two(2 * x if double else x)

    module = Masked().eval()
    network = split(module, (4,))
    assert network.names == ["one", "two"]
    x = torch.randn(3, 4)
    assert torch.equal(network(x), module(x))


class Branching(nn.Module):
    """Takes one of two paths, by the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x) if x.mean() > 0 else self.two(x)
        return self.head(x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (4,)
        return self.head(F.dropout(self.one(x), 0.5, self.training))


class Doubled(nn.Module):
    """Returns two tensors of no name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.one(x)
        return x, self.head(x)


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.head = (nn.Linear(4, size) for size in (4, 4, 4, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.one(x)
        second = self.two(first)
        return {"logits": self.head(first + self.three(second))}


class Scaling(nn.Module):
    """A number of its input's value becomes part of the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (4,)
        return self.head(self.one(x) * x.abs().max().item())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Branching, "takes different paths for different inputs"),
        (Functional, "depends on self.training"),
        (Doubled, "returns 2 tensors, and none is named"),
        (Scaling, "takes different paths"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_way_out(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        split(kind(), (4,), at=["head"])
    assert "bpfree_blocks()" in caught.value.fix


def test_a_cut_where_two_tensors_pass_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot cut before 'three'") as caught:
        split(Skipping(), (4,), at=["three"])
    assert "name one of: two, head" in caught.value.fix
    assert split(Skipping(), (4,), at=["two", "head"]).names == ["one", "two", "head"]


def test_a_check_of_values_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Checking(Functional):
        def forward(self, x: Tensor) -> Tensor:
            if x.isnan().any():
                raise ValueError("not a number")
            return self.head(self.one(x))

    module = Checking().eval()
    with caplog.at_level(logging.WARNING, "bpfree.network"):
        network = split(module, (4,), at=["head"])
    assert "reads values in its forward" in caplog.text
    x = torch.randn(3, 4)
    assert torch.equal(network(x), module(x))


def test_unknown_names_and_wrong_shapes_are_said() -> None:
    with pytest.raises(UsageError, match="did you mean 'head'"):
        split(Transformer(), SHAPE, at=["heads"])
    with pytest.raises(UsageError, match=r"cannot take an input of shape \(3, 9, 9\)") as caught:
        split(Transformer(), (3, 9, 9), at=["head"])
    assert "wrong size" in str(caught.value)


# --- a module's own word ----------------------------------------------------------------------------------------------


class Saying(Branching):
    def bpfree_blocks(self) -> Mapping[str, nn.Module]:
        class First(nn.Module):
            def __init__(self, one: nn.Module, two: nn.Module) -> None:
                super().__init__()
                self.one, self.two = one, two

            def forward(self, x: Tensor) -> Tensor:
                return self.one(x) if x.mean() > 0 else self.two(x)  # type: ignore[no-any-return]

        return {"first": First(self.one, self.two), "head": self.head}


def test_a_module_says_its_blocks_itself() -> None:
    module = Saying()
    network = split(module, (4,))
    assert network.names == ["first", "head"]
    assert network.readout == "head"
    for x in (torch.ones(2, 4), -torch.ones(2, 4)):
        assert torch.equal(network(x), module(x))
    assert {id(p) for p in network.parameters()} == {id(p) for p in module.parameters()}
    rule = Backprop(module, TaskSpec("flat", (4,), 2))
    assert isinstance(rule.network, Network)


def test_blocks_that_are_something_else_are_refused() -> None:
    class Wrong(Saying):
        def bpfree_blocks(self) -> Mapping[str, nn.Module]:
            return {"one": self.one, "two": self.two, "head": self.head}

    with pytest.raises(UsageError, match="do not compose to its forward"):
        split(Wrong(), (4,))
