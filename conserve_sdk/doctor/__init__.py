"""`conserve doctor`: what is installed here, and whether broker and engines are set up so that conversations can move.

It asks from this machine, because turns go to the engines directly: a broker that sees them is not enough. What vLLM
does not tell over HTTP (its KV role, its failure policy, its lease length) is read from a guard where one answers,
and otherwise found out by two or three short requests per engine. Those carry transfer params only as the SDK makes
them (`_kv_params`): others can end a decoder.
"""

from __future__ import annotations

from conserve_sdk.doctor._command import main

__all__ = ["main"]
