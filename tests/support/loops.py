"""Event loops for code that makes one where there is none, and leaves it open."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["loop_for_blocking_runs"]


@contextmanager
def loop_for_blocking_runs() -> Iterator[None]:
    """The frameworks' `run_sync` find this loop, which is closed in the end."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        asyncio.set_event_loop(None)
