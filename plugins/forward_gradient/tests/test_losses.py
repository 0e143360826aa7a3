"""Local heads, and the fused local losses of patches and groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bpfree_forward_gradient.losses import Head, group_count, own_derivatives, spread
from bpfree_forward_gradient.mixer import LocalMixerConfig, local_mixer
from bpfree_forward_gradient.options import ForwardGradientConfig, LocalForwardGradientConfig
from bpfree_forward_gradient.rules import ForwardGradient, LocalForwardGradient
from estimates import batch_for, credit_of, mlp
from torch import Tensor

from bpfree import Batch, TaskSpec, UsageError, new_step
from bpfree.network.reach import Reach

SHAPES = [torch.Size((6,)), torch.Size((4, 6)), torch.Size((6, 5, 7))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_closed_forms_of_a_head(shape: torch.Size, pool: int) -> None:
    """Oracle: autograd through the head; torch's adaptive average pooling."""
    torch.manual_seed(0)
    head = Head(shape, 3, pool).double()
    torch.nn.init.normal_(head.linear.weight)
    x = torch.randn(5, *shape, dtype=torch.float64, requires_grad=True)
    error = torch.randn(5, 3, dtype=torch.float64)
    scores = head(x)
    weight, bias, cotangent = torch.autograd.grad((scores * error).sum(), [head.linear.weight, head.linear.bias, x])
    with torch.no_grad():
        head.credit(head.pooled(x), error)
    assert head.linear.weight.grad is not None
    assert head.linear.bias.grad is not None
    assert torch.allclose(head.linear.weight.grad, weight)
    assert torch.allclose(head.linear.bias.grad, bias)
    assert torch.allclose(head.cotangent(error), cotangent)
    if len(shape) == 3:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, (pool, pool)).flatten(1)
        assert torch.allclose(head.pooled(x), pooled)


def test_a_head_starts_at_zero() -> None:
    assert not Head(torch.Size((6,)), 3)(torch.randn(2, 6)).any()


def unfused(x: Tensor, tangent: Tensor, head: Head, spec: TaskSpec, batch: Batch, groups: int) -> tuple[Tensor, Tensor]:
    """Literally (Ren et al. 2022, section 3.3): one loss per patch and group, everything else behind a stop-gradient.

    Returns:
        The losses' values and their derivatives along the tangent, both (tokens, groups).
    """
    _, tokens, channels = x.shape
    values, derivatives = torch.zeros(tokens, groups), torch.zeros(tokens, groups)
    for token in range(tokens):
        for group in range(groups):
            own = torch.zeros(tokens, channels, dtype=torch.bool)
            own[token, group * channels // groups : (group + 1) * channels // groups] = True

            def loss(features: Tensor, own: Tensor = own) -> Tensor:
                return spec.loss(head(torch.where(own, features, x)), batch)

            values[token, group], derivatives[token, group] = torch.func.jvp(loss, (x,), (tangent,))
    return values, derivatives


@pytest.mark.parametrize("groups", [1, 3])
def test_fused_losses_are_the_unfused_ones(groups: int) -> None:
    """Oracle: each loss on its own, with its own derivative by forward mode."""
    torch.manual_seed(0)
    spec = TaskSpec(name="toy", input_shape=(24,), outputs=5)
    head = Head(torch.Size((4, 6)), 5).double()
    torch.nn.init.normal_(head.linear.weight)
    x, tangent = torch.randn(2, 7, 4, 6, dtype=torch.float64)
    batch = Batch(x, torch.randint(0, 5, (7,)))
    with torch.no_grad():
        values, derivatives = unfused(x, tangent, head, spec, batch, groups)
        scores = head(x)
        products = head.cotangent(spec.error(scores, batch)) * tangent[None]
        fused = own_derivatives(products, Reach(examples=False, tokens=True, groups=True), groups)[0, 0]
    assert torch.allclose(values, spec.loss(scores, batch).expand(4, groups).float())
    assert torch.allclose(fused.float(), derivatives, atol=1e-6)


@pytest.mark.parametrize("reach", [Reach(e, t, g) for e in (True, False) for t in (True, False) for g in (True, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_add_up(shape: torch.Size, reach: Reach) -> None:
    """However they are divided, the parts are of the right shape and their sum is the whole derivative."""
    products = torch.randn(2, 5, *shape, dtype=torch.float64)
    parts = own_derivatives(products, reach, 3)
    tokens = shape[0] if len(shape) == 2 and reach.tokens else 1
    assert parts.shape == (2, 5 if reach.examples else 1, tokens, 3 if reach.groups else 1)
    assert torch.allclose(parts.sum((1, 2, 3)), products.flatten(1).sum(1))
    assert torch.broadcast_shapes(spread(parts, shape).shape, products.shape) == products.shape


def test_units_of_a_group_share_its_derivative() -> None:
    derivatives = torch.tensor([10.0, 20.0, 30.0]).view(1, 1, 1, 3)
    assert spread(derivatives, torch.Size((6,))).flatten().tolist() == [10, 10, 20, 20, 30, 30]
    assert spread(derivatives, torch.Size((6, 2, 2)))[0, 0, :, 0, 0].tolist() == [10, 10, 20, 20, 30, 30]


@pytest.mark.parametrize(
    ("channels", "losses", "size", "own", "expected"),
    [
        (128, "all", None, None, 16),
        (128, "groupwise", 32, None, 4),
        (128, "blockwise", 32, 8, 1),
        (128, "patchwise", None, 8, 1),
        (128, "all", None, 4, 4),
        (128, "all", 16, 4, 8),
        (30, "all", None, None, 3),
        (7, "all", None, None, 1),
        (4, "all", None, None, 1),
    ],
)
def test_number_of_groups(channels: int, losses: Any, size: int | None, own: int | None, expected: int) -> None:
    """Equal groups whose size is nearest to the one asked for (8 if none is), unless the block has groups of its own."""
    assert group_count(channels, losses, size, own) == expected


def test_patchwise_losses_need_tokens(spec: TaskSpec) -> None:
    with pytest.raises(UsageError, match="tokens"):
        LocalForwardGradient(mlp(spec, 8), spec, LocalForwardGradientConfig(losses="patchwise"))


@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_one_block_and_group_is_the_global_rule(perturb: Any) -> None:
    """The S/1/1 network with the head in the readout's place: the same noise gives the same credit (Ren et al. 2022, Table 3)."""
    spec = TaskSpec(name="mnist-like", input_shape=(1, 28, 28), outputs=10)
    torch.manual_seed(0)
    network = local_mixer(spec, LocalMixerConfig(preset="S/1/1")).double()
    readout: Any = network.blocks["readout"]
    torch.nn.init.normal_(readout[1].weight)
    options: dict[str, Any] = {"perturb": perturb, "tangents": 2}
    whole = ForwardGradient(network, spec, ForwardGradientConfig(**options)).double()
    local = LocalForwardGradient(network, spec, LocalForwardGradientConfig(**options)).double()
    local.heads["b1"].linear.load_state_dict(readout[1].state_dict())  # type: ignore[union-attr]
    batch = batch_for(spec)
    first, second = credit_of(whole, batch, new_step(whole)), credit_of(local, batch, new_step(local))
    assert first.keys() == {name for name in second if not name.startswith("heads")}
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-10, atol=1e-12), name
        assert value.any(), name
