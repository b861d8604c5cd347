"""Images in a prompt: a run of placeholder characters that depends on the image alone.

A multimodal vLLM puts a number of placeholder tokens into the prompt and tells images apart by their hash when it looks
for cached blocks. Here the placeholders are private-use characters made from that hash, four UTF-8 bytes (so one token)
each: equal images are equal tokens, others are not.
"""

from __future__ import annotations

import re

from conserve_lab.emulator.language.tokens import digest

_FIRST = 0xF_0000
_COUNT = 0xFFFE
_PLACEHOLDERS = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + _COUNT - 1)}]+")


def image_text(reference: str, *, tokens: int) -> str:
    """Return what stands in the prompt for an image.

    Args:
        reference: Its `data:` URL or address.
        tokens: How many tokens it adds.
    """
    return "".join(chr(_FIRST + digest(reference, number) % _COUNT) for number in range(tokens))


def without_images(text: str) -> str:
    """Return the words of a text."""
    return _PLACEHOLDERS.sub("", text)
