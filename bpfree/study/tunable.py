"""Whether a study can be tuned as its file says: looked at before anything runs, and everything that is wrong is said at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bpfree.config import Leaf
from bpfree.errors import UsageError
from bpfree.study.cells import Place, Plan, problems_of, recipe_with
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
    if found:
        listed = [f"{problem} (row {', '.join(dict.fromkeys(rows))})" for problem, rows in found.items()]
        what = listed[0] if len(listed) == 1 else f"{len(listed)} things are wrong in the study:\n" + "\n".join(f"  - {p}" for p in listed)
        raise UsageError(what, where=f"study {plan.study.name}: tune")


def _problems(place: Place, tune: Tune) -> Iterator[str]:
    settings = [Leaf(key, value, "tune: settings") for key, value in tune.settings.items()]
    try:
        if not recipe_with(place, settings)[0].task.validation:
            yield "tuning chooses on the validation split, and task.validation is 0"
    except UsageError as error:
        yield from problems_of(error)
        return
    for key, domain in place.row.space.items():
        reason = UNFAIR.get(key, UNFAIR.get(key.split(".")[0]) if key.split(".")[0] in ("budget", "evaluation") else None)
        if reason is not None:
            yield f"{key} is not to be tuned: {reason}"
            continue
        for value in _tried(domain):
            try:
                recipe_with(place, [Leaf(key, value, "tune: space"), *settings])
            except UsageError as error:
                yield from problems_of(error)


def _tried(domain: Domain) -> list[Any]:
    return [domain.low, domain.high] if isinstance(domain, Interval) else list(domain.values)
