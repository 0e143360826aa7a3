"""Configurations: completed, typed, and refused with everything that is wrong at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import torch
import yaml

from bpfree import Task, TaskSpec, TrainConfig, UsageError, installed_plugins, mlp, option, vgg
from bpfree.baselines import Backprop
from bpfree.cli.annotate import annotate
from bpfree.config import parse_words, read_yaml, resolve
from bpfree.network import VGGConfig
from bpfree.recipe import RunConfig, TaskCommon
from bpfree.training.idle import idle_options
from bpfree.training.trainer import Trainer
from bpfree.typed import typed


def problems_of(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(parse_words(words))
    return "\n".join(caught.value.problems)


def test_an_error_carries_its_problems() -> None:
    """Oracle: the printed list, and the sentence with its place and remedy where there is only one."""
    with pytest.raises(UsageError) as caught:
        resolve(parse_words(["rule.scal=2", "seed=x", "seed=x"]))
    assert len(caught.value.problems) == 2
    assert str(caught.value).splitlines() == [
        "2 problems in the configuration:",
        "  - seed='x': must be a whole number",
        "    where: command line",
        "  - unknown key rule.scal of rule 'backprop'",
        "    where: command line",
        "    fix:   leave it out: there are no keys",
    ]
    assert UsageError("a", where="b", fix="c").problems == ["a: c (b)"]
    assert UsageError.of(["a", "a"], "study", where="b").problems == ["a (b)"]


def test_defaults_are_complete_and_resolve_to_themselves() -> None:
    recipe = resolve([])
    assert (recipe.names["rule"], recipe.names["network"], recipe.names["task"]) == ("backprop", "mlp", "digits")
    assert resolve(recipe.to_dict()) == recipe
    assert resolve(yaml.safe_load(annotate(recipe))) == recipe


def test_words_and_files_and_the_order_in_which_they_win(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("rule: dfa\nseed: 3\nnetwork: {name: mlp, norm: batch}\noptimizer: {lr: 1e-2, options: {betas: [0.5, 0.9]}}\n")
    recipe = resolve(read_yaml(file) + parse_words(["seed=4", "network.widths=[32, 16]", "optimizer.lr=2e-3"]))
    assert recipe.names["rule"] == "dfa"
    assert recipe.settings.seed == 4
    assert (recipe.options["network"].norm, recipe.options["network"].widths) == ("batch", [32, 16])
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
        "unknown protocol 'linear-probes': did you mean 'linear-probe'?",
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
    assert "use select=last" in problems_of("task.validation=0", "select=best-val")
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
    assert resolve(yaml.safe_load(annotate(long))) == long


def test_schedules_are_tried_before_anything_is_loaded() -> None:
    assert "refuses its options" in problems_of("schedule=CosineAnnealingLR", "schedule.options.T_max=10", "schedule.options.eta_min=low")
    assert "no warm-up" in problems_of("schedule=StepLR", "schedule.options.step_size=2", "schedule.warmup=0.1")
    assert "nowhere" in problems_of("output=${nowhere}")


@pytest.mark.parametrize("section", ["rule", "task", "network"])
@pytest.mark.parametrize("text", ["", "null", "~", "[a]", "{}", "''", "{name: null}", "{name: }", "{name: [a]}"])
def test_a_section_that_names_nothing_is_refused(section: str, text: str) -> None:
    """An unset variable of the shell leaves ``rule=``; that must not train the default under another label."""
    if text == "~":
        assert f"unknown {section} '~'" in problems_of(f"{section}=~")
    else:
        assert f"names no {section}: bpfree {section}s lists them" in problems_of(f"{section}={text}")


@pytest.mark.parametrize("value", [None, "", [], ["a"], {}, {"name": None}, {"name": {}}])
def test_the_same_from_python(value: object) -> None:
    for section in ("rule", "task", "network"):
        with pytest.raises(UsageError, match=r"names no|must be|has no parts|unknown key"):
            resolve({section: value})
    for section in ("optimizer", "schedule", "budget", "clip"):
        if value != {"name": None} or section in ("optimizer", "schedule"):
            with pytest.raises(UsageError):
                resolve({section: value})


def test_a_name_that_is_a_number_is_looked_up_as_it_is_typed() -> None:
    assert "unknown rule '5'" in problems_of("rule=5")
    assert "unknown rule '007'" in problems_of("rule=007")
    assert "unknown optimizer '5'" in problems_of("optimizer=5")
    assert "unknown schedule '1e3'" in problems_of("schedule=1e3")


@pytest.mark.parametrize("key", ["seed", "output", "optimizer.lr", "optimizer", "schedule", "budget.epochs", "data.root", "network.widths"])
def test_a_key_without_a_value_is_refused(key: str, tmp_path: Path) -> None:
    assert "has no value" in problems_of(f"{key}=")
    (tmp_path / "my.yaml").write_text(f"{key}:\n")
    with pytest.raises(UsageError, match="has no value"):
        resolve(read_yaml(tmp_path / "my.yaml"))


def test_a_value_has_the_type_of_its_key(tmp_path: Path) -> None:
    """Oracle: what is typed, letter by letter, for text; Python's int and float for numbers."""
    texts = ["007", "83e2010", "12:30", "2001-01-01", "0x10", "1_000", "true", "on", "no", "1e3", "-.5", "~", "a #b", "[x", "0o7"]
    for text in texts:
        recipe = resolve(parse_words([f"output={text}", f"tracking.experiment={text}", f"stream={text}", f"data.root={text}"]))
        settings = recipe.settings
        assert [settings.output, settings.tracking.experiment, settings.stream, settings.data.root] == [text] * 4
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert resolve(read_yaml(tmp_path / "again.yaml")) == recipe
    (tmp_path / "my.yaml").write_text("output: 007\nstream: 0o10\ntracking: {experiment: 83e2010}\nseed: 010\noptimizer: {lr: 1e-1}\n")
    recipe = resolve(read_yaml(tmp_path / "my.yaml"))
    assert (recipe.settings.output, recipe.settings.stream, recipe.settings.tracking.experiment) == ("007", "0o10", "83e2010")
    assert (recipe.settings.seed, recipe.settings.optimizer.lr) == (10, 0.1)
    assert resolve(parse_words(["network={widths: [010, 20]}"])).options["network"].widths == [10, 20]
    assert resolve(parse_words(["diagnostics=[]", "stream=null", "threads=null"])).settings.stream is None
    assert resolve(parse_words(["optimizer.options={eps: 1e-6, amsgrad: true}"])).settings.optimizer.options == {
        "eps": 1e-6,
        "amsgrad": True,
    }
    assert resolve({"output": 7, "seed": "010"}).settings.output == "7"
    assert resolve(parse_words(['output="null"'])).settings.output == "null"
    assert resolve(parse_words(["deterministic=yes"])).settings.deterministic is True


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=1.0", "seed=1.0: must be a whole number, such as 1"),
        ("seed=0x10", "must be a whole number"),
        ("seed=1_000", "must be a whole number, such as 1000"),
        ("budget.samples=1e6", "must be a whole number, such as 1000000"),
        ("seed=true", "must be a whole number"),
        ("optimizer.lr=fast", "optimizer.lr='fast': must be a number, or null"),
        ("optimizer.lr=true", "must be a number"),
        ("deterministic=1", "deterministic=1: must be true or false"),
        ("output=null", "must be text, not null"),
        ("output=[a]", "must be text, not a list"),
        ("network.widths=256,128", "must be a list: network.widths=[256,128]"),
        ("network.widths=256", "must be a list: network.widths=[256]"),
        ("network.widths=[a]", "must be a whole number"),
        ("network.activation=swish", "must be one of relu, leaky-relu"),
        ("network.activation=tan", "did you mean 'tanh'?"),
        ("optimizer.options=5", "must be a mapping: optimizer.options={name: value}"),
        ("optimizer.leraning_rate=0.1", "did you mean optimizer.lr?"),
        ("learning_rate=0.1", "did you mean optimizer.lr?"),
        ("optimizer.wd=0.1", "did you mean optimizer.weight_decay?"),
        ("batch-size=3", "did you mean batch_size?"),
    ],
)
def test_wrong_values_are_told_in_plain_words(word: str, expected: str) -> None:
    text = problems_of(word)
    assert expected in text
    assert "Config" not in text


def test_a_key_that_is_given_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    cases = {
        "seed: 1\nrule: dfa\nseed: 2\n": "seed is given twice, in lines 1 and 3",
        "optimizer:\n  lr: 1\n  lr: 2\n": "optimizer.lr is given twice, in lines 2 and 3",
        "optimizer: {lr: 1}\nseed: 1\noptimizer: {momentum: 0.9}\n": "optimizer is given twice, in lines 1 and 3",
        "rule: dfa\nrule.name: backprop\n": "rule.name is given twice, as rule and rule.name in lines 1 and 2",
        "rule: {name: dfa}\nrule.name: backprop\n": "rule.name is given twice, as rule.name in lines 1 and 2",
        "optimizer: {lr: 1}\n\noptimizer.lr: 2\n": "optimizer.lr is given twice, as optimizer.lr in lines 1 and 3",
    }
    for content, expected in cases.items():
        (tmp_path / "my.yaml").write_text(content)
        with pytest.raises(UsageError, match=expected):
            read_yaml(tmp_path / "my.yaml")
    with pytest.raises(UsageError, match="given twice"):
        resolve({"rule": "dfa", "rule.name": "backprop"})
    with pytest.raises(UsageError, match="given twice"):
        parse_words(["optimizer={lr: 1, lr: 2}"])
    assert resolve(parse_words(["seed=1", "seed=2", "rule=dfa", "rule.name=backprop"])).settings.seed == 2
    (tmp_path / "merged.yaml").write_text("optimizer: &base {name: sgd, lr: 1}\nschedule: {name: cosine}\n")
    assert resolve(read_yaml(tmp_path / "merged.yaml")).settings.optimizer.lr == 1


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for content in ("1: 2\n", "optimizer: {options: {1: 2}}\n", "null: 3\n", "true: {a: 1}\n"):
        (tmp_path / "my.yaml").write_text(content)
        with pytest.raises(UsageError, match="name must be text"):
            read_yaml(tmp_path / "my.yaml")
    with pytest.raises(UsageError, match="name must be text"):
        resolve({"optimizer": {1: 2}})
    for word in (".seed=1", "seed.=2", "rule.=3", "optimizer..lr=3", "rule.name.x=3", "seed.x=1"):
        problems_of(word)


@pytest.mark.parametrize(
    ("words", "both"),
    [
        (["schedule.final=0.5"], ("schedule.final=0.5", "schedule.name=constant")),
        (["schedule=cosine", "schedule.gamma=0.1"], ("schedule.gamma=0.1", "schedule.name=cosine")),
        (["schedule=linear", "schedule.milestones=[0.5]"], ("schedule.milestones=[0.5]", "schedule.name=linear")),
        (["schedule=cosine", "schedule.options={T_max: 3}"], ("schedule.options={T_max: 3}", "schedule.name=cosine")),
        (["schedule=ExponentialLR", "schedule.options={gamma: 0.9}", "schedule.warmup=0.1"], ("warmup=0.1", "schedule.name=ExponentialLR")),
        (["schedule=milestones"], ("schedule=milestones", "schedule.milestones")),
        (["clip.scope=global"], ("clip.scope=global", "clip.norm")),
        (["alignment.draws=4"], ("alignment.draws=4", "alignment.every=0")),
        (["network.width=64", "network.widths=[32]"], ("network.width=64", "with network.widths=[32]: it is for network.widths=[]")),
        (["network.depth=2", "network.widths=[32]"], ("network.depth=2", "network.widths=[32]")),
        (["network.width=64", "network.depth=0"], ("network.width=64", "with network.depth=0")),
        (["task.split_seed=3", "task.validation=0", "select=last"], ("task.split_seed=3", "task.validation=0")),
        (["data.workers=2", "data.resident=yes"], ("data.workers=2", "data.resident=yes")),
        (["pictures.count=9", "pictures.every=0"], ("pictures.count=9", "pictures.every=0")),
        (["optimizer=sgd", "optimizer.options={dampening: 0.5}"], ("optimizer.options.dampening", "momentum")),
        (["optimizer=sgd", "optimizer.options={lr: 0.5}"], ("optimizer.options.lr", "optimizer.lr=0.5")),
        (
            ["budget.epochs=4", "schedule=OneCycleLR", "schedule.options={max_lr: 1, total_steps: 4}", "optimizer.lr=0.3"],
            ("optimizer.lr=0.3", "schedule.name=OneCycleLR"),
        ),
    ],
)
def test_a_setting_that_another_makes_idle_is_refused_with_both(words: list[str], both: tuple[str, str]) -> None:
    text = problems_of(*words)
    assert both[0] in text
    assert both[1] in text


def test_a_pooling_after_a_convolution_that_there_is_not_is_refused_unless_it_is_the_default() -> None:
    images = TaskSpec("images", (3, 32, 32), 10)
    assert vgg(images, VGGConfig(channels=[8, 8])).shapes["b2"] == (8, 8, 8)
    with pytest.raises(UsageError, match=r"no convolution 3 to pool after: network\.channels has 2"):
        vgg(images, VGGConfig(channels=[8, 8], pool_after=[1, 3]))


@dataclass
class Conditional:
    """Options of which one is for a value of another, and one for all values of it but one."""

    kind: Literal["a", "b", "c"] = option("a", "which")
    of_a: int = option(1, "for a", needs={"kind": ("a",)})
    but_c: int = option(1, "for all but c", unless={"kind": ("c",)})
    of_either: int = option(1, "for a, or of_a=2", needs={"kind": ("a",), "of_a": (2,)})


def test_an_option_is_idle_where_others_say_so_and_it_is_not_what_it_was() -> None:
    def idle(base: Conditional | None = None, **given: Any) -> list[str]:
        return [key for key, _ in idle_options(Conditional(**given), base or Conditional(), "rule.")]

    assert idle(kind="a", of_a=5, but_c=5, of_either=5) == []
    assert idle(kind="b", of_a=5, but_c=5, of_either=5) == ["rule.of_a", "rule.of_either"]
    assert idle(kind="b", of_a=2, but_c=5, of_either=5) == ["rule.of_a"]
    assert idle(kind="c", of_a=1, but_c=5, of_either=1) == ["rule.but_c"]
    assert idle(Conditional(but_c=5), kind="c", but_c=5) == []
    assert idle(Conditional(but_c=5), kind="c", but_c=1) == ["rule.but_c"]


class Configured(Backprop):
    Config = Conditional


def test_an_idle_option_that_was_given_in_python_is_refused_before_training(digits: Task) -> None:
    rule = Configured(mlp(digits.spec), digits.spec, Conditional(kind="c", but_c=5))
    with pytest.raises(UsageError, match=r"rule\.but_c=5 does nothing with rule\.kind=c"):
        Trainer(rule, digits, TrainConfig())


def test_conditions_of_options_name_options_and_their_values() -> None:
    """Of all rules, networks and tasks that are installed; oracle: the types of the options that are named."""
    registry = installed_plugins()
    kinds = ("rules", "networks", "tasks")
    configs = {registry.get(kind, name).Config for kind in kinds for name in registry.names(kind)} | {RunConfig, TaskCommon}
    conditions = [
        (get_type_hints(config), key, value)
        for config in configs
        for item in fields(config)
        for needed in (item.metadata.get("needs", {}), item.metadata.get("unless", {}))
        for key, values in needed.items()
        for value in values
    ]
    assert len(conditions) > 20
    for hints, key, value in conditions:
        assert typed(value, hints[key], key) == value


@pytest.mark.parametrize(
    "options",
    [
        *("{betas: [0.9]}", "{betas: 0.9}", "{betas: [a, b]}", "{eps: small}", "{amsgrad: 'no'}", "{beta:3}"),
        *("{eps: null}", "{foreach: 1}", "{params: 1}"),
    ],
)
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor", "rprop"])
def test_options_that_an_optimiser_does_not_take_are_refused_by_name(name: str, options: str) -> None:
    text = problems_of(f"optimizer={name}", f"optimizer.options={options}")
    assert "optimizer.options." in text
    assert "unexpected" not in text


def test_null_is_an_option_where_torch_has_it() -> None:
    assert resolve(parse_words(["optimizer=adam", "optimizer.options={foreach: null}"])).settings.optimizer.options == {"foreach": None}


def test_a_device_that_cannot_be_is_refused_before_anything_is_looked_for() -> None:
    for name in ("nowhere", "cuda:x", "cpu0"):
        with pytest.raises(UsageError, match=f"unknown device '{name}'"):
            resolve(parse_words([f"device={name}"]))
    assert resolve(parse_words(["device=cuda:3"])).settings.device == "cuda:3"  # it may be there on another machine


def test_a_reference_of_another_type_does_not_show_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BPFREE_TEST_SECRET", "hunter2")
    for word in ("seed=${oc.env:BPFREE_TEST_SECRET}", "seed=${nothing.there}"):
        with pytest.raises(UsageError, match=r"seed: its reference .* give the value itself") as error:
            resolve(parse_words([word]))
        assert "hunter2" not in str(error.value)
