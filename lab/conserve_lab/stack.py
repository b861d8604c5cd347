"""`LocalStack`: a broker and an emulated fleet in this process, ready to use. For tests and for trying things out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, FleetConfig, default_fleet

__all__ = ["LocalStack", "broker_entries"]

READY_BUDGET_S = 20.0


class LocalStack:
    """A broker in front of an emulated fleet, on free ports of the loopback interface.

    Args:
        fleet: the engines; default: two prefillers and three decoders, answering as fast as the machine can.
        preset: placement of the broker.
        port: of the broker; 0: a free one.
        settings: further tables of the broker's configuration.

    Raises:
        TimeoutError: the broker did not see all engines ready in time (on entering).

    Example:
        ```python
        with LocalStack() as stack:
            llm = ConServeChat(model=stack.model, broker_url=stack.broker_url)
        ```
    """

    def __init__(
        self,
        *,
        fleet: FleetConfig | None = None,
        preset: str = "default",
        port: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.fleet = EmulatedFleet(fleet or default_fleet(time_scale=0.0))
        self._tables = {"placement": {"preset": preset}, "listen": {"port": port}, "scrape": {"interval_ms": 200}}
        self._tables |= dict(settings or {})
        self._exit = ExitStack()
        self._broker: BrokerServer | None = None

    @property
    def model(self) -> str:
        """The name that the engines serve."""
        return self.fleet.engines[0].model

    @property
    def broker(self) -> BrokerServer:
        """The broker, to stop or restart it."""
        assert self._broker is not None, "enter the stack first"
        return self._broker

    @property
    def broker_url(self) -> str:
        """Where the broker answers."""
        return self.broker.url

    def __enter__(self) -> Self:
        with ExitStack() as guard:
            guard.enter_context(self.fleet)
            config = BrokerConfig.from_mapping({**self._tables, "engine": broker_entries(self.fleet)})
            self._broker = guard.enter_context(BrokerServer(config))
            self._broker.wait_until_ready(timeout_s=READY_BUDGET_S, engines=len(config.engine))
            self._exit = guard.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._exit.close()


def broker_entries(fleet: EmulatedFleet) -> list[dict[str, Any]]:
    """Return a running fleet as entries of the broker's `engine` table."""
    return [
        {
            "id": engine.id,
            "url": engine.url,
            "role": engine.role,
            "model": engine.model,
            "transfer_group": engine.model,  # KV moves only between engines of one model
            "connector": engine.config.connector,
            "block_size_tokens": engine.config.block_size,
            "max_hold_ms": engine.config.kv_lease_ms if engine.config.connector == "nixl" else 0,
        }
        for engine in fleet.engines
    ]
