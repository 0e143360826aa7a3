"""Configurations: completed, typed, and refused with everything that is wrong at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from bpfree import UsageError
from bpfree.config import parse_words, read_yaml, resolve


def problems_of(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(parse_words(words))
    return str(caught.value)


def test_defaults_are_complete_and_resolve_to_themselves() -> None:
    recipe = resolve([])
    assert (recipe.names["rule"], recipe.names["network"], recipe.names["task"]) == ("backprop", "mlp", "digits")
    assert resolve(recipe.to_dict()) == recipe
    assert resolve(yaml.safe_load(recipe.to_yaml(comments=True))) == recipe


def test_words_and_files_and_the_order_in_which_they_win(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("rule: dfa\nseed: 3\nnetwork: {name: mlp, depth: 2}\noptimizer: {lr: 1e-2, options: {betas: [0.5, 0.9]}}\n")
    recipe = resolve(read_yaml(file) + parse_words(["seed=4", "network.widths=[32, 16]", "optimizer.lr=2e-3"]))
    assert recipe.names["rule"] == "dfa"
    assert recipe.settings.seed == 4
    assert (recipe.options["network"].depth, recipe.options["network"].widths) == (2, [32, 16])
    assert recipe.settings.optimizer.lr == 2e-3
    assert recipe.settings.optimizer.options == {"betas": [0.5, 0.9]}
    assert recipe.flat()["rule.scale"] == 1.0


def test_everything_wrong_is_reported_at_once_with_the_nearest_valid_name_or_range() -> None:
    text = problems_of(
        "rule=dfa", "rule.scal=2", "rule.scale=-1", "optimizer.lrr=1", "seed=x", "budget.epochs=0", "batchsize=3", "precision=fp16",
        "accumulate=100", "network.depth=two", "task.validation=1.5", "schedule=cosin", "task.augment=[flipp]", "budget=5"
    )  # fmt: skip
    for expected in (
        "unknown key rule.scal of rule 'dfa': did you mean rule.scale?",
        "rule.scale=-1 is out of range: must be > 0",
        "unknown key optimizer.lrr: did you mean optimizer.lr?",
        "seed='x'",
        "budget.epochs=0 is out of range: must be >= 1",
        "unknown key batchsize: did you mean batch_size?",
        "precision='fp16'",
        "task.validation=1.5 is out of range: must be >= 0 and < 1",
        "budget=5: is a section",
    ):
        assert expected in text, text
    text = problems_of(
        "network.depth=two", "schedule=cosin", "task.augment=[flipp]", "accumulate=100", "optimizer=adamx", "diagnostics=[x]",
        "evaluation.protocols=[linear-probes]"
    )  # fmt: skip
    for expected in (
        "network.depth='two'",
        "unknown schedule 'cosin'",
        "unknown augmentation 'flipp'",
        "accumulate=100",
        "unknown optimizer 'adamx'",
        "unknown diagnostic 'x'",
        "unknown protocol 'linear-probes' in evaluation.protocols (did you mean 'linear-probe'?",
    ):
        assert expected in text, text


def test_a_key_without_its_section_is_found() -> None:
    assert "did you mean task.augment?" in problems_of("augment=[flip]")
    assert "did you mean rule.scale?" in problems_of("rule=dfa", "scale=2")
    assert "did you mean optimizer.lr?" in problems_of("lr=0.1")


def test_names_are_checked_and_suggested() -> None:
    assert "unknown rule 'backprp'" in problems_of("rule=backprp")
    assert "did you mean 'backprop'" in problems_of("rule=backprp")
    assert "unknown task 'digit'" in problems_of("task=digit")
    assert "unknown network 'mpl'" in problems_of("network=mpl")
    assert "two" not in problems_of("rule=nosuchthing")


def test_settings_that_exclude_each_other() -> None:
    assert "needs select=last" in problems_of("task.validation=0", "select=best-val")
    assert "one limit" in problems_of("budget.epochs=1", "budget.samples=10")
    assert resolve(parse_words(["task.validation=0"])).task.validation == 0


def test_words_and_files_that_are_no_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected key=value"):
        parse_words(["--lr"])
    with pytest.raises(UsageError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UsageError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")
    (tmp_path / "object.yaml").write_text("seed: !!python/object/apply:os.getcwd []")
    with pytest.raises(UsageError, match="not valid YAML"):
        read_yaml(tmp_path / "object.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UsageError, match="must be a mapping"):
        read_yaml(tmp_path / "list.yaml")


def test_building_is_a_function_of_the_seed_and_leaves_the_callers_random_state() -> None:
    recipes = [resolve(parse_words([f"seed={seed}", "rule=dfa"])) for seed in (0, 0, 1)]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    rules = [recipe.build_rule(recipe.spec()) for recipe in recipes]
    assert torch.equal(torch.rand(2), expected)
    first, same, other = (rule.state_dict() for rule in rules)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["feedback_b1"], other["feedback_b1"])


def test_a_rule_with_a_network_of_its_own_gets_it() -> None:
    recipe = resolve(parse_words(["rule=noprop-dt", "rule.T=3"]))
    assert recipe.names["network"].startswith("noprop")
    assert recipe.options["network"].blocks == 3
    named = resolve(parse_words(["rule=noprop-dt", "rule.T=4", "network=noprop-cnn", "task=mnist"]))
    assert named.options["network"].blocks == 4


def test_values_mean_what_people_mean() -> None:
    """1e-8 is a number, and no is a word, in words and in files; a long value with comments beside it is read back."""
    recipe = resolve(parse_words(["optimizer.options.eps=1e-8", "data.resident=no", "optimizer.options.betas=[0.5,.9]", "seed=007"]))
    assert recipe.settings.optimizer.options == {"eps": 1e-8, "betas": [0.5, 0.9]}
    assert recipe.settings.data.resident == "no"
    assert resolve(parse_words(["data.resident=yes", "deterministic=true"])).settings.deterministic is True
    folder = "/a very long folder name/" * 12
    long = resolve(parse_words([f"data.root={folder}"]))
    assert resolve(yaml.safe_load(long.to_yaml(comments=True))) == long


def test_schedules_are_tried_before_anything_is_loaded() -> None:
    assert "refuses its options" in problems_of("schedule=CosineAnnealingLR", "schedule.options.T_max=10", "schedule.options.eta_min=low")
    assert "no warm-up" in problems_of("schedule=StepLR", "schedule.options.step_size=2", "schedule.warmup=0.1")
    assert "nowhere" in problems_of("output=${nowhere}")
