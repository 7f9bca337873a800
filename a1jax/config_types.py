"""ConfigError, and the fit of a value to an annotation. ``a1jax.config`` is the name other modules import from."""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import pathlib
import types
import typing
from collections.abc import Iterable
from typing import Any

_SEQUENCES = (collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one line: what, where, what to do."""


def annotations(thing: Any) -> dict[str, Any]:
    """Name -> resolved annotation of a function or dataclass. One that cannot be resolved (a name imported for
    type checkers only) counts as Any instead of spoiling the others."""
    try:
        return typing.get_type_hints(thing)
    except Exception:  # any error an annotation's own code may raise
        pass
    found: dict[str, Any] = {}
    for owner in reversed(thing.__mro__ if isinstance(thing, type) else (inspect.unwrap(thing),)):
        space = vars(inspect.getmodule(owner)) if inspect.getmodule(owner) else {}
        for name, annotation in getattr(owner, "__annotations__", {}).items():
            try:
                found[name] = eval(annotation, dict(space)) if isinstance(annotation, str) else annotation
            except Exception:
                found[name] = Any
    return found


def fit(value: Any, annotation: Any, path: str) -> Any:
    """``value`` as ``annotation`` wants it: an int for a float stays a number, a list becomes the tuple asked for.

    Raises ConfigError naming ``path`` where the value does not fit.
    """
    ok, fitted, where = _fit(value, annotation)
    if ok:
        return fitted
    raise ConfigError(f"{path}{where[0]}: got {where[1]!r} ({type(where[1]).__name__}), expected {describe(where[2])}")


_Miss = tuple[str, Any, Any]  # (path below the value, the value that does not fit, the annotation it should fit)


def _fit(value: Any, annotation: Any) -> tuple[bool, Any, _Miss]:
    annotation = _plain(annotation)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    miss: _Miss = ("", value, annotation)
    if annotation is Any:
        return True, value, miss
    if annotation is None or annotation is type(None):
        return value is None, value, miss
    if origin is typing.Literal:
        # 1 == True, yet they are different choices
        return any(value == choice and type(value) is type(choice) for choice in args), value, miss
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, args, miss)
    kind = origin or annotation
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool), value, miss
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value, miss
    if kind is collections.abc.Callable:
        return callable(value), value, miss
    if kind in (tuple, list) or kind in _SEQUENCES:
        return _fit_sequence(value, kind, args, miss)
    if kind in _MAPPINGS:
        return _fit_mapping(value, args, miss)
    if kind is pathlib.Path and isinstance(value, str):
        return True, pathlib.Path(value), miss
    try:
        return isinstance(value, kind), value, miss
    except TypeError:  # a protocol or another special form that cannot be asked at run time
        return True, value, miss


def _plain(annotation: Any) -> Any:
    """Annotated[T, ...] and NewType as T; type variables, strings and array annotations (jaxtyping) as Any."""
    while True:
        if typing.get_origin(annotation) in (typing.Annotated, typing.Final, typing.ClassVar):
            annotation = typing.get_args(annotation)[0]
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif hasattr(annotation, "__value__") and type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            break
    if isinstance(annotation, (typing.TypeVar, str)) or annotation is inspect.Parameter.empty:
        return Any
    return Any if type(annotation).__module__.startswith("jaxtyping") else annotation


def _fit_union(value: Any, choices: tuple[Any, ...], miss: _Miss) -> tuple[bool, Any, _Miss]:
    results = [_fit(value, choice) for choice in choices]
    good = [fitted for ok, fitted, _ in results if ok]
    for fitted in good:  # a member that takes the value as it is wins over one that would change it
        if fitted is value:
            return True, fitted, miss
    if good:
        return True, good[0], miss
    deep = [where for _, _, where in results if where[0]]  # the member that got furthest tells most
    return False, value, deep[0] if deep else miss


def _fit_sequence(value: Any, kind: Any, args: tuple[Any, ...], miss: _Miss) -> tuple[bool, Any, _Miss]:
    if not isinstance(value, (tuple, list)):
        return False, value, miss
    if kind is not tuple:
        wanted: Iterable[Any] = [args[0] if args else Any] * len(value)
    elif len(args) == 2 and args[1] is Ellipsis:
        wanted = [args[0]] * len(value)
    elif args and args != ((),):
        if len(args) != len(value):
            return False, value, miss
        wanted = args
    else:
        wanted = [Any] * len(value)
    fitted = []
    for place, (item, annotation) in enumerate(zip(value, wanted, strict=True)):
        ok, new, (where, bad, expected) = _fit(item, annotation)
        if not ok:
            return False, value, (f".{place}{where}", bad, expected)
        fitted.append(new)
    if isinstance(value, kind) and all(a is b for a, b in zip(fitted, value, strict=True)):
        return True, value, miss
    return True, (list(fitted) if kind is list else tuple(fitted)), miss


def _fit_mapping(value: Any, args: tuple[Any, ...], miss: _Miss) -> tuple[bool, Any, _Miss]:
    if not isinstance(value, collections.abc.Mapping):
        return False, value, miss
    keys, values = args if args else (Any, Any)
    fitted = {}
    for key, item in value.items():
        for thing, annotation in ((key, keys), (item, values)):
            ok, new, (where, bad, expected) = _fit(thing, annotation)
            if not ok:
                return False, value, (f".{key}{where}", bad, expected)
        fitted[key] = new
    return True, value if all(fitted[key] is value[key] for key in fitted) else fitted, miss


def within(annotation: Any, kind: type, place: Any) -> Any:
    """The annotation of what stands at ``place`` (index or key) in a ``kind`` annotated so; Any where it does not say."""
    annotation = _plain(annotation)
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((found for found in (within(choice, kind, place) for choice in args) if found is not Any), Any)
    origin = typing.get_origin(annotation)
    if not args or not isinstance(origin, type) or not issubclass(kind, origin):
        return Any
    if kind is dict:
        return args[1]
    if origin is tuple and args[-1] is not Ellipsis:
        return args[place] if place < len(args) else Any
    return args[0]


def describe(annotation: Any) -> str:
    """An annotation as a reader would write it."""
    annotation = _plain(annotation)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is Ellipsis:
        return "..."
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(describe, args))
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return "a function or binding"
    if origin is not None and args:
        return f"{describe(origin)}[{', '.join(map(describe, args))}]"
    return getattr(annotation, "__name__", str(annotation))


def suggest(name: str, known: Iterable[str]) -> str:
    """', did you mean ...?' or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def listing(names: Iterable[Any]) -> str:
    """Names in a row, in their own order."""
    return ", ".join(map(str, names)) or "nothing"
