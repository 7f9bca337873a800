"""Configs as plain Python values: bind, load, check, override, save, diff.

An experiment file has ``get_config(arg="")`` that returns a frozen dataclass; where a choice is a function, the field
holds a Binding. Nothing here knows a particular config: every function walks dataclasses, bindings, tuples and dicts.
Paths are dotted: ``sft.optimizer.learning_rate``, ``teachers.0.steps``, ``teachers.search.steps``.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable
from inspect import Parameter
from typing import Any

from a1jax.config_bind import Binding, bind, default, name_of, parameters
from a1jax.config_files import load, save
from a1jax.config_types import ConfigError, annotations, fit, listing, suggest, within

__all__ = ["Binding", "ConfigError", "bind", "check", "diff", "load", "override", "save"]


def check(cfg: Any, path: str = "") -> None:
    """Compares every value in a config with the annotation of its field or bound parameter.

    Raises ConfigError naming the path of the first one that does not fit.
    """
    for name, value, annotation in _children(cfg, Any):
        below = _join(path, name)
        fit(value, annotation, below)
        check(value, below)


def override(cfg: Any, assignments: Iterable[str]) -> Any:
    """A copy of the config with every ``path=value`` applied; all of them at once, so values that depend on each other may change together.

    A value is read as a Python literal where that fits the field, else as text where the field takes text.
    Raises ConfigError for a malformed assignment, an unknown path (naming what exists there) or a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set {assignment}: write path.to.field=value")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{path.strip()}: set here, and also {part!r} above it as a whole; keep one of the two")
        if isinstance(node.get(parts[-1]), dict):
            raise ConfigError(f"{path.strip()}: set as a whole, and also fields within it; keep one of the two")
        node[parts[-1]] = text.strip()
    return _rebuild(cfg, Any, tree, "") if tree else cfg


def diff(old: Any, new: Any, path: str = "") -> list[str]:
    """'path: old -> new' for every value that differs, in the order of the fields; empty when the two are equal."""
    left, right = ({str(name): value for name, value, _ in _children(side, Any)} for side in (old, new))
    if type(old) is not type(new) or not (left or right):
        return [] if _same(old, new) else [f"{path or 'config'}: {old!r} -> {new!r}"]
    lines = []
    if isinstance(old, Binding) and old.fn is not new.fn:
        lines.append(f"{path or 'config'}: {name_of(old.fn)} -> {name_of(new.fn)}")
    for name in dict.fromkeys([*left, *right]):
        below = _join(path, name)
        if name in left and name in right:
            lines += diff(left[name], right[name], below)
        else:
            sides = (repr(side[name]) if name in side else "(not set)" for side in (left, right))
            lines.append(f"{below}: {' -> '.join(sides)}")
    return lines


def _same(old: Any, new: Any) -> bool:
    return type(old) is type(new) and (old == new or (old != old and new != new))  # nan is the same as nan here


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, Binding))


def _children(value: Any, annotation: Any) -> list[tuple[Any, Any, Any]]:
    """(name, value, annotation) of everything directly inside ``value``, itself annotated so; empty for a plain value."""
    if isinstance(value, Binding):
        known, _ = parameters(value.fn)
        return [(name, item, known.get(name, Any)) for name, item in value.items]
    if _is_config(value):
        hints = annotations(type(value))
        return [(field.name, getattr(value, field.name), hints.get(field.name, Any)) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return [(key, item, within(annotation, dict, key)) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return [(place, item, within(annotation, type(value), place)) for place, item in enumerate(value)]
    return []


def _rebuild(value: Any, annotation: Any, tree: dict[str, Any], path: str) -> Any:
    """``value`` with the assignments of ``tree`` (name -> text, or name -> tree) put in."""
    known = _settable(value, annotation, path)
    changes = {}
    for name, change in tree.items():
        below = _join(path, name)
        if name not in known:
            owner = type(value).__name__ if not isinstance(value, Binding) else name_of(value.fn)
            what = "index" if isinstance(value, (tuple, list)) else "key" if isinstance(value, dict) else "field"
            raise ConfigError(f"{below}: no such {what} in {owner}{suggest(name, known)}; it has: {listing(known)}")
        key, current, wanted = known[name]
        changes[key] = _rebuild(current, wanted, change, below) if isinstance(change, dict) else _read(change, current, wanted, below)
    try:
        return _replace(value, changes)
    except (TypeError, ValueError) as error:  # a config's own __post_init__ says no
        raise ConfigError(f"{path + ': ' if path else ''}{' '.join(str(error).split())}") from error


def _settable(value: Any, annotation: Any, path: str) -> dict[str, tuple[Any, Any, Any]]:
    """Text of the name -> (name, current value, annotation) for what an assignment may reach inside ``value``."""
    found = {str(name): (name, item, wanted) for name, item, wanted in _children(value, annotation)}
    if isinstance(value, Binding):
        for name, wanted in parameters(value.fn)[0].items():
            found.setdefault(name, (name, default(value.fn, name), wanted))
    elif _is_config(value):
        fixed = {field.name for field in dataclasses.fields(value) if not field.init}
        return {name: found[name] for name in found if name not in fixed}
    elif not isinstance(value, (dict, tuple, list)):
        shown = "not set" if value is Parameter.empty else f"{value!r} ({type(value).__name__})"
        raise ConfigError(f"{path}: {shown}, so nothing inside it can be set")
    return found


def _replace(value: Any, changes: dict[Any, Any]) -> Any:
    if isinstance(value, Binding):
        return bind(value, **changes)
    if _is_config(value):
        return dataclasses.replace(value, **changes)
    if isinstance(value, dict):
        return {key: changes.get(key, item) for key, item in value.items()}
    items = [changes.get(place, item) for place, item in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _read(text: str, current: Any, annotation: Any, path: str) -> Any:
    """The value of ``text`` for a place that holds ``current`` and is annotated so."""
    if annotation is Any and isinstance(current, str):
        annotation = str  # not annotated, but text stands there: `5` stays text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    for candidate in (value, text):
        try:
            fitted = fit(candidate, annotation, path)
        except ConfigError:
            continue
        if annotation is not Any or not (_is_config(current) or callable(current)):
            return float(fitted) if _wants_float(annotation, fitted) else fitted
    if isinstance(current, Binding):
        raise ConfigError(
            f"{path}: holds a function ({name_of(current.fn)}), which is chosen in the experiment file; "
            f"set its parameters instead: {listing(_join(path, name) for name in parameters(current.fn)[0])}"
        )
    if _is_config(current):
        inside = listing(_join(path, field.name) for field in dataclasses.fields(current))
        raise ConfigError(f"{path}: a {type(current).__name__}, which is not set as a whole; set its fields: {inside}")
    if annotation is Any:
        raise ConfigError(f"{path}: holds {name_of(current)}, which is chosen in the experiment file")
    return fit(value, annotation, path)


def _wants_float(annotation: Any, value: Any) -> bool:
    return annotation is float and isinstance(value, int)
