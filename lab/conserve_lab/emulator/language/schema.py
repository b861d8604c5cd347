"""Values that satisfy a JSON schema, chosen by a number and by hints from the prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from conserve_lab.emulator.language.hints import Hints
from conserve_lab.emulator.language.tokens import digest

_DEPTH_MAX: Final = 12
_SHALLOW: Final = 4
_LOWER: Final = frozenset({"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"})
_UPPER: Final = frozenset({"maximum", "exclusiveMaximum", "maxLength", "maxItems"})
_FORMATS: Final[Mapping[str, str]] = {
    "date": "2026-05-17",
    "date-time": "2026-05-17T09:30:00Z",
    "time": "09:30:00Z",
    "duration": "PT15M",
    "email": "ada@example.org",
    "hostname": "example.org",
    "ipv4": "192.0.2.7",
    "ipv6": "2001:db8::7",
    "uri": "https://example.org/a",
    "uuid": "0b7e1c1a-5d0f-4c44-9a52-6f1f3f0f7c11",
}
_PATTERN_CANDIDATES: Final = (
    "0", "1", "12", "123", "1234", "12345", "0.5", "a", "ab", "abc", "word", "A", "AB", "ABC", "Ab", "a1", "A-1",
    "ABC-123", "id_1", "key-1", "+15550100", "555-0100", "555-010-0123", "true", "/a", "a/b", "a.txt", "#ffffff",
    *_FORMATS.values(),
)  # fmt: skip


class SchemaUnsatisfiable(ValueError):  # noqa: N818  (reads as a statement where it is raised)
    """No value for this schema could be found; names the place in the schema."""


def fill_schema(schema: Mapping[str, Any], *, seed: int, hints: Hints | None = None) -> Any:
    """Return a value that satisfies `schema`, always the same for the same seed and hints.

    Understands `$ref`, `enum`, `const`, `anyOf`, `oneOf`, `allOf`, type lists, objects, arrays, string formats and
    lengths, numeric bounds and `multipleOf`; prefers `examples` and `default` where a schema offers them.

    Raises:
        SchemaUnsatisfiable: For a schema this filler cannot satisfy (an unusual `pattern`, a broken `$ref`).
    """
    return _Filler(schema, seed, hints or Hints()).fill(schema, "$", 0)


class _Filler:
    def __init__(self, root: Mapping[str, Any], seed: int, hints: Hints) -> None:
        self._root = root
        self._seed = seed
        self._hints = hints
        self._numbers_used = 0
        self._by_type: dict[str, Callable[[Mapping[str, Any], str, int], Any]] = {
            "object": self._object,
            "array": self._array,
            "string": lambda schema, path, _: self._string(schema, path),
            "integer": lambda schema, path, _: int(self._number(schema, path, whole=True)),
            "number": lambda schema, path, _: self._number(schema, path, whole=False),
            "boolean": lambda _schema, path, _: bool(self._pick(path) % 2),
            "null": lambda _schema, _path, _: None,
        }

    def fill(self, schema: Any, path: str, depth: int) -> Any:
        if depth > _DEPTH_MAX:
            raise SchemaUnsatisfiable(f"{path}: the schema nests deeper than {_DEPTH_MAX} levels")
        schema = self._resolve(schema, path)
        if "const" in schema:
            return schema["const"]
        for key in ("enum", "examples"):
            if isinstance(schema.get(key), list) and schema[key]:
                return self._choose(schema[key], path)
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                return self._alternative(schema, key, path, depth)
        kind = self._type_of(schema, path, depth)
        if kind not in self._by_type:
            raise SchemaUnsatisfiable(f"{path}: unknown type {kind!r}")
        return self._by_type[kind](schema, path, depth)

    # ---- structure -----------------------------------------------------------------------------------------

    def _resolve(self, schema: Any, path: str) -> Mapping[str, Any]:
        """Follow `$ref` and merge `allOf` until a plain schema is left."""
        for _ in range(_DEPTH_MAX):
            if not isinstance(schema, Mapping):
                return {}  # `true` accepts anything
            if "$ref" in schema:
                rest = {key: value for key, value in schema.items() if key != "$ref"}
                schema = {**self._target(str(schema["$ref"]), path), **rest}
            elif schema.get("allOf"):
                schema = self._merged(schema, path)
            else:
                return schema
        raise SchemaUnsatisfiable(f"{path}: $ref or allOf goes in a circle")

    def _target(self, reference: str, path: str) -> Mapping[str, Any]:
        node: Any = self._root
        for part in reference.removeprefix("#").strip("/").split("/"):
            if part:
                node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
        if not reference.startswith("#") or not isinstance(node, Mapping):
            raise SchemaUnsatisfiable(f"{path}: cannot resolve $ref {reference!r}")
        return node

    def _merged(self, schema: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        merged: dict[str, Any] = {}
        for part in [{key: value for key, value in schema.items() if key != "allOf"}, *schema["allOf"]]:
            for key, value in self._resolve(part, path).items():
                merged[key] = _both(key, merged[key], value) if key in merged else value
        return merged

    def _alternative(self, schema: Mapping[str, Any], key: str, path: str, depth: int) -> Any:
        """Take the first alternative that is not null, or null once the value is nested deep enough."""
        siblings = {name: value for name, value in schema.items() if name not in {"anyOf", "oneOf", "default"}}
        options = [self._resolve(option, path) for option in schema[key]]
        nulls = [option for option in options if option.get("type") == "null"]
        others = [option for option in options if option.get("type") != "null"]
        order = nulls + others if depth > _SHALLOW else others + nulls
        problem: SchemaUnsatisfiable | None = None
        for option in order:
            try:
                return self.fill({**siblings, **option}, path, depth + 1)
            except SchemaUnsatisfiable as error:
                problem = problem or error
        raise problem or SchemaUnsatisfiable(f"{path}: {key} is empty")

    def _type_of(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        kind = schema.get("type")
        if isinstance(kind, list):
            named = [name for name in kind if name != "null"]
            return "null" if not named or (depth > _SHALLOW and "null" in kind) else str(self._choose(named, path))
        if kind is not None:
            return str(kind)
        if "properties" in schema:
            return "object"
        if "items" in schema or "prefixItems" in schema:
            return "array"
        bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
        return "number" if bounds & schema.keys() else "string"

    def _object(self, schema: Mapping[str, Any], path: str, depth: int) -> dict[str, Any]:
        """Fill every property near the surface, only the required ones further down."""
        properties = schema.get("properties") or {}
        required = list(dict.fromkeys(schema.get("required") or []))
        names = list(dict.fromkeys([*properties, *required])) if depth < _SHALLOW else required
        value: dict[str, Any] = {}
        for name in names:
            try:
                value[name] = self.fill(properties.get(name, {}), f"{path}.{name}", depth + 1)
            except SchemaUnsatisfiable:
                if name in required:
                    raise
        extra = schema.get("additionalProperties", {})
        for number in range(len(value), int(schema.get("minProperties", 0))):
            value[f"key_{number}"] = self.fill(extra, f"{path}.key_{number}", depth + 1)
        return value

    def _array(self, schema: Mapping[str, Any], path: str, depth: int) -> list[Any]:
        prefix = schema.get("prefixItems") or []
        low = int(schema.get("minItems", 0))
        high = int(schema.get("maxItems", max(low, 3)))
        wanted = low if depth >= _SHALLOW else max(low, min(high, 1 + self._pick(path) % 2))
        value = [self.fill(item, f"{path}[{at}]", depth + 1) for at, item in enumerate(prefix[:high])]
        items = schema.get("items", {})
        attempts = 0
        while len(value) < wanted and items is not False:
            candidate = self.fill(items, f"{path}[{len(value)}.{attempts}]", depth + 1)
            attempts += 1
            if not schema.get("uniqueItems") or candidate not in value:
                value.append(candidate)
            elif attempts > 100:
                break
        if len(value) < low:
            raise SchemaUnsatisfiable(f"{path}: cannot find {low} different items")
        return value

    # ---- leaves --------------------------------------------------------------------------------------------

    def _string(self, schema: Mapping[str, Any], path: str) -> str:
        candidates: list[str] = [schema["default"]] if isinstance(schema.get("default"), str) else []
        if schema.get("format") in _FORMATS:
            candidates.append(_FORMATS[schema["format"]])
        if "name" in path.rsplit(".", 1)[-1] and self._hints.other_script:
            candidates.append(self._hints.other_script[0])
        phrases = self._hints.phrases
        candidates += [self._choose(phrases, path)] if phrases else []
        candidates += ["word", *phrases[:20], *_PATTERN_CANDIDATES]
        low, high = int(schema.get("minLength", 0)), int(schema.get("maxLength", 10_000))
        pattern = re.compile(str(schema.get("pattern", "")))
        for candidate in candidates:
            fitted = candidate if len(candidate) >= low else candidate + "x" * (low - len(candidate))
            for text in (candidate, fitted[:high]):
                if low <= len(text) <= high and pattern.search(text):
                    return text
        raise SchemaUnsatisfiable(
            f"{path}: no string found for pattern {pattern.pattern!r} and length {low} to {high}; "
            "give the schema `examples`"
        )

    def _number(self, schema: Mapping[str, Any], path: str, *, whole: bool) -> float:
        step = schema.get("multipleOf", 1 if whole else None)
        low, high = _bounds(schema, whole=whole)
        for number in self._hints.numbers[self._numbers_used :]:
            self._numbers_used += 1
            if low <= number <= high and (step is None or number % step == 0):
                return int(number) if number.is_integer() else number
        if isinstance(schema.get("default"), int | float):
            return float(schema["default"])
        low, high = _finite(low, high)
        if step is None:
            return low + (high - low) * (self._pick(path) % 101) / 101
        first, last = -(-low // step), high // step
        if first > last:
            raise SchemaUnsatisfiable(f"{path}: no multiple of {step} between {low} and {high}")
        value = (first + self._pick(path) % int(last - first + 1)) * step
        return int(value) if float(value).is_integer() else float(value)

    def _pick(self, path: str) -> int:
        return digest(self._seed, path)

    def _choose(self, options: Sequence[Any], path: str) -> Any:
        return options[self._pick(path) % len(options)]


def _both(key: str, first: Any, second: Any) -> Any:
    """Return what satisfies both of two values of one keyword, as `allOf` wants it."""
    if key == "properties":
        shared = first.keys() & second.keys()
        return {**first, **second, **{name: {"allOf": [first[name], second[name]]} for name in sorted(shared)}}
    if key == "required":
        return [*first, *second]
    if key in _LOWER:
        return max(first, second)
    if key in _UPPER:
        return min(first, second)
    return first


def _bounds(schema: Mapping[str, Any], *, whole: bool) -> tuple[float, float]:
    """Return the inclusive range a schema allows, infinite where it says nothing."""
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if above is not None:
        low = max(low, above // 1 + 1 if whole else above + 1e-6)
    if below is not None:
        high = min(high, -(-below // 1) - 1 if whole else below - 1e-6)
    return low, high


def _finite(low: float, high: float) -> tuple[float, float]:
    """Return a range to choose from: a missing side is 100 away from the other, or the range is 0 to 100."""
    if low == -math.inf:
        low = 0 if high >= 0 else high - 100
    return low, low + 100 if high == math.inf else high
