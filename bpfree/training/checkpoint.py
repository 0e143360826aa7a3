"""Checkpoints: written atomically, read whole or not at all and without running code, complete enough to resume bit for bit.

A checkpoint is one file of tensors and plain values (``torch.load(..., weights_only=True)``):

``format``, ``bpfree``          version of this layout, and of the core
``config``                      the run's configuration, nested; ``None`` for a network made in Python
``rule``, ``task``              the rule's class or name, and the task's spec
``weights``                     the rule's state dict: its network, heads, buffers
``training``                    absent from weights-only files: position, optimisers, generators, meters, best so far
``digest``                      the method of the digest that the file ends with (files of version 0.1 have none)

The file is torch's zip archive with a comment, the SHA-256 of the archive: torch itself reads damaged numbers without a word.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch

from bpfree.errors import BpfreeError, DiskError, UsageError, did_you_mean
from bpfree.files import remove_abandoned, replacing
from bpfree.record.folder import RunFolder
from bpfree.rule import Rule
from bpfree.step import Phase, Stage

__all__ = ["FORMAT", "check_rule", "find_checkpoint", "keep_weights", "load_weights", "read_checkpoint", "replay", "write_checkpoint"]

logger = logging.getLogger("bpfree")

FORMAT = 1
DIGEST = "sha256"
MARK = b"bpfree sha256 "
TAIL = len(MARK) + 64
"""Bytes of the archive's comment: the mark and 64 hex digits."""
CHUNK = 1 << 20
KINDS: dict[str, type] = {"format": int, "weights": dict, "rule": str, "phases_begun": int, "training": dict}
"""Types of the entries of a checkpoint, where they exist."""
FIX = "use another file of its folder checkpoints, or train again: bpfree train --config RUN/config.yaml"


class _Hashed:
    """A file that is hashed as it is written.

    Args:
        file: open for writing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.new(DIGEST)
        self.trouble: OSError | None = None

    def write(self, content: Any) -> int:
        """Write the bytes and add them to the hash."""
        self.digest.update(content)
        try:
            return self._file.write(content)
        except OSError as error:
            self.trouble = error  # torch turns it into an error about its archive
            raise

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write or replace the file as a whole, with the digest of its bytes at the end; remove the temporary files of killed processes.

    Raises:
        DiskError: it cannot be written; the one before it stays.
    """
    remove_abandoned(path.parent, path.name)
    hashed: Any = None
    try:
        with replacing(path, durable=True) as file:
            hashed = _Hashed(file)  # torch asks for no more of a file
            torch.save({"format": FORMAT, "digest": DIGEST, **content}, hashed)
            file.seek(-2, 2)  # an archive ends with the length of its comment; torch writes none
            file.write(TAIL.to_bytes(2, "little") + MARK + hashed.digest.hexdigest().encode())
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else hashed and hashed.trouble
        if not isinstance(reason, OSError):
            raise
        fix = "make room there, then resume the run from its last checkpoint"
        raise DiskError(f"cannot write the checkpoint: {reason.strerror or reason}", where=str(path), fix=fix) from error


def read_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, and refuse it unless its bytes are those that were written.

    One of version 0.1, which has no digest, is read with a warning.

    Raises:
        BpfreeError: the file is damaged, no checkpoint, or of a later format.
    """
    try:
        with path.open("rb") as file:  # one open file: what is checked is what is read, also where another replaces it
            digested = _check_digest(file, path)
            content = torch.load(file, map_location=device, weights_only=True)
    except OSError as error:
        raise BpfreeError(f"cannot read the checkpoint: {error.strerror or error}", where=str(path), fix=FIX) from error
    except BpfreeError:
        raise
    except Exception as error:
        # torch's own message may advise to run the code in the file
        foreign = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "it holds objects other than tensors and plain values" if foreign else "it is damaged, or was not written by bpfree"
        raise BpfreeError(f"cannot read the checkpoint: {reason}", where=str(path), fix=FIX) from None
    if not isinstance(content, dict) or "weights" not in content or "format" not in content:
        raise BpfreeError("the file is no checkpoint of bpfree", where=str(path), fix=FIX)
    odd = [key for key, kind in KINDS.items() if not isinstance(content.get(key, kind()), kind)]
    if odd:
        raise BpfreeError(f"the checkpoint is not as bpfree writes it: {', '.join(odd)}", where=str(path), fix=FIX)
    if content["format"] > FORMAT:
        raise BpfreeError(
            f"the checkpoint has format {content['format']}, this version reads up to {FORMAT}", where=str(path), fix="update bpfree"
        )
    if not digested and content.get("digest") is not None:
        raise _damaged(path)
    if not digested:
        _warn_undigested(path)
    return content


def _check_digest(file: IO[bytes], path: Path) -> bool:
    """Tell whether the file has a digest, check it, and leave the file at its beginning.

    Raises:
        BpfreeError: the digest is another than that of its bytes.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - TAIL - 2))
    end = file.read()
    if end[2:].startswith(MARK):
        found, left = hashlib.new(DIGEST), size - len(end)
        file.seek(0)
        while left > 0 and (part := file.read(min(CHUNK, left))):
            found.update(part)
            left -= len(part)
        found.update(bytes(2))  # the length of the comment, before there was one
        if end != TAIL.to_bytes(2, "little") + MARK + found.hexdigest().encode():
            raise _damaged(path)
    file.seek(0)
    return end[2:].startswith(MARK)


def _damaged(path: Path) -> BpfreeError:
    return BpfreeError("cannot read the checkpoint: its bytes do not match its digest", where=str(path), fix=FIX)


@lru_cache(maxsize=64)
def _warn_undigested(path: Path) -> None:
    logger.warning("the checkpoint %s is of version 0.1 and has no digest, so damage to it cannot be detected", path)


def check_rule(content: Mapping[str, Any], rule: Rule, path: Path) -> None:
    """Refuse a checkpoint of a different rule.

    Raises:
        BpfreeError: it is.
    """
    if content["rule"] != type(rule).__name__:
        what = f"the checkpoint is of another rule: {content['rule']}, not {type(rule).__name__}"
        raise BpfreeError(what, where=str(path), fix="name the rule that it was made with")


def replay(rule: Rule, steps: Iterator[Stage | Phase], content: Mapping[str, Any]) -> Iterator[Stage | Phase]:
    """Begin the stages and phases that had begun when a checkpoint was written: they may make parameters, which its weights need.

    Args:
        rule: freshly built.
        steps: of its run (:func:`bpfree.tasks.stages.walk`), from the first; those that come next are left in it.
        content: of the checkpoint.
    """
    begun = 0
    while begun < content["phases_begun"] and (each := next(steps, None)) is not None:
        if isinstance(each, Phase):
            rule.start_phase(each)
            begun += 1
        else:
            rule.start_stage(each)
        yield each


def load_weights(rule: Rule, content: Mapping[str, Any], where: str = "", fix: str = "") -> None:
    """Load a checkpoint's weights, after its phases have been replayed.

    Raises:
        BpfreeError: they do not fit the network.
    """
    try:
        for name in rule.growing:
            if name in content["weights"]:
                owner, _, own = name.rpartition(".")
                setattr(rule.get_submodule(owner), own, torch.empty_like(content["weights"][name], device=rule.get_buffer(name).device))
        rule.load_state_dict(content["weights"])
    except RuntimeError as error:
        place = str(error).splitlines()[-1].strip()
        raise BpfreeError("the checkpoint's weights do not fit this network", where=f"{where}{place}", fix=fix) from error


def keep_weights(folder: Path) -> None:
    """Keep one checkpoint of a run that is over, with the weights that were tested and without what only a resumed run needs.

    Args:
        folder: of the checkpoints. Nothing changes where there is none, or where it cannot be read or written.
    """
    last = folder / "last.pt"
    with suppress(BpfreeError, OSError):
        if (folder / "selected.pt").is_file():
            last.unlink(missing_ok=True)
        elif last.is_file() and (content := read_checkpoint(last)).pop("training", None) is not None:
            write_checkpoint(last, content)


def find_checkpoint(place: str | Path, *, output: str | Path = "runs", prefer: str = "last") -> Path:
    """Find a checkpoint by its file, by a run's folder, or by a run's name under the output folder.

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
        remove_abandoned(candidate, "*")
        known = [candidate, folder.selected, folder.last] if prefer == "selected" else [candidate, folder.last, folder.selected]
        found = next((path for path in known if path.is_file()), None)
        if found is not None:
            return found
    fix = f"give a checkpoint file, a run's folder, or the name of a run in {output}/"
    unfinished = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if unfinished is not None and not any(file.exists() for file in (RunFolder(unfinished).config, RunFolder(unfinished).log.path)):
        held = sorted(path.parent.name for path in unfinished.glob("*/config.yaml"))
        raise UsageError("the folder is not a run's", where=str(unfinished), fix=f"name one of its runs: {held[-1]}" if held else fix)
    if unfinished is not None:
        raise UsageError("the run has no checkpoint yet", where=str(unfinished), fix="start it again from the beginning")
    guess = did_you_mean(Path(place).name, (path.parent.name for path in Path(output).glob("*/config.yaml")))
    raise UsageError("no such run or checkpoint", where=str(place), fix=guess or fix)
