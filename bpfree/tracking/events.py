"""Messages of a run to an MLflow store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bpfree.run import Run

__all__ = ["Artifact", "DataSet", "End", "Message", "Metrics", "Model", "Opening", "Tags", "TextArtifact"]


@dataclass
class DataSet:
    """What a run was trained on: ``schema`` and ``profile`` are JSON, where they are known."""

    name: str
    digest: str
    schema: str | None = None
    profile: str | None = None


@dataclass
class Opening:
    """A run as it is created in the store.

    Attributes:
        dataset: that it is trained on.
        run_id: MLflow's identifier, once it is known.
        resumed: whether it may have been there with other settings.
        ended: whether the store has its end already, and only gets what was added later.
        about: description of its experiment, if that is created with it.
    """

    uri: str
    experiment: str
    name: str
    time: int
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    dataset: DataSet | None = None
    run_id: str | None = None
    resumed: bool = False
    ended: bool = False
    about: str = ""


@dataclass
class Metrics:
    """Values of metrics at one time."""

    time: int
    step: int
    values: dict[str, float]


@dataclass
class Tags:
    """Tags to set; those without a text are removed."""

    values: dict[str, str]


@dataclass
class Artifact:
    """A file to upload, or a folder of files, and its folder in the store."""

    path: Path
    folder: str


@dataclass
class TextArtifact:
    """A small file to write in the store."""

    name: str
    text: str


@dataclass
class Model:
    """A finished run's model.

    Attributes:
        run: as its log has it.
        checkpoint: with the tested weights.
        tags, params, metrics: shown with the model, as with the run.
        dataset: that it was trained on and scored on.
        register: name in the registry; ``None``: it is not registered.
    """

    run: Run
    checkpoint: Path
    tags: dict[str, str]
    params: dict[str, str]
    metrics: list[Metrics]
    dataset: DataSet | None = None
    register: str | None = None


@dataclass
class End:
    """The run is over."""

    status: str
    time: int


Message = Metrics | Tags | Artifact | TextArtifact | Model | End
