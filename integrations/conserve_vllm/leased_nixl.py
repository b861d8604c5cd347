"""A connector module for vLLM: stock NIXL in pull mode, with holds that belong to leases.

Only the scheduler's half differs. A request whose params carry a hold order is held for the order's time instead of
the engine's (never longer: `kv_lease_duration` stays the bound), and a hold that is over is given to the worker's own
list of leases with a deadline that has passed, which makes the worker free the blocks at its next step. vLLM steps as
long as anything is held, so that is at once (vLLM 0.32, `nixl/base_scheduler.py`, `nixl/pull_worker.py`).

vLLM loads it by `kv_connector_module_path`; the class keeps the stock name because vLLM compares names. With
`"conserve_quiet": true` in `kv_connector_extra_config` NIXL's progress thread rests too (`quiet_nixl`). Runs inside
vLLM's process only: nothing else in this package imports it.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

from conserve_vllm.holds import HoldBook, read_order
from conserve_vllm.quiet_nixl import STOCK, find_bindings, rest_between_polls

__all__ = ["QUIET_KEY", "leased_scheduler"]

QUIET_KEY = "conserve_quiet"
PAST_S = 1.0


def leased_scheduler(stock: type[Any]) -> type[Any]:
    """The stock scheduler's half of the connector, with holds by lease."""

    class LeasedScheduler(stock):  # type: ignore[misc]  # the base is vLLM's, known when vLLM runs
        """Ends holds by lease; everything else is stock."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._book = HoldBook()
            self._ended: set[str] = set()

        def request_finished(self, request: Any, block_ids: Any) -> Any:
            order = read_order(request.kv_transfer_params)
            answer = super().request_finished(request, block_ids)
            if order is None:
                return answer
            previous = None
            deadline_s = self._reqs_need_send.get(request.request_id)
            if order.hold_s == 0:
                previous = self._book.end(order.lease_id)
            elif deadline_s is not None:  # held: neither aborted nor without a block
                now_s = time.perf_counter()
                until_s = min(deadline_s, now_s + order.hold_s)
                self._reqs_need_send[request.request_id] = until_s
                previous = self._book.begin(order.lease_id, request.request_id, until_s=until_s, now_s=now_s)
            if previous is not None:
                self._ended.add(previous)
            return answer

        def build_connector_meta(self, scheduler_output: Any) -> Any:
            meta = super().build_connector_meta(scheduler_output)
            past_s = time.perf_counter() - PAST_S
            # The worker takes no notice of those that are over already: read by another engine, or expired.
            meta.reqs_to_send.update(dict.fromkeys(self._ended, past_s))
            self._ended.clear()
            return meta

    return LeasedScheduler


def _quieten(vllm_config: Any) -> None:
    if vllm_config.kv_transfer_config.get_from_extra_config(QUIET_KEY, False):
        rest_between_polls(find_bindings())


def _leased_connector(stock: Any, scheduler: type[Any], worker: type[Any]) -> type[Any]:
    """The stock connector, made as the stock one makes itself (`nixl/connector.py`), but of these halves."""

    def construct(connector: Any, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        _quieten(vllm_config)
        stock.NixlBaseConnector.__init__(connector, vllm_config, role, kv_cache_config)
        half = (vllm_config, connector.engine_id, kv_cache_config)
        if role.name == "SCHEDULER":
            connector.connector_scheduler = scheduler(*half)
        else:
            connector.connector_worker = worker(*half)

    base = stock.NixlPullConnector
    doc = "The stock pull connector, with holds by lease."
    made: type[Any] = type(base)(
        "NixlConnector", (base,), {"__module__": __name__, "__doc__": doc, "__init__": construct}
    )
    return made


def __getattr__(name: str) -> Any:
    """The connector class, made when vLLM asks for it."""
    if name != "NixlConnector":
        raise AttributeError(name)
    stock = importlib.import_module(STOCK)
    scheduler = importlib.import_module(f"{STOCK}.pull_scheduler").NixlPullConnectorScheduler
    worker = importlib.import_module(f"{STOCK}.pull_worker").NixlPullConnectorWorker
    made = _leased_connector(stock, leased_scheduler(scheduler), worker)
    globals()[name] = made
    return made
