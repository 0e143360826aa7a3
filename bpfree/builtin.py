"""The core's own plugin: its baselines, networks and tasks, its trackers and executors."""

from __future__ import annotations

from pathlib import Path

from bpfree import baselines, hooks, remembered
from bpfree.addons import CENTRALISE, AddonKind
from bpfree.kinds import Maker
from bpfree.metric import Metric
from bpfree.network import builders, timm_models, torchvision_models
from bpfree.network.builders import NetworkBuilder
from bpfree.program import Program
from bpfree.programs.sklearn import SKLEARN
from bpfree.rule import Rule
from bpfree.tasks import (
    augment,
    folders,
    huggingface,
    metrics,
    mixing,
    npz,
    protocols,
    tables,
    torchvision_sets,
    transforms,
    vision,
)
from bpfree.tasks.angles import DIGITS_ANGLE, MNIST_ANGLE
from bpfree.tasks.diabetes import DIABETES
from bpfree.tasks.digits import DIGITS
from bpfree.tasks.task import DataSource

bpfree_api = hooks.API_VERSION


@hooks.hookimpl
def bpfree_rules() -> dict[str, type[Rule]]:
    return {"backprop": baselines.Backprop, "dfa": baselines.DFA, "frozen": baselines.Frozen, "linear": baselines.Linear}


@hooks.hookimpl
def bpfree_networks() -> dict[str, NetworkBuilder]:
    return {
        "mlp": NetworkBuilder(remembered.mlp, builders.MLPConfig, "multilayer perceptron; images are flattened"),
        "vgg": NetworkBuilder(remembered.vgg, builders.VGGConfig, "3x3 convolutions with max-poolings and a linear readout"),
        "torchvision": NetworkBuilder(
            torchvision_models.torchvision_network,
            torchvision_models.TorchvisionConfig,
            "a model of torchvision (torchvision:resnet18, ...), split into blocks",
            family="model",
        ),
        "timm": NetworkBuilder(
            timm_models.timm_network,
            timm_models.TimmConfig,
            "a model of timm (timm:NAME), split into blocks; needs the extra timm",
            family="model",
        ),
    }


@hooks.hookimpl
def bpfree_tasks() -> dict[str, DataSource]:
    return {
        "digits": DIGITS,
        "digits-angle": DIGITS_ANGLE,
        "mnist-angle": MNIST_ANGLE,
        "diabetes": DIABETES,
        "mnist": vision.MNIST,
        "fashion-mnist": vision.FASHION_MNIST,
        "cifar10": vision.CIFAR10,
        "cifar100": vision.CIFAR100,
        "npz": npz.NPZ,
        "folder": folders.FOLDER,
        "csv": tables.CSV,
        "torchvision": torchvision_sets.TORCHVISION,
        "hf": huggingface.HF,
    }


@hooks.hookimpl
def bpfree_programs() -> dict[str, Program]:
    return {"sklearn": SKLEARN}


@hooks.hookimpl
def bpfree_augmentations() -> dict[str, augment.Augmentation]:
    return {"flip": augment.FLIP, "crop": augment.CROP, "mixup": mixing.MIXUP, "cutmix": mixing.CUTMIX, **transforms.TRANSFORMS}


@hooks.hookimpl
def bpfree_addons() -> dict[str, AddonKind]:
    return {"centralise": CENTRALISE}


@hooks.hookimpl
def bpfree_metrics() -> dict[str, Metric]:
    return dict(metrics.BUILT_IN)


@hooks.hookimpl
def bpfree_protocols() -> dict[str, protocols.EvaluationProtocol]:
    return {
        "linear-probe": protocols.LINEAR_PROBE,
        "nearest-centroid": protocols.NEAREST_CENTROID,
        "clustering": protocols.CLUSTERING,
    }


@hooks.hookimpl
def bpfree_studies() -> dict[str, Path]:
    presets = Path(__file__).parent / "study" / "presets"
    return {name: presets / f"{name}.yaml" for name in ("digits-floor-ceiling", "floor", "quickstart", "claims", "claims-cifar10")}


@hooks.hookimpl
def bpfree_trackers() -> dict[str, Maker]:
    files = "bpfree.tracking.file_trackers"
    return {
        "mlflow": Maker("bpfree.tracking.mlflow_tracker:MLflowTracker", "an MLflow store: tracking.uri, or mlflow.db"),
        "csv": Maker(f"{files}:CSVTracker", "metrics.csv, a line for each value"),
        "tensorboard": Maker(f"{files}:TensorBoardTracker", "an event file for TensorBoard"),
    }


@hooks.hookimpl
def bpfree_executors() -> dict[str, Maker]:
    return {
        "local": Maker("bpfree.study.executors:local", "this process, or --jobs processes on this machine"),
        "ray": Maker("bpfree.study.ray_executor:RayExecutor", "a Ray cluster"),
        "slurm": Maker("bpfree.study.slurm_executor:SlurmExecutor", "a SLURM cluster, a job for each cell"),
    }
