"""The denoising blocks and the networks made of them.

A block sees an input x and a noised label embedding z (N, d), and returns class logits (N, m). Its work on x does not depend
on z (``features``), so that an evaluation with several z pays for it once.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.network.builders import NetworkBuilder
from bpfree.network.network import Network, evaluating
from bpfree.options import option
from bpfree.tasks.task import TaskSpec
from bpfree.tasks.trees import leaves, select
from bpfree_noprop.dropout import KeyedDropout, masks_from
from bpfree_noprop.embeddings import target_size

__all__ = ["NETWORKS", "CNNConfig", "DenoisingBlock", "LabelBlock", "MLPConfig", "PairedBlock", "PaperConfig", "paired"]


@dataclass
class DenoisingConfig:
    """What all NoProp networks have in common."""

    blocks: int = option(10, "number of blocks t1, t2, ...; must equal the rule's T", ge=1)
    state_dim: int | None = option(None, "dimension d of the noised label; none: the number of classes", ge=1)
    label: Literal["vector", "input"] = option(
        "vector", "path of the noised label: linear layers, or (input) a stem like the input's, for prototypes"
    )
    members: Literal[1, 2] = option(1, "twins in a block, each of which learns from one half of the data (2: for rule.state=crossfit)")


@dataclass
class MLPConfig(DenoisingConfig):
    """Narrow, deep blocks for vectors and tiny images."""

    width: int = option(64, "units of each layer", ge=1)
    depth: int = option(3, "layers between the joined paths and the logits", ge=0)


@dataclass
class CNNConfig(DenoisingConfig):
    """Small convolutional blocks for images of at least 16x16 pixels."""

    channels: int = option(16, "channels of the first convolution, doubled by the second", ge=1)
    width: int = option(128, "units of each linear layer", ge=1)


@dataclass
class PaperConfig(DenoisingConfig):
    """The discrete-time block of the paper's Figure 6."""

    dropout: float = option(0.2, "dropout after each convolution", ge=0, lt=1)


class LabelBlock(nn.Module):
    """A block that receives an input and a noised label; in its own-prediction twin only its last linear map learns.

    Args:
        state_dim: d.
        parts: children by name, among them ``out``.
    """

    stem: nn.Module
    label: nn.Module
    fuse: nn.Module
    out: nn.Linear

    def __init__(self, state_dim: int, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.state_dim = state_dim
        self._dropouts = [module for module in self.modules() if isinstance(module, KeyedDropout)]

    def masks(self, generator_for: Callable[[str], torch.Generator], name: str) -> AbstractContextManager[None]:
        """Draw the block's dropout masks from the generator ``<name>/dropout`` inside, if it has any dropout."""
        return masks_from(generator_for(f"{name}/dropout"), self._dropouts) if self._dropouts else nullcontext()

    def singles(self) -> Sequence[LabelBlock]:
        """Return the block, or the two that it is a pair of."""
        return [self]

    @abstractmethod
    def blind(self, x: Tensor) -> Tensor:
        """Return the activities (N, H) before the last linear map for an input alone: the state is z = 0."""

    def no_label(self, x: Tensor) -> Tensor:
        """Return the state z = 0 (N, d), which says nothing of a label."""
        return torch.zeros(leaves(x)[0].shape[0], self.state_dim, device=self.out.weight.device, dtype=self.out.weight.dtype)

    def freeze_body(self) -> None:
        """Fix all but the last linear map."""
        self.requires_grad_(False)
        self.out.requires_grad_(True)


class DenoisingBlock(LabelBlock):
    """``logits = out(fuse([stem(x), label(z)]))``.

    Args:
        stem: (N, *input_shape) to (N, F).
        label: (N, d) to (N, G).
        fuse: (N, F+G) to (N, H).
        out: (N, H) to (N, m).
        state_dim: d.
    """

    def __init__(self, stem: nn.Module, label: nn.Module, fuse: nn.Module, out: nn.Linear, state_dim: int) -> None:
        super().__init__(state_dim, stem=stem, label=label, fuse=fuse, out=out)

    def features(self, x: Tensor) -> Tensor:
        """Return (N, F): what the block computes from the input alone."""
        return self.stem(x)  # type: ignore[no-any-return]

    def hidden(self, features: Tensor, z: Tensor) -> Tensor:
        """Return activities (N, H) before the last linear map, of input features (N, F) and a state (N, d)."""
        return self.fuse(torch.cat([features, self.label(z)], dim=1))  # type: ignore[no-any-return]

    def blind(self, x: Tensor) -> Tensor:
        return self.hidden(self.features(x), self.no_label(x))

    def judge(self, features: Tensor, z: Tensor) -> Tensor:
        """Return logits (N, m) of input features (N, F) and a state (N, d)."""
        return self.out(self.hidden(features, z))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.judge(self.features(x), z)


class PairedBlock(DenoisingBlock):
    """Two blocks, each of which learns from one half of the training examples; together they answer the mean of their outputs.

    Args:
        members: two blocks of the same form.
    """

    def __init__(self, members: Sequence[DenoisingBlock]) -> None:
        LabelBlock.__init__(self, members[0].state_dim, members=nn.ModuleList(members))

    def singles(self) -> list[DenoisingBlock]:
        return list(cast(Iterable[DenoisingBlock], self.members))

    def features(self, x: Tensor) -> Tensor:
        """Return (N, 2F): both members' features side by side."""
        return torch.cat([member.features(x) for member in self.singles()], dim=1)

    def hidden(self, features: Tensor, z: Tensor) -> Tensor:
        """Return (N, 2H): both members' activities side by side."""
        parts = zip(self.singles(), features.chunk(2, dim=1), strict=True)
        return torch.cat([member.hidden(part, z) for member, part in parts], dim=1)

    def judge(self, features: Tensor, z: Tensor) -> Tensor:
        parts = zip(self.singles(), features.chunk(2, dim=1), strict=True)
        return torch.stack([member.judge(part, z) for member, part in parts]).mean(0)

    def no_label(self, x: Tensor) -> Tensor:
        return self.singles()[0].no_label(x)

    def freeze_body(self) -> None:
        for member in self.singles():
            member.freeze_body()

    def crossed(self, x: Any, z: Tensor, halves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits (N, m) of the member that learns from each example, and, without a graph, of the one that never does.

        A half of a single example is not normalised by its own statistics, but by the running ones.

        Args:
            x: inputs.
            z: (N, d) states.
            halves: places in the batch of the examples from which each member learns.
        """
        learned, foreign = [], []
        for member, other, part in zip(self.singles(), reversed(self.singles()), halves, strict=True):
            if len(part):
                seen, state = select(x, part), z[part]
                with evaluating(member) if len(part) < 2 else nullcontext():
                    learned.append(member(seen, state))
                with torch.no_grad(), evaluating(other):
                    foreign.append(other(seen, state))
        order = torch.cat(tuple(halves)).argsort()
        return torch.cat(learned)[order], torch.cat(foreign)[order]


def paired(make: Callable[[], DenoisingBlock], members: int) -> DenoisingBlock:
    """Make a block, or a pair of them."""
    return make() if members == 1 else PairedBlock([make() for _ in range(members)])


class Residual(nn.Module):
    """``r + f(r)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, r: Tensor) -> Tensor:
        return r + self.inner(r)  # type: ignore[no-any-return]


def dense(inputs: int, outputs: int) -> list[nn.Module]:
    """Build a linear layer, batch norm and ReLU."""
    return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]


def mlp_block(spec: TaskSpec, config: MLPConfig, d: int) -> DenoisingBlock:
    def stem() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), *dense(spec.input_size, config.width))

    label = stem() if config.label == "input" else nn.Sequential(*dense(d, config.width))
    sizes = [2 * config.width] + [config.width] * config.depth
    fuse = nn.Sequential(*(layer for pair in itertools.pairwise(sizes) for layer in dense(*pair)))
    return DenoisingBlock(stem(), label, fuse, nn.Linear(sizes[-1], target_size(spec)), d)


def cnn_block(spec: TaskSpec, config: CNNConfig, d: int) -> DenoisingBlock:
    channels, height, width = spec.input_shape
    first, second = config.channels, 2 * config.channels

    def stem() -> nn.Sequential:
        flat = second * ((height + 1) // 4) * ((width + 1) // 4)
        layers = nn.Sequential(
            *(nn.Conv2d(channels, first, 5, stride=2, padding=2), nn.BatchNorm2d(first), nn.ReLU()),
            *(nn.Conv2d(first, second, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(second), nn.ReLU()),
            *(nn.Flatten(), *dense(flat, config.width)),
        )
        return layers.to(memory_format=torch.channels_last)  # a quarter faster on a CPU

    label = label_stem(spec, stem()) if config.label == "input" else nn.Sequential(*dense(d, config.width))
    fuse = nn.Sequential(*dense(2 * config.width, config.width))
    return DenoisingBlock(stem(), label, fuse, nn.Linear(config.width, target_size(spec)), d)


def paper_block(spec: TaskSpec, config: PaperConfig, d: int) -> DenoisingBlock:
    channels, height, width = spec.input_shape

    def stem() -> nn.Sequential:
        layers = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), KeyedDropout(config.dropout)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), KeyedDropout(config.dropout)),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), KeyedDropout(config.dropout)),
            *(nn.Flatten(), nn.Linear(128 * (height // 4) * (width // 4), 256), nn.BatchNorm1d(256)),
        )
        return layers.to(memory_format=torch.channels_last)  # a block's step takes 0.8 to 0.9 of the time on a CPU

    deeper = Residual(nn.Sequential(*dense(256, 256), nn.Linear(256, 256), nn.BatchNorm1d(256)))
    label = label_stem(spec, stem()) if config.label == "input" else nn.Sequential(*dense(d, 256), deeper)
    fuse = nn.Sequential(*dense(512, 256), *dense(256, 128))
    return DenoisingBlock(stem(), label, fuse, nn.Linear(128, target_size(spec)), d)


def label_stem(spec: TaskSpec, stem: nn.Sequential) -> nn.Sequential:
    """Build the path of a noised label that is an image: (N, d) is folded to (N, *input_shape) first."""
    return nn.Sequential(nn.Unflatten(1, spec.input_shape), *stem)


def builder(
    make: Callable[[TaskSpec, Any, int], DenoisingBlock], options: type[DenoisingConfig], summary: str, *, images: bool
) -> NetworkBuilder:
    """Return a builder of networks of independent blocks ``t1``, ``t2``, ... from the maker of one block."""

    def build(spec: TaskSpec, config: DenoisingConfig | None = None) -> Network:
        config = options() if config is None else config
        d = config.state_dim if config.state_dim is not None else target_size(spec)
        check_inputs(spec)
        check_sizes(spec, config.label, d, images)
        blocks: dict[str, nn.Module] = {f"t{t}": paired(lambda: make(spec, config, d), config.members) for t in range(1, config.blocks + 1)}
        return Network(blocks, input_shape=spec.input_shape, readout=None, chain=False)

    return NetworkBuilder(build, options, summary)


def check_inputs(spec: TaskSpec, *, instead: str = "noprop") -> None:
    """Refuse inputs that the blocks' own stems do not take; ``instead`` names the network whose stem may take them.

    Raises:
        UsageError: tokens, or several tensors.
    """
    if not spec.takes_real_tensors:
        raise UsageError(
            "this network needs inputs that are one tensor of real numbers",
            where=f"task {spec.name}",
            fix=f"use network={instead} with a stem that takes them: network.stem=FILE.py:NAME, or a module in Python",
        )


def check_sizes(spec: TaskSpec, label: str, d: int, images: bool, *, instead: str = "noprop-mlp") -> None:
    """Refuse sizes that do not fit; ``instead`` names the network for inputs that are no images.

    Raises:
        UsageError: if the block needs images and the task has none, or a noised label shaped like an input has another size.
    """
    if images and (len(spec.input_shape) != 3 or min(spec.input_shape[1:]) < 4):
        raise UsageError(
            f"this network needs images of at least 4x4 pixels, not inputs of shape {spec.input_shape}", fix=f"use network={instead}"
        )
    if label == "input" and d != spec.input_size:
        raise UsageError(
            f"a noised label with the shape of an input has {spec.input_size} dimensions, not {d}",
            where="network.state_dim",
            fix=f"set network.state_dim={spec.input_size}, or network.label=vector",
        )


NETWORKS = {
    "noprop-mlp": builder(mlp_block, MLPConfig, "narrow denoising blocks for vectors and tiny images (NoProp)", images=False),
    "noprop-cnn": builder(cnn_block, CNNConfig, "small convolutional denoising blocks (NoProp)", images=True),
    "noprop-paper": builder(paper_block, PaperConfig, "denoising blocks of the NoProp paper's Figure 6, discrete time", images=True),
}
