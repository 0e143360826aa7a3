"""MPS devices, which are not here: with their availability, and what torch does on them, made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bpfree import BudgetConfig, Saved, Task, TrainConfig, Trainer, UsageError, load, mlp
from bpfree.baselines import Backprop
from bpfree.config import resolve
from bpfree.devices import doubled, explained, global_state, preserved_global_state, seed_global, set_global_state, summed, synchronize
from bpfree.tasks.protocols import Setting
from bpfree.training import environment
from bpfree.training.meters import Clock

MPS = torch.device("mps", 0)


def here(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(("cuda", "mps", "kind"), [(1, True, "cuda"), (1, False, "cuda"), (0, True, "mps"), (0, False, "cpu")])
def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, kind: str) -> None:
    here(monkeypatch, cuda=cuda, mps=mps)
    assert environment.resolve_device("auto").type == kind


def test_devices_are_taken_by_name_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, cuda=2, mps=True)
    assert [str(environment.resolve_device(name)) for name in ("cuda:1", "mps", "mps:0", "cpu")] == ["cuda:1", "mps:0", "mps:0", "cpu"]
    assert str(environment.resolve_device("cuda", process=3)) == "cuda:1"
    assert str(environment.resolve_device("mps", process=3)) == "mps:0"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("cuda", "no CUDA device found"),
        ("cuda:0", "no CUDA device found"),
        ("mps", "no MPS device found"),
        ("tpu", "unknown device 'tpu'"),
    ],
)
def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, what: str) -> None:
    here(monkeypatch)
    with pytest.raises(UsageError, match=what):
        environment.resolve_device(name)
    here(monkeypatch, cuda=1, mps=True)
    with pytest.raises(UsageError, match=r"device=mps:1: 1 MPS device found"):
        environment.resolve_device("mps:1")


def test_a_configuration_may_name_mps_wherever_it_is_read() -> None:
    assert resolve({"device": "mps:0"}).settings.device == "mps:0"
    with pytest.raises(UsageError, match="unknown device 'mps:x'"):
        resolve({"device": "mps:x"})


# --- float64 ------------------------------------------------------------------------------------------------------------


def rule_of(task: Task, dtype: torch.dtype) -> Backprop:
    return Backprop(mlp(task.spec).to(dtype), task.spec)


def test_a_rule_in_float64_is_refused_on_mps_with_the_reason(monkeypatch: pytest.MonkeyPatch, digits: Task) -> None:
    here(monkeypatch, mps=True)
    with pytest.raises(UsageError, match="Backprop computes in float64, which MPS devices do not have") as refused:
        Trainer(rule_of(digits, torch.float64), digits, TrainConfig(budget=BudgetConfig(epochs=1), device="mps"))
    assert "device=cpu" in str(refused.value.fix)
    assert environment.device_of(rule_of(digits, torch.float32), "mps") == MPS
    assert environment.device_of(rule_of(digits, torch.float32), "auto") == MPS


def test_auto_trains_a_rule_in_float64_on_the_cpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, digits: Task, caplog: pytest.LogCaptureFixture
) -> None:
    here(monkeypatch, mps=True)
    trainer = Trainer(rule_of(digits, torch.float64), digits, TrainConfig(budget=BudgetConfig(epochs=1), device="auto"))
    assert trainer.setup.device.type == "cpu"
    assert "float64, which MPS devices do not have: it is trained on the CPU" in caplog.text
    assert trainer.fit().status == "finished"


def test_several_processes_do_not_train_on_mps(monkeypatch: pytest.MonkeyPatch, digits: Task) -> None:
    here(monkeypatch, mps=True)
    rule = rule_of(digits, torch.float32)
    assert environment.device_of(rule, "auto", processes=2).type == "cpu"
    with pytest.raises(UsageError, match="several processes cannot train together"):
        environment.device_of(rule, "mps", processes=2)


def test_float64_that_a_rule_makes_in_a_step_is_refused_with_the_reason() -> None:
    said = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead."
    with pytest.raises(UsageError, match="NoPropCT computes in float64"), explained(MPS, "NoPropCT"):
        raise TypeError(said)
    with pytest.raises(TypeError), explained(torch.device("cpu"), "NoPropCT"):
        raise TypeError(said)
    with pytest.raises(TypeError, match="something else"), explained(MPS, "NoPropCT"):
        raise TypeError("something else")


def test_exact_sums_are_taken_on_the_cpu_where_the_device_has_no_float64() -> None:
    with FakeTensorMode():
        values = torch.ones(3, device="mps")
        found = [doubled(values), summed(values), summed(values > 0)]
    assert [(each.device.type, each.dtype) for each in found] == [("cpu", torch.float64)] * 3
    assert summed(torch.tensor([True, True])).item() == 2
    assert Setting(10, 0, MPS).device.type == "cpu"
    assert Setting(10, 0, torch.device("cuda")).device.type == "cuda"


# --- clocks, memory, generators -----------------------------------------------------------------------------------------


def test_clocks_wait_for_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    for device in ("mps:0", "cpu", "cuda:1"):
        synchronize(torch.device(device))
    assert waited == ["mps", "cuda:1"]
    Clock(MPS).start()
    assert waited == ["mps", "cuda:1", "mps"]


def test_mps_takes_its_memory_from_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, mps=True)
    assert list(environment.free_memory("mps")) == ["the machine's memory"]
    tags = environment.describe(MPS)
    assert (tags["device"], tags["cuda"]) == ("mps", "")
    assert tags["device_name"] == environment.describe(torch.device("cpu"))["device_name"]


def test_bf16_on_mps_is_autocast_of_mps() -> None:
    assert environment.autocast(MPS, "bf16").device == "mps"


class Generator:
    """The global generator of MPS: the numbers that it has drawn, as a tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = torch.tensor([0])
        monkeypatch.setattr(torch.mps, "get_rng_state", lambda: self.state)
        monkeypatch.setattr(torch.mps, "set_rng_state", self.set)
        monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: self.set(torch.tensor([seed])))

    def set(self, state: Any) -> None:
        self.state = state


def test_the_generator_of_mps_is_kept_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(monkeypatch)
    before, drawn = global_state(MPS), torch.get_rng_state()
    assert set(before) == {"cpu", "mps"}
    with preserved_global_state(MPS):
        seed_global(7, MPS)
        assert generator.state.item() == 7
    assert generator.state.item() == 0
    assert torch.equal(torch.get_rng_state(), drawn)
    generator.set(torch.tensor([3]))
    set_global_state({"cpu": drawn}, MPS)  # of a run that was on the CPU: what fits
    assert generator.state.item() == 3
    set_global_state(before, torch.device("cpu"))
    assert generator.state.item() == 3


def test_a_trained_rule_in_float64_stays_off_mps(monkeypatch: pytest.MonkeyPatch, digits: Task, tmp_path: Path) -> None:
    rule = rule_of(digits, torch.float64)
    Trainer(rule, digits, TrainConfig(budget=BudgetConfig(epochs=1), device="cpu"), folder=tmp_path / "run").fit()
    here(monkeypatch, mps=True)
    assert load(tmp_path / "run", rule=rule_of(digits, torch.float64), device="auto").device.type == "cpu"
    with pytest.raises(UsageError, match="Backprop computes in float64"):
        load(tmp_path / "run", rule=rule_of(digits, torch.float64), device="mps")
    with pytest.raises(UsageError, match="Backprop computes in float64"):
        Saved(rule, digits.spec, None, tmp_path).to("mps")
