"""What runs can be found by. Oracles: a class whose lines are counted by hand, and what rules declare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bpfree import Batch, Broadcast, Step, always
from bpfree.baselines import DFA, Backprop, Linear
from bpfree.code_lines import class_lines, code_lines
from bpfree.config import parse_words, resolve
from bpfree.plugins import installed_plugins
from bpfree.recorded import standard_tags
from bpfree.runner import run


class Base(Broadcast):
    """Four lines."""

    # a comment
    scale = (  # 1
        2.0  # 2
    )  # 3

    """Not code either."""
    text = """4
    5"""


class Counted(Base):
    """Docstring
    of two lines."""

    def signals(self, traces: Any, batch: Batch, error: Tensor, step: Step) -> list[Tensor]:  # 2
        """Of a function."""
        # a comment

        def inner(x: Tensor) -> Tensor:  # 3
            return x.sum(  # 4
                dim=1,  # 5
            )  # 6

        return [inner(error)]  # 7


def test_lines_are_counted_without_blanks_comments_and_docstrings() -> None:
    """Counted by hand: seven of the class with its first, six of its base; the contract's bases do not count."""
    assert class_lines(Base) == 6
    assert class_lines(Counted) == 7 + 6
    assert code_lines("x = 1\n\n# no\ny = '''a\nb'''  # yes\n'no'\n") == 3
    assert code_lines("    def f(): 'no'\n") == 1


def test_lines_of_bases_elsewhere_do_not_count_and_a_class_without_source_has_no_number() -> None:
    class Derived(Backprop):
        draws_of = always(3)

    assert class_lines(Derived) == 2
    space: dict[str, Any] = {"Backprop": Backprop, "__name__": "nowhere"}
    exec("class Typed(Backprop): pass", space)
    assert class_lines(space["Typed"]) is None


@pytest.mark.parametrize("name", installed_plugins().names("rules"))
def test_every_rule_has_lines(name: str) -> None:
    lines = class_lines(installed_plugins().get("rules", name))
    assert lines is not None
    assert 2 <= lines < 1000
    if name == "linear":
        assert lines == class_lines(Linear) > class_lines(Backprop) > 0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("backprop", {"reverse_span": "all", "dependence": "all", "downstream_weights": "all", "supervision": "labels"}),
        ("dfa", {"reverse_span": "1", "downstream_weights": "0", "own_network": "False", "rule_lines": str(class_lines(DFA))}),
        ("linear", {"own_network": "True"}),
    ],
)
def test_tags_say_what_a_rule_declares(name: str, expected: dict[str, str]) -> None:
    recipe = resolve(parse_words([f"rule={name}"]))
    task = recipe.build_task()
    rule = recipe.build_rule(task.spec)
    tags = standard_tags(recipe, task, rule)
    assert tags.items() >= expected.items()
    assert tags["supervision"] == rule.traits.supervision
    assert all(isinstance(value, str) for value in tags.values())


def test_a_run_has_them(tmp_path: Any) -> None:
    words = [
        "rule=dfa",
        "budget.epochs=1",
        "tracking.enabled=false",
        "device=cpu",
        f"output={tmp_path}",
        f"threads={torch.get_num_threads()}",
    ]
    made = run(resolve(parse_words(words)), quiet=True, tags={"study": "mine", "seed": "other"})
    assert made.tags.items() >= {"study": "mine", "seed": "other", "reverse_span": "1", "rule": "dfa"}.items()
