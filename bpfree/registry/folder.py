"""Find the registry of this installation."""

from __future__ import annotations

from pathlib import Path

from bpfree.errors import BpfreeError

__all__ = ["registry_folder"]


def registry_folder() -> Path:
    """Find the folder of the registry that came with bpfree: inside an installed wheel, or beside the package in a checkout.

    Raises:
        BpfreeError: it is in neither place.
    """
    package = Path(__file__).parents[1]
    places = (package / "_registry", package.parent / "registry")
    for place in places:
        if (place / "schema.json").is_file():
            return place
    raise BpfreeError(
        "this installation of bpfree has no registry", where=" or ".join(map(str, places)), fix="install bpfree again, or give --folder"
    )
