"""Answers that pydantic can read as they are."""

from __future__ import annotations

from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

__all__ = ["read"]


def read(data: object, cast_to: object) -> Any | None:
    """A completion or a chunk of one, as openai would build it from the same data; None: openai should.

    Strictly, so that nothing is turned into another type. What does not fit is an answer that openai lets pass all the
    same, with the fields as they came. Models differ in one thing: `model_fields_set` names unknown fields as well, as
    pydantic has it; what they dump is the same.

    Args:
        data: the parsed JSON of the answer.
        cast_to: the class that openai was asked for.
    """
    if cast_to is not ChatCompletionChunk and cast_to is not ChatCompletion:
        return None
    try:
        return cast_to.model_validate(data, strict=True)
    except ValidationError:
        return None
