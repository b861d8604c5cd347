"""The emulated model: a tokenizer, a chat template and a deterministic language.

The same prompt tokens and the same sampling fields give the same answer, on every engine and in every process.
"""

from __future__ import annotations

from conserve_lab.emulator.language.answer import Answer, Delta, Message, RenderedCall, assemble
from conserve_lab.emulator.language.images import image_text
from conserve_lab.emulator.language.prompt import Call, ChatMessage, Dialogue, Tool, parse_prompt, render_chat
from conserve_lab.emulator.language.schema import SchemaUnsatisfiable, fill_schema
from conserve_lab.emulator.language.speaker import ANY_OBJECT, LanguageSettings, NamedTool, Speaker, Wish
from conserve_lab.emulator.language.tokens import Mark, TokenIds, block_keys, mark_id, text_of, text_tokens

__all__ = [
    "ANY_OBJECT",
    "Answer",
    "Call",
    "ChatMessage",
    "Delta",
    "Dialogue",
    "LanguageSettings",
    "Mark",
    "Message",
    "NamedTool",
    "RenderedCall",
    "SchemaUnsatisfiable",
    "Speaker",
    "TokenIds",
    "Tool",
    "Wish",
    "assemble",
    "block_keys",
    "fill_schema",
    "image_text",
    "mark_id",
    "parse_prompt",
    "render_chat",
    "text_of",
    "text_tokens",
]
