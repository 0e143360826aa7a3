"""Batches and their order. Oracles: torch.randperm by hand, TaskSpec.normalise on the whole split, the other way of loading."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from bpfree import Batch, BpfreeError, Split, TaskSpec, UsageError
from bpfree.errors import DiskError
from bpfree.seeds import derive
from bpfree.tasks import loading
from bpfree.tasks.augment import CROP, FLIP, Augmentation, Draws
from bpfree.tasks.loading import Loader, Resident

SPEC = TaskSpec("toy", (3, 12, 10), 7, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def toy(count: int = 101) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *SPEC.input_shape), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 7, (count,), generator=generator))


def pairs(batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor | None]]:
    return [(batch.inputs, batch.targets) for batch in batches]


def assert_same(one: Iterable[Batch], other: Iterable[Batch]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close((a.inputs, a.targets), (b.inputs, b.targets), rtol=0, atol=0)


def test_an_evaluation_pass_is_the_normalised_split_in_its_own_order(device: torch.device) -> None:
    split = toy()
    loader = Loader(split, SPEC, batch_size=25, device=device)
    inputs, targets = zip(*pairs(loader), strict=True)
    assert len(loader) == 5
    assert loader.examples == 101
    assert [len(part) for part in inputs] == [25, 25, 25, 25, 1]
    torch.testing.assert_close(torch.cat(inputs), SPEC.normalise(split.inputs.to(device)), rtol=0, atol=0)
    assert torch.equal(torch.cat(targets).cpu(), split.targets)
    assert inputs[0].device.type == device.type


def test_the_order_of_a_training_pass_is_a_permutation_drawn_from_seed_and_epoch(device: torch.device) -> None:
    split = toy(100)
    loader = Loader(split, SPEC, batch_size=32, device=device, seed=7)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(derive(7, "order", 4)))
    inputs = torch.cat([batch.inputs for batch in loader.batches(4)])
    torch.testing.assert_close(inputs, SPEC.normalise(split.inputs[order].to(device)), rtol=0, atol=0)
    assert not torch.equal(loader.order(4), loader.order(5))


@pytest.mark.parametrize("resident", [True, False])
def test_a_pass_resumes_at_any_batch(resident: bool, device: torch.device) -> None:
    loader = Loader(toy(), SPEC, batch_size=10, device=device, seed=1, augment=[FLIP, CROP], resident=resident)
    whole = list(loader.batches(2))
    for start in range(len(loader) + 1):
        assert_same(whole[start:], loader.batches(2, start))


@pytest.mark.parametrize("augment", [(), (FLIP, CROP)], ids=["plain", "augmented"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streamed_batches_equal_resident_ones_bit_by_bit(augment: tuple[Augmentation, ...], workers: int, device: torch.device) -> None:
    options: dict[str, Any] = {"batch_size": 33, "device": device, "seed": 3, "augment": augment}
    streamed = Loader(toy(), SPEC, resident=False, workers=workers, **options)
    before = torch.get_rng_state()
    assert_same(Loader(toy(), SPEC, resident=True, **options).batches(1), streamed.batches(1))
    assert streamed.resident is None
    assert torch.equal(before, torch.get_rng_state()), "torch's global generator was drawn from"


@pytest.mark.parametrize(
    ("count", "size", "lengths"), [(101, 50, [50, 50]), (102, 50, [50, 50, 2]), (100, 50, [50, 50]), (1, 50, [1]), (3, 1, [1, 1, 1])]
)
def test_a_training_pass_drops_a_remainder_of_exactly_one(count: int, size: int, lengths: list[int], device: torch.device) -> None:
    loader = Loader(toy(count), SPEC, batch_size=size, device=device, seed=0)
    assert [len(batch) for batch in loader.batches(0)] == lengths
    assert (len(loader), loader.examples) == (len(lengths), sum(lengths))


def test_the_example_left_out_changes_from_pass_to_pass() -> None:
    loader = Loader(toy(101), SPEC, batch_size=50, device=torch.device("cpu"), seed=0)
    left = {next(iter(set(range(101)) - set(loader.order(epoch).tolist()))) for epoch in range(10)}
    assert len(left) > 5


def test_the_whole_split_can_be_one_batch(device: torch.device) -> None:
    (batch,) = Loader(toy(), SPEC, batch_size="all", device=device, seed=0).batches(0)
    assert len(batch) == 101


def test_a_batch_belongs_to_its_receiver(device: torch.device) -> None:
    for seed in (None, 0):
        loader = Loader(toy(), SPEC, batch_size="all", device=device, seed=seed)
        first = [batch.inputs.clone() for batch in loader.batches(0)]
        for batch in loader.batches(0):
            batch.inputs.zero_()
        assert torch.equal(first[0], next(loader.batches(0)).inputs)


def test_loaders_of_one_split_can_share_its_tensors(device: torch.device) -> None:
    one = Loader(toy(), SPEC, batch_size=10, device=device, seed=0)
    other = Loader(toy(), SPEC, batch_size=20, device=device, seed=0, share=one.resident)
    assert one.resident is not None
    assert other.resident is one.resident
    first = torch.cat([batch.inputs for batch in itertools.islice(one.batches(0), 2)])
    assert torch.equal(first, next(other.batches(0)).inputs)


def test_what_is_kept_raw_or_normalised_gives_the_same_batches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Loader(toy(), SPEC, batch_size=10, device=device, seed=0)
    monkeypatch.setattr(loading, "FLOAT_LIMIT", 0)
    large = Loader(toy(), SPEC, batch_size=10, device=device, seed=0)
    assert small.resident is not None
    assert large.resident is not None
    assert (small.resident.normalised, large.resident.normalised) == (True, False)
    assert large.resident.inputs.dtype == torch.uint8
    assert_same(small.batches(0), large.batches(0))


def test_a_split_too_large_for_the_host_limit_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "HOST_LIMIT", 1000)
    assert Loader(toy(), SPEC, batch_size=10, device=torch.device("cpu")).resident is None


@pytest.mark.parametrize("resident", [True, False])
def test_targets_come_in_the_types_that_losses_take(resident: bool, device: torch.device) -> None:
    inputs = torch.rand(6, 4, dtype=torch.float64)
    spec = TaskSpec("flat", (4,), 2)
    for targets, dtype in (
        (torch.tensor([0, 1] * 3, dtype=torch.uint8), torch.int64),
        (torch.rand(6, 2, dtype=torch.float64), torch.float32),
    ):
        batch = next(Loader(Split(inputs, targets), spec, batch_size=4, device=device, resident=resident).batches(0))
        assert batch.targets is not None
        assert (batch.inputs.dtype, batch.targets.dtype) == (torch.float32, dtype)
    assert next(Loader(Split(inputs, None), spec, batch_size=4, device=device, resident=resident).batches(0)).targets is None


def test_augmentations_may_change_targets(device: torch.device) -> None:
    def soften(images: Tensor, targets: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
        assert targets is not None
        return images, torch.nn.functional.one_hot(targets, 7) * 0.9

    batch = next(Loader(toy(), SPEC, batch_size=10, device=device, seed=0, augment=[Augmentation(soften)]).batches(0))
    assert batch.targets is not None
    assert batch.targets.shape == (10, 7)


def test_requests_that_make_no_sense_are_refused() -> None:
    cpu = torch.device("cpu")
    normalised = Resident.of(toy(), SPEC, cpu)
    with pytest.raises(UsageError, match="0 examples"):
        Loader(toy(), SPEC, batch_size=0, device=cpu)
    with pytest.raises(UsageError, match="need a seed"):
        Loader(toy(), SPEC, batch_size=4, device=cpu, augment=[FLIP])
    with pytest.raises(UsageError, match="raw"):
        Loader(toy(), SPEC, batch_size=4, device=cpu, seed=0, augment=[FLIP], share=normalised)
    with pytest.raises(BpfreeError, match="without examples"):
        Loader(toy(0), SPEC, batch_size=4, device=cpu)


def test_shared_memory_that_is_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the option; the run can be resumed."""

    def full(loader: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", full)
    loader = Loader(toy(), SPEC, batch_size=10, device=torch.device("cpu"), resident=False, workers=2)
    with pytest.raises(DiskError, match="cannot start processes that load data") as caught:
        next(iter(loader))
    assert "data.workers=0" in caught.value.fix
