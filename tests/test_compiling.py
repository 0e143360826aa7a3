"""Compiled blocks: equal results, a clock that leaves compilation out, and eager blocks wherever it fails."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from made_time import Time
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as autograd_config

from bpfree import Batch, Phase, Step
from bpfree.training import compiling
from bpfree.training.compiling import Compilation
from bpfree.training.meters import Clock


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing that another test has compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that leaves graphs alone: torch's own needs many seconds."""
    monkeypatch.setattr(compiling, "inductor", lambda graph, inputs, mode: graph.forward)


def make_blocks(device: torch.device, count: int = 2) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 6)).to(device) for _ in range(count)]


def passes(blocks: list[nn.Module], inputs: Tensor) -> list[Tensor]:
    """Outputs, gradients and running statistics after two steps."""
    found = []
    for block in blocks * 2:
        block.zero_grad()
        output = block(inputs)
        output.square().sum().backward()
        found += [output.detach(), *(p.grad.clone() for p in block.parameters()), *(b.clone() for b in block.buffers())]
    return found


def twins(device: torch.device) -> tuple[list[nn.Module], list[Tensor], Tensor]:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).to(device)
    blocks = make_blocks(device)
    return blocks, passes(copy.deepcopy(blocks), inputs), inputs


def test_none_compiles_nothing(device: torch.device) -> None:
    blocks, wanted, inputs = twins(device)
    compilation = Compilation(blocks, "none", device)
    assert all(torch.equal(a, b) for a, b in zip(passes(blocks, inputs), wanted, strict=True))
    assert (compilation.graphs, compilation.seconds, compilation.trouble) == (0, 0.0, "")


def test_blocks_compile_when_first_called(device: torch.device, as_it_is: None) -> None:
    # Oracle: eager twins bit by bit, because the compiler leaves the graphs alone; one graph of blocks that are alike, or one each.
    blocks, wanted, inputs = twins(device)
    keys = [list(block.state_dict()) for block in blocks]
    compilation = Compilation(blocks, "default", device)
    assert compilation.graphs == 0
    assert all(torch.equal(a, b) for a, b in zip(passes(blocks, inputs), wanted, strict=True))
    first = compilation.graphs
    assert first in (1, 2)
    assert [list(block.state_dict()) for block in blocks] == keys
    blocks[0].eval()(inputs)
    assert compilation.graphs == first + 1
    passes(copy.deepcopy(blocks), inputs[:3])
    assert compilation.graphs == first + 1  # copies are eager
    assert compilation.trouble == ""


def test_the_clock_leaves_steps_out_that_compile(device: torch.device, as_it_is: None, clock: Time) -> None:
    # Oracle: a clock that is moved by known times in a step that compiles and in one that does not.
    (block, *_), _, inputs = twins(device)
    compilation, training = Compilation([block], "default", device), Clock(device)
    training.start()

    def take(batch: Batch, step: Step) -> dict[str, Tensor]:
        block(batch.inputs)
        clock.now += pauses.pop()
        return {}

    pauses = [1.0, 8.0]
    step = Step(torch.Generator(), lambda name: torch.Generator(), lambda *names: None, lambda name: 0.0, Phase())
    while pauses:
        compilation.around(take, training, Batch(inputs), step)
    training.stop()
    assert (compilation.seconds, training.seconds) == (8.0, 1.0)


def check_fallback(compilation: Compilation, blocks: list[nn.Module], wanted: list[Tensor], inputs: Tensor, records: list[Any]) -> None:
    """Oracle: eager twins bit by bit, one warning, and nothing compiled from then on."""
    assert all(torch.equal(a, b) for a, b in zip(passes(blocks, inputs), wanted, strict=True))
    graphs = compilation.graphs
    passes(blocks, inputs[:3])
    assert compilation.graphs == graphs
    assert len(records) == 1
    assert "no such thing" in compilation.trouble
    assert compilation.trouble in records[0].getMessage()


def test_a_compiler_that_fails(device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def failing(graph: Any, inputs: Any, mode: str) -> Any:
        raise RuntimeError("no such thing as a compiler\nand more")

    monkeypatch.setattr(compiling, "inductor", failing)
    blocks, wanted, inputs = twins(device)
    with caplog.at_level(logging.WARNING, logger="bpfree"):
        check_fallback(Compilation(blocks, "default", device), blocks, wanted, inputs, caplog.records)


@pytest.mark.skipif(not hasattr(autograd_config, "force_non_lazy_backward_lowering"), reason="this torch compiles backward passes late")
def test_a_compiler_that_fails_for_the_backward_pass(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As torch's own is called, with its way of making a backward pass, whose compiler here knows forward passes alone.
    def failing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such thing as a backward pass")

    def backend(graph: Any, inputs: Any, config_patches: Any) -> Any:
        whole = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=failing)
        return whole(graph, inputs)

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
    blocks, wanted, inputs = twins(device)
    with caplog.at_level(logging.WARNING, logger="bpfree"):
        check_fallback(Compilation(blocks, "default", device), blocks, wanted, inputs, caplog.records)


@pytest.mark.parametrize("late", [False, True])
def test_a_platform_that_is_not_known(
    late: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Where torch.compile refuses at once, or what it returns fails at its first call.
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such thing on this platform")

    monkeypatch.setattr(torch, "compile", (lambda *args, **kwargs: failing) if late else failing)
    blocks, wanted, inputs = twins(device)
    with caplog.at_level(logging.WARNING, logger="bpfree"):
        check_fallback(Compilation(blocks, "default", device), blocks, wanted, inputs, caplog.records)


def test_errors_of_the_caller_are_raised(device: torch.device, as_it_is: None) -> None:
    # Oracle: the eager error; it says nothing about the compiler.
    blocks, _, inputs = twins(device)
    compilation = Compilation(blocks, "default", device)
    with pytest.raises(RuntimeError, match="shape"):
        blocks[0](inputs[:, :3])
    assert compilation.trouble == ""
    passes(blocks, inputs)
    assert compilation.graphs > 0


def test_there_are_no_cuda_graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    modes: list[str] = []
    monkeypatch.setattr(compiling, "inductor", lambda graph, inputs, mode: modes.append(mode) or graph.forward)
    blocks, _, inputs = twins(torch.device("cpu"))
    Compilation(blocks, "cuda-graphs", torch.device("cpu"))
    passes(blocks, inputs)
    assert set(modes) == {"default"}
    assert "there are none on cpu" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["default", "cuda-graphs"])
def test_torchs_compiler_gives_equal_results(mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # Oracle: eager twins in single precision, to 1e-5 of a tensor's norm (1e-6 where that is zero: biases that batch norm undoes).
    if device.type == "cpu" and (mode != "default" or shutil.which("g++") is None):
        pytest.skip("needs CUDA" if mode != "default" else "needs g++")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    blocks, wanted, inputs = twins(device)
    compilation = Compilation(blocks, mode, device)
    found = passes(blocks, inputs)
    assert compilation.trouble == ""
    assert compilation.graphs > 0
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).float().norm() <= 1e-5 * b.float().norm() + 1e-5
