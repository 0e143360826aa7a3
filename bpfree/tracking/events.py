"""Messages of a run to an MLflow store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Artifact", "End", "Message", "Metrics", "Opening", "Tags", "TextArtifact"]


@dataclass
class Opening:
    """A run as it is created in the store; ``dataset`` is its name and digest."""

    uri: str
    experiment: str
    name: str
    time: int
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    dataset: tuple[str, str] | None = None
    run_id: str | None = None


@dataclass
class Metrics:
    """Values of metrics at one time."""

    time: int
    step: int
    values: dict[str, float]


@dataclass
class Tags:
    """Tags to set."""

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
class End:
    """The run is over."""

    status: str
    time: int


Message = Metrics | Tags | Artifact | TextArtifact | End
