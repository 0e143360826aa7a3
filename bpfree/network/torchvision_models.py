"""Networks from torchvision's classification models, split into blocks: ``network=torchvision network.model=resnet18``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bpfree.errors import UsageError, unknown_name
from bpfree.network.network import Network
from bpfree.network.split import split
from bpfree.options import option
from bpfree.tasks.task import TaskSpec

__all__ = ["TorchvisionConfig", "torchvision_network"]

SMALL = 64


@dataclass
class TorchvisionConfig:
    """A model of torchvision, with as many outputs as the task has."""

    model: str = option("resnet18", "name in torchvision.models, such as resnet18, vgg11_bn, mobilenet_v2 or densenet121")
    at: list[str] = option(
        factory=list, help="submodules that begin a block, such as layer1.0 (none: one block per layer or residual block)"
    )
    options: dict[str, Any] = option(factory=dict, help="arguments of the model's constructor, such as width_per_group")
    small_stem: bool = option(True, "ResNets on images below 64 pixels: begin with a 3x3 convolution of stride 1, without max-pooling")


def torchvision_network(spec: TaskSpec, config: TorchvisionConfig | None = None) -> Network:
    """The model, split at its layers or residual blocks.

    Grey images: the first convolution sums its kernels over the three colours, which is the same as repeating the
    image in each. The small stem is that of the CIFAR experiments of He et al. 2016.

    Raises:
        UsageError: no images, an unknown model, arguments that it does not take, images too small for it, or a model
            that cannot be split.
    """
    from torchvision import models

    config = config or TorchvisionConfig()
    if len(spec.input_shape) != 3 or spec.input_shape[0] not in (1, 3):
        raise UsageError(
            f"torchvision's models take images of 1 or 3 channels, not inputs of shape {spec.input_shape}", fix="use network=mlp"
        )
    known = models.list_models(module=models)
    if config.model not in known:
        raise unknown_name("model", config.model, known, where="network.model")
    try:
        model = models.get_model(config.model, **{"num_classes": spec.outputs, **config.options})
    except (TypeError, ValueError) as error:
        where = f"network.options: {config.options}"
        raise UsageError(
            f"{config.model} does not take these arguments: {error}", where=where, fix="see torchvision's documentation"
        ) from error
    if config.small_stem and isinstance(model, models.ResNet) and min(spec.input_shape[1:]) < SMALL:
        use_small_stem(model)
    if spec.input_shape[0] == 1:
        take_grey(model)
    return split(model, spec.input_shape, at=list(config.at) or None)


def use_small_stem(model: Any) -> None:
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNet does
    model.maxpool = nn.Identity()


def take_grey(model: nn.Module) -> None:
    """Make the first convolution over three channels one over a single channel, in place."""
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d) and part.in_channels == 3), None)
    if first is None:
        raise UsageError(f"{type(model).__name__} has no convolution over colours that grey images could enter", fix="use another model")
    with torch.no_grad():
        first.weight = nn.Parameter(first.weight.sum(1, keepdim=True))
    first.in_channels = 1
