"""YAML as jobs and overrides are written in it: PyYAML's safe subset, with the numbers of YAML 1.2.

PyYAML follows YAML 1.1, to which ``1e-2``, ``1.5e3`` and ``-.5`` are texts.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """Reads."""


class _Dumper(yaml.SafeDumper):
    """Writes; needs the same rule, to quote a text that looks like a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The plain data that ``text`` stands for. Raises ``yaml.YAMLError``."""
    return yaml.load(text, _Loader)


def write_yaml(tree: Any) -> str:
    """Plain data as text, mappings in their own order; ``read_yaml`` gives it back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
