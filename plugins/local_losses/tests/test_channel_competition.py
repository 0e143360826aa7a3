"""Channel-wise competition. Oracles: the published goodness and loss written out, and permutations of classes with channel groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_local_losses.channel_competition import ChannelCompetition, ChannelCompetitionConfig, goodness
from bpfree_local_losses.channel_network import ChannelGroupsConfig, channel_groups
from bpfree_local_losses.windows import windowed_phases
from goodness_kit import IMAGES, VECTORS, batch_of, gradients, of_block
from torch import Tensor, nn

from bpfree import Batch, Budget, BudgetConfig, Run, Split, Task, TaskSpec, TrainConfig, Trainer, UsageError, hookimpl, new_step
from bpfree.network import MLPConfig, mlp

GENERATOR = torch.Generator()
CLASSES = 4
SMALL = ChannelGroupsConfig(per_group=[2, 3, 2, 2], pool_after=[2])


def rule_of(network: ChannelGroupsConfig = SMALL, **options: Any) -> ChannelCompetition:
    torch.manual_seed(0)
    return ChannelCompetition(channel_groups(IMAGES, network), IMAGES, ChannelCompetitionConfig(**options)).double()


def test_goodness_and_loss_are_the_published_ones() -> None:
    """Oracle: the authors' split into sets of channels, mean of squares over channels, height and width, and cross-entropy."""
    rule, batch = rule_of(), batch_of(IMAGES)
    ours = gradients(rule, batch)
    rule.zero_grad()
    x = batch.inputs
    for index, block in enumerate(rule.network.blocks.values()):
        x = torch.relu(block[0](x.detach()))
        x = F.max_pool2d(x, 2) if index == 1 else x
        x = F.batch_norm(x, None, None, block[-1].weight, block[-1].bias, training=True, eps=1e-4)
        sets = torch.split(x, x.shape[1] // CLASSES, dim=1)
        factors = torch.cat([part.pow(2).mean((1, 2, 3)).unsqueeze(-1) for part in sets], 1)
        torch.testing.assert_close(goodness(x, CLASSES), factors)
        F.cross_entropy(factors, batch.targets).backward()
    assert len(ours) == 16
    for name, p in rule.named_parameters():
        torch.testing.assert_close(ours[name], p.grad)


def permute(layer: Any, order: Tensor, inner: Tensor | None = None) -> None:
    """Give a convolution or a norm its output channels in another order, and a convolution its input channels."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p[order])
        if inner is not None and layer.groups == 1:
            layer.weight.copy_(layer.weight[:, inner])
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(layer.running_mean[order])
            layer.running_var.copy_(layer.running_var[order])


def test_permuting_classes_with_channel_groups_permutes_scores_and_updates() -> None:
    """All blocks have their groups permuted alike, those that keep groups apart too."""
    classes = torch.tensor([2, 0, 3, 1])
    rule, other, batch = rule_of(), rule_of(), batch_of(IMAGES)
    before = None
    for block in other.network.blocks.values():
        order = torch.arange(block[0].out_channels).view(CLASSES, -1)[classes].flatten()
        permute(block[0], order, before)
        permute(block[-1], order)
        before = order
    scores, permuted = rule.predict(batch.inputs, GENERATOR), other.predict(batch.inputs, GENERATOR)
    torch.testing.assert_close(permuted, scores[:, classes])
    assert not torch.allclose(permuted, scores)
    place_of = torch.argsort(classes)  # class c has become class place_of[c]
    ours, theirs = gradients(rule, batch), gradients(other, Batch(batch.inputs, place_of[batch.targets]))
    for name, block in rule.network.blocks.items():
        order = torch.arange(block[0].out_channels).view(CLASSES, -1)[classes].flatten()
        key = f"network.blocks.{name}.0.bias"
        torch.testing.assert_close(theirs[key], ours[key][order])


def test_blocks_that_separate_keep_groups_apart() -> None:
    """Oracle: the derivative of the channels of a class by channels below, which is zero for those of others."""
    network = channel_groups(IMAGES, SMALL).double().eval()
    assert [block[0].groups for block in list(network.blocks.values())[:4]] == [1, CLASSES, 1, CLASSES]
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    output = network.blocks["b4"](x)
    slope = torch.autograd.grad(output[:, 2:4].sum(), x)[0][0].abs().sum((1, 2))  # the second class's
    assert slope[2:4].min() > 0
    assert not slope[[0, 1, 4, 5, 6, 7]].any()
    assert all(block[0].groups == 1 for block in list(channel_groups(IMAGES, ChannelGroupsConfig(separate=False)).blocks.values())[:4])


def test_no_gradient_crosses_a_layer() -> None:
    one, other = rule_of(prediction="softmax"), rule_of(prediction="softmax")
    with torch.no_grad():
        other.network.blocks["b2"][0].weight.normal_()
        other.classifier.weight.normal_()
    first, second = gradients(one, batch_of(IMAGES)), gradients(other, batch_of(IMAGES))
    assert all(torch.equal(a, b) for a, b in zip(of_block(first, "b1"), of_block(second, "b1"), strict=True))
    assert not torch.equal(of_block(first, "b2")[0], of_block(second, "b2")[0])


@pytest.mark.parametrize("prediction", ["goodness", "softmax"])
def test_credit_is_the_gradient_of_the_objective(prediction: Any) -> None:
    rule, batch = rule_of(prediction=prediction), batch_of(IMAGES)
    expected = torch.autograd.grad(rule.objective(batch, new_step(rule)), list(rule.parameters()))
    for value, ours in zip(expected, gradients(rule, batch).values(), strict=True):
        torch.testing.assert_close(ours, value)


def test_groups_of_consecutive_classes() -> None:
    """Two groups for four classes: the loss of a block is that of two classes; soft labels are summed."""
    rule = rule_of(ChannelGroupsConfig(per_group=[2, 3, 2, 2], groups=[2, 2, 4, 4]), groups=[2, 2, 4, 4])
    batch = batch_of(IMAGES)
    trace = next(rule.network.stream(batch.inputs))
    expected = F.cross_entropy(goodness(trace.output, 2), batch.targets // 2)
    torch.testing.assert_close(rule.local_loss(trace, batch, new_step(rule)), expected)
    soft = Batch(batch.inputs, F.one_hot(batch.targets, CLASSES).double())
    torch.testing.assert_close(rule.local_loss(trace, soft, new_step(rule)), expected)
    assert set(rule.alternatives(batch.inputs, GENERATOR)) == {"b3", "b4"}


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UsageError, match=r"7 channels of block 'b1' cannot be divided among 4 groups[\s\S]*give it 8"):
        ChannelCompetition(mlp(VECTORS, MLPConfig(widths=[7])), VECTORS)
    with pytest.raises(UsageError, match="4 classes cannot be divided into 3 groups"):
        rule_of(groups=[3, 4, 4, 4])
    with pytest.raises(UsageError, match=r"last block has 2 groups[\s\S]*softmax"):
        rule_of(groups=[4, 4, 4, 2])
    with pytest.raises(UsageError, match="1 numbers of groups for 4 blocks"):
        rule_of(groups=[4])
    with pytest.raises(UsageError, match="cannot be divided among the 4 groups of b2"):
        channel_groups(IMAGES, ChannelGroupsConfig(per_group=[1, 1], groups=[2, 4]))
    with pytest.raises(UsageError, match="too small for 4 poolings"):
        channel_groups(IMAGES, ChannelGroupsConfig(per_group=[1] * 4, pool_after=[1, 2, 3, 4]))
    for windows, what in (([[0, 1]], "1 windows for 4 blocks"), ([[0, 1], [2, 2], [0, 1], [0, 1]], r"window \[2, 2\] of b2 is none")):
        with pytest.raises(UsageError, match=what):
            rule_of(windows=windows)


# --- interleaved layer training -----------------------------------------------------------------------------------------


def test_phases_of_the_published_windows() -> None:
    """Oracle: the authors' test, epoch in range(start, end), for each layer and epoch of their table for CIFAR-10."""
    table = {"b1": (0, 11), "b2": (2, 18), "b3": (4, 26), "b4": (6, 32)}
    for epochs in (50, 20, None):
        learning: list[set[str]] = []
        for phase in windowed_phases(table, ["classifier"], Budget(epochs=epochs)):
            learning += [set(phase.groups or ())] * (40 - len(learning) if phase.epochs is None else phase.epochs)
        assert len(learning) == (epochs or 40)
        for epoch, groups in enumerate(learning):
            assert groups == {"classifier"} | {name for name, (start, end) in table.items() if epoch in range(start, end)}
    goodness_alone = list(windowed_phases({"b1": (0, 2), "b2": (1, 3)}, [], Budget(epochs=10)))
    assert [phase.epochs for phase in goodness_alone] == [1, 1, 1]


class Watch:
    """Note after each epoch which groups have moved in it."""

    def __init__(self, rule: ChannelCompetition) -> None:
        self.rule, self.moved = rule, list[set[str]]()
        self.before = self.weights()

    def weights(self) -> dict[str, Tensor]:
        return {name: torch.cat([p.detach().flatten() for p in group]) for name, group in self.rule.groups().items()}

    @hookimpl
    def epoch_end(self, run: Run, rule: Any) -> None:
        after = self.weights()
        self.moved.append({name for name in after if not torch.equal(after[name], self.before[name])})
        self.before = after


def test_a_layer_outside_its_window_does_not_move() -> None:
    """A run of five epochs; the sets of groups that moved in each are those of the windows, bit for bit."""
    torch.manual_seed(0)
    made = batch_of(IMAGES, 32)
    split = Split(made.inputs.float(), made.targets)
    task = Task(IMAGES, split, None, split)
    rule = ChannelCompetition(
        channel_groups(IMAGES, SMALL),
        IMAGES,
        ChannelCompetitionConfig(windows=[[0, 2], [0, 3], [1, 4], [2, 4]], prediction="softmax"),
    )
    watch = Watch(rule)
    settings = TrainConfig(budget=BudgetConfig(epochs=5), batch_size=16, device="cpu", select="last")
    assert Trainer(rule, task, settings, observers=[watch]).fit().epoch == 5
    always = {"classifier"}
    assert watch.moved == [{"b1", "b2"} | always, {"b1", "b2", "b3"} | always, {"b2", "b3", "b4"} | always, {"b3", "b4"} | always, always]


def test_it_learns_by_goodness(digits: Task) -> None:
    """Digits, 4 epochs, small dense layers: far above chance (a tenth)."""
    torch.manual_seed(0)
    rule = ChannelCompetition(mlp(digits.spec, MLPConfig(widths=[80, 80], norm="batch")), digits.spec)
    settings = TrainConfig(budget=BudgetConfig(epochs=4), batch_size=32, device="cpu", evaluation={"every": 4})
    assert Trainer(rule, digits, settings).fit().result["test/accuracy"] > 0.8


def test_its_own_network_fits_the_task() -> None:
    options = ChannelCompetition.network_options(IMAGES, ChannelCompetitionConfig())
    assert options["name"] == "channel-groups"
    assert ChannelCompetition.network_options(VECTORS, ChannelCompetitionConfig())["widths"] == [64, 64, 64]
    published = channel_groups(TaskSpec("mnist", (1, 28, 28), 10))
    assert [block[0].out_channels for block in list(published.blocks.values())[:4]] == [20, 80, 240, 480]
    assert published.shapes["b4"] == (480, 7, 7)
