"""Things found by name: registered ones by a short name, a user's own by ``module:attribute``."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from reasoner_ray.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to objects of one kind; ``key`` is the configuration key that selects one, for error texts."""

    def __init__(self, kind: str, key: str) -> None:
        self._kind = kind
        self._key = key
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under ``name``; a name taken by another object raises ``ValueError``."""

        def enter(entry: T) -> T:
            if self._known.get(name, entry) is not entry:
                raise ValueError(f"{self._kind} {name!r} is registered already")
            self._known[name] = entry
            return entry

        return enter

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._known)

    def get(self, name: str) -> T:
        """The entry called ``name``, or the attribute a ``module:attribute`` path leads to.

        Raises ``ConfigError`` with the nearest known name, or with the reason why the path leads nowhere.
        """
        if ":" in name:
            found: T = load_dotted(name, self._key)
            return found
        if name in self._known:
            return self._known[name]
        raise ConfigError(f"{self._key}: unknown {self._kind} {name!r}; {suggest(name, self.names())}, or module:name of your own")


def load_dotted(path: str, key: str) -> Any:
    """Import what ``module:attribute`` names; raises ``ConfigError`` naming ``key``."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{key}: cannot import {module_name!r} of {path!r} ({error}); its folder must be on PYTHONPATH of every node"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{key}: module {module_name!r} has no {attribute!r}; {suggest(attribute, dir(module))}")
    return getattr(module, attribute)


def suggest(name: str, known: list[str]) -> str:
    """``did you mean X?`` where something is near, else the list of what is known."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(k for k in known if not k.startswith('_'))}"


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], key: str, *, reserved: tuple[str, ...] = ()) -> None:
    """Raise ``ConfigError`` where ``function`` would not take ``arguments`` as keywords.

    ``reserved`` names parameters that the system fills in, which a configuration may not set.
    """
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    known = [n for n, p in parameters.items() if n not in reserved and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in arguments:
        if name in reserved or (name not in known and not open_ended):
            raise ConfigError(f"{key}.{name}: unknown key; {suggest(name, known)}")
    missing = [n for n in known if parameters[n].default is inspect.Parameter.empty and n not in arguments]
    if missing:
        raise ConfigError(f"{key}.{missing[0]}: must be given")
