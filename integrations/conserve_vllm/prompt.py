"""What of a request body enters the prompt, and which bodies must not travel with transferred KV.

vLLM trusts transferred blocks without looking: a prompt of more blocks than were prefilled ends the decoder process,
another prompt of the same length answers with wrong text (measured on vLLM 0.32). So both legs of a transfer must
agree in everything but the fields named here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["TRANSFER_KEY", "carries_media", "one_sequence_problem", "prompt_digest"]

TRANSFER_KEY = "kv_transfer_params"

NOT_PROMPT = frozenset(
    {
        TRANSFER_KEY,
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "min_tokens",
        "n",
        "best_of",
        "use_beam_search",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "return_token_ids",
    }
)
"""Fields in which the legs of one turn may differ: how long the answer is and how it comes, never what is asked."""


PULL_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""Where one body is one prompt. Others (`/v1/chat/completions/batch`) make several of it, or are not known to agree."""


def prompt_digest(path: str, body: Mapping[str, Any]) -> str:
    """A digest of everything that may enter the prompt, whatever the order of the fields.

    The route belongs to it: each reads other fields, so one body is two prompts on two routes.
    """
    asked = {key: value for key, value in body.items() if key not in NOT_PROMPT}
    text = json.dumps([path.rstrip("/"), asked], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def one_sequence_problem(path: str, body: Mapping[str, Any]) -> str:
    """Why this body must not pull KV; empty when it may."""
    prompt = body.get("prompt")
    problems = {
        f"it goes to none of {', '.join(PULL_ROUTES)}": not path.rstrip("/").endswith(PULL_ROUTES),
        "n is above 1": _above_one(body.get("n")) or _above_one(body.get("best_of")),
        "beam search runs several sequences": bool(body.get("use_beam_search")),
        "there are several prompts": isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int),
        "echo and prompt_logprobs need the prompt computed here": bool(body.get("echo"))
        or body.get("prompt_logprobs") is not None,
        # vLLM cuts to another length where the output is limited, as it is on the prefill leg only.
        "the prompt may be truncated": body.get("truncate_prompt_tokens") is not None
        or body.get("truncation") not in (None, "disabled"),
        "previous_response_id lives on one engine only": bool(body.get("previous_response_id")),
        "media named by address may differ between two fetches": any(
            _is_remote(part) for part in _parts(body.get("messages")) + _parts(body.get("input"))
        ),
    }
    return next((problem for problem, applies in problems.items() if applies), "")


def carries_media(body: Mapping[str, Any]) -> bool:
    """Whether a message holds anything but text: vLLM then renders the messages and drops ids that came with them."""
    return any(part.get("type") not in ("text", "input_text", "output_text") for part in _parts(body.get("messages")))


def _parts(items: object) -> list[dict[str, Any]]:
    contents = [item.get("content") for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    return [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]


def _is_remote(part: Mapping[str, Any]) -> bool:
    values = [value for key, value in part.items() if key.endswith("_url")]
    urls = [value.get("url") if isinstance(value, dict) else value for value in values]
    return any(isinstance(url, str) and not url.startswith("data:") for url in urls)


def _above_one(value: object) -> bool:
    return isinstance(value, int) and value > 1
