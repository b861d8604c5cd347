"""Without the extra, the import names it."""

import importlib
import sys

import pytest


def test_import_without_the_agents_sdk_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "conserve_openai_agents")
    monkeypatch.setitem(sys.modules, "agents", None)
    with pytest.raises(ImportError, match=r"pip install 'conserve-sdk\[openai-agents\]'"):
        importlib.import_module("conserve_openai_agents")
