"""Values made for JSON schemas satisfy them, judged by the jsonschema package."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_lab.emulator.language.hints import hints_of
from conserve_lab.emulator.language.schema import SchemaUnsatisfiable, fill_schema

CHECK = jsonschema.Draft202012Validator

strings = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={"minLength": st.integers(0, 8), "maxLength": st.integers(8, 20)},
)
numbers = st.builds(
    lambda kind, low, span, extra: {"type": kind, "minimum": low, "maximum": low + span} | extra,
    st.sampled_from(["integer", "number"]),
    st.integers(-50, 50),
    st.integers(5, 40),
    st.sampled_from([{}, {"multipleOf": 5}]),
)
exclusive = st.builds(
    lambda kind, low, span: {"type": kind, "exclusiveMinimum": low, "exclusiveMaximum": low + span},
    st.sampled_from(["integer", "number"]),
    st.integers(-50, 50),
    st.integers(2, 9),
)
leaves = st.one_of(
    strings,
    numbers,
    exclusive,
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"const": {"a": 1}},
            {"enum": ["x", 3, None]},
            {"type": ["integer", "null"]},
            {"type": "integer", "minimum": 10},
            {"type": "number", "maximum": -10},
            {"type": "string", "format": "date"},
            {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{3}$"},
            {"minimum": 4},
            {},
            True,
        ]
    ),
)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas made of schemas."""
    properties = st.dictionaries(st.sampled_from("abcde"), children, max_size=4)
    return st.one_of(
        st.builds(
            lambda props, required: {
                "type": "object",
                "properties": props,
                "required": [name for name in required if name in props],
            },
            properties,
            st.lists(st.sampled_from("abcde"), unique=True),
        ),
        st.builds(
            lambda item, low, span: {"type": "array", "items": item, "minItems": low, "maxItems": low + span},
            children,
            st.integers(0, 3),
            st.integers(0, 2),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(children, min_size=1, max_size=3)),
        st.builds(lambda child: {"allOf": [child]} if isinstance(child, dict) else child, children),
        st.builds(
            lambda first, rest: {"type": "array", "prefixItems": [first], "items": rest, "minItems": 1},
            children,
            children,
        ),
    )


@given(st.recursive(leaves, containers, max_leaves=12), st.integers(0, 2**62), st.text(max_size=40))
def test_filled_schemas_are_satisfied(schema: Any, seed: int, text: str) -> None:
    root = {"type": "object", "properties": {"it": schema}, "required": ["it"]}
    value = fill_schema(root, seed=seed, hints=hints_of(text + " `ok` 7 12.5"))
    CHECK(root).validate(value)
    assert fill_schema(root, seed=seed, hints=hints_of(text + " `ok` 7 12.5")) == value


REFS = {
    "type": "object",
    "properties": {
        "tree": {"$ref": "#/$defs/node"},
        "who": {
            "allOf": [{"$ref": "#/$defs/person"}, {"properties": {"age": {"type": "integer"}}, "required": ["age"]}]
        },
    },
    "required": ["tree", "who"],
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "label": {"type": "string"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["label", "next"],
        },
        "person": {
            "type": "object",
            "properties": {"first_name": {"type": "string"}, "age": {"type": "integer", "minimum": 18}},
            "required": ["first_name"],
        },
    },
}


@pytest.mark.parametrize("seed", range(20))
def test_references_recursion_and_merging(seed: int) -> None:
    value = fill_schema(REFS, seed=seed, hints=hints_of("create 你好啊集团"))
    CHECK(REFS).validate(value)
    assert value["who"]["first_name"] == "你好啊集团"
    assert value["who"]["age"] >= 18


def test_hints_examples_and_defaults_are_used() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "integer", "minimum": 100},
            "c": {"type": "string"},
            "d": {"type": "string", "default": "given"},
            "e": {"type": "string", "examples": ["1 + 1"]},
            "f": {"type": "integer", "default": 7},
        },
    }
    value = fill_schema(schema, seed=1, hints=hints_of("use 3, then 250 with `notes.txt`"))
    assert value == {"a": 3, "b": 250, "c": "notes.txt", "d": "given", "e": "1 + 1", "f": 7}


def test_unique_items_and_needed_properties() -> None:
    unique = {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 3, "uniqueItems": True}
    assert sorted(fill_schema(unique, seed=5)) == [1, 2, 3]
    grown = fill_schema({"type": "object", "minProperties": 2, "additionalProperties": {"type": "null"}}, seed=1)
    assert list(grown.values()) == [None, None]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#/$defs/missing"}, "cannot resolve"),
        ({"$ref": "https://example.org/x"}, "cannot resolve"),
        ({"$ref": "#"}, "circle"),
        ({"type": "string", "pattern": "^zz[0-9]{9}$"}, "give the schema `examples`"),
        ({"type": "array", "items": {"const": 1}, "minItems": 2, "uniqueItems": True}, "different items"),
        ({"type": "array", "items": False, "minItems": 1}, "different items"),
        ({"type": "integer", "minimum": 1, "maximum": 2, "multipleOf": 7}, "no multiple of 7"),
        ({"type": "file"}, "unknown type"),
        ({"anyOf": [{"type": "file"}]}, "unknown type"),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
            },
            "deeper than",
        ),
    ],
)
def test_impossible_schemas_are_named(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaUnsatisfiable, match=message):
        fill_schema(schema, seed=0)


def test_an_impossible_optional_property_is_left_out() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "file"}, "b": {"const": 1}}}
    assert fill_schema(schema, seed=0) == {"b": 1}
