"""One turn by lease, from this machine, as an agent's would go: broker, engine, its guard, the report."""

from __future__ import annotations

import uuid
from typing import Any

import openai

from conserve_sdk._broker_access import BrokerAccess
from conserve_sdk.client import ConServe
from conserve_sdk.doctor._finding import Finding, fail, ok, reason
from conserve_sdk.identity import conversation
from conserve_sdk.telemetry import TurnCollector

__all__ = ["check_leased_turn"]

TIMEOUT_S = 60.0


def check_leased_turn(
    broker_url: str, model: str, *, access: BrokerAccess, engine_key: str, transport: Any = None
) -> Finding:
    """Hold a conversation of one short turn, and give its lease back.

    Args:
        broker_url: where the broker answers.
        model: to ask for.
        access: this machine's key at the broker, and whom it trusts.
        engine_key: the engines' own; may be empty.
        transport: replaces the network (tests).
    """
    subject, check = f"turn of {model}", "leased_turn"
    turns = TurnCollector()
    options: dict[str, Any] = {"broker_transport": transport, "engine_transport": transport} if transport else {}
    options |= {
        "broker_api_key": access.api_key,
        "broker_ca": access.ca_file,
        "broker_cert": access.cert_file,
        "broker_cert_key": access.cert_key_file,
    }
    with ConServe(broker_url, on_turn=turns, **options) as conserve:
        client = conserve.openai_client(max_retries=0, **({"api_key": engine_key} if engine_key else {}))
        name = f"doctor-{uuid.uuid4().hex}"
        try:
            with conversation(name):
                hello = f"{name}: hello"
                client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": hello}], max_tokens=1, timeout=TIMEOUT_S
                )
        except openai.OpenAIError as exc:
            return fail(subject, check, f"failed ({reason(exc)})", fix="see the lines above, and the broker's log")
        finally:
            conserve.release(name)
    (record,) = turns.records
    if record.loss or record.lease_id is None:
        how = "see the lines above, and the logs of broker and engines"
        return fail(subject, check, f"answered, but not as it should be: {record.loss or 'without a lease'}", fix=how)
    return ok(subject, check, f"by lease on {record.decoder_id} ({record.mode}), first token after {record.ttft_ms} ms")
