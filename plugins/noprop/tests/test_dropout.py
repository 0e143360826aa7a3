"""Keyed dropout: its distribution, its keys, and independence of torch's global generators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from bpfree_noprop.backprop import NoPropBackprop
from bpfree_noprop.blocks import NETWORKS, DenoisingBlock
from bpfree_noprop.dropout import KeyedDropout, masks_from
from bpfree_noprop.dt import NoPropDT
from torch import Tensor, nn

from bpfree.step import Batch
from bpfree.tasks.task import TaskSpec
from bpfree.training.operations import counted_operations
from bpfree.training.stepper import new_step

MakeRule = Callable[..., NoPropDT]
IMAGES = TaskSpec("images", input_shape=(1, 8, 8), outputs=4)


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def paper_block() -> DenoisingBlock:
    builder = NETWORKS["noprop-paper"]
    return cast(DenoisingBlock, builder.build(IMAGES, builder.Config(blocks=1)).blocks["t1"])


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5])
def test_keeps_and_scales_as_dropout_does(p: float, device: torch.device) -> None:
    # Oracle: entries are 0 with probability p (within five standard errors) and 1/(1-p) else; the gradient is the mask.
    dropout, x = KeyedDropout(p), torch.ones(200, 500, device=device, requires_grad=True)
    with masks_from(generator(device), [dropout]):
        y = dropout(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    assert set(y.unique().tolist()) <= {0.0, float(torch.tensor(1 / (1 - p)))}
    assert abs(float((y == 0).float().mean()) - p) <= 5 * (p * (1 - p) / 1e5) ** 0.5


def test_given_generators_decide(device: torch.device) -> None:
    # Oracle: the same key gives the same mask whatever the global generator does, which is left alone.
    dropout, x = KeyedDropout(0.5), torch.ones(64, 64, device=device)

    def draw(seed: int, other: int) -> Tensor:
        torch.manual_seed(other)
        before = torch.get_rng_state()
        with masks_from(generator(device, seed), [dropout]):
            y: Tensor = dropout(x)
        assert torch.equal(torch.get_rng_state(), before)
        return y

    assert torch.equal(draw(0, 1), draw(0, 2))
    assert not torch.equal(draw(0, 1), draw(1, 1))


def test_is_dropout_without_a_generator(device: torch.device) -> None:
    # Oracle: nn.Dropout from the same global state; also after an error inside the context.
    dropout, x = KeyedDropout(0.3), torch.randn(8, 8, device=device)
    with pytest.raises(ZeroDivisionError), masks_from(generator(device), [dropout]):
        _ = 1 / 0
    torch.manual_seed(5)
    mine = dropout(x)
    torch.manual_seed(5)
    assert torch.equal(mine, nn.Dropout(0.3).to(device)(x))
    with masks_from(generator(device), [dropout]):
        assert torch.equal(dropout.eval()(x), x)
    assert not dropout.state_dict()


@pytest.mark.parametrize("kind", ["channels-last", "bf16", "operations", "functional"])
def test_masks_under(kind: str, device: torch.device) -> None:
    # Oracle: the same block called plainly with the same key (for bf16: the zeros of what follows the first dropout).
    block = paper_block().to(device)
    x, z = torch.randn(6, 1, 8, 8, device=device), torch.randn(6, 4, device=device)
    keyed = lambda name: generator(device, len(name))  # noqa: E731
    first = block.stem[3]
    seen: list[Tensor] = []
    first.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))

    def run(f: Callable[..., Any] = block) -> Tensor:
        with block.masks(keyed, "t1"):
            return cast(Tensor, f(x, z))

    plain = run()
    if kind == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(run(), plain)
    elif kind == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            run()
        assert seen[1].dtype is torch.bfloat16
    elif kind == "operations":
        with counted_operations() as operations:
            assert torch.equal(run(), plain)
        assert operations() > 0
    else:
        weights = {name: p.detach() for name, p in block.named_parameters()}
        torch.testing.assert_close(run(lambda *args: torch.func.functional_call(block, weights, args)), plain)
    assert len(seen) == 2


def test_a_steps_masks_depend_on_the_block_and_the_step_alone(make_rule: MakeRule, device: torch.device) -> None:
    # Oracle: the loss bit by bit, for blocks asked alone and in another order, in a copy, and after other draws.
    rule = make_rule(spec=IMAGES, network={"name": "noprop-paper"})
    batch = Batch(torch.randn(6, 1, 8, 8, device=device), (torch.arange(6) % 4).to(device))
    rows, twin = rule.rows(batch), copy.deepcopy(rule)

    def losses(rule: NoPropDT, order: tuple[int, ...], index: int = 0) -> dict[int, float]:
        step = new_step(rule, seed=3)
        step.index = index
        torch.randn(1)
        return {t: float(rule.block_loss(t, batch.inputs, rows, step, share=1).detach()) for t in order}

    first = losses(rule, (1, 2, 3))
    assert losses(twin, (3, 1)) == {t: first[t] for t in (3, 1)}
    assert losses(rule, (2,)) == {2: first[2]}
    assert losses(rule, (2,), index=1) != {2: first[2]}
    rule.network.blocks["t2"].load_state_dict(rule.network.blocks["t1"].state_dict())
    seen: list[Tensor] = []
    for t in (1, 2):
        rule.network.blocks[f"t{t}"].stem[3].register_forward_hook(lambda module, inputs, output: seen.append(output == 0))
    losses(rule, (1, 2))
    assert not torch.equal(*seen)


def test_a_chains_masks_are_keyed_too(device: torch.device) -> None:
    # Oracle: the loss of back-propagation through two blocks bit by bit, whatever the global generator does.
    builder = NETWORKS["noprop-paper"]
    rule = NoPropBackprop(builder.build(IMAGES, builder.Config(blocks=2)), IMAGES, NoPropBackprop.Config(T=2)).to(device)
    batch = Batch(torch.randn(6, 1, 8, 8, device=device), (torch.arange(6) % 4).to(device))
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses.append(rule.objective(batch, new_step(rule, seed=3)))
    assert torch.equal(*losses)


def test_masks_in_a_compiled_block(device: torch.device) -> None:
    # Oracle: the eager block with the same key, output and gradient bit by bit; the compiler leaves its graphs alone.
    block = paper_block().to(device)
    twin = copy.deepcopy(block)
    x, z = torch.randn(6, 1, 8, 8, device=device), torch.randn(6, 4, device=device)
    torch._dynamo.reset()
    block.compile(backend="eager")
    for seed in (0, 1):
        found = []
        for one in (block, twin):
            one.zero_grad()
            with masks_from(generator(device, seed), one._dropouts):
                y = one(x, z)
            y.square().sum().backward()
            found.append([y, *(p.grad for p in one.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch._dynamo.reset()
