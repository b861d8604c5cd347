"""Each package exports exactly what it promises; adding or removing a name is a decision, so it is pinned here."""

import importlib

import pytest

PUBLIC: dict[str, list[str]] = {}


@pytest.mark.parametrize("package", PUBLIC)
def test_all_is_pinned(package: str) -> None:
    assert sorted(importlib.import_module(package).__all__) == sorted(PUBLIC[package])


@pytest.mark.parametrize("package", PUBLIC)
def test_every_exported_name_exists_and_is_documented(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert hasattr(module, name), f"{package}.{name} is listed but missing"
    assert module.__doc__
