"""Configs: frozen dataclasses that are read from YAML, checked strictly, and written back.

`from_plain` makes a dataclass from plain data (dicts, lists, numbers, strings), and `to_plain` does the reverse. The data
come from a YAML file and from "section.key=value" overrides. Unknown keys and values of the wrong type raise UserError.
Invariant: a config that is written as YAML and read back is equal to the original. Each dataclass is defined beside the code
that it configures.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hpc.errors import UserError

T = TypeVar("T")
PathText = typing.NewType("PathText", str)  # type of a field that holds a path: `convert` expands it; see expand_path()


class _Loader(yaml.SafeLoader):
    """Reads 3e-4 as a number. The YAML 1.1 rules of PyYAML would read it as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^\.\d+$|^[-+]?\.(inf|Inf)$"),
    list("-+0123456789."),
)


def volatile(default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """Declares a config field that changes how long or where a stage runs, but not its result.

    The identity of a stage (StageDir.identity) leaves such fields out, so a finished stage stays valid if such a field changes.

    Args:
        default: The field's default value.
        **kwargs: Passed to dataclasses.field, such as default_factory.
    """
    return dataclasses.field(default=default, metadata={"volatile": True}, **kwargs)


def added(default: Any) -> Any:
    """Declares a config field that was added after stages had been recorded, and whose default changes no result.

    The identity of a stage leaves such a field out while it has its default, so results made before the field existed stay
    valid.

    Args:
        default: The field's default value: the behaviour before the field existed.
    """
    return dataclasses.field(default=default, metadata={"added": True})


def expand_path(text: str, name: str = "The path") -> str:
    """Replaces ~ and environment variables in a path. Addresses (with "://"), and paths that exist as they are, stay the same.

    Args:
        text: The path.
        name: What the path is, for the error message, such as its key in the config.

    Raises:
        UserError: A variable is not set, or ~ names no user.
    """
    path = os.path.expanduser(text)
    if "://" in path or os.path.exists(path):
        return path
    path = os.path.expandvars(path)
    if unknown := re.search(r"^~[^/]*|\$(\w+|\{[^}]*\})", path):
        raise UserError(f"{name} is {text}, but {unknown[0]} is not known here. Set the variable, or write the whole path.")
    return path


def parse_yaml(text: str | bytes, source: str) -> Any:
    """Parses YAML into plain data.

    Args:
        text: The YAML; bytes are read as UTF-8, or as UTF-16 if they begin with a byte-order mark.
        source: Name of the text in error messages, such as the path of the file.

    Raises:
        UserError: The text is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        raise UserError(f"{source} is not text in UTF-8 ({' '.join(str(error).split())}). Save it as UTF-8.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> dict:
    """Reads a YAML file with keys and values at its top level. An empty file gives an empty dict.

    Raises:
        UserError: The file cannot be read, is not valid YAML, or holds no keys.
    """
    try:
        data = parse_yaml(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"The config {path} cannot be read: {error.strerror}.") from None
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{path} must hold keys and values, not a {type(data).__name__}.")
    return data or {}


def apply_overrides(data: dict, assignments: list[str]) -> dict:
    """Returns a copy of `data` with overrides applied, one after another. Missing sections are created.

    Another `kind` empties its section first, because the other keys are those of the kind before: give `kind` before them.

    Args:
        data: Plain data of a config.
        assignments: Overrides "section.key=value"; each value is parsed as YAML.

    Raises:
        UserError: An assignment has no key or no "=", or names a key inside something that is not a section.
    """
    data = json.loads(json.dumps(data))
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"'{assignment}' is not an override; write section.key=value.")
        *parents, last = key.split(".")
        section = data
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(f"'{assignment}': {parent} holds a value, not a section.")
        parsed = parse_yaml(value, f"'{assignment}'")
        if is_other_kind(section, {last: parsed}):
            section.clear()
        section[last] = parsed
    return data


def is_other_kind(before: dict, after: dict) -> bool:
    """Returns whether two sections name different values of `kind`, so that the keys of one mean nothing in the other."""
    return "kind" in before and "kind" in after and before["kind"] != after["kind"]


def from_plain(cls: type[T], data: Any, key_path: str = "") -> T:
    """Makes a config dataclass from plain data. Each value is converted to the type in the field's annotation.

    Args:
        cls: The dataclass.
        data: A dict with the dataclass's fields. Fields with a default may be missing.
        key_path: Dotted key of `data` in the whole config, for error messages. "" for the whole config.

    Raises:
        UserError: A key is unknown (the message suggests the nearest one) or missing, or a value is wrong.
    """
    if not isinstance(data, dict):
        raise UserError(f"{key_path or 'The config'} must be a section with keys, not {data!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            advice = f"did you mean '{near[0]}'?" if near else f"the known keys are {', '.join(fields)}."
            raise UserError(f"Unknown key '{_join(key_path, key)}' in the config; {advice}")
    annotations = typing.get_type_hints(cls)
    values = {key: convert(annotations[key], value, _join(key_path, key)) for key, value in data.items()}
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"The config lacks '{_join(key_path, name)}', which has no default.")
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:  # the __post_init__ of the dataclass rejects the values
        raise UserError(f"{key_path or 'The config'}: {error}") from None


def _join(key_path: str, key: Any) -> str:
    return f"{key_path}.{key}" if key_path else str(key)


def convert(annotation: Any, value: Any, key_path: str) -> Any:
    """Converts a plain value to the type in an annotation.

    Args:
        annotation: A dataclass, Literal, tuple, dict or scalar type, a union of one of these with None, or of dataclasses.
        value: The plain value.
        key_path: Dotted key of the value in the whole config, for error messages.

    Raises:
        UserError: The value does not fit the annotation.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        members = [a for a in arguments if a is not type(None)]
        return convert(_select_by_kind(members, value, key_path) if len(members) > 1 else members[0], value, key_path)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"'{key_path}' is {value!r}; choose one of {', '.join(map(str, arguments))}.")
        return value
    if origin is tuple:
        return _convert_tuple(annotation, value, key_path)
    if annotation is PathText:
        return expand_path(_convert_scalar(str, value, key_path), key_path)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type(annotation, value, key_path)
        return {str(k): convert(arguments[1], v, _join(key_path, k)) for k, v in value.items()}
    if dataclasses.is_dataclass(annotation):
        return from_plain(annotation, {} if value is None else value, key_path)
    return _convert_scalar(annotation, value, key_path)


def _convert_tuple(annotation: Any, value: Any, key_path: str) -> tuple:
    elements = typing.get_args(annotation)
    if isinstance(value, str) and elements in ((str, ...), (PathText, ...)):
        value = [value]  # a user may write a list of one string as the string alone
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(annotation, value, key_path)
    if elements[-1] is Ellipsis:
        elements = (elements[0],) * len(value)
    if len(value) != len(elements):
        raise UserError(f"'{key_path}' needs {len(elements)} values, not {len(value)}.")
    return tuple(convert(a, v, f"{key_path}[{i}]") for i, (a, v) in enumerate(zip(elements, value, strict=True)))


def _convert_scalar(kind: type, value: Any, key_path: str) -> Any:
    if kind is bool or isinstance(value, bool):  # first, because Python's bool is an int
        if kind is not bool or not isinstance(value, bool):
            raise _wrong_type(kind, value, key_path)
        return value
    if kind is float and isinstance(value, int):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, kind) or (kind is float and math.isnan(value)):
        raise _wrong_type(kind, value, key_path)
    return value


def _select_by_kind(classes: list[type], value: Any, key_path: str) -> type:
    """Returns the dataclass whose field `kind` equals value["kind"]. If the value has no kind, returns the first dataclass."""
    by_kind = {typing.get_args(typing.get_type_hints(c)["kind"])[0]: c for c in classes}
    first = next(iter(by_kind))
    kind = value.get("kind", first) if isinstance(value, dict) else first
    if kind not in by_kind:
        raise UserError(f"'{_join(key_path, 'kind')}' is {kind!r}; choose one of {', '.join(by_kind)}.")
    return by_kind[kind]


def _wrong_type(annotation: Any, value: Any, key_path: str) -> UserError:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    expected = words.get(annotation, "a list" if typing.get_origin(annotation) is tuple else str(annotation))
    return UserError(f"'{key_path}' is {value!r}, which is not {expected}.")


def to_plain(config: Any, volatile: bool = True) -> Any:
    """Converts a config to plain data for YAML and JSON. Tuples become lists.

    Args:
        config: A config dataclass, or a part of one.
        volatile: True for all fields. False for the identity of a stage, without volatile fields and without `added` fields
            that have their default.
    """
    if dataclasses.is_dataclass(config):
        fields = [f for f in dataclasses.fields(config) if volatile or _in_identity(f, getattr(config, f.name))]
        return {f.name: to_plain(getattr(config, f.name), volatile) for f in fields}
    if isinstance(config, (list, tuple)):
        return [to_plain(v, volatile) for v in config]
    if isinstance(config, dict):
        return {k: to_plain(v, volatile) for k, v in config.items()}
    return config


def _in_identity(field: dataclasses.Field, value: Any) -> bool:
    """Whether a field with this value belongs to the identity of a stage."""
    return not field.metadata.get("volatile") and not (field.metadata.get("added") and value == field.default)


def to_yaml(config: Any) -> str:
    """Writes a config as YAML, with every field in the order of its definition."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def digest(data: Any) -> str:
    """Returns the first 16 hex digits of the SHA-256 of plain data, as JSON with sorted keys and without spaces."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def differences(before: Any, after: Any, key_path: str = "") -> list[str]:
    """Lists the differences between two plain structures, such as "model.codes: 512 → 256".

    Args:
        before: The old structure.
        after: The new structure.
        key_path: Dotted key of the structures in the whole config; every line starts with it.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = list(before) + [k for k in after if k not in before]
        return [d for k in keys for d in differences(before.get(k), after.get(k), _join(key_path, k))]
    return [] if before == after else [f"{key_path}: {before!r} → {after!r}"]
