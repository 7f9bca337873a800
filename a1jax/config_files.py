"""Config files: an experiment file loaded by path, a config saved as a Python file that can be run again."""

from __future__ import annotations

import builtins
import dataclasses
import enum
import importlib.util
import math
import os
import pathlib
import pprint
import re
import sys
import traceback
from typing import Any

import numpy as np

from a1jax.config_bind import Binding, lookup, name_of, public_module
from a1jax.config_types import ConfigError, suggest

_WIDTH = 140  # columns of a saved file; what fits is kept on one line


def load(spec: str) -> Any:
    """The config of ``FILE.py`` or ``FILE.py:arg``: imports the file by its path and calls its ``get_config(arg)``.

    Raises ConfigError, one line with file and line number, for anything that goes wrong on the way.
    """
    match = re.fullmatch(r"(.+?\.py)(?::(.*))?", str(spec), re.DOTALL)
    if not match:
        raise ConfigError(f"{spec}: expected FILE.py or FILE.py:arg")
    path, arg = pathlib.Path(match[1]), match[2] or ""
    if not path.is_file():
        near = suggest(path.name, sorted(p.name for p in path.parent.glob("*.py"))) if path.parent.is_dir() else ""
        raise ConfigError(f"{path}: no such file{near}")
    try:
        module = _import(path)
    except SyntaxError as error:
        raise ConfigError(f"{error.filename or path}:{error.lineno}: syntax error: {error.msg}") from error
    except Exception as error:
        raise ConfigError(_one_line(path, error)) from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"{path}: has no function get_config(arg)")
    try:
        cfg = get_config(arg)
    except Exception as error:
        raise ConfigError(_one_line(path, error)) from error
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise ConfigError(f"{path}: get_config({arg!r}) returned {type(cfg).__name__}, not a config dataclass")
    return cfg


def save(cfg: Any, path: str | os.PathLike[str]) -> None:
    """Writes a Python file whose ``get_config()`` builds a config equal to ``cfg``. The same config gives the same text.

    Raises ConfigError, and writes nothing, for a value that Python text cannot name (a lambda, a function of an experiment file, an array).
    """
    text = source(cfg)
    space: dict[str, Any] = {"__name__": "a1jax_saved_config"}
    exec(compile(text, str(path), "exec"), space)
    again = space["get_config"]()
    if again != cfg and repr(again) != repr(cfg):  # nan is not equal to itself, but reads the same
        raise ConfigError(f"{path}: the config does not survive being written as Python; compare {again!r} with {cfg!r}")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)  # a reader sees the old file or the new one, never half of one


def source(cfg: Any) -> str:
    """The text of the Python file that ``save`` writes."""
    names = _Names()
    body = _render(cfg, names, "config", 4, len("return "))
    return (
        '"""A saved a1jax config: run it again with `a1jax run`."""\n\n'
        f"{names.imports()}\n\n"
        'def get_config(arg=""):\n'
        "    if arg:\n"
        '        raise ConfigError(f"a saved config takes no argument, got {arg!r}")\n'
        f"    return {body}\n"
    )


def _import(path: pathlib.Path) -> Any:
    name = "a1jax_experiment_" + re.sub(r"\W", "_", str(path.resolve()))
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    before, wrote = sys.modules.get(name), sys.dont_write_bytecode
    sys.modules[name] = module  # dataclasses and annotations look their module up by name
    sys.dont_write_bytecode = True  # loading a config leaves nothing beside it
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name) if before is None else sys.modules.update({name: before})
        raise
    finally:
        sys.dont_write_bytecode = wrote
    return module


def _one_line(path: pathlib.Path, error: Exception) -> str:
    message = " ".join(str(error).split())
    where, here = str(path), os.path.abspath(path)
    for frame in traceback.extract_tb(error.__traceback__):
        if os.path.abspath(frame.filename) == here:
            where = f"{path}:{frame.lineno}"
    return f"{where}: {message}" if isinstance(error, ConfigError) else f"{where}: {type(error).__name__}: {message}"


class _Names:
    """The modules that a saved file imports, each under one short name."""

    def __init__(self) -> None:
        self.modules: dict[str, str] = {}
        self.roots: set[str] = set()

    def of(self, thing: Any, path: str) -> str:
        """The text that means ``thing`` (a function or class) in the file, importing its module."""
        module, name = _importable(thing, path)
        if module == "builtins":
            return name
        if module not in self.modules:
            parts = module.split(".")
            taken = {*(short.split(".")[0] for short in self.modules.values()), *dir(builtins), "get_config", "bind", "arg", "ConfigError"}
            short = ["_".join(parts[-n:]) for n in range(1, len(parts) + 1)] + [f"{parts[-1]}_{n}" for n in range(2, 100)]
            if parts[0] != "a1jax" and (parts[0] not in taken or parts[0] in self.roots):
                self.roots.add(parts[0])
                short = [module]  # a library is called by its full name: optax.adamw, jax.nn.silu
            self.modules[module] = next(candidate for candidate in short if candidate not in taken or candidate == module)
        return f"{self.modules[module]}.{name}"

    def imports(self) -> str:
        """The import lines: libraries, then a1jax, each in order."""
        names: dict[str, list[str]] = {"a1jax.config": ["ConfigError", "bind"]}
        lines = []
        for module, short in self.modules.items():
            parent, _, last = module.rpartition(".")
            if not parent or short == module:
                lines.append(f"import {module}")
            else:
                names.setdefault(parent, []).append(last + (f" as {short}" if short != last else ""))
        lines += [f"from {module} import {', '.join(sorted(found))}" for module, found in names.items()]
        lines.sort(key=lambda line: (not line.startswith("import "), line))
        others = [line for line in lines if "a1jax" not in re.split(r"[ .]", line)]
        own = [line for line in lines if line not in others]
        return "\n".join([*others, *([""] if others else []), *own]) + "\n"


def _importable(thing: Any, path: str) -> tuple[str, str]:
    """(module, name) under which ``thing`` can be imported. Raises ConfigError if there is none."""
    module, name = public_module(thing), getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None)
    if not module or not name or "<" in name or module == "__main__" or module.startswith("a1jax_experiment_"):
        why = "cannot be imported by name, so the run could not be repeated; define it in a module of a1jax"
        raise ConfigError(f"{path}: {name_of(thing)} {why}")
    if lookup(module, name) is not thing:
        raise ConfigError(f"{path}: {module}.{name} is not what the config holds; bind the function that can be imported under its name")
    return module, name


def _render(value: Any, names: _Names, path: str, indent: int, used: int) -> str:
    """``value`` as Python text; on one line where it fits after ``used`` columns, else one entry a line."""
    head, entries, tail = _entries(value, names, path)
    if entries is None:
        return head
    flat = [label + _render(item, names, below, 0, 10**6) for label, item, below in entries]
    comma = "," if isinstance(value, tuple) and len(flat) == 1 and head == "(" else ""
    line = f"{head}{', '.join(flat)}{comma}{tail}"
    if indent + used + len(line) + 1 <= _WIDTH or not flat or used >= 10**6:
        return line
    inside = " " * (indent + 4)
    rows = [f"{inside}{label}{_render(item, names, below, indent + 4, len(label))},\n" for label, item, below in entries]
    return f"{head}\n{''.join(rows)}{' ' * indent}{tail}"


def _entries(value: Any, names: _Names, path: str) -> tuple[str, list[tuple[str, Any, str]] | None, str]:
    """(opening text, [(label, value, its path)], closing text); no list for a value that is one piece of text."""
    if isinstance(value, Binding):
        return "bind(", [("", _Text(names.of(value.fn, path)), path), *((f"{n}=", v, f"{path}.{n}") for n, v in value.items)], ")"
    if isinstance(value, _Text):
        return str(value), None, ""
    if isinstance(value, enum.Enum):
        return f"{names.of(type(value), path)}.{value.name}", None, ""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return f"{names.of(type(value), path)}(", [(f"{n}=", getattr(value, n), f"{path}.{n}") for n in fields], ")"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{names.of(type(value), path)}(", [(f"{n}=", getattr(value, n), f"{path}.{n}") for n in value._fields], ")"
    for kind, opening, closing in ((tuple, "(", ")"), (list, "[", "]")):
        if type(value) is kind:
            return opening, [("", item, f"{path}.{n}") for n, item in enumerate(value)], closing
    if type(value) is dict:
        return "{", [(f"{_render(k, names, path, 0, 10**6)}: ", v, f"{path}.{k}") for k, v in value.items()], "}"
    if type(value) in (set, frozenset):
        return f"{type(value).__name__}([", [("", item, path) for item in sorted(value, key=repr)], "])"
    return _atom(value, names, path), None, ""


class _Text(str):
    """Text that goes into the file as it is."""


def _atom(value: Any, names: _Names, path: str) -> str:
    if type(value) is float and not math.isfinite(value):
        return f'float("{value}")'
    if type(value) is str:
        return '"' + repr(value)[1:-1] + '"' if repr(value)[0] == "'" and '"' not in value and "\\'" not in repr(value) else repr(value)
    if value is None or value is Ellipsis or type(value) in (bool, int, float, complex, bytes):
        return pprint.pformat(value, width=10**6)
    if isinstance(value, np.dtype):
        return f'{names.of(np.dtype, path)}("{value.name}")'
    if isinstance(value, pathlib.PurePath):
        return f"{names.of(pathlib.Path, path)}({str(value)!r})"
    if isinstance(value, type) or callable(value):
        return names.of(value, path)
    raise ConfigError(f"{path}: {type(value).__name__} cannot be written as Python; use numbers, text, tuples, dicts, dataclasses or bind")
