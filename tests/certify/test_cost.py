"""What a step costs. Oracles: tensors counted by hand; networks whose activations have a known size; the autograd graph's own shape."""

from __future__ import annotations

import pytest
import torch

from bpfree.baselines import DFA, Backprop, Frozen
from bpfree.certify import Measurements, Specimen, Subject
from bpfree.certify.cost import MANY, MemoryCurve, measure_memory, saved_for_backward


def test_bytes_saved_for_backward_are_counted_at_their_peak() -> None:
    """Oracle: tanh saves its output; the first graph is gone before the second is built."""
    x = torch.randn(1000, requires_grad=True)
    with saved_for_backward() as size:
        y = x.tanh()
        assert size.now == 4000
        y = y.tanh()
        del y
        x[:10].tanh().sum().backward()
    assert size.peak == 8000
    assert size.now == 0
    assert size.works


def test_memory_of_back_propagation_grows_and_of_frozen_features_does_not() -> None:
    """Oracle: per block of the network, one input of the linear map and one output of tanh are saved; frozen blocks save nothing."""
    curve = measure_memory(Subject(Backprop), Specimen())
    assert curve.growth == "growing"
    assert curve.activation == MANY * 32 * 4
    assert curve.slope(curve.saved) == pytest.approx(2, abs=0.2)
    flat = measure_memory(Subject(Frozen), Specimen())
    assert flat.growth == "flat"
    assert flat.slope(flat.saved) == pytest.approx(0, abs=0.01)


def test_a_number_of_blocks_that_cannot_be_chosen_leaves_memory_unmeasured() -> None:
    curve = measure_memory(Subject("hebbian-norm"), Specimen())
    assert curve.growth == "unmeasured"
    assert curve.to_dict()["activations_per_block"] == {"saved": None, "peak": None}


def test_the_slope_is_a_fitted_lines() -> None:
    """Oracle: a straight line."""
    curve = MemoryCurve([2, 4, 8, 16], [], [20 + 3 * depth for depth in (2, 4, 8, 16)], 1)
    assert curve.slope(curve.peak) == pytest.approx(3)
    assert curve.slope(curve.saved) is None


def test_passes_count_tangents_and_relaxation() -> None:
    """Oracle: K directions go through the blocks above the first; T inference steps and the forward pass."""
    assert Measurements(Subject(DFA)).observations["dense"].passes() == dict.fromkeys(["b1", "b2", "b3", "b4", "readout"], 1.0)
    tangents = Measurements(Subject("forward-gradient", ["rule.tangents=3"])).observations["dense"].passes()
    assert (tangents["b1"], tangents["b2"], tangents["readout"]) == (1.0, 4.0, 4.0)
    relaxed = Measurements(Subject("epc", ["rule.T=5"])).observations["convolutional"].passes()
    assert relaxed["readout"] == 6.0
