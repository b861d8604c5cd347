"""The stamp: what a prefiller's guard says about the transfer params it let out, signed, for the decoder's guard.

A decoder cannot see when a prompt was prefilled, how many blocks it got, or whether somebody changed the params on
their way; vLLM 0.32 does not look either. So the prefiller's guard adds one field to the params it answers with. The
client carries it along with the rest, and the decoder's guard takes it out again before vLLM reads them.

The key is derived from the broker's token key where that is a secret which every guard has, else from one that the
guards share; a lease token is never good as a stamp, nor the other way round.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from conserve_sdk.core.units import Ms
from conserve_sdk.tokens import SigningKey
from conserve_vllm.refusal import Refusal

__all__ = ["STAMP_KEY", "Stamp", "StampPress", "ids_digest", "params_digest"]

STAMP_KEY = "conserve_stamp"
STAMP_CHARS_MAX = 2048

UNSIGNED = frozenset({STAMP_KEY, "prompt_token_ids", "do_remote_decode", "remote_num_tokens"})
"""What the decode leg may add to the prefiller's params, or leave out; each is checked by itself."""
_PURPOSE = b"conserve transfer stamp 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What is known of one prefilled prompt.

    Attributes:
        lease_id: the lease whose token came with the prefill.
        engine_id: the prefiller, as the lease names it.
        params: digest of the params.
        prompt: digest of the route and the request's prompt fields.
        ids: digest of the prompt's token ids, or "" if the prefiller did not tell them.
        remote_num_tokens: the params' own count, or 0.
        issued_at_ms: when the prefiller answered (its own clock, Unix epoch).
        expires_at_ms: from then on its vLLM may give the blocks away, less a margin.
    """

    lease_id: str
    engine_id: str
    params: str
    prompt: str
    ids: str
    remote_num_tokens: int
    issued_at_ms: Ms
    expires_at_ms: Ms


class StampPress:
    """Signs with the first key, accepts all.

    Args:
        keys: secrets that all guards have, current first.
    """

    def __init__(self, keys: Sequence[SigningKey]) -> None:
        self._kid = keys[0].kid
        self._secrets = {key.kid: hmac.digest(key.secret, _PURPOSE, hashlib.sha256) for key in keys}

    def sign(self, stamp: Stamp) -> str:
        """The text of a stamp."""
        signed = f"{_encode([self._kid])}.{_encode(list(asdict(stamp).values()))}"
        return f"{signed}.{self._signature(self._kid, signed)}"

    def read(self, text: object) -> Stamp:
        """What a stamp says.

        Raises:
            Refusal: it is none, or nobody we know signed it.
        """
        if not isinstance(text, str) or len(text) > STAMP_CHARS_MAX or not text.isascii() or text.count(".") != 2:
            raise _forged()
        head, payload, signature = text.split(".")
        try:
            (kid,) = _decode(head)
            if not hmac.compare_digest(self._signature(kid, f"{head}.{payload}"), signature):
                raise _forged()
            return Stamp(**dict(zip(Stamp.__dataclass_fields__, _decode(payload), strict=True)))
        except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
            raise _forged() from error

    def _signature(self, kid: str, signed: str) -> str:
        return _base64url(hmac.digest(self._secrets[kid], signed.encode("ascii"), hashlib.sha256))


def params_digest(params: Mapping[str, Any]) -> str:
    """A digest of all params that must come back as they went out."""
    kept = {key: value for key, value in params.items() if key not in UNSIGNED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def ids_digest(ids: object) -> str:
    """A digest of token ids.

    Raises:
        Refusal: they are no list of whole numbers.
    """
    if not isinstance(ids, list) or not ids or set(map(type, ids)) != {int}:
        raise Refusal(400, "bad_transfer_params", "prompt_token_ids must be a non-empty list of whole numbers")
    try:
        return hashlib.sha256(array("q", ids).tobytes()).hexdigest()
    except OverflowError as error:
        raise Refusal(400, "bad_transfer_params", "prompt_token_ids holds a number that is no token id") from error


def _forged() -> Refusal:
    return Refusal(
        409,
        "transfer_unstamped",
        f"kv_transfer_params without a valid {STAMP_KEY}: send the prefill answer's params unchanged; "
        "the prefiller needs a guard with the same keys",
    )


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _encode(values: list[Any]) -> str:
    return _base64url(json.dumps(values, separators=(",", ":")).encode("ascii"))


def _decode(text: str) -> list[Any]:
    values = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    if not isinstance(values, list):
        raise TypeError("a list is expected")
    return values
