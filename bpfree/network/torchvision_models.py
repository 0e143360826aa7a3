"""Networks from torchvision's classification models, split into blocks: ``network=torchvision:resnet18``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bpfree.errors import UsageError, unknown_name
from bpfree.network.image_models import REFUSALS, image_shape, split_model, take_grey
from bpfree.network.network import Network
from bpfree.options import option
from bpfree.tasks.task import TaskSpec

__all__ = ["TorchvisionConfig", "torchvision_network"]

SMALL = 64
SIZED = {"vision_transformer": lambda side: {"image_size": side}, "maxvit": lambda side: {"input_size": (side, side)}}
"""Modules of models that are built for images of one size, and the arguments that say which."""


@dataclass
class TorchvisionConfig:
    """A model of torchvision, with as many outputs as the task has."""

    model: str = option("resnet18", "name in torchvision.models, such as resnet18, vgg11_bn, mobilenet_v2 or densenet121")
    at: list[str] = option(
        factory=list, help="submodules that begin a block, such as layer1.0 (none: one block per layer or residual block)"
    )
    options: dict[str, Any] = option(factory=dict, help="arguments of the model's constructor, such as width_per_group")
    image_size: int = option(0, "side in pixels of the squares to which images are resized (0: not resized)", ge=0, le=4096)
    small_stem: bool = option(True, "ResNets on images below 64 pixels: begin with a 3x3 convolution of stride 1, without max-pooling")
    width: float = option(1.0, "ResNets: factor on the channels of every layer (0.25: a quarter of the width)", gt=0)


def torchvision_network(spec: TaskSpec, config: TorchvisionConfig | None = None) -> Network:
    """Make a model of torchvision, split at its layers or residual blocks.

    Grey images: the first convolution sums its kernels over the three colours, which is the same as repeating the
    image in each. The small stem is that of the CIFAR experiments of He et al. 2016. Models that are built for one size of images
    (vision transformers) are built for the task's.

    Raises:
        UsageError: no images, an unknown model, arguments that it does not take, images of a size that it does not take, a width for
            another model than a ResNet, or a model that cannot be split.
    """
    from torchvision import models

    config = config or TorchvisionConfig()
    channels, *sides = image_shape(spec, "torchvision", config.image_size)
    known = models.list_models(module=models)
    if config.model not in known:
        raise unknown_name("model", config.model, known, where="network.model")
    usual, smallest = _sizes(models, config.model)
    model = _made(models, config, spec.outputs, sides, usual)
    if config.width != 1:
        if not isinstance(model, models.ResNet):
            fix = "leave it out; network.options has what the model's own constructor takes, such as {width_mult: 0.25} of mobilenet_v2"
            raise UsageError(f"only ResNets have a width, {config.model} has none", where=f"network.width={config.width:g}", fix=fix)
        resize_channels(model, config.width)
        if not all(parameter.numel() for parameter in model.parameters()):  # a group of ResNeXt's without a channel
            raise UsageError(f"so narrow a {config.model} has layers without channels", where="network.width", fix="a larger width")
    if config.small_stem and isinstance(model, models.ResNet) and min(sides) < SMALL:
        use_small_stem(model)
    if channels == 1:
        take_grey(model)
    return split_model(model, config.model, spec, at=config.at, size=config.image_size, usual=usual, smallest=smallest)


def _made(models: Any, config: TorchvisionConfig, outputs: int, sides: list[int], usual: int) -> nn.Module:
    sized = SIZED.get(models.get_model_builder(config.model).__module__.rpartition(".")[2])
    size = sized(sides[0]) if sized and not {"image_size", "input_size"} & config.options.keys() else {}
    resize = f"network.image_size={usual} resizes the images in front of the model"
    if size and sides[0] != sides[1]:
        raise UsageError(f"{config.model} takes square images, not {sides[0]}x{sides[1]}", where="network.model", fix=resize)
    try:
        model: nn.Module = models.get_model(config.model, **{"num_classes": outputs, **size, **config.options})
    except REFUSALS as error:
        where = f"network.options: {config.options}"
        if size and not config.options:
            raise UsageError(f"{config.model} does not take images of {sides[0]}x{sides[0]}: {error}", where=where, fix=resize) from error
        raise UsageError(
            f"{config.model} does not take these arguments: {error}", where=where, fix="see torchvision's documentation"
        ) from error
    return model


def _sizes(models: Any, name: str) -> tuple[int, int]:
    """Return the image size that a model was made for, and the smallest that it takes, as its pretrained weights state them."""
    try:
        weights = models.get_model_weights(name).DEFAULT
        return int(weights.transforms.keywords["crop_size"]), int(max(weights.meta.get("min_size", (0, 0))))
    except (AttributeError, KeyError, TypeError, ValueError):
        return 224, 0


def resize_channels(model: Any, width: float) -> None:
    """Make the layers of a ResNet again with ``width`` times their channels, at least one, initialised as torchvision does."""

    def channels(usual: int) -> int:
        return max(1, round(usual * width))

    zero = [name for name, parameter in model.named_parameters() if name.endswith("weight") and not parameter.any()]
    outputs = model.fc.out_features
    model.inplanes, model.dilation = channels(64), 1
    model.conv1 = nn.Conv2d(3, model.inplanes, 7, stride=2, padding=3, bias=False)
    model.bn1 = model._norm_layer(model.inplanes)
    for place, usual in enumerate((64, 128, 256, 512), start=1):
        old = getattr(model, f"layer{place}")
        strides = {part.stride[0] for part in old[0].modules() if isinstance(part, nn.Conv2d)}
        dilates = place > 1 and strides == {1}  # in place of a stride
        new = model._make_layer(type(old[0]), channels(usual), len(old), stride=1 if place == 1 else 2, dilate=dilates)
        setattr(model, f"layer{place}", new)
    model.fc = nn.Linear(model.inplanes, outputs)
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            initialise(part)
    with torch.no_grad():
        for name in zero:
            model.get_parameter(name).zero_()


def initialise(convolution: nn.Conv2d) -> None:
    """Draw a kernel as torchvision's ResNet does."""
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def use_small_stem(model: Any) -> None:
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
    initialise(model.conv1)
    model.maxpool = nn.Identity()
