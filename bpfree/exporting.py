"""Export of trained rules as programs without bpfree: ``torch.export`` and ONNX, checked against the rule itself.

A program takes raw inputs, as ``Saved.predict`` does, and returns ``scores`` and, for classes and labels, ``probabilities``; or
``outputs``. A rule that predicts with noise becomes a deterministic program: the noise of its first example with the seed, which every
example gets, so that the program predicts for each example what the rule predicts for it alone.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
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
from bpfree.tasks.trees import tree_map
from bpfree.version import __version__

__all__ = ["FORMATS", "TOLERANCE", "Exported", "check_kind", "export"]

Format = Literal["torch-export", "onnx"]
FORMATS = ("torch-export", "onnx")
TOLERANCE = 1e-4
"""Largest difference of an output from the rule's own, relative to 1 and the largest output of the batch, whichever is more."""
EXAMPLES = (1, 5)
"""Sizes of the batches on which a program for any size is checked."""
TRIALS = 8
"""Examples for which a rule must read the same values into Python, which then do not depend on its inputs."""
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
    examples = [_example(saved, count) for count in ((batch,) if batch else EXAMPLES)]
    about = _about(saved, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{'.onnx' if format == 'onnx' else '.pt2'}")
    try:
        with _quiet(), evaluating(saved.rule), torch.no_grad():
            program = _Program(saved, seed)
            try:
                _write(program, examples[-1], draft, format, dynamic=batch is None, about=about)
                loaded = _loaded(draft, format)
            except Exception as error:  # torch raises whatever its tracers meet
                raise _refused(saved, format, batch, error) from error
            difference = max(_compare(saved, program, loaded, example, seed, path) for example in examples)
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
    """What is exported: normalisation, prediction and probabilities of a rule, with its noise as constants.

    Args:
        saved: the trained rule.
        seed: of its noise.
    """

    def __init__(self, saved: Saved, seed: int) -> None:
        super().__init__()
        self.rule, self.spec, self._generator = saved.rule, saved.spec, torch.Generator()
        found = []
        for example in _example(saved, TRIALS).split(1):
            self._generator.manual_seed(seed)
            with evaluating(self.rule), torch.no_grad(), _Recording() as recording:
                self._predict(example)
            found.append(recording)
        if any(each.read != found[0].read for each in found):
            what = "the rule decides by the values of its inputs how it goes on, which a program cannot"
            raise BpfreeError(what, where=type(self.rule).__name__, fix="use bpfree predict, or bpfree.load in Python")
        self._read, self.draws = found[0].read, len(found[0].drawn)
        for place, drawn in enumerate(found[0].drawn):
            self.register_buffer(f"noise{place}", drawn)

    def _predict(self, inputs: Tensor) -> Tensor:
        return self.rule.predict(self.spec.normalise(inputs, self.rule.network.dtype), self._generator)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Predict for raw inputs (N, ...)."""
        with _Replay(self._read, [self.get_buffer(f"noise{place}") for place in range(self.draws)], inputs), _without_autocast():
            found = self._predict(inputs)
        if self.spec.targets not in NAMED:
            return {"outputs": found}
        shares = found.sigmoid() if self.spec.targets == "multilabel" else found.softmax(1)
        return {"scores": found, "probabilities": shares}


DRAWS = frozenset({"randn", "rand", "randint", "bernoulli", "multinomial", "normal", "randperm"})
DRAWS_IN_PLACE = frozenset({"normal_", "uniform_", "bernoulli_", "exponential_", "random_"})
READS = frozenset({"item", "tolist", "__bool__", "__float__", "__int__", "__index__"})
"""Functions that give values of a tensor to Python: a program has those of the weights as constants."""


def _is_draw(name: str, arguments: Mapping[str, Any]) -> bool:
    return arguments.get("generator") is not None and name in DRAWS | DRAWS_IN_PLACE


MANY = 1_000_003
"""What ``len`` says of a batch while a program for any number of examples is traced, as it cannot say "any"."""


class _Recording(TorchFunctionMode):
    """Record what a prediction draws from its generator, and which values it reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []
        self.read: list[Any] = []

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = getattr(function, "__name__", ""), function(*args, **(kwargs or {}))
        if _is_draw(name, kwargs or {}):
            self.drawn.append(result.detach().clone())
        elif name in READS:
            self.read += np.asarray(result, dtype=object).ravel().tolist()
        return result


class _Replay(TorchFunctionMode):
    """Give what was recorded for one example: values as they are, noise to each example of a batch.

    Args:
        read: values.
        drawn: noise.
        inputs: (N, ...) of the batch.
    """

    def __init__(self, read: list[Any], drawn: list[Tensor], inputs: Tensor) -> None:
        super().__init__()
        self._read, self._drawn, self._count = iter(read), iter(drawn), inputs.shape[0]

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name == "tolist" and args[0].dim():  # traced tensors ask for the parts of a list one by one
            return [part.tolist() for part in args[0]]
        if name in READS:
            return next(self._read)
        if name == "__len__" and isinstance(args[0].shape[0], torch.SymInt):
            return MANY
        args, kwargs = tree_map(self._counted, (args, kwargs))
        if function is torch.cdist and len(args) == 2:
            return _distances(*args)
        if not _is_draw(name, kwargs):
            return function(*args, **kwargs)
        known = next(self._drawn)
        wide = known.expand(self._count, *known.shape[1:]) if known.dim() and known.shape[0] == 1 else known
        return args[0].copy_(wide) if name in DRAWS_IN_PLACE else wide

    def _counted(self, argument: Any) -> Any:
        return self._count if type(argument) is int and argument == MANY else argument


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute ``torch.cdist``, which chooses its method by the number of examples."""
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).pow(2).sum(-1).sqrt()


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Leave out regions of autocast, which programs cannot have, and which do nothing in full precision."""
    before = torch.autocast
    torch.autocast = lambda *arguments, **options: nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = before  # type: ignore[misc]


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
    traced = torch.export.export(program, (example,), dynamic_shapes=shapes, strict=False)
    if format == "torch-export":
        torch.export.save(traced, path, extra_files={ABOUT: json.dumps(about)})
        return
    made = torch.onnx.export(traced, (), dynamo=True, input_names=["inputs"], output_names=_outputs(program), verbose=False)
    assert made is not None
    made.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    made.save(str(path), external_data=False)


def _refused(saved: Saved, format: Format, batch: int | None, error: Exception) -> BpfreeError:
    lines = re.sub(r"\x1b\[\d*m", "", told(error)).splitlines()  # without the colours of terminals
    reason = next((line.strip() for line in lines if line.strip()), "")[:300]
    what = f"the computation of this rule cannot be exported as {format}: {reason}"
    fix = "use bpfree predict, or bpfree.load in Python"
    return BpfreeError(what, where=type(saved.rule).__name__, fix=f"export it for one size: --batch N; or {fix}" if batch is None else fix)


def _outputs(program: _Program) -> list[str]:
    return ["scores", "probabilities"] if program.spec.targets in NAMED else ["outputs"]


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
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # torch prints programs that it could not make
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
