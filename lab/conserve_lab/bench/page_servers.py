"""Many engines for a scraper: one process that answers `/health`, `/v1/models` and a long `/metrics` on many ports."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import Any, Self

from conserve_lab.demo.errors import DemoError

MODEL = "measured"
_CONFIG = 'block_size="16",enable_prefix_caching="True",engine="0",kv_cache_size_tokens="1048576"'
_START_BUDGET_S = 60.0
_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 240.0)


def page(*, lines: int, started_at_s: float) -> bytes:
    """A page with the series that a broker reads, among histograms as vLLM has them; vLLM 0.32 serves 750 lines."""
    labels = f'{{engine="0",model_name="{MODEL}"}}'
    rows = [
        f"vllm:cache_config_info{{{_CONFIG}}} 1.0",
        f"vllm:num_requests_running{labels} 7.0",
        f"vllm:num_requests_waiting{labels} 0.0",
        f"vllm:kv_cache_usage_perc{labels} 0.25",
        f"vllm:prompt_tokens_total{labels} 123456.0",
        f"vllm:generation_tokens_total{labels} 65432.0",
        f"process_start_time_seconds {started_at_s}",
    ]
    rows += [
        f'vllm:prompt_tokens_by_source_total{{engine="0",model_name="{MODEL}",source="{source}"}} 1000.0'
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
    ]
    number = 0
    while len(rows) < lines:
        name = f"vllm:request_measured_{number}_time_seconds"
        rows += [f"# HELP {name} Histogram of one more duration in seconds.", f"# TYPE {name} histogram"]
        rows += [f'{name}_bucket{{engine="0",le="{bound}",model_name="{MODEL}"}} 123456.0' for bound in _BUCKETS]
        rows += [f"{name}_sum{labels} 1234.5678", f"{name}_count{labels} 123456.0"]
        number += 1
    return ("\n".join(rows) + "\n").encode()


class PageServers:
    """The child; a context manager.

    Attributes:
        engines: entries of a broker's configuration.
    """

    def __init__(self, count: int, *, lines: int = 750) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._child_end, count, lines), daemon=True)
        self.engines: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._process.start()
        self._child_end.close()
        try:
            if not self._pipe.poll(_START_BUDGET_S):
                raise DemoError("the page servers did not start in time")
            ports = self._pipe.recv()
        except EOFError:
            raise DemoError("the page servers did not start") from None
        self.engines = [
            {
                "id": f"e{index:02}",
                "url": f"http://127.0.0.1:{port}",
                "role": "both",
                "model": MODEL,
                "connector": "none",
            }
            for index, port in enumerate(ports)
        ]
        return self

    def __exit__(self, *_exc: object) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, count: int, lines: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which kills this process
    asyncio.run(_serve_all(pipe, count, lines))


async def _serve_all(pipe: Connection, count: int, lines: int) -> None:
    models = json.dumps({"data": [{"id": MODEL, "max_model_len": 32_768}]}).encode()
    bodies = {b"/health": b"", b"/v1/models": models, b"/metrics": page(lines=lines, started_at_s=1_700_000_000.0)}
    answers = {
        path: b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        for path, body in bodies.items()
    }

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(answers[head.split(b" ", 2)[1]])
        except (asyncio.IncompleteReadError, ConnectionResetError):
            writer.close()

    servers = [await asyncio.start_server(talk, "127.0.0.1", 0) for _ in range(count)]
    pipe.send([server.sockets[0].getsockname()[1] for server in servers])
    await asyncio.Event().wait()
