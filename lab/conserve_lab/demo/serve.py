"""`conserve demo --serve`: a broker and an emulated fleet that stay up for the user's own agent."""

from __future__ import annotations

import threading

from rich.console import Console

from conserve_broker.server import BrokerServer
from conserve_lab.demo.figures import Variant
from conserve_lab.demo.fleets import EmulatedSource
from conserve_lab.demo.settings import DemoSettings
from conserve_lab.demo.trial import broker_config

BROKER_PORT = 7070

LINES = """from conserve_langgraph import ConServeChat
llm = ConServeChat(model="{model}", broker_url="{url}")
print(llm.invoke("Hello", config={{"configurable": {{"thread_id": "my-conversation"}}}}).content)"""
"""The three lines that use what was started."""


def serve(settings: DemoSettings, *, console: Console, stop: threading.Event, port: int = BROKER_PORT) -> None:
    """Start broker and fleet, say how to use them, and keep them until `stop` is set.

    Raises:
        TimeoutError: the broker did not see its engines in time.
        OSError: the port is taken.
    """
    with EmulatedSource(time_scale=settings.time_scale) as source, source.fresh(Variant.CONSERVE) as fleet:
        config = broker_config(fleet, preset=settings.preset, port=port)
        with BrokerServer(config) as broker:
            broker.wait_until_ready(engines=len(fleet.urls))
            console.print(f"broker   {broker.url}", highlight=False)
            for engine_id, url in fleet.urls.items():
                console.print(f"engine   {url}  {engine_id}", highlight=False)
            console.print("\nUse them from another terminal; Ctrl-C ends them:\n", highlight=False)
            console.print(
                LINES.format(model=fleet.model, url=broker.url), markup=False, highlight=False, soft_wrap=True
            )
            stop.wait()
