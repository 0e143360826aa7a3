"""A run's MLflow model: its tested weights, signature, input example and requirements, logged and registered.

MLflow loads it by :mod:`bpfree.mlflow_model`, which reads the checkpoint without running code from it; nothing is pickled. Requirements
are those that the run recorded, and are not inferred, which would load the model in another process and ask a package index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpfree.run import Run
from bpfree.tasks.facts import CLASS, NAMED, input_dtype
from bpfree.tracking.events import Model
from bpfree.training.checkpoint import read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

__all__ = ["LOADER", "NAME", "log", "save"]

LOADER = "bpfree.mlflow_model"
"""Module by which MLflow loads a model."""
NAME = "model"
"""Name of a run's model: ``runs:/ID/model``."""
WIDE = 1000
"""Entries up to which vectors have a column each in the signature, so that MLflow converts their types."""
LARGE = 20_000
"""Numbers above which an input gives no example."""
DIGEST_TAG = "bpfree.weights"
"""Tag of a model with the digest of the checkpoint that it was made of, so that none is logged twice."""


def log(client: MlflowClient, experiment_id: str, run_id: str, model: Model) -> str:
    """Log a model, unless the store has it, and register it; the run's own copy of the checkpoint is removed, as the model has it.

    Args:
        client: of the store.
        experiment_id, run_id: where the run is.
        model: the model.

    Raises:
        BpfreeError: the checkpoint is damaged.

    Returns:
        MLflow's identifier of the model.
    """
    digest = hashlib.sha256(model.checkpoint.read_bytes()).hexdigest()[:16]
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    logged = next((one for one in found if one.tags.get(DIGEST_TAG) == digest), None)
    if logged is None:
        logged = client.create_logged_model(experiment_id, NAME, run_id, model.tags | {DIGEST_TAG: digest}, model.params)
    if logged.status != "READY":  # new, or of a process that was killed
        with tempfile.TemporaryDirectory(prefix="bpfree-") as place:
            save(Path(place) / NAME, model.checkpoint, model.run, model_id=logged.model_id, run_id=run_id)
            client.log_model_artifacts(logged.model_id, os.fspath(Path(place) / NAME))
        _connect(client, run_id, logged.model_id, model)
        client.finalize_logged_model(logged.model_id, "READY")
    if model.register:
        _register(client, run_id, logged, model.register)
    with contextlib.suppress(Exception):  # a store that cannot remove files keeps them
        _drop_checkpoints(client, run_id)
    return str(logged.model_id)


def _connect(client: MlflowClient, run_id: str, model_id: str, model: Model) -> None:
    """Show the model with its run, and the run's results with the model."""
    from mlflow.entities import LoggedModelOutput, Metric

    client.log_outputs(run_id, [LoggedModelOutput(model_id, model.run.epoch)])
    known: dict[str, str] = {"model_id": model_id, "run_id": run_id}
    if model.dataset is not None:
        known |= {"dataset_name": model.dataset.name, "dataset_digest": model.dataset.digest}
    points = [Metric(name, value, one.time, one.step, **known) for one in model.metrics for name, value in one.values.items()]
    if points:
        client.log_batch(run_id, metrics=points)


def _register(client: MlflowClient, run_id: str, logged: LoggedModel, name: str) -> None:
    """Make the model a version of a registered one, which is created if it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tag, model_id, quoted = "mlflow.modelVersions", logged.model_id, name.replace("'", "''")
    # a database finds models by their identifiers at the process's global address, which may be another; a server at its own
    served = client.tracking_uri.startswith(("http:", "https:", "databricks"))
    source = f"models:/{model_id}" if served else logged.artifact_location
    versions = [one for one in client.search_model_versions(f"name = '{quoted}' and run_id = '{run_id}'") if one.source == source]
    if not versions:
        versions = [client.create_model_version(name, source, run_id, model_id=model_id)]
    known = json.loads(client.get_logged_model(model_id).tags.get(tag, "[]"))
    own = [{"name": one.name, "version": one.version} for one in versions]
    if any(one not in known for one in own):
        client.set_logged_model_tags(model_id, {tag: json.dumps([*known, *own])})  # by which MLflow's interface shows them together


def _drop_checkpoints(client: MlflowClient, run_id: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if any(one.path == "checkpoints" for one in client.list_artifacts(run_id)):
        repository = get_artifact_repository(client.get_run(run_id).info.artifact_uri, tracking_uri=client.tracking_uri)
        repository.delete_artifacts("checkpoints")


def save(folder: Path, checkpoint: Path, run: Run, *, model_id: str, run_id: str) -> None:
    """Write the folder of a model.

    Args:
        folder: to be made.
        checkpoint: with the tested weights; what only a resumed run needs is left out.
        run: as its log has it.
        model_id, run_id: MLflow's identifiers.

    Raises:
        BpfreeError: the checkpoint is damaged.
    """
    import mlflow.pyfunc
    from mlflow.models.model import Model as Description

    content = read_checkpoint(checkpoint)
    data = folder.with_name(f"{folder.name}-data") / "weights.pt"
    data.parent.mkdir()
    if content.pop("training", None) is None:
        shutil.copyfile(checkpoint, data)
    else:
        write_checkpoint(data, content)
    spec = content["task"]
    inputs, example = _inputs(spec, input_dtype(spec, run.data))
    with quietly("mlflow.pyfunc"):
        mlflow.pyfunc.save_model(
            os.fspath(folder),
            loader_module=LOADER,
            data_path=os.fspath(data),
            mlflow_model=Description(model_id=model_id, run_id=run_id),
            signature=_signature(spec, inputs),
            input_example=example,
            pip_requirements=requirements(run),
            model_config={"device": "cpu", "allow_code": []},
        )


@contextlib.contextmanager
def quietly(name: str) -> Iterator[None]:
    """Leave out a logger's notes inside the context, which a run's display has no place for."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def requirements(run: Run) -> list[str]:
    """List the packages that a model needs, in the versions of its run where they are known."""
    versions = {name: str(run.tags[name]) for name in ("bpfree", "torch") if run.tags.get(name)}
    if plugin := run.tags.get("plugin"):
        versions.setdefault(plugin, str(run.tags.get("plugin_version", "")))
    for name in ("bpfree", "torch"):
        versions.setdefault(name, metadata.version(name))
    versions |= {name: metadata.version(name) for name in ("numpy", "pandas")}
    return [f"{name}=={version.partition('+')[0]}" if version else name for name, version in versions.items()]


# --- signature and example -----------------------------------------------------------------------------------------------


def _signature(spec: Mapping[str, Any], inputs: Any) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec

    if inputs is None:
        return None
    params = ParamSchema([ParamSpec("scores", DataType.boolean, False), ParamSpec("seed", DataType.long, 0)])
    return ModelSignature(inputs, _outputs(spec), params)


def _inputs(spec: Mapping[str, Any], dtype: str) -> tuple[Any, Any]:
    """Return the schema of a task's inputs and an example, ``None`` of what MLflow cannot describe (nested parts, say)."""
    import numpy as np
    from mlflow.types import ColSpec, Schema, TensorSpec

    shape, names = tuple(spec["input_shape"]), tuple(spec.get("input_names") or ())
    if spec.get("structure") is not None:
        return _parts(spec["structure"]), None
    example = _example(spec, shape, dtype)
    if len(shape) == 1 and shape[0] <= WIDE:
        kind = "double" if np.dtype(dtype).kind == "f" else "long"
        schema = Schema([ColSpec(kind, name) for name in names] if names else [ColSpec(kind)] * shape[0])
        return schema, _table(example.astype(np.float64 if kind == "double" else np.int64), names)
    return Schema([TensorSpec(np.dtype(dtype), (-1, *shape))]), example if example.size <= LARGE else None


def _table(example: Any, names: tuple[str, ...]) -> Any:
    import pandas as pd

    return pd.DataFrame(example, columns=list(names)) if names else example


def _parts(structure: Any) -> Any:
    import numpy as np
    from mlflow.types import Schema, TensorSpec

    flat = isinstance(structure, Mapping) and all(isinstance(part, Mapping) and "shape" in part for part in structure.values())
    if not flat:
        return None
    kinds = {"real": "float32", "integer": "int64", "bool": "bool"}
    return Schema([TensorSpec(np.dtype(kinds[part["dtype"]]), (-1, *part["shape"]), name) for name, part in structure.items()])


def _example(spec: Mapping[str, Any], shape: tuple[int, ...], dtype: str) -> Any:
    """Make up an input of the right size and range: data stay where they are."""
    import numpy as np

    draw = np.random.default_rng(0)
    if spec.get("vocabulary"):
        return draw.integers(0, spec["vocabulary"], (1, *shape)).astype(dtype)
    mean, std = (np.reshape(spec[key], (-1, *[1] * (len(shape) - 1))) for key in ("mean", "std"))
    scale = spec.get("scale") or (255.0 if dtype == "uint8" else 1.0)
    least, most = spec.get("limits") or ((0, 255) if dtype == "uint8" else (-math.inf, math.inf))
    made = np.clip((draw.standard_normal((1, *shape)) * std + mean) * scale, least, most)
    return (made.round() if np.dtype(dtype).kind in "iu" else made).astype(dtype)


def _outputs(spec: Mapping[str, Any]) -> Any:
    import numpy as np
    from mlflow.types import ColSpec, Schema, TensorSpec
    from mlflow.types.schema import Array

    size = spec.get("output_shape") or ((*spec["input_shape"], spec["outputs"]) if spec["targets"] == "tokens" else (spec["outputs"],))
    if spec["targets"] not in NAMED or (CLASS in spec and spec["targets"] != "classes"):
        return Schema([TensorSpec(np.dtype("float32"), (-1, *size))])
    names = tuple(spec.get("class_names") or ())
    kind: Any = "string" if names else "long"
    predicted = ColSpec(Array(kind) if spec["targets"] == "multilabel" else kind, "prediction")
    return Schema([predicted, *(ColSpec("double", f"probability_{name}") for name in names or range(spec["outputs"]))])
