"""Reading YAML as people mean it: safe tags only, 1e-8 is a number, and yes, no, on and off are words.

PyYAML follows YAML 1.1, where ``1e-8`` is a string and ``no`` is false; this is YAML 1.2 in these two points.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["read"]


class _Loader(yaml.SafeLoader):
    """A safe loader with resolvers of its own."""


_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def read(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        yaml.YAMLError: it stands for none.
    """
    return yaml.load(text, Loader=_Loader)
