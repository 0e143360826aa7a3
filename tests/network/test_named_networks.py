"""Networks by name. Oracles: the spelling of version 1, the libraries' own constructors, and a stand-in for timm."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfree
from bpfree import TaskSpec, UsageError, build_network
from bpfree.cli.main import cli
from bpfree.config import parse_words, resolve
from bpfree.network.timm_models import TimmConfig, timm_network
from bpfree.network.torchvision_models import TorchvisionConfig, torchvision_network

models = pytest.importorskip("torchvision.models")
SMALL = TaskSpec("toy", (3, 32, 32), 7)


def weights(network: nn.Module) -> list[Tensor]:
    return [p.detach() for p in network.parameters()]


# --- names ------------------------------------------------------------------------------------------------------------


def test_both_spellings_mean_the_same_recipe() -> None:
    new = resolve(parse_words(["network=torchvision:resnet34"]), spec=SMALL)
    old = resolve(parse_words(["network=torchvision", "network.model=resnet34"]), spec=SMALL)
    assert new.names["network"] == "torchvision"
    assert new.flat() == old.flat()
    assert resolve(parse_words(["network.name=torchvision:resnet34"]), spec=SMALL).flat() == old.flat()
    later = resolve(parse_words(["network=torchvision:resnet34", "network.model=resnet50"]), spec=SMALL)
    assert later.options["network"].model == "resnet50"


def test_a_file_and_a_rule_may_name_a_model(tmp_path: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rule: dfa\nnetwork: torchvision:mobilenet_v2\n")
    assert resolve(bpfree.config.read_yaml(file), spec=SMALL).options["network"].model == "mobilenet_v2"

    class Named(bpfree.Broadcast):
        @classmethod
        def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
            return {"name": "torchvision:vgg11_bn", "small_stem": False}

        def signals(self, traces: Any, batch: Any, error: Tensor, step: Any) -> list[None]:
            return [None] * (len(traces) - 1)

    recipe = resolve(parse_words(["rule=Named"]), bpfree.installed_plugins().including(Named), spec=SMALL)
    assert recipe.names["network"] == "torchvision"
    assert (recipe.options["network"].model, recipe.options["network"].small_stem) == ("vgg11_bn", False)


def test_in_python() -> None:
    torch.manual_seed(0)
    one = build_network("torchvision:resnet18", SMALL, small_stem=False)
    torch.manual_seed(0)
    other = torchvision_network(SMALL, TorchvisionConfig("resnet18", small_stem=False))
    assert one.names == other.names
    assert all(map(torch.equal, weights(one), weights(other)))
    assert build_network("mlp", SMALL, depth=2, width=5).names == ["b1", "b2", "readout"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp:large", {}, "the network 'mlp' takes no name after the colon"),
        ("torchvision:", {}, "names no model after the colon"),
        ("torchvison:resnet18", {}, "did you mean 'torchvision'"),
        ("torchvision:resnet81", {}, "did you mean 'resnet18'"),
        ("mlp", {"dept": 3}, "did you mean 'depth'"),
        ("mlp", {"depth": -1}, "network.depth"),
    ],
)
def test_wrong_names_are_said(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_network(name, SMALL, **options)
    if not options and "81" not in name and not name.endswith(":"):  # a word that ends so is a mapping in YAML
        with pytest.raises(UsageError, match=message):
            resolve(parse_words([f"network={name}"]), spec=SMALL)


def test_the_listing_takes_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["networks", "torchvision:resnet18"], standalone_mode=False) in (None, 0)
    assert "image_size" in capsys.readouterr().out


# --- sizes of images --------------------------------------------------------------------------------------------------


def test_a_vision_transformer_is_built_for_the_tasks_images() -> None:
    """Oracle: the constructor of torchvision with that size."""
    options = {"patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    torch.manual_seed(0)
    # vit_b_16 fixes its sizes, so a smaller one is made by the class that it makes
    model = models.VisionTransformer(image_size=32, num_classes=7, **options).eval()
    network = torchvision_network(SMALL, TorchvisionConfig("vit_b_32"))
    assert network.readout == "heads"
    (position,) = [p for name, p in network.named_parameters() if name.endswith("pos_embedding")]
    assert position.shape == (1, 1 + 1, 768)  # one patch of 32x32, and the class token
    with torch.no_grad():
        network.eval()(torch.randn(2, 3, 32, 32))
        assert torch.equal(bpfree.split(model, (3, 32, 32)).eval()(x := torch.randn(2, 3, 32, 32)), model(x))


@pytest.mark.parametrize(
    ("shape", "model", "what", "fix"),
    [
        ((3, 28, 28), "vit_b_16", "does not take images of 28x28", "network.image_size=224"),
        ((3, 32, 24), "vit_b_16", "takes square images, not 32x24", "network.image_size=224"),
        ((3, 32, 32), "alexnet", "it takes images of at least 63x63", "network.image_size=224"),
        ((1, 8, 8), "alexnet", r"cannot take an input of shape \(1, 8, 8\)", "network.image_size=224"),
    ],
)
def test_other_sizes_are_refused_with_the_option(shape: tuple[int, ...], model: str, what: str, fix: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        torchvision_network(TaskSpec("toy", shape, 7), TorchvisionConfig(model))
    assert fix in caught.value.fix


def test_images_are_resized_in_the_first_block() -> None:
    """Oracle: torch's interpolation in front of the same network on large images."""
    torch.manual_seed(0)
    network = torchvision_network(SMALL, TorchvisionConfig("squeezenet1_1", image_size=64)).eval()
    torch.manual_seed(0)
    large = torchvision_network(TaskSpec("large", (3, 64, 64), 7), TorchvisionConfig("squeezenet1_1")).eval()
    assert network.input_shape == (3, 32, 32)
    assert network.names == large.names
    assert network.shapes == large.shapes
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = large(F.interpolate(x, (64, 64), mode="bilinear", align_corners=False))
        assert torch.equal(network(x), expected)


def test_a_resized_network_trains_from_its_option() -> None:
    recipe = resolve(parse_words(["rule=dfa", "network=torchvision:resnet18", "network.image_size=64"]), spec=SMALL)
    torch.manual_seed(0)
    rule = recipe.build_rule(SMALL)
    bpfree.Stepper(rule).take(bpfree.Batch(torch.randn(4, 3, 32, 32), torch.arange(4)))
    assert rule.network.shapes["stem"] == (64, 16, 16)  # the large stem: 64 pixels are not small


# --- timm -------------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """As timm's transformers: built for one size, which its outermost forward asserts."""

    def __init__(self, img_size: tuple[int, int] = (224, 224), in_chans: int = 3, num_classes: int = 1000, width: int = 6) -> None:
        super().__init__()
        self.img_size = img_size
        if img_size[0] % 4:
            raise AssertionError("divisible by patches")
        self.patch_embed = nn.Conv2d(in_chans, width, 4, 4)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        assert self.img_size == (H, W), f"Input height {H} doesn't match model"
        x = self.patch_embed(x).flatten(2).permute(0, 2, 1)
        x = self.blocks(x)
        return self.head(x.mean(1).view(B, -1))


@dataclass
class Pretrained:
    input_size: tuple[int, int, int] = (3, 224, 224)
    fixed_input_size: bool = True


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the library, with the four functions that are called; what models were made with."""
    made: list[dict[str, Any]] = []

    def create_model(name: str, **arguments: Any) -> nn.Module:
        made.append({"name": name, **arguments})
        return Tiny(**arguments)

    library = types.ModuleType("timm")
    library.create_model = create_model  # type: ignore[attr-defined]
    library.is_model = lambda name: name.partition(".")[0] == "tiny_patch4"  # type: ignore[attr-defined]
    library.list_models = lambda: ["tiny_patch4"]  # type: ignore[attr-defined]
    library.get_pretrained_cfg = lambda name: Pretrained()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", library)
    return made


def test_a_model_of_timm_is_built_for_the_task_and_watched(timm: list[dict[str, Any]]) -> None:
    words = ["rule=dfa", "network=timm:tiny_patch4.tag", "network.at=[blocks.0,blocks.1,head]", "network.options={width: 5}"]
    recipe = resolve(parse_words(words), spec=SMALL)
    rule = recipe.build_rule(SMALL)
    assert timm == [{"name": "tiny_patch4.tag", "num_classes": 7, "in_chans": 3, "img_size": (32, 32), "width": 5}]
    assert rule.network.names == ["patch_embed", "blocks_0", "blocks_1", "head"]
    assert rule.network.readout == "head"
    metrics = bpfree.Stepper(rule).take(bpfree.Batch(torch.randn(4, 3, 32, 32), torch.arange(4)))
    assert torch.isfinite(metrics["loss"])


def test_what_timm_cannot_do_is_refused_with_the_option(timm: list[dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match=r"network.at=\[\.\.\.\]"):
        build_network("timm:tiny_patch4", SMALL)
    with pytest.raises(UsageError, match=r"does not take images of 30x30.*divisible by patches") as caught:
        timm_network(TaskSpec("odd", (3, 30, 30), 7), TimmConfig("tiny_patch4", at=["head"]))
    assert "network.image_size=224" in caught.value.fix
    resized = timm_network(TaskSpec("odd", (3, 30, 30), 7), TimmConfig("tiny_patch4", at=["head"], image_size=32))
    assert resized.input_shape == (3, 30, 30)
    assert timm[-1]["img_size"] == (32, 32)
    with pytest.raises(UsageError, match="did you mean 'tiny_patch4'"):
        build_network("timm:tiny_patch", SMALL)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="needs the package timm") as caught:
        build_network("timm:resnet18", SMALL)
    assert "bpfree[timm]" in caught.value.fix


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_models_of_the_library_itself() -> None:
    network = build_network("timm:vit_tiny_patch16_224", SMALL, at=["blocks.0", "blocks.6", "head"])
    assert network.readout == "head"
    assert build_network("timm:resnet18", SMALL).readout is not None
