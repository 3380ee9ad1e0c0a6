"""Frozen dataclasses ⇄ YAML: strict keys with "did you mean", a.b=c overrides, fingerprints."""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hpc.errors import UserError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as a string; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^\.\d+$|^[-+]?\.(inf|Inf)$"),
    list("-+0123456789."),
)


def volatile(default: Any = dataclasses.MISSING, **kwargs) -> Any:
    """A field that changes how long or where a stage runs, not what it makes: left out of the fingerprint."""
    return dataclasses.field(default=default, metadata={"volatile": True}, **kwargs)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> dict:
    try:
        data = parse_yaml(Path(path).read_text(), str(path))
    except OSError as error:
        raise UserError(f"The config {path} cannot be read: {error.strerror}.") from None
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{path} must hold keys and values, not a {type(data).__name__}.")
    return data or {}


def override(data: dict, assignments: list[str]) -> dict:
    """Returns `data` with each "a.b=c" applied; c is read as YAML."""
    data = json.loads(json.dumps(data))
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"'{assignment}' is not an override; write section.key=value.")
        *parents, last = key.split(".")
        node = data
        for part in parents:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise UserError(f"'{assignment}': {part} holds a value, not a section.")
        node[last] = parse_yaml(value, f"'{assignment}'")
    return data


def build(cls: type[T], data: Any, where: str = "") -> T:
    """Makes a dataclass from plain data. Raises UserError that names the key, and the nearest one for an unknown key."""
    if not isinstance(data, dict):
        raise UserError(f"{where or 'The config'} must be a section with keys, not {data!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(fields)}."
            raise UserError(f"Unknown key '{_join(where, key)}' in the config; {hint}")
    values = {key: convert(hints[key], value, _join(where, key)) for key, value in data.items()}
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"The config lacks '{_join(where, name)}'.")
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where or 'The config'}: {error}") from None


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    wrong = UserError(f"'{where}' is {value!r}, which is not {_name(kind)}.")
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        return convert(_chosen(kinds, value, where) if len(kinds) > 1 else kinds[0], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"'{where}' is {value!r}; choose one of {', '.join(map(str, arguments))}.")
        return value
    if origin is tuple:
        if isinstance(value, str) and arguments == (str, ...):
            value = [value]  # a list of one is what people write as one
        if not isinstance(value, (list, tuple)):
            raise wrong
        if arguments[-1] is Ellipsis:
            return tuple(convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(arguments):
            raise UserError(f"'{where}' needs {len(arguments)} values, not {len(value)}.")
        return tuple(convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {str(k): convert(arguments[1], v, _join(where, k)) for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return build(kind, {} if value is None else value, where)
    if kind is bool or isinstance(value, bool):
        if kind is not bool or not isinstance(value, bool):
            raise wrong
        return value
    if kind is float and isinstance(value, int):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, kind) or (kind is float and math.isnan(value)):
        raise wrong
    return value


def _chosen(kinds: list[type], value: Any, where: str) -> type:
    """Of several dataclasses, the one whose field `kind` has the value's; the first where the value has none."""
    named = {typing.get_args(typing.get_type_hints(k)["kind"])[0]: k for k in kinds}
    wanted = value.get("kind", next(iter(named))) if isinstance(value, dict) else next(iter(named))
    if wanted not in named:
        raise UserError(f"'{_join(where, 'kind')}' is {wanted!r}; choose one of {', '.join(named)}.")
    return named[wanted]


def _name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, "a list" if typing.get_origin(kind) is tuple else str(kind))


def plain(config: Any, volatile: bool = True) -> Any:
    """Dataclass → plain data for YAML and JSON; volatile=False leaves volatile fields out."""
    if dataclasses.is_dataclass(config):
        fields = [f for f in dataclasses.fields(config) if volatile or not f.metadata.get("volatile")]
        return {f.name: plain(getattr(config, f.name), volatile) for f in fields}
    if isinstance(config, (list, tuple)):
        return [plain(v, volatile) for v in config]
    if isinstance(config, dict):
        return {k: plain(v, volatile) for k, v in config.items()}
    return config


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def digest(data: Any) -> str:
    """16 hex digits of SHA-256 over canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Human-readable differences of two plain structures: "model.codes: 512 → 256"."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = list(before) + [k for k in after if k not in before]
        return [d for k in keys for d in differences(before.get(k), after.get(k), _join(where, k))]
    return [] if before == after else [f"{where}: {before!r} → {after!r}"]
