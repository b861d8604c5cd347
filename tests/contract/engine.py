"""What an engine must do for the SDK and the broker: one suite for the emulated engine and for vLLM itself.

`CASES` are requests with what the answer must have; `KV` are sequences over a prefiller and a decoder. Each raises
`AssertionError`. Whoever runs them brings an `Engines`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

Json = dict[str, Any]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"unit": {"type": "string", "enum": ["lines", "words"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True)
class Engines:
    """A prefiller and a decoder of one fleet."""

    http: httpx2.Client
    prefiller: str
    decoder: str
    model: str
    end_token_id: int

    def post(self, path: str, body: Json, *, url: str = "") -> httpx2.Response:
        return self.http.post(f"{url or self.decoder}{path}", json={"model": self.model, **body})

    def ask(self, path: str, body: Json, *, url: str = "") -> Json:
        answer = self.post(path, body, url=url)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metrics(self, url: str) -> dict[str, float]:
        """Sums by name, over all labels."""
        sums: dict[str, float] = {}
        for line in self.http.get(f"{url}/metrics").text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.partition("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums


def say(text: str = "read the file", **extra: Any) -> Json:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 0, **extra}


# ---- one request, one answer ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A request and what must be true of its answer.

    Attributes:
        has: paths of the answer (dots; numbers index lists) with their values; a type means a value of that type.
        emulated: what the emulator's answer has instead, where it differs on purpose (docs/engines.md says why).
    """

    name: str
    path: str
    body: Json
    status: int = 200
    has: Mapping[str, object] = field(default_factory=dict)
    emulated: Mapping[str, object] | None = None


USAGE = {"usage.prompt_tokens": int, "usage.completion_tokens": int, "usage.total_tokens": int}
CHAT_ANSWER = {"id": str, "object": "chat.completion", "created": int, "model": str, "choices.0.index": 0, **USAGE}
INVALID = {"error.message": str, "error.type": "Bad Request", "error.code": 400}
"""A field that is missing or of another type."""
REFUSED = {"error.message": str, "error.type": "BadRequestError", "error.code": 400}

CASES = [
    Case(
        "chat",
        CHAT,
        say(),
        has={
            **CHAT_ANSWER,
            "choices.0.message.role": "assistant",
            "choices.0.message.content": str,
            "choices.0.finish_reason": str,
            "kv_transfer_params": None,
        },
    ),
    Case(
        "chat length",
        CHAT,
        say(ignore_eos=True),
        has={"choices.0.finish_reason": "length", "usage.completion_tokens": 6},
    ),
    Case(
        "chat token ids", CHAT, say(return_token_ids=True), has={"prompt_token_ids": list, "choices.0.token_ids": list}
    ),
    Case(
        "chat logprobs",
        CHAT,
        say(logprobs=True, top_logprobs=2),
        has={
            "choices.0.logprobs.content.0.token": str,
            "choices.0.logprobs.content.0.logprob": float,
            "choices.0.logprobs.content.0.top_logprobs.0.token": str,
        },
        emulated={"choices.0.logprobs": None},
    ),
    Case("chat n", CHAT, say(n=2, temperature=1), has={"choices.1.index": 1}),
    Case("chat cached", CHAT, say("read the file " * 60), has={"usage.prompt_tokens_details.cached_tokens": int}),
    Case(
        "chat schema",
        CHAT,
        say(
            max_tokens=90,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": TOOL["function"]["parameters"], "strict": True},
            },
        ),
        has={"choices.0.message.content": str},
    ),
    Case(
        "completion",
        COMPLETIONS,
        {"prompt": "read", "max_tokens": 4},
        has={"object": "text_completion", "choices.0.text": str, "choices.0.finish_reason": str, **USAGE},
    ),
    Case("completion of ids", COMPLETIONS, {"prompt": [20, 21, 22], "max_tokens": 4}, has={"usage.prompt_tokens": 3}),
    Case(
        "completion of several",
        COMPLETIONS,
        {"prompt": ["read", "file"], "max_tokens": 4},
        has={"choices.1.index": 1},
        emulated=REFUSED | {"error.param": "prompt"},
    ),
    Case(
        "response",
        RESPONSES,
        {"input": "read", "max_output_tokens": 4},
        has={
            "object": "response",
            "status": str,
            "output.0.content.0.text": str,
            "usage.input_tokens": int,
            "usage.output_tokens": int,
        },
    ),
    Case("greedy n", CHAT, say(n=2), 400, has=REFUSED),
    Case("no messages", CHAT, {"max_tokens": 4}, 400, has=INVALID),
    Case("messages of another type", CHAT, {"messages": "hello"}, 400, has=INVALID),
    Case("no token at all", CHAT, say(max_tokens=0), 400, has=REFUSED),
    Case("stream options without a stream", CHAT, say(stream_options={"include_usage": True}), 400, has=REFUSED),
    Case("min above max", CHAT, say(min_tokens=50), 400, has=REFUSED),
    Case("temperature below 0", CHAT, say(temperature=-1), 400, has=REFUSED),
    Case("params of another type", CHAT, say(kv_transfer_params="x"), 400, has=INVALID),
    Case(
        "another model",
        CHAT,
        say(model="nobody"),
        404,
        has={"error.type": "NotFoundError", "error.param": "model", "error.code": 404},
    ),
    Case(
        "too long",
        COMPLETIONS,
        {"prompt": [20] * 5_000, "max_tokens": 1},
        400,
        has={**REFUSED, "error.param": "input_tokens"},
    ),
]


def check_case(engines: Engines, case: Case, *, emulated: bool = False) -> None:
    answer = engines.post(case.path, case.body)
    has = case.emulated if emulated and case.emulated is not None else case.has
    assert answer.status_code == has.get("error.code", case.status), answer.text
    told = answer.json()
    for path, wanted in has.items():
        found = at(told, path)
        good = isinstance(found, wanted) if isinstance(wanted, type) else found == wanted
        assert good, f"{path} is {found!r}, not {wanted!r}"


def at(node: Any, path: str) -> Any:
    for part in path.split("."):
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, TypeError) as error:
            raise AssertionError(f"no {path} in {json.dumps(node)[:300]}") from error
    return node


# ---- several requests ----------------------------------------------------------------------------------------------


def streams(engines: Engines) -> None:
    """Chat streams begin with the role, end with a reason, then the usage, then `[DONE]`; they carry no params."""
    body = {"model": engines.model, **say(stream=True, stream_options={"include_usage": True})}
    with engines.http.stream("POST", engines.decoder + CHAT, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] <= 6
    assert events[-2]["choices"][0]["finish_reason"] in {"stop", "length"}
    assert not any(event.get("kv_transfer_params") for event in events)


def calls_a_tool(engines: Engines) -> None:
    """A required, strict tool gives one call whose arguments satisfy the schema."""
    push = {str(engines.end_token_id): 100}
    body = say(tools=[TOOL], tool_choice="required", max_tokens=200, logit_bias=push)
    (choice,) = engines.ask(CHAT, body)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"], call["id"][:1] != "") == ("function", "add", True)
    assert json.loads(call["function"]["arguments"])["unit"] in {"lines", "words"}


def moves_once(engines: Engines) -> None:
    """A prefill leg gives params, and a decode leg with them computes none of the prompt."""
    body = say("read the list of errors " * 40)
    before = engines.metrics(engines.decoder)
    leg = {**body, "max_tokens": 1, "return_token_ids": True, "kv_transfer_params": {"do_remote_decode": True}}
    prefilled = engines.ask(CHAT, leg, url=engines.prefiller)
    params = prefilled["kv_transfer_params"]
    assert set(params) >= PARAMS, PARAMS - set(params)
    assert (params["do_remote_prefill"], params["do_remote_decode"], params["transfer_mode"]) == (True, False, "pull")
    params["prompt_token_ids"] = prefilled["prompt_token_ids"]
    answer = engines.ask(CHAT, {**body, "kv_transfer_params": params})
    assert answer["kv_transfer_params"] is None
    assert answer["usage"]["prompt_tokens"] == len(prefilled["prompt_token_ids"])
    grown = lambda name: engines.metrics(engines.decoder)[name] - before.get(name, 0)  # noqa: E731
    wait_until(lambda: grown("vllm:external_prefix_cache_hits_total") == answer["usage"]["prompt_tokens"])
    assert grown("vllm:nixl_xfer_time_seconds_count") == 1
    assert grown("vllm:nixl_bytes_transferred_sum") > 0


PARAMS = {
    "do_remote_prefill",
    "do_remote_decode",
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "tp_size",
    "remote_num_tokens",
    "transfer_mode",
}


def holds(engines: Engines) -> None:
    """A hold shows as used KV, and its answer has params of its own."""
    body = say("count the words of a table " * 40, kv_transfer_params={"do_remote_decode": True})
    answer = engines.ask(CHAT, body)
    assert answer["kv_transfer_params"]["remote_request_id"]
    wait_until(lambda: engines.metrics(engines.decoder)["vllm:num_requests_running"] == 0)
    assert engines.metrics(engines.decoder)["vllm:kv_cache_usage_perc"] > 0


def names_its_metrics(engines: Engines) -> None:
    """Every name that the broker reads is on both pages."""
    engines.ask(CHAT, say())
    for url in (engines.prefiller, engines.decoder):
        missing = METRICS - set(engines.metrics(url))
        assert not missing, missing


METRICS = {
    "vllm:cache_config_info",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_by_source_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:external_prefix_cache_queries_total",
    "vllm:external_prefix_cache_hits_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:nixl_xfer_time_seconds_count",
    "vllm:nixl_bytes_transferred_sum",
    "vllm:nixl_num_failed_transfers_total",
    "vllm:nixl_num_kv_expired_reqs_total",
    "process_start_time_seconds",
}


def tells_what_it_serves(engines: Engines) -> None:
    """Models, version, health, tokens."""
    get = engines.http.get
    (card,) = get(f"{engines.decoder}/v1/models").json()["data"]
    assert (card["id"], isinstance(card["max_model_len"], int)) == (engines.model, True)
    assert get(f"{engines.decoder}/version").json()["version"]
    assert get(f"{engines.decoder}/health").status_code == get(f"{engines.decoder}/ping").status_code == 200
    counted = engines.ask("/tokenize", {"messages": [{"role": "user", "content": "read the file"}]})
    assert counted["count"] == len(counted["tokens"]) > 0
    assert counted["max_model_len"] == card["max_model_len"]
    usage = engines.ask(CHAT, say())["usage"]
    assert usage["prompt_tokens"] == counted["count"]


SEQUENCES: list[Callable[[Engines], None]] = [
    streams,
    calls_a_tool,
    moves_once,
    holds,
    names_its_metrics,
    tells_what_it_serves,
]


def wait_until(check: Callable[[], bool], *, budget_s: float = 30.0) -> None:
    import time

    deadline_s = time.monotonic() + budget_s
    while not check():
        assert time.monotonic() < deadline_s, "never came true"
        time.sleep(0.05)
