"""Directional derivatives by forward mode. Oracle unless a test names another: reverse mode, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from bpfree import UsageError
from bpfree.network.forward_mode import Products
from bpfree.network.perturb import PerturbedPass, Perturber, frozen_statistics, mixes_by_batch_norm
from bpfree.network.sites import Site, find_sites

N, K = 4, 3
TIGHT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-11}


class Residual(nn.Module):
    """Two normalised maps around which the input is added in place, as torchvision's blocks do."""

    def __init__(self, norm: Callable[[], nn.Module], inplace: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.norm1, self.norm2, self.relu = norm(), norm(), nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.relu(self.norm1(self.first(x)))))
        y += self.shortcut(x)
        return self.relu(y)  # type: ignore[no-any-return]


class InPlace(nn.Module):
    """What follows a site overwrites it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x), inplace=True)
        z = self.b(y)
        z += y
        z.mul_(2).sigmoid_()
        return self.c(z)  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 3), (6,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (6,)),
    "overwriting": (InPlace, (6,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (7, 6)),
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.GroupNorm(2, 4), nn.ReLU(True), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 3, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
        ),
        (2, 4, 4),
    ),
    "residual": (lambda: nn.Sequential(nn.Linear(6, 5), Residual(lambda: nn.LayerNorm(5)), nn.Linear(5, 3)), (6,)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 5), Residual(lambda: nn.BatchNorm1d(5)), nn.Linear(5, 3)), (6,)),
    "batch norm, eval": (lambda: nn.Sequential(nn.Linear(6, 5), Residual(lambda: nn.BatchNorm1d(5)), nn.Linear(5, 3)).eval(), (6,)),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        (2, 4, 4),
    ),
}


def prepared(name: str, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, list[Site]]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    module = make().to(device, dtype)
    x = torch.randn(N, *shape, device=device, dtype=dtype)
    return module, x, list(find_sites(module, x, final=False).sites)


def draw_noise(sites: Sequence[Site], device: torch.device, k: int = K, n: int = N, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(k, n, *site.shape, device=device, dtype=dtype) for site in sites]


def draw_weights(module: nn.Module, k: int = K) -> dict[str, Tensor]:
    return {name: torch.randn(k, *value.shape, device=value.device, dtype=value.dtype) for name, value in module.named_parameters()}


def shifted(module: nn.Module, sites: Sequence[Site], shifts: Sequence[Tensor], x: Tensor) -> Tensor:
    """A plain execution with something added at each site, by hooks of the test's own."""
    parts, handles, calls = dict(module.named_modules()), [], [0] * len(sites)

    def behind(index: int) -> Callable[..., Any]:
        return lambda part, args, output: output + shifts[index]

    def before(index: int) -> Callable[..., Any]:
        def hook(part: nn.Module, args: tuple[Tensor]) -> Any:
            calls[index] += 1
            return (args[0] + shifts[index],) if calls[index] == sites[index].call + 1 else None

        return hook

    for index, site in enumerate(sites):
        part = parts[site.module]
        handles.append(part.register_forward_pre_hook(before(index)) if site.before else part.register_forward_hook(behind(index)))
    try:
        return module(x)  # type: ignore[no-any-return]
    finally:
        for handle in handles:
            handle.remove()


def reverse(module: nn.Module, x: Tensor, sites: Sequence[Site], noise: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """(K, N, ...) row by row of the Jacobian: d output_i / d (shifts, parameters) times the directions."""
    module = copy.deepcopy(module)
    members = [module.get_parameter(name) for name in weights]
    shifts = [torch.zeros(len(x), *site.shape, dtype=x.dtype, device=x.device, requires_grad=True) for site in sites]
    output = shifted(module, sites, shifts, x)
    k = len(next(iter([*noise, *weights.values()])))
    rows = []
    for entry in output.flatten():
        parts = torch.autograd.grad(entry, [*shifts, *members], retain_graph=True, allow_unused=True)
        moves = [*(n.expand(k, *s.shape) for n, s in zip(noise, shifts, strict=True)), *weights.values()]
        rows.append(sum((g * move).flatten(1).sum(1) for g, move in zip(parts, moves, strict=True) if g is not None))
    return torch.stack(rows, 1).unflatten(1, output.shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["sites", "weights", "both"])
@pytest.mark.parametrize("name", NETWORKS)
def test_tangents_are_products_with_the_jacobian(name: str, what: str, device: torch.device) -> None:
    module, x, sites = prepared(name, device)
    sites = sites if what != "weights" else []
    noise, weights = draw_noise(sites, device), draw_weights(module) if what != "sites" else {}
    expected = reverse(module, x, sites, noise, weights)
    plain = copy.deepcopy(module)(x).detach()
    perturber = Perturber(module)
    for options in ({"together": True}, {"together": False}):
        for mask in (True, False):
            found = perturber.execute(x, sites, noise, weights, mask=mask, **options)
            torch.testing.assert_close(found.tangent, expected, **TIGHT)
            torch.testing.assert_close(found.output, plain, **TIGHT)
    for k in range(K):
        alone = perturber.execute(x, sites, [n[k : k + 1] for n in noise], {key: value[k : k + 1] for key, value in weights.items()})
        torch.testing.assert_close(alone.tangent, expected[k : k + 1], **TIGHT)


@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_noise_that_was_used(name: str, k: int, device: torch.device) -> None:
    """Zero where a ReLU is inactive, else what was given, which stays as it was. Oracle: the value at the site, by a plain execution."""
    module, x, sites = prepared(name, device)
    noise = draw_noise(sites, device, k)
    given = [n.clone() for n in noise]
    values: dict[int, Tensor] = {}

    for index, site in enumerate(sites):
        zeros = [torch.zeros((), dtype=x.dtype, device=x.device) for _ in sites]
        parts = copy.deepcopy(module)
        part, seen = dict(parts.named_modules())[site.module], []
        if site.before:
            part.register_forward_pre_hook(lambda part, args, seen=seen: seen.append(args[0].detach().clone()))
        else:
            part.register_forward_hook(lambda part, args, output, seen=seen: seen.append(output.detach().clone()))
        shifted(parts, sites, zeros, x)
        values[index] = seen[site.call]
    for together in (True, False):
        for mask in (True, False):
            used = Perturber(module).execute(x, sites, noise, mask=mask, together=together).noise
            for index, site in enumerate(sites):
                active = (values[index] > 0) if mask and site.masked else torch.ones((), device=device)
                torch.testing.assert_close(used[index], given[index] * active, rtol=0, atol=0)
            torch.testing.assert_close(noise, given, rtol=0, atol=0)
    assert len(sites) > 1 or name in ("linear", "instance norm")


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("k", [1, K])
def test_noise_that_all_examples_share(k: int, together: bool, device: torch.device) -> None:
    """Oracle: the same noise written out for each example."""
    module, x, sites = prepared("residual", device)
    noise = draw_noise(sites, device, k, 1)
    shared = Perturber(module).execute(x, sites, noise, together=together)
    written = Perturber(module).execute(x, sites, [n.repeat(1, N, *[1] * (n.dim() - 2)) for n in noise], together=together)
    torch.testing.assert_close(shared.tangent, written.tangent, **TIGHT)
    for one, other in zip(shared.noise, written.noise, strict=True):
        torch.testing.assert_close(one.expand_as(other), other, rtol=0, atol=0)


@pytest.mark.parametrize("k", [0, 1, K])
@pytest.mark.parametrize("name", ["mlp", "layer norm", "convolutions", "residual", "batch norm"])
def test_recorded_inputs(name: str, k: int, device: torch.device) -> None:
    """Oracle: hooks in a plain execution; values of before anything was overwritten."""
    module, x, sites = prepared(name, device)
    paths = [path for path, part in module.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm1d))]
    expected: dict[str, Tensor] = {}
    reference = copy.deepcopy(module)
    for path in paths:
        reference.get_submodule(path).register_forward_pre_hook(lambda part, args, path=path: expected.update({path: args[0].clone()}))
    with torch.no_grad():
        reference(x)
    for together in (True, False):
        noise = draw_noise(sites, device, k) if k else []
        found = Perturber(copy.deepcopy(module)).execute(x, sites if k else [], noise, record=paths, together=together)
        torch.testing.assert_close(found.inputs, expected, **TIGHT)
        assert (found.tangent is None) == (k == 0)


@pytest.mark.parametrize("k", [1, K])
def test_each_example_can_have_weights_of_its_own(k: int, device: torch.device) -> None:
    """Oracle: one example at a time."""
    for name in ("mlp", "convolutions", "batch norm, eval"):
        module, x, _ = prepared(name, device)
        weights = {
            key: torch.randn(k, N, *value.shape, device=device, dtype=value.dtype) for key, value in list(module.named_parameters())[1:]
        }
        perturber = Perturber(module)
        record = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
        found = perturber.execute_per_example(x, weights, record=record)
        assert found.tangent is not None
        for n in range(N):
            moves = {key: value[:, n] for key, value in weights.items()}
            alone = perturber.execute(x[n : n + 1], weights=moves, record=record)
            torch.testing.assert_close(found.tangent[:, n : n + 1], alone.tangent, **TIGHT)
        whole = perturber.execute(x, record=record)
        torch.testing.assert_close((found.output, found.inputs), (whole.output, whole.inputs), **TIGHT)
    module, x, _ = prepared("batch norm", device)
    with pytest.raises(UsageError, match="no derivative per example"):
        Perturber(module).execute_per_example(x, {})


def test_directions_of_examples_share_their_dropout(device: torch.device) -> None:
    """Oracle: equal directions give equal derivatives; examples have masks of their own, of dropout with probability 1/2."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5)).to(device).double()
    x = torch.randn(1, 6, device=device, dtype=torch.float64).repeat(N, 1)
    weights = {name: torch.randn_like(value).expand(K, N, *value.shape) for name, value in module.named_parameters()}
    found = Perturber(module).execute_per_example(x, weights)
    assert found.tangent is not None
    torch.testing.assert_close(found.tangent, found.tangent[:1].expand_as(found.tangent), **TIGHT)
    assert torch.equal(found.tangent[0] == 0, found.output == 0)
    assert len({tuple(row) for row in (found.output == 0).tolist()}) == N


# --- side effects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("k", [0, 1, K])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}])
def test_running_statistics_follow_once(options: dict[str, Any], k: int, together: bool, device: torch.device) -> None:
    """Oracle: a plain forward pass, twice."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, **options), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5)).to(device).double()
    plain = copy.deepcopy(module)
    sites = find_sites(module, torch.zeros(N, 6, device=device, dtype=torch.float64)).sites
    perturber = Perturber(module)
    for _ in range(2):
        x = torch.randn(N, 6, device=device, dtype=torch.float64)
        found = perturber.execute(x, sites if k else (), draw_noise(sites, device, k) if k else (), together=together)
        torch.testing.assert_close(found.output, plain(x).detach(), **TIGHT)
        torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()), **TIGHT)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("k", [1, K])
def test_all_directions_meet_the_dropout_of_a_plain_execution(k: int, together: bool, norm: bool, device: torch.device) -> None:
    """Oracles: plain execution from the same random state, and linearity: equal directions give equal derivatives."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(50)] if norm else []
    module = nn.Sequential(nn.Linear(6, 50), *norms, nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 3)).to(device).double()
    x = torch.randn(N, 6, device=device, dtype=torch.float64)
    sites = find_sites(module, x).sites
    noise = [n[:1].expand(k, *n.shape[1:]) for n in draw_noise(sites, device, 1)]
    torch.manual_seed(1)
    expected = module(x).detach()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    found = Perturber(module).execute(x, sites, noise, together=together)
    assert found.tangent is not None
    torch.testing.assert_close(found.output, expected, **TIGHT)
    torch.testing.assert_close(found.tangent, found.tangent[:1].expand_as(found.tangent), **TIGHT)
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(1)
    torch.testing.assert_close(found.tangent[:1], reverse(module, x, sites, [n[:1] for n in noise], {}), **TIGHT)


def test_no_graph_is_made(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: reverse mode raises."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("reverse mode")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", refuse)
    module, x, sites = prepared("residual", device)
    record = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)][1:]
    for k in (1, K):
        for together in (True, False):
            for weights in ({}, draw_weights(module, k)):
                found = Perturber(module).execute(x, sites, draw_noise(sites, device, k), weights, record=record, together=together)
                assert found.tangent is not None
                tensors = [found.output, found.tangent, *found.inputs.values(), *found.noise]
                assert not any(tensor.requires_grad for tensor in tensors)
        each = {key: value.unsqueeze(1).repeat(1, N, *[1] * (value.dim() - 1)) for key, value in draw_weights(module, k).items()}
        found = Perturber(module).execute_per_example(x, each)
        assert not found.output.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError


@pytest.mark.parametrize("k", [0, 1, K])
def test_hooks_and_modes_are_removed_after_an_error(k: int, device: torch.device) -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).to(device)
    x = torch.randn(N, 6, device=device)
    sites = find_sites(module, x).sites
    module.append(Failing())
    noise = draw_noise(sites, device, k, dtype=torch.float32) if k else []
    for frozen in (False, True):
        with pytest.raises(ArithmeticError), frozen_statistics(module, x) if frozen else nullcontext():
            Perturber(module).execute(x, sites if k else [], noise, record=["0"])
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
        assert module[1].training
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_direction_that_reaches_nothing_has_a_zero_derivative(device: torch.device) -> None:
    module = nn.Sequential(nn.Linear(6, 3))
    module.unused = nn.Linear(2, 2)
    module.forward = lambda x: module[0](x)  # type: ignore[method-assign]
    module, x = module.to(device), torch.randn(N, 6, device=device)
    for k in (1, K):
        for together in (True, False):
            found = Perturber(module).execute(x, weights={"unused.weight": torch.randn(k, 2, 2, device=device)}, together=together)
            torch.testing.assert_close(found.tangent, torch.zeros(k, N, 3, device=device))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "residual", "batch norm"])
def test_autocast(name: str, k: int, together: bool, device: torch.device) -> None:
    """Oracle: single precision, within the precision of bfloat16; the same context is used twice, because it caches weights."""
    module, x, sites = prepared(name, device, torch.float32)
    noise, weights = draw_noise(sites, device, k, dtype=torch.float32), draw_weights(module, k)
    perturber = Perturber(module)
    exact = [perturber.execute(x, sites, noise, w, together=together, mask=False) for w in ({}, weights)]
    with torch.autocast(device.type, torch.bfloat16):
        found = [perturber.execute(x, sites, noise, w, together=together, mask=False) for w in ({}, weights)]
        assert module(x).dtype == found[0].output.dtype
        each = {key: value.unsqueeze(1).repeat(1, N, *[1] * (value.dim() - 1)) for key, value in weights.items()}
        if name != "batch norm":
            own = perturber.execute_per_example(x, each)
            assert torch.linalg.vector_norm(own.output.float() - exact[0].output) < 0.05 * torch.linalg.vector_norm(exact[0].output)
    for one, other in zip(found, exact, strict=True):
        assert one.tangent is not None
        assert other.tangent is not None
        assert torch.cosine_similarity(one.tangent.float().flatten(), other.tangent.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("k", [1, K])
def test_channels_last_inputs(k: int, together: bool, device: torch.device) -> None:
    """Oracle: the same in the usual layout. Without group norm, whose forward mode in torch 2.6 does not take this layout."""
    module, x, _ = prepared("convolutions", device)
    module[1] = nn.BatchNorm2d(4).to(x).eval()
    sites = find_sites(module, x, final=False).sites
    noise, weights = draw_noise(sites, device, k), draw_weights(module, k)
    expected = Perturber(module).execute(x, sites, noise, weights, together=together)
    x = x.contiguous(memory_format=torch.channels_last)
    found = Perturber(module.to(memory_format=torch.channels_last)).execute(x, sites, noise, weights, together=together)
    assert found.tangent is not None
    torch.testing.assert_close((found.output, found.tangent, found.noise), (expected.output, expected.tangent, expected.noise), **TIGHT)


@pytest.mark.parametrize("together", [True, False])
def test_attention_in_eval_mode(together: bool, device: torch.device) -> None:
    """torch's fast path for inference knows no derivatives."""

    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x)[0]

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), Attention(8, 2, batch_first=True)).to(device).double().eval()
    x = torch.randn(N, 5, 8, dtype=torch.float64, device=device)
    sites = find_sites(module, x).sites
    for k in (1, K):
        noise = draw_noise(sites, device, k)
        tangent = Perturber(module).execute(x, sites, noise, together=together).tangent
        torch.testing.assert_close(tangent, reverse(module, x, sites, noise, {}), **TIGHT)


# --- frozen statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 2)])
def test_frozen_statistics_follow_as_in_train_mode(shape: tuple[int, ...], momentum: float | None, device: torch.device) -> None:
    """Oracle: torch's own train mode; the output is that of eval mode afterwards."""
    torch.manual_seed(0)
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)]
    module: nn.Module = kind(6, momentum=momentum).to(device).double()
    plain = copy.deepcopy(module)
    for _ in range(3):
        x = torch.randn(N, *shape, device=device, dtype=torch.float64) + 1
        plain.train()(x)
        with frozen_statistics(module, x):
            assert not mixes_by_batch_norm(module)
            output = module(x)
        assert module.training
        torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(output, plain.eval()(x), **TIGHT)


def test_frozen_statistics_in_depth(device: torch.device) -> None:
    """The second norm sees what the frozen first one makes, and the dropout of the execution that follows. Oracle: by hand."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.BatchNorm1d(6).eval(), nn.BatchNorm1d(6, affine=False))
    module[4] = nn.BatchNorm1d(6, track_running_stats=False)
    module.to(device)
    x = torch.randn(N, 6, device=device) + 1
    torch.manual_seed(1)
    random = torch.get_rng_state()
    with frozen_statistics(module, x):
        assert torch.equal(torch.get_rng_state(), random)
        assert mixes_by_batch_norm(module)  # the last one has no statistics to use
        module(x)
    first = copy.deepcopy(module[0])
    torch.manual_seed(1)
    middle = module[1](first.eval()(x))
    for part, value in ((module[0], x), (module[2], middle)):
        torch.testing.assert_close(part.running_mean, 0.1 * value.mean(0))
        torch.testing.assert_close(part.running_var, 0.9 + 0.1 * value.var(0))
        assert part.num_batches_tracked == 1
    assert module[3].num_batches_tracked == 0
    assert [part.training for part in module] == [True, True, True, False, True]


def test_frozen_statistics_can_stay_as_they_are(device: torch.device) -> None:
    module = nn.Sequential(nn.BatchNorm1d(6)).to(device)
    before = {name: value.clone() for name, value in module.named_buffers()}
    for x in (None, torch.randn(1, 6, device=device)):  # of a single value per channel there is no variance
        with frozen_statistics(module, x):
            assert not module[0].training
        torch.testing.assert_close(dict(module.named_buffers()), before, rtol=0, atol=0)
    with pytest.raises(KeyError), frozen_statistics(module, None):
        raise KeyError
    assert module[0].training


# --- linear maps, term by term ------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "linear": (F.linear, (4, 5, 3), (2, 3), {}),
    "conv1d": (F.conv1d, (4, 2, 6), (4, 1, 3), {"stride": 2, "groups": 2}),
    "conv2d": (F.conv2d, (4, 3, 5, 5), (2, 3, 3, 2), {"padding": (1, 0), "dilation": (1, 2)}),
    "conv2d, same": (torch.conv2d, (4, 3, 5, 5), (2, 3, 3, 3), {"padding": "same"}),
    "conv3d": (F.conv3d, (2, 2, 4, 4, 3), (3, 2, 2, 2, 2), {"padding": 1}),
}


@pytest.mark.parametrize("moving", range(1, 8))
@pytest.mark.parametrize("name", CALLS)
def test_products_equal_torch_s_own(name: str, moving: int, device: torch.device) -> None:
    """Oracle: torch's forward mode, for each set of moving operands, and each way to call."""
    function, shape, weight_shape, options = CALLS[name]
    torch.manual_seed(0)
    shapes = [shape, weight_shape, weight_shape[:1]]
    values = [torch.randn(s, dtype=torch.float64, device=device) for s in shapes]
    chosen = [index for index in range(3) if moving >> index & 1]
    moves = tuple(torch.randn_like(values[index]) for index in chosen)
    positional = [options[key] for key in options] if list(options) == ["stride"] or list(options) == ["padding"] else None
    stride = [1] if positional and "padding" in options else []
    ways: list[Callable[..., Tensor]] = [
        lambda x, w, b: function(x, w, b, **options),
        lambda x, w, b: function(x, w, bias=b, **options),
        lambda x, w, b: function(input=x, weight=w, bias=b, **options),
        lambda x, w, b: function(x, bias=b, weight=w, **options),
    ]
    if positional:
        ways.append(lambda x, w, b: function(x, w, b, *stride, *positional))
    if 2 not in chosen:
        ways += [lambda x, w, b: function(x, w, **options), lambda x, w, b: function(x, w, None, **options)]
    for way in ways:

        def run(*moved: Tensor, way: Callable[..., Tensor] = way) -> Tensor:
            operands = list(values)
            for index, value in zip(chosen, moved, strict=True):
                operands[index] = value
            return way(*operands)

        still = tuple(values[index] for index in chosen)
        expected = jvp(run, still, moves)
        with Products():
            found = jvp(run, still, moves)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_execution_is_a_plain_one_without_directions(device: torch.device) -> None:
    module, x, _ = prepared("mlp", device)
    found = Perturber(module).execute(x)
    assert isinstance(found, PerturbedPass)
    assert found.tangent is None
    assert not found.output.requires_grad
    torch.testing.assert_close(found.output, functional_call(module, dict(module.named_parameters()), (x,)).detach())


class Recurrent(nn.Module):
    """On a CPU in single precision torch takes oneDNN's LSTM, which has no derivative by forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(5, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(self.first(x))[0][:, -1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("directions", [1, 3])
def test_an_lstm_has_a_derivative_in_single_precision_too(directions: int) -> None:
    """Oracle: reverse mode in float64, on the same weights."""
    torch.manual_seed(0)
    module, x = Recurrent(), torch.randn(N, 6, 5)
    noise = [torch.randn(directions, N, 6, 4)]
    site = next(site for site in find_sites(module, x).sites if site.module == "first")
    enabled = torch._C._get_mkldnn_enabled()
    result = Perturber(module).execute(x, [site], noise)
    assert torch._C._get_mkldnn_enabled() == enabled
    exact = copy.deepcopy(module).double()
    hidden = exact.first(x.double())
    for k in range(directions):
        _, expected = torch.autograd.functional.jvp(lambda h: exact.last(exact.lstm(h)[0][:, -1]), hidden, noise[0][k].double())
        assert result.tangent is not None
        torch.testing.assert_close(result.tangent[k].double(), expected, rtol=1e-4, atol=1e-5)
