"""Places for noise on activities. Oracles: sites named by hand from a module's code, and identities that hold for every module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import split
from bpfree.network.sites import Site, Sites, Source, find_sites

models = pytest.importorskip("torchvision.models")
resnet = pytest.importorskip("torchvision.models.resnet")


def find(module: nn.Module, shape: tuple[int, ...], device: torch.device, *, final: bool = True) -> Sites:
    return find_sites(module.to(device), torch.zeros(3, *shape, device=device), final=final)


def behind(layer: str, *shape: int, norm: str | None = None, masked: bool = False) -> Site:
    return Site((Source(layer, norm),), norm or layer, torch.Size(shape), masked=masked)


class Module(nn.Module):
    """A function of three linear maps a, b, c from 4 to 4, a normalisation and two kinds of activation."""

    def __init__(self, function: Callable[[Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.relu, self.drop = nn.LayerNorm(4), nn.ReLU(), nn.Dropout(0.5)
        self.overwrite = nn.ReLU(inplace=True)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def in_place(m: Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y += m.b(x)
    return m.overwrite(y)


def written(m: Module, x: Tensor) -> Tensor:
    y, z = m.a(x), m.b(x)
    z[:, 0] = y[:, 1]
    return F.relu(y) + F.relu(z)


def copied(m: Module, x: Tensor) -> Tensor:
    y, z = m.a(x), torch.zeros(len(x), 4, device=x.device)
    z[:] = y
    return F.relu(y) + z


def drop_path(x: Tensor, training: bool) -> Tensor:
    """As torchvision's and timm's stochastic depth: the same tensor in evaluation, a random scale in training."""
    return x * torch.ones(len(x), 1, device=x.device).bernoulli_(0.5) if training else x


A, B = behind("a", 4), behind("b", 4)
MASKED = behind("a", 4, masked=True)
SUM = Site((Source("a"), Source("b")), "relu", torch.Size((4,)), before=True, masked=True)
# Sites in order, for functions whose output is made by no linear map.
CASES: dict[str, tuple[Callable[[Module, Tensor], Tensor], list[Site]]] = {
    "module relu": (lambda m, x: m.relu(m.a(x)), [MASKED]),
    "relu in place": (lambda m, x: m.overwrite(m.a(x)), [MASKED]),
    "F.relu": (lambda m, x: F.relu(m.a(x)), [MASKED]),
    "F.relu in place": (lambda m, x: F.relu(m.a(x), inplace=True), [MASKED]),
    "torch.relu": (lambda m, x: torch.relu(m.a(x)), [MASKED]),
    "torch.relu_": (lambda m, x: torch.relu_(m.a(x)), [MASKED]),
    "tensor.relu": (lambda m, x: m.a(x).relu(), [MASKED]),
    "tensor.relu_": (lambda m, x: m.a(x).relu_(), [MASKED]),
    "relu by keyword": (lambda m, x: F.relu(input=m.a(x)), [MASKED]),
    "tanh": (lambda m, x: m.a(x).tanh(), [A]),
    "gelu": (lambda m, x: F.gelu(m.a(x)), [A]),
    "relu6": (lambda m, x: F.relu6(m.a(x)), [A]),
    "norm": (lambda m, x: m.relu(m.norm(m.a(x))), [behind("a", 4, norm="norm", masked=True)]),
    "norm, functional relu": (lambda m, x: m.norm(m.a(x)).relu(), [behind("a", 4, norm="norm", masked=True)]),
    "norm, tanh": (lambda m, x: m.norm(m.a(x)).tanh(), [behind("a", 4, norm="norm")]),
    "norm behind relu": (lambda m, x: m.norm(m.relu(m.a(x))), [MASKED]),
    "norm twice on one": (lambda m, x: m.norm(m.norm(m.a(x))).relu(), [A]),
    "norm shared": (lambda m, x: m.norm(m.a(x)).relu() + m.norm(m.b(x)).relu(), [A, B]),
    "norm shared in a sum": (lambda m, x: m.relu(m.norm(m.a(x)) + m.norm(m.b(x))), [A, B]),
    "norm beside a second consumer": (lambda m, x: (y := m.a(x), m.norm(y).relu() + y)[1], [A]),
    "sum": (lambda m, x: m.relu(m.a(x) + m.b(x)), [SUM]),
    "sum in place": (in_place, [Site(SUM.sources, "overwrite", SUM.shape, before=True, masked=True)]),
    "sum of three": (
        lambda m, x: m.relu(m.a(x) + (m.b(x) + m.c(x))),
        [Site(tuple(map(Source, "abc")), "relu", SUM.shape, before=True, masked=True)],
    ),
    "sum, by torch.add": (lambda m, x: m.relu(torch.add(m.a(x), m.b(x))), [SUM]),
    "sum, python's": (lambda m, x: m.relu(sum([m.a(x), m.b(x)])), [SUM]),
    "sum with the input": (lambda m, x: m.relu(x + m.a(x)), [Site((Source("a"),), "relu", SUM.shape, before=True, masked=True)]),
    "sum, second call of relu": (
        lambda m, x: m.relu(m.relu(m.c(x)) + m.a(x)),
        [behind("c", 4, masked=True), Site((Source("a"),), "relu", SUM.shape, before=True, call=1, masked=True)],
    ),
    "sum, normalised branch": (
        lambda m, x: m.relu(m.norm(m.a(x)) + m.b(x)),
        [Site((Source("a", "norm"), Source("b")), "relu", SUM.shape, before=True, masked=True)],
    ),
    "sum, functional relu": (lambda m, x: F.relu(m.a(x) + m.b(x)), [A, B]),
    "sum, tanh": (lambda m, x: (m.a(x) + m.b(x)).tanh(), [A, B]),
    "sum with a factor": (lambda m, x: m.relu(torch.add(m.a(x), m.b(x), alpha=2)), [A, B]),
    "difference": (lambda m, x: m.relu(m.a(x) - m.b(x)), [A, B]),
    "sum with itself": (lambda m, x: (y := m.a(x), m.relu(y + y))[1], [A]),
    "sum that broadcasts": (lambda m, x: m.relu(m.a(x).unsqueeze(2) + m.b(x).unsqueeze(1)), [A, B]),
    "sum with a second consumer": (lambda m, x: (y := m.a(x) + m.b(x), m.relu(y) + y)[1], [A, B]),
    "branch with a second consumer": (lambda m, x: (y := m.a(x), m.relu(y + m.b(x)) + y)[1], [A, behind("b", 4)]),
    "two consumers": (lambda m, x: (y := m.a(x), F.relu(y) + y.tanh())[1], [A]),
    "relu twice": (lambda m, x: (y := m.a(x), m.relu(y) + m.relu(y))[1], [A]),
    "a norm's consumer beside relu": (lambda m, x: (y := m.a(x), m.norm(y) * m.relu(y))[1], [A]),
    "another linear map beside relu": (lambda m, x: (y := m.a(x), m.b(y).tanh() * m.relu(y))[1], [A, B]),
    "another linear map by keyword beside relu": (lambda m, x: (y := m.a(x), m.b(input=y).tanh() * m.relu(y))[1], [A]),
    "called by keyword": (lambda m, x: m.relu(m.a(input=x)), []),
    "relu module by keyword": (lambda m, x: m.relu(input=m.a(x)), [A]),
    "part of it is read": (written, [A, B]),
    "it is written elsewhere": (copied, [A]),
    "called twice": (lambda m, x: m.relu(m.a(m.a(x))) + m.relu(m.b(x)), [behind("b", 4, masked=True)]),
    "called twice in a sum": (
        lambda m, x: m.relu(m.a(m.a(x)) + m.b(x)),
        [Site((Source("b"),), "relu", SUM.shape, before=True, masked=True)],
    ),
    "weight read elsewhere": (lambda m, x: F.linear(m.relu(m.a(x)), m.a.weight), []),
    "weight read elsewhere, transposed": (lambda m, x: m.relu(m.a(x)) @ m.a.weight.T, []),
    "only its type is read": (lambda m, x: m.relu(m.a(x.to(m.a.weight.dtype))), [MASKED]),
    "weight only": (lambda m, x: F.linear(x, m.a.weight).relu(), []),
    "parameter of a norm read elsewhere": (lambda m, x: m.norm(m.a(x)).relu() * m.norm.weight, [A]),
    "dropout before relu": (lambda m, x: m.relu(m.drop(m.a(x))), [A]),
    "dropout in a branch": (lambda m, x: m.relu(m.drop(m.a(x)) + m.b(x)), [A, Site((Source("b"),), "relu", SUM.shape, True, 0, True)]),
    "stochastic depth": (lambda m, x: m.relu(drop_path(m.a(x), m.training) + x), [A]),
    "dropout behind": (lambda m, x: m.drop(m.relu(m.a(x))), [MASKED]),
    "identity": (lambda m, x: m.relu(nn.Identity()(m.a(x))), [MASKED]),
    "view": (lambda m, x: m.relu(m.a(x).view(-1, 2, 2)), [A]),
    "concatenation": (lambda m, x: m.relu(torch.cat([m.a(x), m.b(x)], 1)), [A, B]),
    "product": (lambda m, x: m.relu(m.a(x) * m.b(x)), [A, B]),
    "not on the batch": (
        lambda m, x: m.relu(m.a(torch.ones(5, 4, device=x.device)).sum(0) + m.b(x)),
        [Site((Source("b"),), "relu", torch.Size((4,)), before=True, masked=True)],
    ),
    "one for all examples": (lambda m, x: m.relu(m.b(x)) + m.relu(m.a(torch.ones(1, 4, device=x.device))), [behind("b", 4, masked=True)]),
    "examples and tokens folded": (lambda m, x: m.relu(m.a(x.repeat(2, 1))).view(2, -1, 4).sum(0), []),
}


@pytest.mark.parametrize("name", CASES)
def test_small_functions(name: str, device: torch.device) -> None:
    function, expected = CASES[name]
    module = Module(function)
    found = find(module, (4,), device)
    assert list(found.sites) == expected
    reached = {source.layer for site in expected for source in site.sources}
    assert set(found.others) == {name for name, _ in module.named_parameters() if name.partition(".")[0] not in reached}


def test_final(device: torch.device) -> None:
    layers = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    hidden = behind("0", 5, masked=True)
    assert find(layers, (4,), device) == Sites((hidden,), "2", ())
    assert find(layers, (4,), device, final=False) == Sites((hidden, behind("2", 2)), None, ())
    assert find(nn.Linear(4, 5), (4,), device) == Sites((), "", ())
    assert find(nn.Linear(4, 5), (4,), device, final=False) == Sites((behind("", 5),), None, ())


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.norm(m.a(x)),
        lambda m, x: m.a(x).squeeze(-1),
        lambda m, x: m.a(x) + x,
        lambda m, x: (y := m.a(x), m.relu(y).sum() * 0, y)[2],
        lambda m, x: m.a(m.a(x)),
    ],
    ids=["normalised", "viewed", "summed", "consumed elsewhere", "called twice"],
)
def test_what_is_not_final(function: Callable[[Module, Tensor], Tensor], device: torch.device) -> None:
    assert find(Module(function), (4,), device).final is None


def test_an_output_beside_the_main_one_is_a_consumer(device: torch.device) -> None:
    module = Module(lambda m, x: (y := m.a(x), (m.relu(y), y))[1])  # type: ignore[arg-type,return-value]
    assert find(module, (4,), device).sites == (A,)


def test_tied_parameters_are_perturbed_as_such(device: torch.device) -> None:
    module = Module(lambda m, x: m.b(m.relu(m.c(m.relu(m.a(x))))))
    module.b.weight = module.a.weight
    found = find(module, (4,), device)
    assert found.sites == (behind("c", 4, masked=True),)
    assert found.final is None
    assert {"a.weight", "a.bias", "b.bias"} < set(found.others)


def test_own_parameters_and_embeddings_are_others(device: torch.device) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.scale = nn.Embedding(7, 4), nn.Parameter(torch.ones(4))
            self.linear, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.relu(self.linear(self.embedding(x) * self.scale)).mean(1))
            return y

    found = find_sites(Tokens().to(device), torch.zeros(3, 6, dtype=torch.int64, device=device))
    assert found == Sites((behind("linear", 6, 5, masked=True),), "head", ("scale", "embedding.weight"))


def test_layers_in_layers_of_ones_own_are_theirs(device: torch.device) -> None:
    """A layer with a closed form may be made of torch's; what happens inside is not watched."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.relu = nn.Linear(4, 4), nn.ReLU()

        def parameter_gradients(self, x: Tensor, signal: Tensor) -> dict[str, Tensor]:
            raise NotImplementedError

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y

    found = find(nn.Sequential(Own(), nn.ReLU()), (4,), device)
    assert found == Sites((behind("0", 4, masked=True),), None, ())


def test_pooling_between_convolution_and_relu(device: torch.device) -> None:
    found = find(nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU()), (1, 6, 6), device)
    assert found.sites == (behind("0", 2, 4, 4),)


def test_subclasses_of_norms_are_not_normalisations_that_are_known(device: torch.device) -> None:
    """torchvision's LayerNorm2d is an nn.LayerNorm over another axis."""
    layer_norm_2d = pytest.importorskip("torchvision.models.convnext").LayerNorm2d
    found = find(nn.Sequential(nn.Conv2d(1, 4, 3), layer_norm_2d(4), nn.ReLU()), (1, 6, 6), device)
    assert found == Sites((behind("0", 4, 4, 4),), None, ("1.weight", "1.bias"))


def test_finding_changes_nothing(device: torch.device) -> None:
    """Oracle: state, modes, hooks and random state before."""
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU())
    module.to(device)[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes, random = [part.training for part in module.modules()], torch.get_rng_state()
    find_sites(module, torch.randn(3, 1, 6, 6, device=device, generator=torch.Generator(device).manual_seed(0)))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    with pytest.raises(RuntimeError):
        find_sites(module, torch.zeros(3, 2, 6, 6, device=device))
    assert [part.training for part in module.modules()] == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def before_relu(*sources: tuple[str, str], path: str, shape: tuple[int, ...], call: int) -> Site:
    return Site(tuple(Source(*source) for source in sources), path, torch.Size(shape), before=True, call=call, masked=True)


def test_basic_block(device: torch.device) -> None:
    block = resnet.BasicBlock(4, 4)
    expected = (
        behind("conv1", 4, 5, 5, norm="bn1", masked=True),
        before_relu(("conv2", "bn2"), path="relu", shape=(4, 5, 5), call=1),
    )
    assert find(block, (4, 5, 5), device) == Sites(expected, None, ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"))


def test_bottleneck_with_a_shortcut(device: torch.device) -> None:
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))
    block = resnet.Bottleneck(4, 2, downsample=shortcut)
    block.conv3, block.bn3 = nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8)
    assert find(block, (4, 5, 5), device).sites == (
        behind("conv1", 2, 5, 5, norm="bn1", masked=True),
        behind("conv2", 2, 5, 5, norm="bn2", masked=True),
        before_relu(("conv3", "bn3"), ("downsample.0", "downsample.1"), path="relu", shape=(8, 5, 5), call=2),
    )


def test_blocks_of_a_split_resnet(device: torch.device) -> None:
    """torch.fx makes the same calls as the model's own code."""
    network = split(models.resnet18(num_classes=10), (3, 32, 32)).to(device)
    shape, counts, finals = network.input_shape, [], []
    for name, block in network.blocks.items():
        found = find(block, tuple(shape), device, final=name == network.readout)
        counts.append([(len(site.sources), site.before, site.masked) for site in found.sites])
        finals.append(found.final)
        shape = network.shapes[name]
    inner = (1, False, True)
    plain, wider = [inner, (1, True, True)], [inner, (2, True, True)]
    assert counts == [[inner], plain, plain, wider, plain, wider, plain, wider, plain, []]
    assert [final for final in finals if final is not None] == [finals[-1]]


# Number of sites, of masked ones, and of those that are behind a normalisation or a sum of normalised outputs; from the models' code.
MODELS = {
    "resnet18": (17, 17, 17),
    "resnet50": (49, 49, 49),
    "vgg11": (10, 10, 0),
    "vgg11_bn": (10, 10, 8),
    "mobilenet_v2": (52, 0, 52),
    "alexnet": (7, 7, 0),
    "squeezenet1_1": (26, 26, 0),
    "densenet121": (120, 59, 59),
    "shufflenet_v2_x0_5": (56, 37, 56),
    "convnext_tiny": (58, 0, 0),
    "efficientnet_b0": (81, 0, 49),
    "mobilenet_v3_small": (53, 14, 34),
    "googlenet": (64, 61, 59),  # with both auxiliary classifiers, which training executes
    "mnasnet0_5": (52, 35, 52),
    "vit_b_16": (25, 0, 0),
    "swin_t": (28, 0, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_parameter_is_left_out(name: str) -> None:
    """Every parameter belongs to one site's layer, to the final one, or to the others; on the meta device nothing is computed."""
    options = {"image_size": 32} if name == "vit_b_16" else {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        module = models.get_model(name, **options)
        found = find_sites(module, torch.zeros(2, 3, *((32, 32) if name == "vit_b_16" else (64, 64))))
    layers = [source.layer for site in found.sites for source in site.sources] + ([found.final] if found.final is not None else [])
    assert len(set(layers)) == len(layers)
    owned = [f"{path}.{key}" for path in layers for key, _ in module.get_submodule(path).named_parameters()]
    assert sorted([*owned, *found.others]) == sorted(key for key, _ in module.named_parameters())
    counts = len(found.sites), sum(site.masked for site in found.sites), sum(site.sources[0].norm is not None for site in found.sites)
    assert counts == MODELS[name]


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layer(norm_first: bool, device: torch.device) -> None:
    """Attention reads its projections' weights by itself: they are others. Its last one is a subclass of nn.Linear."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    found = find(layer, (5, 8), device)
    assert found.sites == (behind("linear1", 5, 16, masked=True), behind("linear2", 5, 8))
    assert set(found.others) == {name for name, _ in layer.named_parameters() if not name.startswith("linear")}
