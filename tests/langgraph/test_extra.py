"""Without the extra, the import names it."""

import importlib
import sys

import pytest

import conserve_langgraph


def test_import_without_langgraph_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "conserve_langgraph")
    monkeypatch.setitem(sys.modules, "langchain_openai", None)
    with pytest.raises(ImportError, match=r"pip install 'conserve-sdk\[langgraph\]'"):
        importlib.import_module("conserve_langgraph")


def test_the_middleware_is_loaded_when_it_is_used() -> None:
    assert conserve_langgraph.ConServeMiddleware.__name__ == "ConServeMiddleware"
    with pytest.raises(AttributeError, match="has no attribute 'ConServeAgent'"):
        conserve_langgraph.ConServeAgent  # noqa: B018
