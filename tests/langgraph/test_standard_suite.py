"""LangChain's own suites for chat models, against a broker and an emulated fleet that serves two models.

Async tests of the suites run under anyio like all others here. What is skipped, and why:

- VCR recordings (`test_stream_time`): there is nothing to record, the engines run in this process.
- LangChain's own serialisation (`test_serdes`): it is for classes that LangChain's `load` knows. A ConServeChat travels
  by pickle (`test_pitfalls.py`).
- PDF and audio inputs, Anthropic's message format: vLLM's chat route has no part for PDF files or Anthropic blocks, and
  the emulated model hears nothing.
"""

import base64
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import httpx
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from conserve_lab.emulator import fleet_of
from conserve_lab.stack import LocalStack
from conserve_langgraph import ConServeChat
from conserve_sdk import connect

T = TypeVar("T")
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
BROKER_NOBODY_CALLS = "http://127.0.0.1:9"


@pytest.fixture
def benchmark() -> Callable[[Callable[[], T]], T]:
    """Stands in for pytest-benchmark: speed is measured by `conserve bench`, never in tests."""
    return lambda work: work()


@pytest.fixture
def vcr() -> None:
    """Stands in for pytest-recording."""


@pytest.fixture
def snapshot() -> None:
    """Stands in for syrupy."""


@pytest.fixture(scope="module")
def two_models() -> Iterator[LocalStack]:
    engines = [
        {"id": f"{model}-{role}", "role": role, "model": model}
        for model in ("emulated", "other")
        for role in ("prefiller", "decoder")
    ]
    fleet = fleet_of(
        engines, defaults={"time_scale": 0.0, "tool_calls_min": 1, "tool_calls_max": 1, "image_tokens": 64}
    )
    with LocalStack(fleet=fleet) as stack:
        yield stack
        connect(stack.broker_url).close()


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ConServeChat]:
        return ConServeChat

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "emulated", "broker_url": BROKER_NOBODY_CALLS}

    @property
    def model_override_value(self) -> str:
        return "other"

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        url = "http://broker.example:7070"
        return {"CONSERVE_BROKER_URL": url}, {"model": "emulated"}, {"model_name": "emulated"}


class TestIntegration(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _fleet(self, two_models: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
        type(self).stack = two_models  # type: ignore[attr-defined]  # the suite asks for parameters by property
        # The suite fetches its picture from the internet, where no test may go.
        monkeypatch.setattr(httpx, "get", lambda url, **_: httpx.Response(200, content=PNG))

    @property
    def chat_model_class(self) -> type[ConServeChat]:
        return ConServeChat

    @property
    def chat_model_params(self) -> dict[str, Any]:
        stack: LocalStack = type(self).stack  # type: ignore[attr-defined]
        return {"model": stack.model, "broker_url": stack.broker_url}

    @property
    def model_override_value(self) -> str:
        return "other"

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_urls(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """The same long prompt twice: the decoder has it in its cache the second time."""
        model = self.chat_model_class(**self.chat_model_params)
        prompt = "Say what a cache is good for. " * 40
        model.invoke(prompt)
        if not stream:
            return cast("AIMessage", model.invoke(prompt))
        whole = AIMessageChunk("")
        for chunk in model.stream(prompt):
            whole += chunk
        return whole
