"""The quiet connector, against stand-ins for NIXL's compiled part, which is not installed beside the SDK."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from conserve_vllm import quiet_nixl


class AgentConfig:
    """As NIXL's: attributes that its Python sets one after the other."""

    def __init__(self):
        self.pthrDelay = 0
        self.useProgThread = True


def test_the_progress_thread_rests_whatever_nixl_asks_for():
    bindings = SimpleNamespace(nixlAgentConfig=AgentConfig)
    quiet_nixl.rest_between_polls(bindings)
    config = bindings.nixlAgentConfig()
    config.pthrDelay = 0
    config.useProgThread = False
    assert (config.pthrDelay, config.useProgThread) == (quiet_nixl.DELAY_US, False)
    assert isinstance(config, AgentConfig)


def test_without_nixl_it_says_what_to_install():
    with pytest.raises(ImportError, match="start without --quiet-nixl"):
        quiet_nixl.find_bindings(("no_such_nixl._api",))


def test_vllm_finds_the_stock_connector_under_its_stock_name(monkeypatch):
    class NixlPullConnector:
        pass

    bindings = SimpleNamespace(nixlAgentConfig=AgentConfig)
    for name in (quiet_nixl.STOCK, *quiet_nixl.BINDINGS):
        module = ModuleType(name)
        module.NixlPullConnector = NixlPullConnector
        module.nixlBind = bindings
        monkeypatch.setitem(sys.modules, name, module)
    for at in range(1, quiet_nixl.STOCK.count(".") + 1):
        parent = quiet_nixl.STOCK.rsplit(".", at)[0]
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    for name in quiet_nixl.BINDINGS:
        monkeypatch.setitem(sys.modules, name.split(".")[0], ModuleType(name.split(".")[0]))
    made = quiet_nixl.NixlConnector
    monkeypatch.delitem(vars(quiet_nixl), "NixlConnector")
    assert (made.__name__, made.__module__) == ("NixlConnector", "conserve_vllm.quiet_nixl")
    assert issubclass(made, NixlPullConnector)
    assert bindings.nixlAgentConfig is not AgentConfig


def test_there_is_nothing_else_in_it():
    with pytest.raises(AttributeError):
        _ = quiet_nixl.SomethingElse
