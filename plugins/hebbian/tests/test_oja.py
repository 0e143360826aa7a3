"""Oja and Sanger against the eigenvectors of a known spectrum, and against literal loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_hebbian.base import HebbianConfig
from bpfree_hebbian.oja import Oja, Sanger
from reference import patches, updates
from torch import Tensor, nn

from bpfree import Batch, Network, TaskSpec, new_step

FLAT = TaskSpec("flat", (12,), 3)
IMAGE = TaskSpec("image", (2, 6, 5), 3)


def dense_network(units: int = 4) -> Network:
    blocks = {"b1": nn.Linear(12, units, bias=False), "readout": nn.Linear(units, 3)}
    return Network(blocks, input_shape=(12,), readout="readout").double()


def image_network() -> Network:
    blocks = {
        "b1": nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2, 4, 3, bias=False), nn.ReLU()),
        "readout": nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 5, 3)),
    }
    return Network(blocks, input_shape=(2, 6, 5), readout="readout").double()


def rule_of(kind: type[Oja], network: Network, spec: TaskSpec, **options: Any) -> Oja:
    return kind(network, spec, HebbianConfig(**options)).double()


def batch_of(shape: tuple[int, ...], count: int) -> Batch:
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Batch(x, torch.zeros(count, dtype=torch.long))


def literal_increment(inputs: list[Tensor], weight: Tensor, ordered: bool) -> Tensor:
    """Sum over inputs of y_k (x - sum_j y_j w_j), j over all units, or those up to k: Sanger's equation 1989, one entry at a time."""
    total = torch.zeros_like(weight)
    for x in inputs:
        y = [float((row * x).sum()) for row in weight]
        for k in range(len(weight)):
            before = range(k + 1) if ordered else range(len(weight))
            explained = torch.zeros_like(x)
            for j in before:
                explained += y[j] * weight[j]
            total[k] += y[k] * (x - explained)
    return total


SPECTRUM = torch.tensor([8, 4, 2, 1] + [0.1] * 8, dtype=torch.float64)
SPECTRUM *= 12 / SPECTRUM.sum()  # the mean squared length of an input, as of normalised ones


def known_spectrum(steps: int) -> tuple[Tensor, list[Batch]]:
    """Eigenvectors as columns, in order, and batches of 16 Gaussian examples whose covariance they and SPECTRUM make."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    x = torch.randn(steps * 16, 12, generator=generator, dtype=torch.float64) * SPECTRUM.sqrt() @ basis.T
    return basis, [Batch(part, torch.zeros(16, dtype=torch.long)) for part in x.split(16)]


def test_one_unit_becomes_the_first_principal_component() -> None:
    """Oracle: the leading eigenvector of the covariance that the data are drawn with, up to its sign; unit length."""
    basis, batches = known_spectrum(1500)
    torch.manual_seed(0)
    rule = rule_of(Oja, dense_network(1), FLAT, lr=[0.02])
    updates(rule, batches)
    w = rule.layers["b1"].weight.detach()[0]
    assert abs(float(w @ basis[:, 0])) >= 0.999
    assert float(w.norm()) == pytest.approx(1, abs=0.01)


def test_oja_spans_the_principal_subspace() -> None:
    """Oracle: the cosines of the angles between row space and leading eigenvectors are the singular values of W V."""
    basis, batches = known_spectrum(1500)
    torch.manual_seed(0)
    rule = rule_of(Oja, dense_network(4), FLAT, lr=[0.02])
    updates(rule, batches)
    w = rule.layers["b1"].weight.detach()
    assert float(torch.linalg.svdvals(w @ basis[:, :4]).min()) >= 0.999
    torch.testing.assert_close(w @ w.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=0.01)


def test_sanger_finds_the_principal_components_in_order() -> None:
    """Oracle: torch.linalg.eigh of the second moments of the data."""
    _, batches = known_spectrum(1500)
    torch.manual_seed(0)
    rule = rule_of(Sanger, dense_network(4), FLAT, lr=[0.02])
    updates(rule, batches)
    x = torch.cat([batch.inputs for batch in batches])
    vectors = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors.flip(1)[:, :4]
    w = rule.layers["b1"].weight.detach()
    assert float((F.normalize(w, dim=1) @ vectors).diag().abs().min()) >= 0.999
    torch.testing.assert_close(w.norm(dim=1), torch.ones(4, dtype=torch.float64), rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", [Oja, Sanger])
def test_a_dense_step_is_the_literal_one(kind: type[Oja]) -> None:
    """Oracle: loops over examples and units; the step is the mean over examples."""
    torch.manual_seed(0)
    rule, batch = rule_of(kind, dense_network(), FLAT, lr=[0.03], radius=2.0), batch_of((12,), 6)
    before = rule.layers["b1"].weight.detach().clone()
    expected = before + 0.03 * literal_increment(list(batch.inputs), before, kind is Sanger) / 6
    updates(rule, [batch])
    torch.testing.assert_close(rule.layers["b1"].weight.detach(), expected, rtol=1e-12, atol=1e-14)


def test_the_default_rates_and_weights_are_within_their_bounds() -> None:
    """Oracles: 1 / mean |x|^2 or its bound, by hand; singular values below sqrt(2), where the largest rate is still stable."""
    blocks = {"b1": nn.Conv2d(2, 4, 3), "b2": nn.Conv2d(4, 5, 2), "b3": nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 6, 2))}
    network = Network({**blocks, "readout": nn.Sequential(nn.Flatten(), nn.Linear(12, 3))}, input_shape=(2, 6, 5), readout="readout")
    rule = Oja(network, IMAGE)
    assert list(rule.rates.values()) == pytest.approx([1 / (2 * 9), 1 / (4 * 18), 1 / (5 * 4)])
    rule = Oja(Network({"b1": nn.Linear(200, 200), "readout": nn.Linear(200, 3)}, input_shape=(200,), readout="readout"), FLAT)
    assert 1.3 < float(torch.linalg.svdvals(rule.layers["b1"].weight.detach()).max()) < 2**0.5


def test_the_metric_is_the_distance_from_orthonormal_rows() -> None:
    """Oracle: root mean square of the entries of W W' - 1, one by one."""
    rule = rule_of(Oja, dense_network(), FLAT)
    w = rule.layers["b1"].weight.detach()
    metrics = rule.credit(batch_of((12,), 6), new_step(rule))
    entries = [(float(a @ b) - (i == j)) ** 2 for i, a in enumerate(w) for j, b in enumerate(w)]
    assert float(metrics["b1/off_orthonormal"]) == pytest.approx((sum(entries) / len(entries)) ** 0.5)


@pytest.mark.parametrize("kind", [Oja, Sanger])
def test_a_convolution_learns_as_a_dense_layer_on_its_patches(kind: type[Oja]) -> None:
    """Oracle: the same loops over windows; the mean over examples and positions."""
    torch.manual_seed(0)
    rule, batch = rule_of(kind, image_network(), IMAGE, lr=[0.03], radius=2.0), batch_of((2, 6, 5), 3)
    before = rule.layers["b1"].weight.detach().clone()
    padded = F.pad(batch.inputs, (1, 1, 1, 1), mode="reflect")
    windows = [window for image in padded for window in patches(image, 3)]
    expected = before + 0.03 * literal_increment(windows, before, kind is Sanger) / len(windows)
    updates(rule, [batch])
    torch.testing.assert_close(rule.layers["b1"].weight.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [Oja, Sanger])
@pytest.mark.parametrize(("network", "spec", "shape"), [(dense_network, FLAT, (12,)), (image_network, IMAGE, (2, 6, 5))])
def test_accumulated_batches_are_the_large_batch(kind: type[Oja], network: Any, spec: TaskSpec, shape: tuple[int, ...]) -> None:
    """Oracle: the identity; 64 examples at once, and four times 16."""
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        rule = rule_of(kind, network(), spec)
        updates(rule, [batch_of(shape, 64)], parts)
        results.append(rule.layers["b1"].weight.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert not torch.equal(results[0], rule_of(kind, network(), spec).layers["b1"].weight)


def test_deeper_layers_without_batch_norm_do_not_diverge() -> None:
    """Oracle: of data on one axis, with |x|^2 = 12 on average, everything passes; a rate of 1 / fan-in would be 6 times the limit."""
    torch.manual_seed(0)
    blocks = {"b1": nn.Linear(12, 2, bias=False), "b2": nn.Linear(2, 1, bias=False), "readout": nn.Linear(1, 3)}
    rule = rule_of(Oja, Network(blocks, input_shape=(12,), readout="readout").double(), FLAT)
    axis = F.normalize(torch.randn(12, dtype=torch.float64), dim=0)
    x = torch.randn(500 * 16, 1, dtype=torch.float64) * axis * 12**0.5
    updates(rule, [Batch(part, torch.zeros(16, dtype=torch.long)) for part in x.split(16)])
    first, second = (layer.weight.detach() for layer in rule.layers.values())
    assert float((first @ axis).norm()) == pytest.approx(1, abs=1e-3)
    assert float((second @ first @ axis).norm()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", [Oja, Sanger])
def test_channels_last_images_teach_the_same(kind: type[Oja]) -> None:
    """Oracle: the same images in torch's usual layout; the convolution's gradient then comes in another one, decay and all."""
    batch, weights = batch_of((2, 6, 5), 6), []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        rule = rule_of(kind, image_network(), IMAGE, lr=[0.03], radius=2.0)
        updates(rule, [Batch(batch.inputs.contiguous(memory_format=layout), batch.targets)])
        weights.append(rule.layers["b1"].weight.detach())
    torch.testing.assert_close(weights[1], weights[0])
