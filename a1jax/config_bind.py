"""Bindings: a function with some of its parameters fixed. ``a1jax.config`` is the name other modules import from."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from a1jax.config_types import ConfigError, annotations, fit, listing, suggest


@dataclasses.dataclass(frozen=True, repr=False)
class Binding:
    """A function and the parameters fixed for it; made by ``bind``. Hashable where the bound values are.

    fn: called by ``binding(*args, **more)``; ``more`` wins over what is bound.
    items: (name, value) pairs in the order of fn's signature, so that equal bindings compare equal.
    """

    fn: Callable[..., Any]
    items: tuple[tuple[str, Any], ...] = ()

    @property
    def kwargs(self) -> dict[str, Any]:
        """The bound parameters, a fresh dict."""
        return dict(self.items)

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self.fn(*args, **{**self.kwargs, **more})

    def __repr__(self) -> str:
        bound = "".join(f", {name}={value!r}" for name, value in self.items)
        return f"bind({name_of(self.fn)}{bound})"


def bind(fn: Callable[..., Any], **kwargs: Any) -> Binding:
    """Fixes parameters of ``fn`` now, calls it later. Binding a Binding adds to what it has bound.

    Raises ConfigError for a name that fn does not take, or for a value its annotation does not allow.
    """
    if isinstance(fn, Binding):
        return bind(fn.fn, **{**fn.kwargs, **kwargs})
    if not callable(fn):
        raise ConfigError(f"bind: {fn!r} cannot be called; give a function or a class")
    known, open_ended = parameters(fn)
    bound = {}
    for name, value in kwargs.items():
        if name in known:
            bound[name] = fit(value, known[name], f"{name_of(fn)}({name}=...)")
        elif open_ended:
            bound[name] = value
        else:
            raise ConfigError(f"{name_of(fn)} has no parameter {name!r}{suggest(name, known)}; it takes: {listing(known)}")
    order = {name: place for place, name in enumerate(known)}
    return Binding(fn, tuple(sorted(bound.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))))


def parameters(fn: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Name -> annotation of everything that can be bound by name, and whether ``fn`` also takes ``**anything``."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # builtins without a signature: nothing is known, so nothing is refused
        return {}, True
    hints = annotations(fn.__init__ if isinstance(fn, type) else fn)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {name: hints.get(name, Any) for name, p in signature.parameters.items() if p.kind in by_name}
    return found, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())


def default(fn: Callable[..., Any], name: str) -> Any:
    """The default of a parameter, or inspect.Parameter.empty."""
    try:
        found = inspect.signature(fn).parameters.get(name)
    except (TypeError, ValueError):
        return inspect.Parameter.empty
    return inspect.Parameter.empty if found is None else found.default


def name_of(fn: Any) -> str:
    """module.qualname of a function or class, for messages."""
    if isinstance(fn, Binding):
        return name_of(fn.fn)
    name = getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None)
    return f"{public_module(fn)}.{name}" if name else repr(fn)


def public_module(thing: Any) -> str | None:
    """The module a function or class is imported from by those who use it: optax rather than optax._src.alias."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None) or getattr(thing, "__name__", "")
    if isinstance(module, str) and any(part.startswith("_") for part in module.split(".")):
        root = module.split(".")[0]
        for public in (root, f"{root}.nn", f"{root}.numpy", f"{root}.lax"):
            if lookup(public, name) is thing:
                return public
    return module


def lookup(module: str, name: str) -> Any:
    """The object ``module.name`` of an imported or importable module, or None."""
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found
    except (ImportError, AttributeError, ValueError):
        return None
