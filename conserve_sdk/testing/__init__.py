"""What a test of an agent needs instead of GPUs, a broker process and the wall clock. Public and supported."""

from conserve_sdk.testing._broker import BrokerExchange, InMemoryBroker, small_fleet
from conserve_sdk.testing._clock import FakeClock
from conserve_sdk.testing._engine import EngineCall, EngineReply, ScriptedEngine
from conserve_sdk.testing._network import deny_network

__all__ = [
    "BrokerExchange",
    "EngineCall",
    "EngineReply",
    "FakeClock",
    "InMemoryBroker",
    "ScriptedEngine",
    "deny_network",
    "small_fleet",
]
