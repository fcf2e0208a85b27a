"""Parameters from YAML files and from key=value words, read by the core schema of YAML 1.2.

PyYAML reads YAML 1.1, in which 1_16 is 116, 2024-01-05 is a date, on and no are booleans, and 1e-3 is text.
"""

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

TEXT = "tag:yaml.org,2002:str"
CORE = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    "merge": (r"<<", "<"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}  # fmt: skip


class CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core schema. Keys, and values of the keys in `text`, are text; a key stands once in a mapping."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    text: Collection[str] = ()

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        for key, value in reversed(node.value):
            if names.count(key.value) > 1:  # PyYAML would take the last: a row of a table would be gone
                fault = f"the key {key.value!r} stands twice"
                raise yaml.MarkedYAMLError("in a mapping", node.start_mark, fault, key.start_mark)
            for scalar in (key, value) if key.value in self.text else (key,):
                if isinstance(scalar, yaml.ScalarNode) and not scalar.tag.endswith(":merge"):
                    scalar.tag = TEXT
        return node

    def construct_core_int(self, node: Any) -> int:
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


for _name, (_pattern, _first) in CORE.items():
    _form = re.compile(f"^(?:{_pattern})$")
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _form, list(_first))
CoreLoader.add_constructor("tag:yaml.org,2002:int", CoreLoader.construct_core_int)


def parse_yaml(source: str | bytes, place: str, text: Collection[str] = ()) -> Any:
    """Read YAML; ValueError that begins with `place` where it is none. text: keys whose values are text."""
    try:
        loader = CoreLoader(source)
        loader.text = text
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{place} is not YAML: {error}") from error


def read_parameters(file: Path, text: Collection[str] = ()) -> dict[str, Any]:
    """Read a YAML file of parameters; ValueError unless it is a mapping."""
    values = parse_yaml(file.read_bytes(), str(file), text) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold `name: value` lines, it holds a {type(values).__name__}")
    return values


def parse_values(pairs: Sequence[str], text: Collection[str] = ()) -> dict[str, Any]:
    """["lr=1e-3", "crop=[64, 64]"] -> {"lr": 0.001, "crop": [64, 64]}. What is text, or is declared so, is taken as typed."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, typed = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, got {pair!r}")
        if key in values:
            raise ValueError(f"{key} is given twice")
        values[key] = _parse_value(key, typed, key.rpartition(".")[2] in text)
    return values


def _parse_value(key: str, typed: str, is_text: bool) -> Any:
    if len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\"":
        return typed[1:-1]
    if is_text or not typed:
        return typed
    value = parse_yaml(typed, f"{key}: {typed!r}")
    return typed if isinstance(value, str) else value  # "data #2" is not "data" with a comment


def merge(parameters: dict[str, Any], values: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Put values over parameters; "common.root" reaches into the mapping `common`, which must be in `whole`."""
    merged = copy.deepcopy(parameters)
    for key, value in values.items():
        *path, last = key.split(".")
        inner, there = merged, whole
        for name in path:
            if not isinstance(there.get(name), dict):
                raise ValueError(f"{key}: the parameters file has no mapping {name!r} to put {last!r} into")
            inner, there = inner.setdefault(name, {}), there[name]
        inner[last] = value
    return merged


def lay_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings and those in them; `above` wins, None instead of a mapping takes it away."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(result.get(key), dict) and value is None:
            del result[key]
        elif isinstance(result.get(key), dict) and isinstance(value, dict):
            result[key] = lay_over(result[key], value)
        else:
            result[key] = value
    return result
