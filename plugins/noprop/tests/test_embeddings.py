"""Class embeddings, prototypes and heads."""

from __future__ import annotations

import pytest
import torch
from bpfree_noprop.embeddings import ClassEmbedding, medoid, prototypes
from bpfree_noprop.heads import RadialHead, SoftmaxHead, soft_cross_entropy
from torch import nn

from bpfree.errors import UsageError
from bpfree.tasks.task import Split, TaskSpec


def brute_force_medoid(points: torch.Tensor) -> int:
    medians = []
    for i, point in enumerate(points):
        others = torch.cat([points[:i], points[i + 1 :]])
        medians.append((others - point).norm(dim=1).median().item())
    return min(range(len(medians)), key=medians.__getitem__)


@pytest.mark.parametrize("n", [2, 3, 40, 41, 600])  # 600: more than one slice of rows
def test_medoid_has_the_smallest_median_distance(n: int, device: torch.device) -> None:
    # Oracle: brute force over all pairs.
    points = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
    assert medoid(points.to(device)).item() == brute_force_medoid(points)


def test_medoid_of_a_single_point(device: torch.device) -> None:
    assert medoid(torch.zeros(1, 3, device=device)).item() == 0


def test_prototypes_are_normalised_training_images_of_their_class(device: torch.device) -> None:
    # Oracle: each row is one of the class's images after (x / 255 - mean) / std, the brute-force medoid.
    spec = TaskSpec("images", input_shape=(2, 3, 3), outputs=3, mean=(0.5, 0.1), std=(0.2, 0.3))
    raw = torch.randint(0, 256, (30, 2, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(30) % 3
    rows = prototypes(Split(raw, labels), spec, device).cpu()
    for label in range(3):
        images = spec.normalise(raw[labels == label]).flatten(1)
        torch.testing.assert_close(rows[label], images[brute_force_medoid(images)])


def test_a_class_without_examples_has_no_prototype(device: torch.device) -> None:
    spec = TaskSpec("images", input_shape=(1, 2, 2), outputs=2)
    with pytest.raises(UsageError, match="class 1"):
        prototypes(Split(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)), spec, device)


@pytest.mark.parametrize(("classes", "dim"), [(4, 20), (10, 3)])
def test_learned_embedding_starts_orthogonal(classes: int, dim: int) -> None:
    # Oracle: the smaller Gram matrix is the identity, times what makes rows of mean square 1 where there are fewer dimensions than classes.
    weight = ClassEmbedding(classes, dim, "learned").weight
    gram = weight @ weight.T if classes <= dim else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(min(classes, dim)) * max(1, classes / dim), atol=1e-5, rtol=0)
    assert float(weight.detach().pow(2).sum(1).mean()) == pytest.approx(1, abs=1e-5)


def test_one_hot_embedding_is_fixed_and_unsaved() -> None:
    embed = ClassEmbedding(4, 99, "one-hot")
    assert not list(embed.parameters())
    assert not embed.state_dict()
    rows = torch.rand(5, 4)
    assert torch.equal(embed(rows), rows @ embed.weight)


def test_a_new_head_names_the_nearest_embedding(device: torch.device) -> None:
    # Oracle: brute-force nearest neighbour among embeddings of unequal length.
    embed = ClassEmbedding(5, 8, "prototype").to(device)
    with torch.no_grad():
        embed.weight.normal_()
    z = torch.randn(100, 8, device=device)
    head = SoftmaxHead(embed).to(device)
    assert torch.equal(head(z, embed).argmax(1), torch.cdist(z, embed.weight).argmin(1))


def test_radial_head_is_the_formula(device: torch.device) -> None:
    # Oracle: Eq. 15-16 written out with explicit differences.
    embed = ClassEmbedding(4, 6, "learned").to(device)
    head = RadialHead(embed, sigma=0.7).to(device)
    z = torch.randn(5, 6, device=device)
    guess = head.linear(z).softmax(1) @ embed.weight
    distance = (guess[:, None, :] - embed.weight[None]).pow(2).sum(2)
    torch.testing.assert_close(head(z, embed), (-distance / (2 * 0.7**2)).log_softmax(1))


def test_cross_entropy_of_one_hot_rows_is_torchs(device: torch.device) -> None:
    # Oracle: torch's cross-entropy with integer targets.
    logits, targets = torch.randn(6, 4, device=device), torch.tensor([0, 1, 2, 3, 3, 0], device=device)
    rows = nn.functional.one_hot(targets, 4).float()
    torch.testing.assert_close(soft_cross_entropy(logits.log_softmax(1), rows), nn.functional.cross_entropy(logits, targets))
