"""Weights of a model from a file, for a stem whose blocks may name its parts in another way than the model itself."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError

__all__ = ["load_given"]

NESTED = ("state_dict", "model", "model_state", "weights", "network")
"""Keys under which files hold the state dict."""


@torch.no_grad()
def load_given(module: nn.Module, path: Path) -> None:
    """Fill all parameters and buffers of a module from a state dict in a file; what else the file has, such as a classifier, is left.

    Names are those of the module, or of the model that was cut into its blocks. A first convolution over grey images takes the sum of the
    file's kernels over the colours.

    Raises:
        UsageError: the file cannot be read, or lacks a tensor of this name and shape.
    """
    given = state_in(path)
    wanted = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if not name.endswith("num_batches_tracked")}
    for name, tensor in wanted.items():
        found = given.pop(name_in(given, name), None)  # each is used once
        if found is not None and found.dim() == 4 and found.shape[1] == 3 and tensor.shape[1:2] == (1,):
            found = found.sum(1, keepdim=True)
        if found is None or found.shape != tensor.shape:
            what = "has no weights" if found is None else f"has weights of shape {tuple(found.shape)}, not {tuple(tensor.shape)},"
            raise UsageError(
                f"the file {what} for {name}",
                where=str(path),
                fix="give the state dict of this very model: see network.options (a ResNet on small images has another first layer unless "
                "small_stem is false)",
            )
        tensor.copy_(found)


def name_in(given: Mapping[str, Tensor], name: str) -> str:
    """Return the name, with ``_`` for each dot, that a part of a block had in its model; empty if the file has none such.

    A block that is one submodule, ``layer1.0`` say, is called ``layer1_0``, or ``layer1`` where that holds nothing else, and has only the
    rest of the name inside; another one keeps whole names inside.
    """
    inside = name.removeprefix("blocks.")
    block, _, rest = (each.replace(".", "_") for each in inside.partition("."))
    nested = [key for key in given if key.startswith(f"{block}_") and key.endswith(f"_{rest}")]
    likely = [name.replace(".", "_"), inside.replace(".", "_"), *(nested if len(nested) == 1 else []), rest]
    return next((key for key in likely if key in given), "")


def state_in(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name, with ``_`` for each dot; nothing in it is executed.

    Raises:
        UsageError: the file cannot be read, or holds no tensors.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "give a state dict that was written by torch.save(model.state_dict(), ...)"
        raise UsageError("the file holds no weights that can be read safely", where=f"{path}: {reason}", fix=fix) from error
    while isinstance(content, Mapping) and (inner := next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), None)):
        content = inner
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UsageError("the file holds no state dict", where=str(path), fix="write one with torch.save(model.state_dict(), ...)")
    return {key.removeprefix("module.").replace(".", "_"): value for key, value in tensors.items()}
