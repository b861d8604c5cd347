"""Without the extra, the import names it."""

import importlib
import sys

import pytest


def test_import_without_pydantic_ai_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "conserve_pydantic_ai")
    monkeypatch.setitem(sys.modules, "pydantic_ai.models.openai", None)
    with pytest.raises(ImportError, match=r"pip install 'conserve-sdk\[pydantic-ai\]'"):
        importlib.import_module("conserve_pydantic_ai")
