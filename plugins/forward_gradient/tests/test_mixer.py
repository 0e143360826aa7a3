"""The network local-mixer: its sizes, what it computes, the closed forms of its layers, and what its parts depend on."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from bpfree_forward_gradient.mixer import (
    LOCAL_MIXER,
    GroupLinear,
    LocalMixerConfig,
    LocalNorm,
    MeanTokens,
    MixerBlock,
    Patches,
    TokenLinear,
    local_mixer,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from bpfree import Network, UsageError
from bpfree.tasks.task import TaskSpec

MNIST = TaskSpec("mnist", input_shape=(1, 28, 28), outputs=10)
CIFAR = TaskSpec("cifar10", input_shape=(3, 32, 32), outputs=10)
TINY = TaskSpec("tiny", input_shape=(2, 4, 6), outputs=3)
VECTORS = TaskSpec("vectors", input_shape=(7,), outputs=3)


@pytest.fixture
def device() -> torch.device:
    return torch.device(os.environ.get("BPFREE_TEST_DEVICE", "cpu"))


def tiny(device: torch.device, spec: TaskSpec = TINY, seed: int = 0, **options: Any) -> Network:
    """Three blocks of 2x2 patches with 8 channels in 2 groups, in float64, with biases and a readout that are not zero."""
    torch.manual_seed(seed)
    network = local_mixer(spec, LocalMixerConfig(**{"blocks": 3, "patches": 2, "channels": 8, "groups": 2, **options})).double()
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or name.startswith("blocks.readout"):
            nn.init.normal_(parameter, std=0.3)
    return network.to(device)


def draw(*shape: int, device: torch.device, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)


# Sizes


@pytest.mark.parametrize(
    ("preset", "spec", "count"),
    [("S/1/1", MNIST, 271_892), ("M/1/16", MNIST, 429_076), ("M/8/16", CIFAR, 918_770), ("L/8/64", CIFAR, 13_074_674)],
)
def test_presets_have_the_papers_numbers_of_parameters(preset: Any, spec: TaskSpec, count: int) -> None:
    """Oracle: Table 2 of the paper: 272 K, 429 K, 919 K and 13.1 M, with a linear head beside each block."""
    network = local_mixer(spec, LocalMixerConfig(preset=preset))
    channels = network.shapes["b1"][-1]
    heads = len(network.hidden) * (channels + 1) * spec.outputs
    assert sum(parameter.numel() for parameter in network.parameters()) + heads == count


def test_a_preset_can_be_changed() -> None:
    assert LocalMixerConfig(preset="M/8/16").sizes() == (4, 8, 512, 16)
    assert LocalMixerConfig(preset="M/8/16", blocks=2, groups=8).sizes() == (2, 8, 512, 8)


@pytest.mark.parametrize(
    ("spec", "options", "tokens"), [(TINY, {}, 4), (TINY, {"patches": 1}, 1), (VECTORS, {"patches": 1}, 1), (MNIST, {"patches": 7}, 49)]
)
def test_blocks_hand_on_tokens(device: torch.device, spec: TaskSpec, options: dict[str, Any], tokens: int) -> None:
    network = tiny(device, spec, **options)
    assert network.names == ["b1", "b2", "b3", "readout"]
    assert all(network.shapes[name] == (tokens, 8) for name in network.hidden)
    assert all(network.blocks[name].groups == 2 for name in network.hidden)
    assert network(draw(5, *spec.input_shape, device=device)).shape == (5, spec.outputs)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_the_defaults_fit_common_images(shape: tuple[int, ...]) -> None:
    assert isinstance(LOCAL_MIXER.build(TaskSpec("any", shape, 10), LOCAL_MIXER.Config()), Network)


def test_nothing_has_parameters_but_the_linear_maps(device: torch.device) -> None:
    network = tiny(device)
    owners = {name.rpartition(".")[0] for name, _ in network.named_parameters()}
    assert {type(network.get_submodule(owner)) for owner in owners} == {nn.Linear, GroupLinear, TokenLinear}
    assert all(set(dict(network.get_submodule(owner).named_parameters())) == {"weight", "bias"} for owner in owners)


@pytest.mark.parametrize("norm", ["both", "after"])
def test_each_layer_is_called_once(device: torch.device, norm: str) -> None:
    """Oracle: a count by hooks. Other code attaches noise to layers, which needs one call of each."""
    network = tiny(device, norm=norm)
    leaves = [part for part in network.modules() if not list(part.children())]
    calls: list[nn.Module] = []
    for part in leaves:
        part.register_forward_hook(lambda module, args, output: calls.append(module))
    network(draw(2, *TINY.input_shape, device=device))
    assert len(calls) == len(leaves)
    assert set(calls) == set(leaves)
    assert sum(isinstance(part, LocalNorm) for part in leaves) == (4 + 6 + 6 if norm == "both" else 2 + 3 + 3)


# What it computes


def numpy_norm(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / np.sqrt(values.var() + 1e-5)


def reference(network: Network, image: np.ndarray, patches: int, groups: int, both: bool) -> np.ndarray:
    """Scores of one image, entry by entry, from the text of the paper and the released code."""
    parameters = iter([parameter.detach().cpu().numpy() for parameter in network.parameters()])
    before = numpy_norm if both else (lambda values: values)

    def dense(x: np.ndarray) -> np.ndarray:
        weight, bias = next(parameters), next(parameters)
        return np.stack([np.maximum(numpy_norm(weight @ before(token) + bias), 0) for token in x])

    def grouped(x: np.ndarray) -> np.ndarray:
        weight, bias = next(parameters), next(parameters)
        y, width = np.zeros_like(x), x.shape[1] // groups
        for p in range(len(x)):
            for g in range(groups):
                own = slice(g * width, (g + 1) * width)
                y[p, own] = numpy_norm(before(x[p, own]) @ weight[g] + bias[own])
        return y

    def mixed(x: np.ndarray) -> np.ndarray:
        weight, bias = next(parameters), next(parameters)
        source = np.stack([before(token) for token in x])
        y = [sum(weight[q, p] * source[p] for p in range(len(x))) + bias[q] for q in range(len(x))]
        return np.stack([np.maximum(numpy_norm(token), 0) for token in y])

    channels, height, width = image.shape
    h, w = height // patches, width // patches
    cut = [
        [image[c, i * h + a, j * w + b] for a in range(h) for b in range(w) for c in range(channels)]
        for i in range(patches)
        for j in range(patches)
    ]
    x = np.maximum(grouped(dense(np.array(cut))), 0)
    for _ in network.hidden[1:]:
        x = np.maximum(x + grouped(dense(mixed(x))), 0)
    weight, bias = next(parameters), next(parameters)
    return weight @ x.mean(0) + bias


@pytest.mark.parametrize("norm", ["both", "after"])
@pytest.mark.parametrize("patches", [1, 2])
def test_the_network_is_the_papers(device: torch.device, norm: str, patches: int) -> None:
    """Oracle: an implementation in numpy, one image and one entry at a time."""
    network = tiny(device, norm=norm, patches=patches)
    images = draw(4, *TINY.input_shape, device=device)
    expected = np.stack([reference(network, image, patches, groups=2, both=norm == "both") for image in images.cpu().numpy()])
    np.testing.assert_allclose(network(images).detach().cpu().numpy(), expected, rtol=0, atol=1e-12)


def test_a_vector_is_one_patch(device: torch.device) -> None:
    """Oracle: a grey image of one row is the vector of its pixels."""
    image = TaskSpec("row", input_shape=(1, 1, 7), outputs=3)
    x = draw(5, 7, device=device)
    torch.testing.assert_close(tiny(device, VECTORS, patches=1)(x), tiny(device, image, patches=1)(x.view(5, 1, 1, 7)))


def test_the_order_within_patches(device: torch.device) -> None:
    """Oracle: the image's entries numbered as (channel, row, column), and the order written out."""
    image = torch.arange(2 * 2 * 4, device=device).view(1, 2, 2, 4)
    assert Patches(2)(image)[0].tolist() == [[0, 8, 1, 9], [2, 10, 3, 11], [4, 12, 5, 13], [6, 14, 7, 15]]
    assert Patches(1)(image)[0].tolist() == [[0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]]


def test_mean_tokens(device: torch.device) -> None:
    x = draw(3, 4, 5, device=device)
    torch.testing.assert_close(MeanTokens()(x), sum(x[:, p] for p in range(4)) / 4)


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", lambda fan_in: min(2 / fan_in**0.5, 0.1)), ("constant", lambda fan_in: 0.1)])
def test_initial_weights(init: str, deviation: Any) -> None:
    """Oracle: the sample deviation is within 5 standard errors, s / sqrt(2 n), of s."""
    torch.manual_seed(0)
    network = local_mixer(CIFAR, LocalMixerConfig(blocks=2, patches=8, channels=1024, groups=2, init=init))
    layers = {name: part for name, part in network.blocks.named_modules() if hasattr(part, "weight") and "readout" not in name}
    assert [name for name in layers if name.startswith("b2")] == ["b2.layers.token", "b2.layers.channel", "b2.layers.group"]
    for name, layer in layers.items():
        fan_in = {"b1.layers.channel": 48, "b2.layers.token": 64, "b2.layers.channel": 1024}.get(name, 512)
        expected = deviation(fan_in)
        assert abs(layer.weight.std().item() - expected) < 5 * expected / math.sqrt(2 * layer.weight.numel()), name
        assert not layer.bias.any()


def test_scores_are_zero_at_first(device: torch.device) -> None:
    network = local_mixer(TINY, LocalMixerConfig(channels=8)).to(device)
    x = draw(4, *TINY.input_shape, device=device, dtype=torch.float32)
    assert network.features(x).any()
    assert not network(x).any()


# Closed forms


def layers(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """A layer, an input and a signal for each kind; sums of outer products meet several tokens and examples."""
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {
        "groups of tokens": (GroupLinear(3, 12, 12), (5, 4, 12), (5, 4, 12)),
        "groups of vectors": (GroupLinear(2, 4, 6), (5, 4), (5, 6)),
        "one group": (GroupLinear(1, 4, 4), (5, 2, 4), (5, 2, 4)),
        "tokens": (TokenLinear(4), (5, 4, 6), (5, 4, 6)),
        "one token": (TokenLinear(1), (5, 1, 6), (5, 1, 6)),
        "norm": (LocalNorm(), (5, 4, 12), (5, 4, 12)),
        "norm of groups": (LocalNorm(3), (5, 4, 12), (5, 4, 12)),
        "norm of vectors": (LocalNorm(2), (5, 8), (5, 8)),
    }
    result = {}
    for name, (layer, inputs, outputs) in made.items():
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        x, signal = (draw(*shape, device=device, seed=seed, dtype=dtype) for seed, shape in enumerate((inputs, outputs)))
        result[name] = layer.to(device, dtype), 3 * x + 1, signal
    return result


KINDS = list(layers(torch.device("cpu"), torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_closed_forms_are_the_gradients(device: torch.device, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Oracle: autograd in float64. The closed forms make no graph, and leave input and signal as they were."""
    layer, x, signal = layers(device, dtype)[kind]
    kept = x.clone(), signal.clone()
    made = {"input": layer.input_gradient(x.requires_grad_(), signal)}
    if list(layer.parameters()):
        made |= layer.parameter_gradients(x, signal)
    exact = layer.double()
    wanted = {"input": x.detach().double().requires_grad_(), **dict(exact.named_parameters())}
    expected = torch.autograd.grad(exact(wanted["input"]), list(wanted.values()), signal.double())
    assert set(made) == set(wanted)
    for (name, parameter), gradient in zip(wanted.items(), expected, strict=True):
        assert made[name].shape == parameter.shape
        assert made[name].dtype == dtype
        assert not made[name].requires_grad
        torch.testing.assert_close(made[name].double(), gradient, rtol=0, atol=tolerance)
    assert torch.equal(x, kept[0])
    assert torch.equal(signal, kept[1])


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_take_strided_tensors(device: torch.device, kind: str) -> None:
    """Oracle: the same numbers in contiguous memory."""
    layer, x, signal = layers(device, torch.float64)[kind]
    strided = [torch.stack([t, -t], -1)[..., 0] for t in (x, signal)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(layer(strided[0]), layer(x))
    torch.testing.assert_close(layer.input_gradient(*strided), layer.input_gradient(x, signal))
    if list(layer.parameters()):
        torch.testing.assert_close(layer.parameter_gradients(*strided), layer.parameter_gradients(x, signal))


def test_what_a_normalisation_removes(device: torch.device) -> None:
    """Oracle: adding to a group, or scaling it, changes nothing, so the cotangent is orthogonal to both (up to eps)."""
    x, signal = draw(5, 4, 12, device=device, seed=1), draw(5, 4, 12, device=device, seed=2)
    gradient, parts = (t.view(5, 4, 3, 4) for t in (LocalNorm(3, eps=0).input_gradient(x, signal), x))
    assert gradient.abs().max() > 0.1
    assert gradient.sum(-1).abs().max() < 1e-12
    assert (gradient * parts).sum(-1).abs().max() < 1e-12
    assert LocalNorm.normalises


@pytest.mark.parametrize("norm", ["both", "after"])
@pytest.mark.parametrize("name", ["b1", "b2", "readout"])
def test_forward_mode_agrees_with_reverse_mode(device: torch.device, norm: str, name: str) -> None:
    """Oracle: <u, J t> = <J^T u, t> for directions of the input and of all parameters at once."""
    network = tiny(device, norm=norm)
    block = network.blocks[name]
    index = network.names.index(name)
    shape = TINY.input_shape if index == 0 else network.shapes[network.names[index - 1]]
    primals = {"": draw(6, *shape, device=device), **{key: value.detach() for key, value in block.named_parameters()}}
    tangents = {key: draw(*value.shape, device=device, seed=seed) for seed, (key, value) in enumerate(primals.items())}

    def run(values: dict[str, Tensor]) -> Tensor:
        inputs = values.pop("")
        output: Tensor = functional_call(block, values, inputs)
        return output

    with torch.no_grad(), forward_ad.dual_level():
        moved = forward_ad.unpack_dual(run({key: forward_ad.make_dual(value, tangents[key]) for key, value in primals.items()})).tangent
    sources = {key: value.clone().requires_grad_() for key, value in primals.items()}
    output = run(dict(sources))
    direction = draw(*output.shape, device=device, seed=99)
    gradients = torch.autograd.grad(output, list(sources.values()), direction)
    expected = sum((gradient * tangent).sum() for gradient, tangent in zip(gradients, tangents.values(), strict=True))
    assert moved is not None
    torch.testing.assert_close((moved * direction).sum(), expected, rtol=1e-10, atol=1e-10)


# What depends on what


def tail(block: nn.Module, first: str) -> nn.Sequential:
    """The layers of a block from ``first`` on."""
    assert isinstance(block, MixerBlock)
    named = list(block.layers.named_children())
    start = [name for name, _ in named].index(first)
    return nn.Sequential(*(layer for _, layer in named[start:]))


@pytest.mark.parametrize(("name", "first"), [("b1", "channel_before"), ("b2", "channel_before")])
def test_patches_do_not_meet_after_the_token_mixing(device: torch.device, name: str, first: str) -> None:
    """Oracle: an intervention on one patch changes the output there, and nowhere else."""
    network = tiny(device)
    part = tail(network.blocks[name], first)
    x = draw(5, 4, 12 if name == "b1" else 8, device=device)
    other = x.clone()
    other[:, 2] = draw(*x[:, 2].shape, device=device, seed=7)
    changed = (part(x) != part(other)).any(2)
    assert changed.tolist() == [[False, False, True, False]] * 5


def test_the_token_mixing_mixes_patches_and_no_channels(device: torch.device) -> None:
    """Oracle: an intervention on one channel of one patch changes that channel in all patches."""
    layer = tiny(device).get_submodule("blocks.b2.layers.token")
    x = draw(5, 4, 8, device=device)
    other = x.clone()
    other[:, 2, 3] += 1
    assert torch.equal((layer(x) != layer(other)).any(0), torch.arange(8, device=device).expand(4, 8) == 3)


@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize("first", ["group_before", "group"])
def test_groups_do_not_meet_after_the_channel_mixing(device: torch.device, name: str, first: str) -> None:
    """Oracle: an intervention on one group of one patch changes the output there, and nowhere else."""
    part = tail(tiny(device, groups=4).blocks[name], first)
    x = draw(5, 4, 8, device=device)
    other = x.clone()
    other[:, 2, 4:6] += draw(5, 2, device=device, seed=7)
    changed = (part(x) != part(other)).view(5, 4, 4, 2).any(3).any(0)
    assert changed.nonzero().tolist() == [[2, 2]]


# Requests that cannot be carried out


@pytest.mark.parametrize(
    ("spec", "options", "what", "fix"),
    [
        (VECTORS, {"patches": 2}, "needs images", "set network.patches=1, which takes a vector as one patch"),
        (TaskSpec("series", (5, 8), 3), {"patches": 1}, "needs images", "use network=mlp"),
        (MNIST, {"patches": 8}, "8 patches per side do not divide", "one of 1, 2, 4, 7, 14"),
        (MNIST, {"patches": 8, "norm": "after"}, "8 patches per side do not divide", "one of 1, 2, 4, 7, 14, 28"),
        (MNIST, {"preset": "M/8/16"}, "8 patches per side do not divide", "one of 1, 2, 4, 7, 14"),
        (TINY, {"patches": 4}, "do not divide the image", "one of 1, 2"),
        (MNIST, {"patches": 28}, "patches of one value", "one of 1, 2, 4, 7, 14"),
        (TINY, {"channels": 12, "groups": 5}, "5 groups do not divide 12", "one of 1, 2, 3, 4, 6"),
        (TINY, {"channels": 12, "groups": 12}, "groups of two or more", "one of 1, 2, 3, 4, 6"),
    ],
)
def test_refusals_name_what_is_valid(spec: TaskSpec, options: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        local_mixer(spec, LocalMixerConfig(**{"patches": 2, **options} if "preset" not in options else options))
    assert what in caught.value.what
    assert caught.value.fix.endswith(fix)


def test_a_group_linear_map_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(UsageError, match="3 groups do not divide 12 and 8"):
        GroupLinear(3, 12, 8)
