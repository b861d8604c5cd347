"""What a test of an agent needs instead of GPUs, a broker process and the wall clock. Public and supported."""

from conserve_sdk.testing._broker import BrokerExchange, InMemoryBroker, small_fleet
from conserve_sdk.testing._clock import FakeClock
from conserve_sdk.testing._engine import EngineCall, ScriptedEngine, UnexpectedCall
from conserve_sdk.testing._network import NetworkDenied, deny_network
from conserve_sdk.testing._replies import EngineReply, ToolCall

__all__ = [
    "BrokerExchange",
    "EngineCall",
    "EngineReply",
    "FakeClock",
    "InMemoryBroker",
    "NetworkDenied",
    "ScriptedEngine",
    "ToolCall",
    "UnexpectedCall",
    "deny_network",
    "small_fleet",
]
