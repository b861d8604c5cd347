"""Images as input: what a multimodal vLLM does with them, as far as tokens and caches can tell."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_lab.emulator.language import image_text
from conserve_lab.emulator.language.hints import hints_of
from conserve_lab.emulator.language.images import without_images

IMAGE_TOKENS = 48
CAT = "data:image/png;base64," + base64.b64encode(b"a cat").decode()
DOG = "data:image/png;base64," + base64.b64encode(b"a dog").decode()


@pytest.fixture(scope="module")
def seeing() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=0, decoders=1, time_scale=0, image_tokens=IMAGE_TOKENS)) as fleet:
        yield fleet


def ask(fleet: EmulatedFleet, http: httpx2.Client, *urls: str, role: str = "user", path: str = "") -> httpx2.Response:
    parts: list[Any] = [{"type": "text", "text": "What is on it? "}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = {"model": "emulated", "messages": [{"role": role, "content": parts}]}
    return http.post(fleet.engine("d0").url + (path or "/v1/chat/completions"), json=body)


def test_an_image_adds_its_tokens(seeing: EmulatedFleet, http: httpx2.Client) -> None:
    counts = [
        ask(seeing, http, *urls, path="/tokenize").json()["count"]
        for urls in ((), (CAT,), (CAT, DOG), ("https://example.org/cat.png",))
    ]
    assert [count - counts[0] for count in counts] == [0, IMAGE_TOKENS, 2 * IMAGE_TOKENS, IMAGE_TOKENS]


def test_the_same_image_is_cached_and_another_is_not(seeing: EmulatedFleet, http: httpx2.Client) -> None:
    cached = [
        ask(seeing, http, url).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for url in (CAT, CAT, DOG)
    ]
    assert cached[0] == 0
    assert cached[1] >= IMAGE_TOKENS
    assert cached[2] == 0


def test_tools_may_return_images(seeing: EmulatedFleet, http: httpx2.Client) -> None:
    answer = ask(seeing, http, CAT, role="tool").json()["choices"][0]["message"]["content"]
    assert answer.startswith("The last tool returned: What is on it?. ")
    assert without_images(answer) == answer


def test_an_image_offers_no_words() -> None:
    assert hints_of(image_text(CAT, tokens=IMAGE_TOKENS)) == hints_of("")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url"}, "data: URL"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "data: URL"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}, "not valid base64"),
        ({"type": "input_audio", "input_audio": {"data": ""}}, "'input_audio' is not supported"),
    ],
)
def test_what_is_no_image_is_refused(
    seeing: EmulatedFleet, http: httpx2.Client, part: dict[str, Any], message: str
) -> None:
    body = {"model": "emulated", "messages": [{"role": "user", "content": [part]}]}
    answer = http.post(seeing.engine("d0").url + "/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
