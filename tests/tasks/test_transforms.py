"""Augmentations with options: torchvision's transforms by name, mixup and cutmix.

Oracles: torchvision's transform on a single image under the same seed; SciPy's beta distribution; a loop over single images.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from bpfree import Batch, BpfreeError, Split, Task, TaskSpec, Traits, UsageError, always
from bpfree.baselines import Backprop
from bpfree.config import parse_words, resolve
from bpfree.network.builders import mlp
from bpfree.plugins import installed_plugins
from bpfree.tasks.augment import Augmentation, Draws, check_augmentations, named_augmentation
from bpfree.tasks.loading import Loader
from bpfree.tasks.transforms import CLASSES, TRANSFORMS
from bpfree.training.trainer import Trainer

SPEC = TaskSpec("pictures", (3, 16, 16), 5, scale=255)
PIXELS = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(40) % 5
OPTIONS: dict[str, dict[str, Any]] = {
    "elastic-transform": {"alpha": 20.0, "sigma": 1.0},
    "gaussian-blur": {"kernel_size": 3},
    "random-adjust-sharpness": {"sharpness_factor": 2},
    "random-affine": {"degrees": 20},
    "random-crop": {"size": [16, 16], "padding": 2},
    "random-posterize": {"bits": 2},
    "random-resized-crop": {"size": [16, 16]},
    "random-rotation": {"degrees": 30},
    "random-solarize": {"threshold": 100},
}


def find(entry: Any) -> Augmentation:
    return named_augmentation(entry, lambda name: installed_plugins().get("augmentations", name))  # type: ignore[no-any-return]


def draws(indices: torch.Tensor, *, epoch: int = 0, spec: TaskSpec = SPEC) -> Draws:
    return Draws(7, epoch, indices, spec)


def applied(entry: Any, indices: torch.Tensor, *, epoch: int = 0) -> torch.Tensor:
    return find(entry)(PIXELS[indices], LABELS[indices], draws(indices, epoch=epoch))[0]


@pytest.mark.parametrize("name", CLASSES)
def test_every_transform_is_torchvisions_under_the_seed_of_the_example(name: str) -> None:
    options = OPTIONS.get(name, {})
    made = applied({"name": name, **options}, torch.arange(12))
    transform = getattr(v2, CLASSES[name])(**options)
    for image, seed, result in zip(PIXELS, draws(torch.arange(12)).seeds(name), made, strict=False):
        torch.manual_seed(seed)
        torch.testing.assert_close(result, transform(image), rtol=0, atol=0)
    assert made.dtype == torch.uint8


@pytest.mark.parametrize("name", ["random-rotation", "color-jitter", "random-erasing"])
def test_what_happens_to_an_image_depends_on_seed_epoch_and_index_alone(name: str) -> None:
    entry = {"name": name, **OPTIONS.get(name, {}), **({"brightness": 0.5} if name == "color-jitter" else {})}
    whole = applied(entry, torch.arange(40))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole[order], applied(entry, order))
    assert torch.equal(whole[5:8], applied(entry, torch.arange(5, 8)))
    assert not torch.equal(whole, applied(entry, torch.arange(40), epoch=1))
    assert (whole != PIXELS).any()


def test_the_global_generators_stay_as_they_are() -> None:
    before = torch.get_rng_state()
    applied("random-erasing", torch.arange(5))
    assert torch.equal(before, torch.get_rng_state())


def test_pixels_of_every_type_get_the_same_transform() -> None:
    """Oracle: those in uint8. torchvision would take 0 to 1 for the range of floats."""
    entry = {"name": "random-solarize", "threshold": 100, "p": 1.0}
    expected = applied(entry, torch.arange(40)).float()
    for dtype in (torch.int16, torch.int64):
        made = find(entry)(PIXELS.to(dtype), None, draws(torch.arange(40)))[0]
        assert made.dtype == dtype
        assert torch.equal(made.float(), expected)
    floats = find({"name": "random-solarize", "threshold": 100 / 255, "p": 1.0})(PIXELS.float(), None, draws(torch.arange(40)))[0]
    torch.testing.assert_close(floats, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("random-rotation", "torchvision refuses these options"),
        ({"name": "random-rotation", "angle": 3}, r"random-rotation: unknown option angle: known here: degrees"),
        ({"name": "random-rotation", "degrees": "much"}, "torchvision refuses"),
        ({"degrees": 3}, "names no augmentation"),
        (3, "names no augmentation"),
        ("random-rotatoin", "did you mean"),
        ({"name": "flip", "p": 0.3}, "unknown option p"),
        ({"name": "mixup", "alpha": -1}, "alpha=-1 is out of range"),
        ({"name": "mixup", "alpha": "x"}, "must be a number"),
    ],
)
def test_entries_that_are_wrong_are_refused(entry: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(entry)
    assert re.search(message, str(caught.value))


def test_options_that_change_the_size_are_refused() -> None:
    with pytest.raises(BpfreeError, match=r"images of shape \(3, 8, 8\) of those of \(3, 16, 16\)"):
        applied({"name": "random-crop", "size": [8, 8]}, torch.arange(4))


def test_the_command_line_takes_names_and_mappings() -> None:
    recipe = resolve(parse_words(["task.augment=[flip, {name: random-rotation, degrees: 10}]"]))
    assert recipe.task.augment == ["flip", {"name": "random-rotation", "degrees": 10}]
    assert [each.said is None for each in recipe.augmentations()] == [False, False]
    again = resolve(parse_words([f"task.augment={recipe.task.augment}".replace("'", "")]))
    assert again.task.augment == recipe.task.augment
    assert resolve(recipe.to_dict()).task.augment == recipe.task.augment
    with pytest.raises(UsageError, match="flip is named twice"):
        resolve(parse_words(["task.augment=[flip, flip]"]))
    with pytest.raises(UsageError, match="unknown option angle"):
        resolve(parse_words(["task.augment=[{name: random-rotation, angle: 10}]"]))


def test_augmentations_of_images_are_refused_for_other_inputs() -> None:
    with pytest.raises(UsageError, match=r"augmentations of images, but task 'v' has inputs of shape \(6,\)"):
        check_augmentations([find("flip")], TaskSpec("v", (6,), 2), ("classes",), "a rule")


# --- mixing ---------------------------------------------------------------------------------------------------------------


def mixed(name: str, count: int = 40, **options: Any) -> tuple[torch.Tensor, torch.Tensor, Draws]:
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(count) % 5
    made, soft = find({"name": name, **options})(images, labels, draws(torch.arange(count)))
    assert soft is not None
    return made, soft, draws(torch.arange(count))


def test_mixup_averages_images_and_labels_with_one_share() -> None:
    """Oracle: a loop; the partner and the share are those that the example draws."""
    made, soft, drawn = mixed("mixup")
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    partners, shares = (drawn.uniform("mixup partner")[:, 0] * 40).floor().long().tolist(), drawn.uniform("mixup")[:, 0].tolist()
    for place, (partner, share) in enumerate(zip(partners, shares, strict=True)):
        torch.testing.assert_close(made[place], share * images[place] + (1 - share) * images[partner])
        expected = torch.zeros(5)
        expected[place % 5] += share
        expected[partner % 5] += 1 - share
        torch.testing.assert_close(soft[place], expected)
    assert len(set(partners)) > 15


def test_cutmix_pastes_a_rectangle_and_mixes_labels_by_its_area() -> None:
    """Oracle: what the images show: each image holds its own number."""
    count = 60
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 16, 12).clone()
    spec = TaskSpec("numbers", (3, 16, 12), count)
    made, soft = find("cutmix")(images, torch.arange(count), draws(torch.arange(count), spec=spec))
    assert soft is not None
    several = 0
    for place in range(count):
        foreign = made[place, 0] != place
        (rows, columns) = foreign.any(1).nonzero().flatten(), foreign.any(0).nonzero().flatten()
        assert int(foreign.sum()) == len(rows) * len(columns), "what is pasted is a rectangle"
        assert len(made[place].unique()) <= 2
        torch.testing.assert_close(soft[place, place], torch.tensor(1 - float(foreign.float().mean())))
        if len(rows):
            assert soft[place, int(made[place, 0][foreign][0])] == pytest.approx(float(foreign.float().mean()))
            several += 1
    assert several > 40
    torch.testing.assert_close(soft.sum(1), torch.ones(count))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_the_beta_distribution(alpha: float) -> None:
    spec = TaskSpec("many", (1, 1, 1), 2000)
    made, soft = find({"name": "mixup", "alpha": alpha})(
        torch.zeros(2000, 1, 1, 1), torch.arange(2000), Draws(3, 0, torch.arange(2000), spec)
    )
    assert soft is not None
    partners = Draws(3, 0, torch.arange(2000), spec).partners("mixup partner")
    others = partners != torch.arange(2000)
    shares = soft[torch.arange(2000), torch.arange(2000)][others].double().numpy()
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert made.shape == (2000, 1, 1, 1)


def test_integer_pixels_are_rounded() -> None:
    made, _ = find("mixup")(PIXELS, LABELS, draws(torch.arange(40)))
    floats, _ = find("mixup")(PIXELS.float(), LABELS, draws(torch.arange(40)))
    assert made.dtype == torch.uint8
    assert torch.equal(made.float(), floats.round())


def test_the_loss_of_a_mixed_batch_is_the_mixed_loss() -> None:
    """Oracle: the definition: share * loss(own) + (1 - share) * loss(partner's)."""
    _, soft, drawn = mixed("mixup")
    outputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(5))
    share, partners = drawn.uniform("mixup")[:, 0], drawn.partners("mixup partner")
    losses = [SPEC.losses(outputs, Batch(None, labels)) for labels in (LABELS, LABELS[partners])]
    torch.testing.assert_close(SPEC.loss(outputs, Batch(None, soft)), (share * losses[0] + (1 - share) * losses[1]).mean())


def test_mixing_in_a_loader_gives_soft_labels() -> None:
    split = Split(PIXELS, LABELS)
    batches = Loader(split, SPEC, batch_size=16, device=torch.device("cpu"), seed=0, augment=[find("flip"), find("cutmix")])
    for batch in batches.batches(0):
        assert batch.targets is not None
        assert batch.targets.shape == (len(batch), 5)
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(len(batch)))


def test_mixing_is_refused_for_rules_and_tasks_without_soft_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"from which a rule cannot learn: it accepts classes \(trait targets\)"):
        check_augmentations([find("mixup")], SPEC, ("classes",), "a rule")
    monkeypatch.setattr(Backprop, "traits_of", always(Traits("all", "all", "all", targets=("classes",))))
    with pytest.raises(UsageError, match=r"from which rule 'backprop' cannot learn"):
        resolve(parse_words(["rule=backprop", "task.augment=[mixup]"]))
    task = Task.of(Split(PIXELS, LABELS), Split(PIXELS, LABELS), spec=SPEC)
    with pytest.raises(UsageError, match="from which Backprop cannot learn"):
        Trainer(Backprop(mlp(SPEC), SPEC), task, augment=[find("cutmix")])
    monkeypatch.undo()
    assert resolve(parse_words(["rule=backprop", "task.augment=[mixup]"])).augmentations()[0].mixes
    with pytest.raises(UsageError, match="mixing makes soft labels of classes"):
        check_augmentations([find("mixup")], TaskSpec("r", (3, 8, 8), 2, "real"), ("real", "soft"), "a rule")


def test_all_are_registered() -> None:
    known = installed_plugins().names("augmentations")
    assert {"flip", "crop", "mixup", "cutmix", *TRANSFORMS} <= set(known)
    assert np.all([hasattr(v2, kind) for kind in CLASSES.values()])
