"""Which classes explain the options of a factory that are mappings themselves."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def explained_by(**classes: type) -> Callable[[F], F]:
    """A decorator of a factory: option -> the dataclass whose docstring explains the option's own keys."""

    def mark(factory: F) -> F:
        setattr(factory, "explained_by", classes)  # noqa: B010  (a function has no such field for type checkers)
        return factory

    return mark
