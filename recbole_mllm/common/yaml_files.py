"""The one reader of YAML files; its errors name the file, the line and what to write instead."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from recbole_mllm.common.errors import UserError


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads numbers as RecBole does (config/configurator.py:105-122): YAML 1.1 takes 1e-3 for a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _StrictLoader(_Loader):
    """Refuses a key that stands twice."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), dict[str, int]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in lines:
                    problem = f"{key.value} stands there already, on line {lines[key.value]}; keep one of them"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return node


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the keys and values of the YAML file at `path`; an empty file has none.

    Raises:
        UserError: It cannot be read, is not UTF-8, no valid YAML or no mapping, names a key twice, or holds a tag that
            would make a Python object.
    """
    node = _mapping_node(path, _StrictLoader)
    if node is None:
        return {}
    found: dict[str, Any] = {}
    loader, value = _Loader(""), node
    try:
        loader.flatten_mapping(node)
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else loader.construct_object(key, deep=True)
            found[str(name)] = loader.construct_object(value, deep=True)
    except yaml.YAMLError as error:
        raise _invalid(path, error) from error
    except (ValueError, OverflowError, RecursionError) as error:  # a date that is none, a number of 5,000 digits
        why = str(error).partition(";")[0] or type(error).__name__
        raise UserError(f"{path}:{value.start_mark.line + 1}: the value cannot be read ({why})") from error
    return found


def check_readable(path: Path) -> bool:
    """Refuse a file that no reader of YAML could take for a mapping; return whether it holds anything.

    Unlike `read_mapping` it lets keys that are named twice and Python's tags pass: stock RecBole reads them.

    Raises:
        UserError: Says what is wrong, and where.
    """
    return _mapping_node(path) is not None


def line_of(path: Path, *keys: str) -> int | None:
    """Return the line on which the last of nested `keys` stands; None where the file does not have it so."""
    try:
        node, line = _mapping_node(path), None
    except UserError:
        return None
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = [(name.start_mark.line + 1, value) for name, value in pairs if str(name.value) == key]
        if not found:
            return None
        line, node = found[-1]
    return line


def _mapping_node(path: Path, loader: type[_Loader] = _Loader) -> Any:
    """Return the file's content as a mapping of YAML nodes, None for an empty file."""
    text = _text(path)
    try:
        node = yaml.compose(text, loader)
    except yaml.reader.ReaderError as error:
        line, code = text.count("\n", 0, error.position) + 1, int(error.character)
        raise UserError(
            f"{path}:{line}: it holds a control character (code {code}); remove it, or save the file as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise _invalid(path, error) from error
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read; it must hold `key: value` lines") from None
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"):
        return None
    if not isinstance(node, yaml.MappingNode):
        what = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise UserError(f"{path}:{node.start_mark.line + 1}: it must hold `key: value` lines, and here is {what}")
    return node


def _text(path: Path) -> str:
    if os.path.lexists(path) and not path.is_file():
        what = "a link that leads nowhere" if path.is_symlink() and not path.is_dir() else "no file"
        raise UserError(f"{path} is {what}; put a YAML file in its place, or remove it")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise UserError(f"{path}:{line}: it is not UTF-8 (byte 0x{byte:02x}); save it as UTF-8") from error


def _invalid(path: Path, error: Any) -> UserError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"{path}:{mark.line + 1}: it" if mark is not None else str(path)
    words = [getattr(error, "context", None), getattr(error, "problem", None) or error]
    return UserError(f"{place} is no valid YAML: {' '.join(' '.join(str(word) for word in words if word).split())}")
