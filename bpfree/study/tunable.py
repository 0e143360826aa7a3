"""Whether a study can be tuned as its file says: checked before anything runs, all problems reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bpfree.errors import UsageError
from bpfree.leaves import Leaf, canonical
from bpfree.study.cells import Place, Plan, recipe_with
from bpfree.study.space import Domain, Interval, Tune

__all__ = ["check_tuning"]

UNFAIR = {
    "budget": "a row would have more training than another",
    "evaluation": "trials would not be measured alike",
    "select": "trials would not be measured alike",
    "stream": "it draws other random numbers, and is no better for it",
    "task": "trials would not be measured alike",
    "task.name": "trials would not be measured alike",
    "task.split_seed": "trials would not be measured alike",
    "task.validation": "trials would not be measured alike",
}


def check_tuning(plan: Plan) -> None:
    """Try every choice and both ends of every interval.

    Raises:
        UsageError: with everything that is wrong.
    """
    tune = plan.study.tune
    if tune is None:
        return
    found: dict[str, list[str]] = {}
    for place in plan.places:
        for problem in _problems(place, tune) if place.row.space else ():
            found.setdefault(problem, []).append(place.row.label)
    listed = [f"{problem} (row {', '.join(dict.fromkeys(rows))})" for problem, rows in found.items()] or [*_unused_settings(plan, tune)]
    if listed:
        raise UsageError.of(listed, "study", where=f"study {plan.study.name}: tune")


def _problems(place: Place, tune: Tune) -> Iterator[str]:
    settings = [Leaf(key, value, "tune: settings", shared=True) for key, value in tune.settings.items()]
    try:
        if not recipe_with(place, settings)[0].task.validation:
            yield "tuning chooses on the validation split, and task.validation is 0"
    except UsageError as error:
        yield from error.problems
        return
    for key, domain in place.row.space.items():
        reason = UNFAIR.get(key, UNFAIR.get(key.split(".")[0]) if key.split(".")[0] in ("budget", "evaluation") else None)
        if reason is not None:
            yield f"{key} is not to be tuned: {reason}"
            continue
        yield from _not_used(place, key, settings)
        for value in _tried(domain):
            try:
                recipe_with(place, [*_leaves({key: value}), *settings])
            except UsageError as error:
                yield from error.problems


def _leaves(values: Mapping[str, Any]) -> list[Leaf]:
    return [Leaf(key, value, "tune: space", shared=True) for key, value in values.items()]


def _not_used(place: Place, key: str, settings: Sequence[Leaf]) -> Iterator[str]:
    """What is wrong if none of its values is used, whatever one other key that is tuned is set to."""
    space, reason = place.row.space, ""
    others: list[dict[str, Any]] = [{}, *({other: value} for other in space if other != key for value in _tried(space[other]))]
    for other in others:
        for value in _tried(space[key]):
            try:
                unused = recipe_with(place, [*_leaves({**other, key: value}), *settings])[0].unused
            except UsageError:  # which is reported on its own
                return
            name = canonical(key, value)
            if name not in unused:
                return
            reason = reason or unused[name]
    yield f"{key} is tuned and not used: {reason}; tune: {{{key}: null}} of the row takes it away"


def _unused_settings(plan: Plan, tune: Tune) -> Iterator[str]:
    """Settings of trials that no row uses."""
    leaves = [Leaf(key, value, "tune: settings", shared=True) for key, value in tune.settings.items()]
    recipes = [recipe_with(place, leaves)[0] for place in plan.places if place.row.space]
    for leaf in leaves if recipes else ():
        key = canonical(leaf.key, leaf.value)
        if all(key in recipe.unused for recipe in recipes):
            yield f"{key} is used by no row: {recipes[0].unused[key]}"


def _tried(domain: Domain) -> list[Any]:
    return [domain.low, domain.high] if isinstance(domain, Interval) else list(domain.values)
