"""What a test of an agent needs instead of GPUs, a broker process and the wall clock. Public and supported."""

from conserve_sdk.testing._broker import BrokerExchange, InMemoryBroker, small_fleet
from conserve_sdk.testing._clock import FakeClock

__all__ = ["BrokerExchange", "FakeClock", "InMemoryBroker", "small_fleet"]
