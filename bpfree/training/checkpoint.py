"""Checkpoints: written atomically, read without running code, complete enough to resume bit for bit.

A checkpoint is one file of tensors and plain values (``torch.load(..., weights_only=True)``):

``format``, ``bpfree``          version of this layout, and of the core
``config``                      the run's configuration, nested; ``None`` for a network made in Python
``rule``, ``task``              the rule's class or name, and the task's spec
``weights``                     the rule's state dict: its network, heads, buffers
``training``                    absent from weights-only files: position, optimisers, generators, meters, best so far
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bpfree.errors import BpfreeError, UsageError
from bpfree.files import remove_abandoned, replacing
from bpfree.record.folder import RunFolder
from bpfree.rule import Rule
from bpfree.step import Phase

__all__ = ["FORMAT", "check_rule", "find_checkpoint", "load_weights", "read_checkpoint", "replay", "write_checkpoint"]

FORMAT = 1


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write or replace the file as a whole; what killed processes have left of others is removed."""
    remove_abandoned(path.parent, path.name)
    with replacing(path, durable=True) as file:
        torch.save({"format": FORMAT, **content}, file)


def read_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        BpfreeError: the file is corrupt, no checkpoint, or of a later format.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BpfreeError(
            f"cannot read the checkpoint: {first}", where=str(path), fix="it is corrupt, or was not written by bpfree"
        ) from error
    if not isinstance(content, dict) or "weights" not in content or "format" not in content:
        raise BpfreeError("the file is no checkpoint of bpfree", where=str(path))
    if content["format"] > FORMAT:
        raise BpfreeError(
            f"the checkpoint has format {content['format']}, this version reads up to {FORMAT}", where=str(path), fix="update bpfree"
        )
    return content


def check_rule(content: Mapping[str, Any], rule: Rule, path: Path) -> None:
    """Refuse the checkpoint of another rule.

    Raises:
        BpfreeError: it is.
    """
    if content["rule"] != type(rule).__name__:
        raise BpfreeError(f"the checkpoint is of another rule: {content['rule']}, not {type(rule).__name__}", where=str(path))


def replay(rule: Rule, phases: Iterator[Phase], content: Mapping[str, Any]) -> Iterator[Phase]:
    """Begin the phases that had begun when a checkpoint was written, which may make parameters; its weights fit afterwards.

    Args:
        rule: freshly built.
        phases: of its run, from the first; those that come next are left in it.
        content: of the checkpoint.
    """
    for phase in itertools.islice(phases, content["phases_begun"]):
        rule.start_phase(phase)
        yield phase


def load_weights(rule: Rule, content: Mapping[str, Any], where: str = "", fix: str = "") -> None:
    """Take up a checkpoint's weights, once its phases are replayed.

    Raises:
        BpfreeError: they do not fit the network.
    """
    try:
        rule.load_state_dict(content["weights"])
    except RuntimeError as error:
        place = str(error).splitlines()[-1].strip()
        raise BpfreeError("the checkpoint's weights do not fit this network", where=f"{where}{place}", fix=fix) from error


def find_checkpoint(place: str | Path, *, output: str | Path = "runs", prefer: str = "last") -> Path:
    """The checkpoint that a person means: a file, a run's folder, or a run's name under the output folder.

    Args:
        place: what was given.
        output: folder of runs.
        prefer: ``last`` (to resume), or ``selected`` (the weights that were tested).

    Raises:
        UsageError: if there is none.
    """
    candidates = [Path(place), Path(output) / str(place)]
    for candidate in candidates:
        folder = RunFolder(candidate)
        remove_abandoned(folder.checkpoints, "*.pt")
        remove_abandoned(candidate, "predictions.npz")
        known = [candidate, folder.selected, folder.last] if prefer == "selected" else [candidate, folder.last]
        found = next((path for path in known if path.is_file()), None)
        if found is not None:
            return found
    unfinished = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if unfinished is not None:
        raise UsageError("the run has no checkpoint yet", where=str(unfinished), fix="start it again from the beginning")
    raise UsageError(
        "no such run or checkpoint", where=str(place), fix=f"give a checkpoint file, a run's folder, or the name of a run in {output}/"
    )
