"""Export of trained rules as programs without bpfree: ``torch.export`` and ONNX, checked against the rule itself.

A program takes raw inputs, as ``Saved.predict`` does, and returns ``scores`` and, for classes and labels, ``probabilities``; or
``outputs``. A rule that predicts with noise becomes a deterministic program: the noise of its first example with the seed, which every
example gets, so that the program predicts for each example what the rule predicts for it alone.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bpfree.errors import BpfreeError, UsageError, told
from bpfree.network.network import evaluating
from bpfree.saved import NAMED, Saved
from bpfree.version import __version__

__all__ = ["FORMATS", "TOLERANCE", "Exported", "check_kind", "export"]

Format = Literal["torch-export", "onnx"]
FORMATS = ("torch-export", "onnx")
TOLERANCE = 1e-4
"""Largest difference of an output from the rule's own, relative to 1 and the largest output of the batch, whichever is more."""
EXAMPLES = (1, 5)
"""Sizes of the batches on which a program for any size is checked."""
ABOUT = "bpfree.json"
"""Name of the description in a program of ``torch.export``."""


@dataclass(frozen=True)
class Exported:
    """A program that was exported and checked.

    Attributes:
        path: of the file.
        difference: largest absolute difference of an output from that of ``Saved.predict``.
        examples: on how many examples.
        about: what is recorded in the program: shapes, classes, rule, task, versions.
    """

    path: Path
    difference: float
    examples: int
    about: dict[str, Any]


def export(saved: Saved, path: str | Path, *, format: Format, batch: int | None = None, seed: int = 0) -> Exported:
    """Write a program that predicts what the rule predicts, load it again, and compare its outputs with the rule's.

    Args:
        saved: the trained rule; it is exported for the CPU.
        path: of the file, which is written only if the check has passed.
        format: ``torch-export`` (a ``.pt2`` file for ``torch.export.load``) or ``onnx``.
        batch: number of examples of a batch; ``None``: any.
        seed: of the noise of a stochastic rule.

    Raises:
        UsageError: inputs that are no single tensor, or a batch of less than one.
        BpfreeError: the rule's computation cannot be exported, or the program's outputs differ from the rule's.
    """
    check_kind(format, batch)
    path, spec = Path(path), saved.spec
    if spec.structure is not None:
        raise UsageError("its inputs are several tensors", where=f"task {spec.name}", fix="export it in Python, by torch.export")
    saved.to("cpu")
    program = _Program(saved, seed)
    examples = [_example(saved, count) for count in ((batch,) if batch else EXAMPLES)]
    about = _about(saved, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{'.onnx' if format == 'onnx' else '.pt2'}")
    try:
        with _quiet(), evaluating(saved.rule), torch.no_grad():
            _write(program, examples[-1], draft, format, dynamic=batch is None, about=about)
            difference = max(_compare(saved, program, _loaded(draft, format), example, seed, path) for example in examples)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return Exported(path, difference, sum(map(len, examples)), about)


def check_kind(format: str, batch: int | None) -> None:
    """Refuse a format that is not known, or whose packages are not installed, and a batch without examples."""
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}", where="format", fix=f"known: {', '.join(FORMATS)}")
    if batch is not None and batch < 1:
        raise UsageError(f"a batch of {batch} examples", where="batch", fix="give 1 or more, or dynamic")
    for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise BpfreeError(f"export to ONNX needs {name}", where=str(error), fix="pip install 'bpfree[onnx]'") from error


class _Program(nn.Module):
    """What is exported: normalisation, prediction and probabilities of a rule, with its noise as constants."""

    def __init__(self, saved: Saved, seed: int) -> None:
        super().__init__()
        self.rule, self._spec, self._generator = saved.rule, saved.spec, torch.Generator().manual_seed(seed)
        drawing = _Drawing([])
        with evaluating(self.rule), torch.no_grad(), drawing:
            self._predict(_example(saved, 1))
        for place, drawn in enumerate(drawing.made):
            self.register_buffer(f"noise{place}", drawn)
        self.draws = len(drawing.made)

    def _predict(self, inputs: Tensor) -> Tensor:
        return self.rule.predict(self._spec.normalise(inputs, self.rule.network.dtype), self._generator)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Predict for raw inputs (N, ...)."""
        with _Drawing([self.get_buffer(f"noise{place}") for place in range(self.draws)], inputs):
            found = self._predict(inputs)
        if self._spec.targets not in NAMED:
            return {"outputs": found}
        shares = found.sigmoid() if self._spec.targets == "multilabel" else found.softmax(1)
        return {"scores": found, "probabilities": shares}


DRAWS: frozenset[Any] = frozenset(
    {torch.randn, torch.rand, torch.randint, torch.bernoulli, torch.multinomial, torch.normal, torch.randperm}
)
IN_PLACE = frozenset({"normal_", "uniform_", "bernoulli_", "exponential_", "random_"})


class _Drawing(TorchFunctionMode):
    """Record what is drawn from a generator; or give what was recorded, of one example, to each example of a batch.

    Args:
        known: what was recorded; empty: record.
        inputs: (N, ...) of the batch.
    """

    def __init__(self, known: list[Tensor], inputs: Tensor | None = None) -> None:
        super().__init__()
        self._known, self._inputs, self._next, self.made = known, inputs, 0, list[Tensor]()

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if kwargs.get("generator") is None or name not in DRAWS | IN_PLACE:
            return function(*args, **kwargs)
        if self._inputs is None:
            drawn = function(*args, **kwargs)
            self.made.append(drawn.detach().clone())
            return drawn
        known = self._known[self._next]
        self._next += 1
        wide = known.expand(len(self._inputs), *known.shape[1:]) if known.dim() and len(known) == 1 else known
        return args[0].copy_(wide) if name in IN_PLACE else wide


def _example(saved: Saved, count: int) -> Tensor:
    """Make up raw inputs (N, ...) in the range of the task's: integers of a vocabulary, else float32."""
    spec, generator = saved.spec, torch.Generator().manual_seed(0)
    made = spec.example(count, generator)
    if not spec.takes_real_tensors:
        return made  # type: ignore[no-any-return]
    if spec.limits is not None:
        low, high = spec.limits
        return low + (high - low) * torch.rand(made.shape, generator=generator)
    shape = (1, -1) + (1,) * (made.dim() - 2)
    mean, std = (torch.tensor(values).view(shape) for values in (spec.mean, spec.std))
    return (made * std + mean) * (spec.scale or 1.0)  # type: ignore[no-any-return]


def _about(saved: Saved, batch: int | None) -> dict[str, Any]:
    spec = saved.spec
    return {
        "bpfree": __version__,
        "rule": saved.recipe.names["rule"] if saved.recipe else type(saved.rule).__name__,
        "task": spec.name,
        "input_shape": list(spec.input_shape),
        "input_range": None if spec.limits is None else list(spec.limits),
        "batch": batch or "dynamic",
        "targets": spec.targets,
        "classes": list(saved.classes),
    }


# --- writing and loading ------------------------------------------------------------------------------------------------------


def _write(program: _Program, example: Tensor, path: Path, format: Format, *, dynamic: bool, about: dict[str, Any]) -> None:
    shapes = {"inputs": {0: torch.export.Dim("batch", min=1)}} if dynamic else None
    try:
        traced = torch.export.export(program, (example,), dynamic_shapes=shapes, strict=False)
        if format == "torch-export":
            torch.export.save(traced, path, extra_files={ABOUT: json.dumps(about)})
            return
        made = torch.onnx.export(traced, (), dynamo=True, input_names=["inputs"], output_names=_outputs(program), verbose=False)
        assert made is not None
        made.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
        made.save(str(path), external_data=False)
    except BpfreeError:
        raise
    except Exception as error:  # torch raises whatever its tracers meet
        first = next((line.strip() for line in told(error).splitlines() if line.strip()), "")
        fix = "export it for batches of one size: --batch N" if dynamic else "use bpfree predict, or bpfree.load in Python"
        what = f"the computation of this rule cannot be exported as {format}: {first[:300]}"
        raise BpfreeError(what, where=type(program.rule).__name__, fix=fix) from error


def _outputs(program: _Program) -> list[str]:
    return ["scores", "probabilities"] if program._spec.targets in NAMED else ["outputs"]


def _loaded(path: Path, format: Format) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Load a program from its file, as its user will."""
    if format == "torch-export":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Tensor) -> Mapping[str, Tensor]:
        made = session.run(names, {session.get_inputs()[0].name: np.ascontiguousarray(inputs.numpy())})
        return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, made, strict=True)}

    return run


def _compare(
    saved: Saved, program: _Program, loaded: Callable[[Tensor], Mapping[str, Tensor]], example: Tensor, seed: int, path: Path
) -> float:
    """Return the largest difference of the loaded program's outputs from the rule's own.

    Raises:
        BpfreeError: it is beyond the tolerance.
    """
    found = loaded(example)
    parts = example.split(1) if program.draws else [example]  # noise is that of each example by itself
    expected = {"outputs": torch.cat([saved.predict(part, batch_size=len(example), seed=seed) for part in parts])}
    if saved.spec.targets in NAMED:
        shares = np.concatenate([saved.predict_proba(part, batch_size=len(example), seed=seed) for part in parts])
        expected = {"scores": expected["outputs"], "probabilities": torch.from_numpy(shares)}
    largest = 0.0
    for name, wanted in expected.items():
        wanted, made = wanted.double(), found[name].double()
        if made.shape != wanted.shape:
            raise _differs(path, f"{name} have shape {tuple(made.shape)}, not {tuple(wanted.shape)}")
        difference = float((made - wanted).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise _differs(path, f"{name} by up to {difference:.2g} on {len(example)} examples")
        largest = max(largest, difference)
    return largest


def _differs(path: Path, how: str) -> BpfreeError:
    what = f"the exported program does not predict what the rule predicts: {how} (tolerance {TOLERANCE:g})"
    return BpfreeError(what, where=str(path), fix="nothing was kept; use bpfree predict, or report this with the run's config.yaml")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the reports of torch's exporters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
