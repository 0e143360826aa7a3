"""Blocks whose view of the input is any model: of a library, of a file, of an earlier run, or a module of one's own.

A *stem* is a model without its classifier, its output pooled or flattened to (N, F). Each block has one of its own, or all have one
together (``shared``). Blocks with stems of their own share nothing. A shared stem that learns gets gradients from every block, so that
through it each block learns from the weights of all others; one that is ``frozen`` gets none, and its features can be computed once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.code_files import shown
from bpfree.errors import UsageError
from bpfree.named_networks import build_network
from bpfree.network.builders import NetworkBuilder
from bpfree.network.network import Network, evaluating
from bpfree.options import option
from bpfree.tasks.task import TaskSpec
from bpfree.tasks.trees import leaves
from bpfree_noprop.blocks import DenoisingBlock, DenoisingConfig, LabelBlock, check_sizes, dense, paired
from bpfree_noprop.dropout import KeyedDropout, keyed, masks_from
from bpfree_noprop.embeddings import target_size
from bpfree_noprop.stem_sources import RUN, Made, called, headless, of_network, of_run, untold
from bpfree_noprop.weights import load_given

__all__ = ["NETWORKS", "Maker", "Stem", "StemConfig", "StemNetwork", "ViewConfig", "noprop_network", "shared_stem"]


@dataclass
class ViewConfig:
    """A model through which blocks see the input, and the sizes of what they make of its features."""

    stem: Any = option(
        "auto",
        "model that sees the input: a network's name (mlp, vgg, torchvision:resnet18, timm:NAME), FILE.py:NAME or run:NAME; a list has one "
        "for each block; auto: mlp, or torchvision:resnet18 for images",
    )
    options: dict[str, Any] = option(factory=dict, help="options of the stem's network, such as {depth: 2}")
    weights: str = option("", "file of weights with which stems begin, such as a pretrained model's state dict")
    frozen: bool | None = option(None, "stems keep their weights (none: those of a shared stem that come from weights= or run:)")
    pool: Literal["auto", "mean", "flatten"] = option(
        "auto", "how a stem's output becomes a vector: means over places, or flat; auto: flat where a classifier was cut off"
    )
    image_size: int = option(0, "side in pixels of the squares to which stems resize their images (0: not resized)", ge=0, le=4096)
    width: int = option(128, "units of the label's path, of what is read from the stem's features, and of the joined layers", ge=1)
    depth: int = option(1, "layers between the joined paths and the logits", ge=0)

    @property
    def found(self) -> bool:
        """Whether the file of weights, if there is to be one, is there."""
        return not self.weights or Path(self.weights).expanduser().is_file()


@dataclass
class StemConfig(ViewConfig, DenoisingConfig):
    """Blocks that see the input through any model."""

    shared: bool = option(False, "one stem for all blocks; if it learns, blocks learn from each other's weights through it")
    keep: bool = option(True, "compute the features of a shared frozen stem once for each split, and keep them", needs={"shared": (True,)})


class Stem(nn.Module):
    """A model without its classifier, from inputs to features (N, F).

    Args:
        body: the model.
        what: it is, in words.
        spec: of the task.
        pool: ``mean`` over places of (N, C, H, W) or (N, L, C), or ``flatten``.
        image_size: to which images are resized first; 0: they are not.
        frozen: whether it keeps its weights and statistics, and is always in eval mode.

    Raises:
        UsageError: it does not take the task's inputs, or gives something else than a tensor.
    """

    def __init__(self, body: nn.Module, what: str, spec: TaskSpec, *, pool: str, image_size: int = 0, frozen: bool = False) -> None:
        super().__init__()
        self.body, self.pool, self.image_size, self.frozen = keyed(body), pool, image_size, frozen
        self.size = self._fitted(what, spec)
        self.what = f"{what}, {self.size} features"
        self._dropouts = [part for part in self.modules() if isinstance(part, KeyedDropout)]
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def _fitted(self, what: str, spec: TaskSpec) -> int:
        """Return F, and lay convolutions out as they are fastest, where the model's own views allow it."""
        weight = next((p for p in self.body.parameters() if p.is_floating_point()), torch.zeros(()))
        example = spec.example(2, dtype=weight.dtype)
        try:
            if any(isinstance(part, nn.Conv2d) for part in self.body.modules()):
                self.body.to(memory_format=torch.channels_last)
                try:
                    return self._measure(example)
                except RuntimeError:  # such as a view of an output whose channels come last
                    self.body.to(memory_format=torch.contiguous_format)
            return self._measure(example)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise UsageError(
                f"the stem ({what}) cannot take an input of shape {spec.input_shape}",
                where=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}",
                fix="choose a stem for such inputs; network.image_size=224 (image_size=224) resizes images in front of it",
            ) from error

    def _measure(self, example: Any) -> int:
        versions = [leaf._version for leaf in leaves(example)]
        with torch.inference_mode(False), torch.no_grad(), evaluating(self):
            size = int(self(example).shape[1])
        if [leaf._version for leaf in leaves(example)] != versions:
            raise TypeError("it overwrites its input, which other blocks see too (set inplace=False on its first operation)")
        return size

    def train(self, mode: bool = True) -> Stem:
        """Set the mode; a frozen stem stays in eval mode."""
        return super().train(mode and not self.frozen)

    def masks(self, generator_for: Callable[[str], torch.Generator]) -> AbstractContextManager[None]:
        """Draw the dropout masks of a shared stem from the generator ``stem/dropout`` inside."""
        return masks_from(generator_for("stem/dropout"), self._dropouts) if self._dropouts else nullcontext()

    def forward(self, x: Any) -> Tensor:
        if self.image_size:
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        h = self.body(x)
        if not isinstance(h, Tensor):
            raise TypeError(f"it returns {type(h).__name__}, not a tensor")
        if self.pool == "mean" and h.dim() in (3, 4):
            h = h.mean(1) if h.dim() == 3 else h.mean((2, 3))
        return h.flatten(1)


class StemNetwork(Network):
    """Denoising blocks ``t1``, ``t2``, ..., each behind a stem of its own, or all behind one.

    Args:
        blocks: by name; behind a shared stem they take its features.
        spec: of the task.
        stem: the shared one.
        keep: whether its features are to be kept, if it is frozen.
        missing: file of weights that was not found, so that stems are as initialised.
    """

    def __init__(
        self, blocks: dict[str, nn.Module], spec: TaskSpec, stem: Stem | None = None, *, keep: bool = True, missing: str = ""
    ) -> None:
        example = None if spec.takes_real_tensors else spec.example(1)
        super().__init__(blocks, input_shape=spec.input_shape, chain=False, example=example)
        self.stem, self.keep, self.missing = stem, keep, missing

    def plan(self) -> str:
        """Say in plain text what the blocks see the input through, what they share, and what that means for locality."""
        if self.stem is None:
            singles = [single for block in self.blocks.values() for single in cast(LabelBlock, block).singles()]
            stems = [cast(nn.Sequential, single.stem)[0] for single in singles]
            kinds = list(dict.fromkeys(cast(Stem, stem).what for stem in stems))
            state = "keep their weights" if all(cast(Stem, stem).frozen for stem in stems) else "learn with their blocks"
            if len(stems) == 1:
                return f"stem: {stems[0].what}, which {'keeps its weights' if stems[0].frozen else 'learns with its block'}"
            return f"stems: one for each block ({'; '.join(kinds)}), which {state}; blocks share none of it"
        if self.stem.frozen:
            kept = "computed once for each split and kept, unless augmented" if self.keep else "computed for each batch"
            return f"stem: one for all blocks ({self.stem.what}), frozen: it gets no gradient, blocks stay independent; features are {kept}"
        return (
            f"stem: one for all blocks ({self.stem.what}), which learns from the gradients of every block: through it blocks learn "
            "from each other's weights (dependence and downstream weights: all)"
        )


def shared_stem(network: Network | None) -> Stem | None:
    """Return the stem that all blocks of a network share; ``None``: they share none."""
    return network.stem if isinstance(network, StemNetwork) else None


def noprop_network(
    spec: TaskSpec,
    stem: Any = "auto",
    *,
    blocks: int | None = None,
    shared: bool = False,
    frozen: bool | None = None,
    weights: str | Path = "",
    keep: bool = True,
    options: dict[str, Any] | None = None,
    pool: Literal["auto", "mean", "flatten"] = "auto",
    image_size: int = 0,
    width: int = 128,
    depth: int = 1,
    state_dim: int | None = None,
    label: Literal["vector", "input"] = "vector",
    members: Literal[1, 2] = 1,
) -> StemNetwork:
    """Make a network of denoising blocks, each of which sees the input through any model.

    Args:
        spec: of the task.
        stem: a class or function that makes the model (it may take ``spec``, ``input_shape`` and ``outputs``, and gets ``options``); a
            module, of which each block gets a copy with its weights; a name, as ``network.stem`` takes it; or a list, one for each block.
            A last linear layer with as many outputs as the task has is a classifier, and is left out.
        blocks: T; ``None``: as many as a list has, or 10.
        shared, frozen, weights, keep, options, pool, image_size, width, depth, label, members: see :class:`StemConfig`.
        state_dim: d; ``None``: of one-hot classes or labels, or of real targets.

    Raises:
        UsageError: a stem that cannot be made, or does not fit the task.
    """
    place = str(weights)
    if place and not Path(place).expanduser().is_file():
        raise UsageError("there is no such file of weights", where=place, fix="give the path of a state dict that torch.save has written")
    config = StemConfig(
        blocks=(len(stem) if isinstance(stem, (list, tuple)) else 10) if blocks is None else blocks,
        state_dim=state_dim,
        label=label,
        members=members,
        stem=stem,
        options=options or {},
        weights=place,
        shared=shared,
        frozen=frozen,
        keep=keep,
        pool=pool,
        image_size=image_size,
        width=width,
        depth=depth,
    )
    return build(spec, config)


def build(spec: TaskSpec, config: StemConfig | None = None) -> StemNetwork:
    """Build the network of a configuration.

    A file of weights may be missing, since a trained rule is loaded with its own; training refuses it then.

    Raises:
        UsageError: a stem that cannot be made, or does not fit the task.
    """
    config = config or StemConfig()
    d = config.state_dim if config.state_dim is not None else target_size(spec)
    check_sizes(spec, config.label, d, images=False)
    sources = sources_of(config)
    given = bool(config.weights) or all(isinstance(each, str) and each.startswith(RUN) for each in sources)
    frozen = config.shared and given if config.frozen is None else config.frozen
    makers = {key_of(source): Maker(source, spec, config, frozen=frozen) for source in sources}
    whole = makers[key_of(sources[0])]() if config.shared else None
    blocks: dict[str, nn.Module] = {}
    for t, source in enumerate(sources, start=1):
        make = makers[key_of(source)]

        def member(make: Maker = make) -> DenoisingBlock:
            return block(whole or make(), make if config.label == "input" else None, spec, config, d, shared=config.shared)

        blocks[f"t{t}"] = paired(member, config.members)
    return StemNetwork(blocks, spec, whole, keep=config.keep, missing="" if config.found else config.weights)


def sources_of(config: StemConfig) -> list[Any]:
    """Return what each block's stem is made from.

    Raises:
        UsageError: a list of another length than there are blocks, or of several stems for one that is shared.
    """
    sources = list(config.stem) if isinstance(config.stem, (list, tuple)) else [config.stem] * config.blocks
    if len(sources) != config.blocks:
        what = f"{len(sources)} stems for {config.blocks} blocks"
        raise UsageError(what, where="network.stem", fix=f"list {config.blocks}, or set network.blocks and rule.T to {len(sources)}")
    if config.shared and len(set(map(key_of, sources))) > 1:
        raise UsageError("blocks cannot share several stems", where="network.stem, network.shared", fix="name one, or network.shared=false")
    if config.shared and config.label == "input":
        what = "the path of a noised label that is an image has a stem of its own, which a shared stem rules out"
        raise UsageError(what, where="network.label, network.shared", fix="rule.embedding=learned, or network.shared=false")
    return sources


def key_of(source: Any) -> Any:
    """Return what is the same for the same source."""
    return source if isinstance(source, str) else id(source)


def block(view: Stem, label: Callable[[], Stem] | None, spec: TaskSpec, config: StemConfig, d: int, *, shared: bool) -> DenoisingBlock:
    """Build a block behind its stem, or behind the features of a shared one.

    Args:
        view: the stem.
        label: makes the stem of a noised label that has the shape of an input; ``None``: the label is a vector.
    """
    width = config.width

    def reading(stem: Stem, *before: nn.Module) -> nn.Sequential:
        return nn.Sequential(*before, *dense(stem.size, width))

    path: nn.Module = nn.Sequential(*dense(d, width))
    if label is not None:
        stem = label()
        path = reading(stem, nn.Unflatten(1, spec.input_shape), stem)
    sizes = [2 * width] + [width] * config.depth
    fuse = nn.Sequential(*(layer for pair in itertools.pairwise(sizes) for layer in dense(*pair)))
    return DenoisingBlock(reading(view) if shared else reading(view, view), path, fuse, nn.Linear(sizes[-1], target_size(spec)), d)


class Maker:
    """Makes stems from one source.

    Args:
        source: a name, a module, or what makes one.
        spec: of the task.
        config: of the network.
        frozen: whether the stems are.
    """

    def __init__(self, source: Any, spec: TaskSpec, config: ViewConfig, *, frozen: bool) -> None:
        self._config, self._spec, self._frozen = config, spec, frozen
        size = config.image_size
        if size and len(spec.input_shape) != 3:
            raise UsageError("only images are resized", where="network.image_size", fix="leave it out")
        self._inner = replace(spec, input_shape=(spec.input_shape[0], size, size)) if size else spec
        self._source = ("torchvision:resnet18" if spec.is_image else "mlp") if source == "auto" else source
        self._known: Made | None = None

    def __call__(self) -> Stem:
        try:
            made, config = self._made(), self._config
        except UsageError as error:
            where = f"network.stem={self._source!s:.200}"
            raise UsageError(f"the stem cannot be made: {error.what}", where=where, fix=error.fix, known=error.known) from error
        what = made.told
        if config.weights and config.found:
            load_given(made.body, Path(config.weights).expanduser())
            what += f", weights from {Path(config.weights).name}"
        pool = config.pool if config.pool != "auto" else "flatten" if made.cut else "mean"
        return Stem(made.body, what, self._spec, pool=pool, image_size=config.image_size, frozen=self._frozen)

    def _made(self) -> Made:
        source, spec, options = self._source, self._inner, self._config.options
        if isinstance(source, str) and not source.startswith(RUN):
            with untold():
                network = build_network(source, spec, **options)
            return of_network(network, shown(source), spec)
        if not isinstance(source, (str, nn.Module)):
            made = called(source, spec, options)
            name = getattr(source, "__name__", "") or type(made).__name__
            return of_network(copy.deepcopy(made), name, spec) if isinstance(made, Network) else headless(made, name, spec)
        if options:
            what = "a module" if isinstance(source, nn.Module) else "the network of a run"
            raise UsageError(f"{what} takes no options", where="network.options", fix="leave them out")
        if self._known is None:
            self._known = of_run(source, spec) if isinstance(source, str) else headless(source, type(source).__name__, spec)
        return copy.deepcopy(self._known)


NETWORKS = {"noprop": NetworkBuilder(build, StemConfig, "denoising blocks that see the input through any model (NoProp)")}
