"""The table of energies, its metrics, its file and its plot. Oracles: the energies by the book; numbers read back by the ticks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from bpfree_predictive_coding import plugin, profile
from bpfree_predictive_coding.plugin import bpfree_rules
from bpfree_predictive_coding.rules import ErrorPC, FixedPrediction, IncrementalPC, PredictiveCoding
from drawn import drawn, texts
from pc_oracles import FLAT, REAL, batch_of, by_the_book, cross_entropy, network_of, rows, rule_of, squared

from bpfree import Rule, Run, Stepper, new_step
from bpfree.training.alignment import Alignment, AlignmentConfig


def test_the_table_is_that_by_the_book() -> None:
    """Steps + 1 rows, a column for each block; means over the sampled batches, every second one here."""
    rule = rule_of(PredictiveCoding, T=4, profile_every=2, precision=0.6)
    step, tables = new_step(rule), []
    assert rule.profile.take() is None
    for index in range(4):
        batch, step.index = batch_of(seed=index), index
        metrics = rule.credit(batch, step)
        if index % 2:
            assert metrics.keys() == {"loss"}
            continue
        _, _, table = by_the_book(rule.network, batch.inputs, cross_entropy(rows(batch), 0.6), T=4, lr=0.1)
        tables.append(table)
        energies = {f"{name}/energy": value for name, value in zip(rule.network.names, table[-1], strict=True)}
        assert {name: float(value) for name, value in metrics.items() if name in energies} == pytest.approx(energies, rel=1e-5)
        assert metrics.keys() == {"loss", "equilibrium_distance", *energies}
        assert all(value.shape == () and value.dtype in (torch.float32, torch.float64) for value in metrics.values())
    mean = (torch.tensor(tables[0]) + torch.tensor(tables[1])) / 2
    taken = rule.profile.take()
    assert taken is not None
    torch.testing.assert_close(torch.tensor(taken), mean, rtol=1e-5, atol=1e-12)
    assert torch.tensor(taken).shape == (5, 4)
    assert rule.profile.take() is None
    step.index = 4  # the next epoch's table is its own
    rule.credit(batch_of(seed=0), step)
    torch.testing.assert_close(torch.tensor(rule.profile.take()), torch.tensor(tables[0]), rtol=1e-5, atol=1e-12)


def test_the_distance_to_equilibrium() -> None:
    """The norm of the energy's gradient by all states, over that before the first step. Oracle: autograd by the book."""
    for T in (1, 3):
        rule, batch = rule_of(PredictiveCoding, spec=REAL, T=T, profile_every=1), batch_of(REAL)
        norms = []
        for steps in (0, T):
            before, _, _ = by_the_book(rule.network, batch.inputs, squared(rows(batch, REAL)), T=steps, lr=0.1)
            after, _, _ = by_the_book(rule.network, batch.inputs, squared(rows(batch, REAL)), T=1, lr=1.0, states=before)
            norms.append(sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)) ** 0.5)
        assert float(rule.credit(batch, new_step(rule))["equilibrium_distance"]) == pytest.approx(norms[1] / norms[0], rel=1e-5)


@pytest.mark.parametrize("factory", [PredictiveCoding, ErrorPC, FixedPrediction])
def test_it_vanishes_after_a_long_relaxation(factory: type[Rule]) -> None:
    network = network_of("tanh")
    far, near = (
        float(rule.credit(batch_of(), new_step(rule))["equilibrium_distance"])
        for rule in (rule_of(factory, network=network, T=T, state_lr=0.3, profile_every=1) for T in (1, 300))
    )
    assert far > 0.3
    assert near < 1e-6


@pytest.mark.parametrize("name", sorted(set(bpfree_rules()) - {"z-il"}))
def test_every_relaxation_is_profiled(name: str) -> None:
    """The output's energy before the first step is the loss times the precision, the hidden blocks' is zero; no sample, no table."""
    for every in (0, 1):
        rule = rule_of(bpfree_rules()[name], T=3, profile_every=every, precision=0.5)
        metrics = rule.learn(batch_of(), new_step(rule))
        taken = rule.profile.take()
        if not every:
            assert taken is None
            continue
        assert taken is not None
        assert [len(row) for row in taken] == [4] * 4
        assert taken[0] == pytest.approx([0, 0, 0, float(metrics["loss"]) / 2])
        assert taken[-1] == pytest.approx([float(metrics[f"{block}/energy"]) for block in rule.network.names])


def test_sampling_leaves_the_update_as_it_is() -> None:
    """Oracle: the rule that is not watched; iPC's last step needs no predictions then."""
    for factory in (PredictiveCoding, IncrementalPC, ErrorPC, FixedPrediction):
        made = []
        for every in (0, 1):
            rule = rule_of(factory, T=3, profile_every=every)
            step = new_step(rule)
            for index in range(3):
                step.index = index
                rule.learn(batch_of(seed=index), step)
            made.append(rule.network.state_dict())
        assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_alignment_does_not_count_as_a_sample() -> None:
    """Measuring it meets the batch on the side; the epoch's table is that of the run without it."""
    rule, batch = rule_of(PredictiveCoding, T=2, profile_every=1), batch_of()
    Alignment(Stepper(rule), AlignmentConfig(every=1)).measure(batch)
    assert rule.profile.take() is None


def test_micro_batches_of_a_step_are_one_table() -> None:
    """Shapes agree whatever the number of examples; means over micro-batches."""
    rule = rule_of(PredictiveCoding, T=2, profile_every=1)
    step, tables = new_step(rule), []
    for seed, count in ((0, 7), (1, 3)):
        batch = batch_of(count=count, seed=seed)
        rule.credit(batch, step)
        tables.append(by_the_book(rule.network, batch.inputs, cross_entropy(rows(batch)), T=2, lr=0.1)[2])
    torch.testing.assert_close(torch.tensor(rule.profile.take()), torch.tensor(tables).mean(0), rtol=1e-5, atol=1e-12)


# --- file and plot -------------------------------------------------------------------------------------------------------

TABLE = [[0.0, 0.0, 2.0], [0.0, 0.5, 1.5], [0.25, 0.75, 1.0]]


def test_epochs_are_kept_and_replaced(tmp_path: Path) -> None:
    names = ["b1", "b2", "readout"]
    for epoch, table in ((1, TABLE), (2, TABLE), (10, TABLE), (2, TABLE[::-1])):
        path = profile.keep(tmp_path, epoch, names, table)
    assert json.loads(path.read_text()) == {"blocks": names, "energy": {"1": TABLE, "2": TABLE[::-1], "10": TABLE}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["relaxation.json"]


def plotted(tmp_path: Path, epochs: list[int], count: int = 3) -> str:
    """The plot of a run with these epochs and this many blocks."""
    names = [f"b{index + 1}" for index in range(count - 1)] + ["readout"]
    table = [[float(index + step >= count - 1) * (1 + index + step) for index in range(count)] for step in range(count)]
    for epoch in epochs:
        path = profile.keep(tmp_path, epoch, names, table)
    target = profile.draw(path, "a title")
    assert target == tmp_path / "plots" / "relaxation.svg"
    return target.read_text()


def test_the_plot_shows_the_first_and_the_last_epoch(tmp_path: Path) -> None:
    """By number, not by name; energies that are zero are not drawn on the logarithmic axis."""
    text = plotted(tmp_path, [2, 9, 10])
    assert texts(text, "title") == ["a title"]
    assert texts(text, "item") == ["b1", "b2", "readout"]
    panels = drawn(text)
    assert [panel.title.split(":")[0] for panel in panels] == ["epoch 2", "epoch 10"]
    assert panels[0].y_ticks == panels[1].y_ticks
    for panel in panels:
        assert panel.lines == {
            "b2": [(pytest.approx(step, abs=0.02), pytest.approx(2 + step, rel=0.02)) for step in (1, 2)],
            "readout": [(pytest.approx(step, abs=0.02), pytest.approx(3 + step, rel=0.02)) for step in (0, 1, 2)],
        }
        assert panel.markers["b1, step 2: 3"] == (pytest.approx(2, abs=0.02), pytest.approx(3, rel=0.02))
        assert panel.looks["readout"] == ("c1 d1", "")  # with dashes


def test_one_epoch_is_one_panel_and_many_blocks_have_a_band_of_colours(tmp_path: Path) -> None:
    text = plotted(tmp_path, [3], count=15)
    assert [panel.title.split(":")[0] for panel in drawn(text)] == ["epoch 3"]
    assert texts(text, "item") == ["b1", "b14", "readout"]


@pytest.mark.filterwarnings("error")
def test_what_is_drawn_where_nothing_has_energy(tmp_path: Path) -> None:
    """A network of one block whose table is zero."""
    path = profile.keep(tmp_path, 1, ["readout"], [[0.0], [0.0]])
    assert [panel.lines for panel in drawn(profile.draw(path, "nothing").read_text())] == [{}]


def test_the_plugins_hooks(tmp_path: Path) -> None:
    """A run with a folder gets the file, its artifacts, and a plot of all its epochs at its end, also if there was nothing left to do."""
    rule = rule_of(PredictiveCoding, T=2, profile_every=1)
    made = Run("id", "name", folder=tmp_path / "run", epoch=1)
    (tmp_path / "run").mkdir()
    plugin.epoch_end(made, rule)
    assert made.artifacts == {}
    plugin.run_end(made)
    assert made.artifacts == {}
    rule.credit(batch_of(), new_step(rule))
    plugin.epoch_end(made, rule)
    assert made.artifacts == {"relaxation.json": tmp_path / "run" / "relaxation.json"}
    plugin.run_end(made)
    wanted = {"relaxation.json", "plots/relaxation.svg"}
    assert made.artifacts.keys() == wanted
    again = Run("id", "name", folder=tmp_path / "run", epoch=1)
    plugin.run_end(again)
    assert again.artifacts.keys() == wanted


def test_runs_that_have_no_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a folder, of another rule, or of z-il; and without a warning."""
    from bpfree.baselines import Backprop

    rule = rule_of(PredictiveCoding, T=2, profile_every=1)
    rule.credit(batch_of(), new_step(rule))
    for folder, other in ((None, rule), (tmp_path, Backprop(network_of("tanh"), FLAT)), (tmp_path, rule_of(bpfree_rules()["z-il"]))):
        made = Run("id", "name", folder=folder, epoch=1)
        plugin.epoch_end(made, other)
        plugin.run_end(made)
        assert made.artifacts == {}
    assert not caplog.records


def test_a_plot_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "relaxation.json"
    path.write_text("no JSON")
    made = Run("id", "a-run", folder=tmp_path, artifacts={"relaxation.json": path})
    with caplog.at_level(logging.WARNING, logger="bpfree"):
        plugin.run_end(made)
    assert "no plot of the relaxation of a-run" in caplog.text
    assert made.artifacts == {"relaxation.json": path}
