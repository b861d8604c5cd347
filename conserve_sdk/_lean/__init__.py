"""openai's clients without its walks through what is plain JSON already, both ways.

openai's client goes through every message of a call with every type that a message could have, each turn from the
beginning, and builds every answer, and every chunk of a stream, field by field. That takes most of a turn's CPU and
holds the event loop meanwhile (figures in `docs/clients.md`). It is there for dates, files and objects in messages,
for fields that go by another name, of which messages have none, and for answers of a wrong form. So lists that are
plain JSON are sent as they are, and answers of the right form are read by pydantic; anything else goes openai's way,
and what comes out is the same (`tests/clients/test_lean_requests.py`, `test_lean_answers.py`).
"""

from __future__ import annotations

from conserve_sdk._lean.clients import AsyncOpenAI, OpenAI, make_lean

__all__ = ["AsyncOpenAI", "OpenAI", "make_lean"]
