"""Networks from timm's image models, split into blocks: ``network=timm:NAME``, with the extra ``timm``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from bpfree.errors import UsageError, unknown_name
from bpfree.network.image_models import REFUSALS, image_shape, split_model
from bpfree.network.network import Network
from bpfree.options import option
from bpfree.tasks.task import TaskSpec

__all__ = ["TimmConfig", "timm_network"]


@dataclass
class TimmConfig:
    """A model of timm, with as many outputs as the task has, and without pretrained weights unless the options ask for them."""

    model: str = option("resnet18", "name that timm.create_model takes")
    at: list[str] = option(factory=list, help="submodules that begin a block, such as blocks.1 (none: a block per layer or residual block)")
    options: dict[str, Any] = option(factory=dict, help="arguments of timm.create_model, such as drop_path_rate")
    image_size: int = option(0, "side in pixels of the squares to which images are resized (0: not resized)", ge=0, le=4096)


def timm_network(spec: TaskSpec, config: TimmConfig | None = None) -> Network:
    """Make a model of timm, split at its layers or residual blocks, or where ``network.at`` says.

    A model that is built for one size of images is built for the task's; colours are left to timm's own ``in_chans``.

    Raises:
        UsageError: timm is not installed, no images, an unknown model, arguments that it does not take, images of a size that it does not
            take, or a model that cannot be split.
    """
    config = config or TimmConfig()
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise UsageError("network=timm needs the package timm", where="network", fix="pip install 'bpfree[timm]'") from error
    channels, *sides = image_shape(spec, "timm", config.image_size)
    if not timm.is_model(config.model):
        raise unknown_name("model", config.model, timm.list_models(), where="network.model")
    pretrained = timm.get_pretrained_cfg(config.model)
    usual = int(getattr(pretrained, "input_size", (3, 224, 224))[1])
    size = {"img_size": tuple(sides)} if getattr(pretrained, "fixed_input_size", False) else {}
    resize = f"network.image_size={usual} resizes the images in front of the model"
    try:
        arguments = {"num_classes": spec.outputs, "in_chans": channels, **size, **config.options}
        model: nn.Module = timm.create_model(config.model, **arguments)
    except REFUSALS as error:
        what = f"{config.model} does not take images of {sides[0]}x{sides[1]}, or these arguments: {error}"
        raise UsageError(what, where=f"network.options: {config.options}", fix=f"{resize}; see timm's documentation") from error
    return split_model(model, config.model, spec, at=config.at, size=config.image_size, usual=usual)
