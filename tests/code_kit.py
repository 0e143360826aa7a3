"""Files of code for tests: a rule, a network, a task; and code that leaves a mark when it is executed."""

from __future__ import annotations

from pathlib import Path

MINE = '''
import torch
from torch import nn

import bpfree


class Mine(bpfree.Broadcast):
    """A fixed random projection of the error."""

    def __init__(self, network, spec, config=None):
        super().__init__(network, spec, config)
        for name in self.network.hidden:
            self.register_buffer(f"b_{name}", torch.randn(spec.outputs, self.network.shapes[name].numel()))

    def signals(self, traces, batch, error, step):
        return [(error @ self.get_buffer(f"b_{t.name}")).view_as(t.output) for t in traces[:-1]]


class Net(nn.Sequential):
    def __init__(self, input_shape, outputs, width: int = 8):
        super().__init__(nn.Linear(input_shape[0], width), nn.ReLU(), nn.Linear(width, outputs))


def data(noise: float = 0.1):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(3, 4, generator=generator)[y] + noise * torch.randn(120, 4, generator=generator)
    return (x[:90], y[:90]), (x[90:], y[90:])
'''
MARKING = "from pathlib import Path\n\nPath({mark!r}).touch()\n"
"""Leaves a mark when it is executed."""
FAST = ["budget.epochs=1", "device=cpu", "threads=1", "tracking.enabled=false", "pictures.every=0", "pictures.curves=false"]
OURS = ["rule=mine.py:Mine", "network=mine.py:Net", "task=mine.py:data"]


def written(folder: Path, code: str = MINE, *, mark: Path | None = None, name: str = "mine.py") -> Path:
    """A file of code in a folder."""
    path = folder / name
    path.write_text(code + (MARKING.format(mark=str(mark)) if mark is not None else ""))
    return path
