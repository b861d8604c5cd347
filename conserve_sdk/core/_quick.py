"""Frozen dataclasses that are cheap to make.

The `__init__` that `dataclass(frozen=True)` writes sets each field by a call of `object.__setattr__`, which makes an
event or a lease of twenty fields cost as much as the decision about it. Here the new object is, while it is being
filled, of a twin class with the same slots and no guard; then it becomes what it is. Nobody sees it before that.
Copies with a few fields changed are made the same way (`dataclasses.replace` takes ten times as long), and objects
whose fields come in an order of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def quick_init(kind: type[T]) -> type[T]:
    """Give a frozen dataclass with slots and keyword-only fields a cheaper constructor. Nobody may derive from it."""
    assert not hasattr(kind, "__post_init__"), f"{kind.__name__} does more than fill its fields"
    all_fields = fields(kind)  # type: ignore[arg-type]  # a dataclass, which `type[T]` cannot say
    names: dict[str, Any] = {"_kind": kind, "_twin": _twin_of(kind), "_set": object.__setattr__}
    parameters = [_parameter(field, names) for field in all_fields if field.init]
    lines = [
        f"def __init__(self, *, {', '.join(parameters)}):",
        "    _set(self, '__class__', _twin)",
        *(f"    self.{field.name} = {_value(field, names)}" for field in all_fields),
        "    self.__class__ = _kind",
    ]
    exec("\n".join(lines), names)  # noqa: S102  # as `dataclasses` does; the text holds nothing but the fields' names
    init = names["__init__"]
    init.__qualname__ = f"{kind.__qualname__}.__init__"
    init.__annotations__ = dict(kind.__init__.__annotations__)
    kind.__init__ = init  # type: ignore[method-assign]
    return kind


def quick_copy(kind: type[T], *changing: str) -> Callable[..., T]:
    """A function that copies an object of a frozen dataclass with slots; it takes the object, then these fields."""
    kept = {name: f"old.{name}" for name in _names(kind) if name not in changing}
    return _filling(kind, ("old", *changing), {**kept, **{name: name for name in changing}})


def quick_make(kind: type[T], *names: str) -> Callable[..., T]:
    """A constructor of a frozen dataclass with slots that takes all its fields by place, in this order."""
    if sorted(names) != sorted(_names(kind)):
        raise AssertionError(f"these are not the fields of {kind.__name__}: {', '.join(names)}")
    return _filling(kind, names, {name: name for name in names})


def _filling(kind: type[T], parameters: Sequence[str], values: Mapping[str, str]) -> Callable[..., T]:
    """A function of these parameters, by place, that makes an object and fills its slots with these expressions."""
    scope: dict[str, Any] = {"_kind": kind, "_new": object.__new__, "_twin": _twin_of(kind)}
    lines = [
        f"def fill({', '.join(parameters)}):",
        "    made = _new(_twin)",
        *(f"    made.{name} = {value}" for name, value in values.items()),
        "    made.__class__ = _kind",
        "    return made",
    ]
    exec("\n".join(lines), scope)  # noqa: S102  # see above
    fill: Callable[..., T] = scope["fill"]
    return fill


def _names(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


def _twin_of(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (), {"__slots__": tuple(_names(kind))})


def _parameter(field: Field[Any], names: dict[str, Any]) -> str:
    if field.default is MISSING:
        assert field.default_factory is MISSING, f"{field.name}: a factory's value cannot be passed"
        return field.name
    names[f"_default_{field.name}"] = field.default
    return f"{field.name}=_default_{field.name}"


def _value(field: Field[Any], names: dict[str, Any]) -> str:
    if field.init:
        return field.name
    names[f"_make_{field.name}"] = field.default_factory
    return f"_make_{field.name}()"
