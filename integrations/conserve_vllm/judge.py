"""The guard's decisions, without I/O: what a request may carry, and what a prefiller's answer is stamped with.

The rules are those of `kv_transfer_params` on vLLM 0.32 with NIXL in pull mode, where nothing checks them: a set that
is used twice or late answers 200 with wrong text and leaves it in the prefix cache; one with a longer prompt, without
blocks or without ids ends the decoder process, or hangs the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from conserve_sdk.core.lease import EngineBinding
from conserve_sdk.core.units import Incarnation, Ms
from conserve_sdk.tokens import LeaseClaims, TokenExpired, TokenInvalid, TokenSigner
from conserve_vllm.holds import hold_params
from conserve_vllm.prompt import TRANSFER_KEY, carries_media, one_sequence_problem, prompt_digest
from conserve_vllm.refusal import Refusal
from conserve_vllm.settings import GuardSettings
from conserve_vllm.shape import Wish, read_wish
from conserve_vllm.spent import SpentTransfers
from conserve_vllm.stamp import STAMP_KEY, Stamp, StampPress, ids_digest, params_digest

__all__ = ["Judge", "PrefillOrder", "Verdict"]

BLOCKS_KEPT_MS = Ms(30_000)
"""vLLM's `kv_lease_duration` unless configured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOrder:
    """A prefill leg that was let through; its answer is to be stamped."""

    lease_id: str
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The request may go on.

    Attributes:
        kind: what it is.
        params: what to send as its params; None for none.
        prefill: set for a prefill leg.
        stripped: why a wish to hold was taken out; "" if none was.
    """

    kind: Literal["plain", "prefill", "hold", "pull"]
    params: dict[str, Any] | None = None
    prefill: PrefillOrder | None = None
    stripped: str = ""


class Judge:
    """Decides for one engine.

    Args:
        settings: whose engine, which keys, which limits.
        incarnation: this life of the engine, as the broker names it; "" if that cannot be known.
        now_ms: Unix time.
        kept_ms: this engine's own `kv_lease_duration`.
    """

    def __init__(
        self,
        settings: GuardSettings,
        *,
        incarnation: Callable[[], Incarnation],
        now_ms: Callable[[], Ms],
        kept_ms: Callable[[], Ms] = lambda: BLOCKS_KEPT_MS,
    ) -> None:
        self._settings = settings
        self._incarnation = incarnation
        self._now_ms = now_ms
        self._kept_ms = kept_ms
        self._tokens = TokenSigner(settings.keys)
        self._press = StampPress(settings.secrets())
        self._spent = SpentTransfers()

    # ---- requests -----------------------------------------------------------------------------------------------

    def admit(self, token: str | None) -> None:
        """Let a request in or not, where every request needs a lease.

        Raises:
            Refusal: the token is missing, invalid, over, or of another engine.
        """
        if self._settings.require_lease:
            self._claims(token)

    def holder(self, token: str | None) -> str:
        """Whose hold on this engine the bearer of a token may end.

        Raises:
            Refusal: the token is missing, invalid, over, or does not decode here.
        """
        claims = self._claims(token)
        if claims.decoder.engine_id != self._settings.engine_id:
            raise Refusal(409, "lease_elsewhere", f"this lease does not decode on {self._settings.engine_id}")
        return claims.lease_id

    def decide(self, path: str, body: Mapping[str, Any], token: str | None) -> Verdict:
        """Decide about a request that has transfer params.

        Raises:
            Refusal: it must not go on.
        """
        params = body[TRANSFER_KEY]
        wish = read_wish(params)
        if wish is Wish.NOTHING:
            return Verdict(kind="plain")
        if wish is Wish.PULL:
            return Verdict(kind="pull", params=self._pull(path, body, self._claims(token)))
        return self._keep(path, body, token)

    def _keep(self, path: str, body: Mapping[str, Any], token: str | None) -> Verdict:
        """`do_remote_decode` alone: a prefill leg on the lease's prefiller, a hold on its decoder."""
        params: dict[str, Any] = body[TRANSFER_KEY]
        own = self._settings.engine_id
        try:
            claims = self._claims(token)
        except Refusal as refusal:
            if params.get("do_remote_prefill") is False:
                raise  # the form of a prefill leg, whose sender waits for params
            # A hold is a favour: without a good lease the turn is a plain one, and its answer the same.
            return Verdict(kind="plain", stripped=refusal.code)
        if claims.prefiller is not None and claims.prefiller.engine_id == own:
            self._check_binding(claims.prefiller)
            order = PrefillOrder(lease_id=claims.lease_id, prompt=prompt_digest(path, body))
            return Verdict(kind="prefill", params=params, prefill=order)
        if params.get("do_remote_prefill") is False:
            raise Refusal(409, "lease_elsewhere", f"this lease does not prefill on {own}")
        if claims.hold_ms == 0:
            return Verdict(kind="plain", stripped="hold_not_granted")
        return Verdict(kind="hold", params=params | hold_params(claims.lease_id, hold_ms=claims.hold_ms))

    def _pull(self, path: str, body: Mapping[str, Any], claims: LeaseClaims) -> dict[str, Any]:
        params: dict[str, Any] = body[TRANSFER_KEY]
        now_ms = self._now_ms()
        if claims.decoder.engine_id != self._settings.engine_id:
            raise Refusal(409, "lease_elsewhere", f"this lease does not decode on {self._settings.engine_id}")
        if problem := one_sequence_problem(path, body):
            raise Refusal(409, "transfer_unfit", f"this request must compute its own prompt: {problem}")
        stamp = self._press.read(params.get(STAMP_KEY))
        self._check_stamp(stamp, claims, now_ms=now_ms)
        self._check_unchanged(stamp, params)
        self._check_prompt(stamp, path, body)
        self._spent.spend(
            (str(params["remote_engine_id"]), str(params["remote_request_id"])),
            until_ms=Ms(stamp.expires_at_ms + self._settings.clock_leeway_ms),
            now_ms=now_ms,
        )
        kept = _for_vllm(params, hold=claims.hold_ms > 0)
        held = kept.get("do_remote_decode") is True
        return kept | hold_params(claims.lease_id, hold_ms=claims.hold_ms) if held else kept

    def _check_stamp(self, stamp: Stamp, claims: LeaseClaims, *, now_ms: Ms) -> None:
        prefiller = claims.prefiller
        if stamp.lease_id != claims.lease_id or prefiller is None or stamp.engine_id != prefiller.engine_id:
            raise Refusal(409, "transfer_foreign", "these kv_transfer_params were made for another lease")
        if now_ms >= stamp.expires_at_ms or now_ms - stamp.issued_at_ms >= self._settings.transfer_deadline_ms:
            raise Refusal(
                409,
                "transfer_expired",
                f"these kv_transfer_params are {now_ms - stamp.issued_at_ms} ms old: prefill again",
            )
        if stamp.issued_at_ms - now_ms > self._settings.clock_leeway_ms:
            raise Refusal(
                409,
                "clock_skew",
                f"these kv_transfer_params are from {stamp.issued_at_ms - now_ms} ms in the future: "
                "synchronise the clocks of prefiller and decoder",
            )

    def _check_unchanged(self, stamp: Stamp, params: Mapping[str, Any]) -> None:
        counted = params.get("remote_num_tokens", stamp.remote_num_tokens)
        if stamp.params != params_digest(params) or counted != stamp.remote_num_tokens:
            raise Refusal(409, "transfer_altered", "these kv_transfer_params are not as the prefiller gave them")

    def _check_prompt(self, stamp: Stamp, path: str, body: Mapping[str, Any]) -> None:
        if stamp.prompt != prompt_digest(path, body):
            raise Refusal(
                409,
                "prompt_differs",
                "this request's prompt is not the one that was prefilled; send the same body on both legs",
            )
        ids = body[TRANSFER_KEY].get("prompt_token_ids")
        if ids is not None and stamp.ids and ids_digest(ids) != stamp.ids:
            raise Refusal(409, "prompt_differs", "prompt_token_ids are not those that were prefilled")
        if ids is not None and not stamp.ids:
            raise Refusal(409, "prompt_differs", "the prefiller told no prompt_token_ids: ask it for return_token_ids")
        if ids is None and "messages" in body and not carries_media(body):
            raise Refusal(
                409,
                "ids_missing",
                "a chat prompt that pulls KV needs the prefill answer's prompt_token_ids inside kv_transfer_params",
            )

    # ---- leases -------------------------------------------------------------------------------------------------

    def _claims(self, token: str | None) -> LeaseClaims:
        """The lease that a request comes with: valid, and bound to this life of this engine."""
        if not token:
            raise Refusal(
                403, "lease_required", "this needs a lease token in X-ConServe-Lease; the ConServe SDK sends it"
            )
        try:
            claims = self._tokens.verify(token, now_ms=Ms(self._now_ms() - self._settings.clock_leeway_ms))
        except TokenExpired as expired:
            raise Refusal(409, "lease_expired", f"{expired}; renew the lease or ask for a new one") from expired
        except TokenInvalid as invalid:
            raise Refusal(403, "lease_invalid", str(invalid)) from invalid
        own = self._settings.engine_id
        if not claims.names_engine(own):
            raise Refusal(409, "lease_elsewhere", f"this lease does not name {own}")
        if claims.decoder.engine_id == own:
            self._check_binding(claims.decoder)
        return claims

    def _check_binding(self, binding: EngineBinding) -> None:
        own = self._incarnation()
        if binding.incarnation and own and binding.incarnation != own:
            raise Refusal(
                409,
                "engine_restarted",
                f"this lease is of an earlier life of {binding.engine_id} ({binding.incarnation}); ask for a new one",
            )

    # ---- answers ------------------------------------------------------------------------------------------------

    def stamp(self, answer: dict[str, Any], order: PrefillOrder) -> bool:
        """Put a stamp into a prefiller's answer; returns whether it has params to stamp."""
        params = answer.get(TRANSFER_KEY)
        if not isinstance(params, dict) or params.get("do_remote_prefill") is not True:
            return False
        now_ms = self._now_ms()
        ids = answer.get("prompt_token_ids")
        counted = params.get("remote_num_tokens")
        # Two thirds of what vLLM keeps them for, as its own heartbeats count on.
        life_ms = min(self._settings.transfer_deadline_ms, self._kept_ms() * 2 // 3)
        params[STAMP_KEY] = self._press.sign(
            Stamp(
                lease_id=order.lease_id,
                engine_id=self._settings.engine_id,
                params=params_digest(params),
                prompt=order.prompt,
                ids=ids_digest(ids) if ids else "",
                remote_num_tokens=counted if isinstance(counted, int) else 0,
                issued_at_ms=now_ms,
                expires_at_ms=Ms(now_ms + life_ms),
            )
        )
        return True


def _for_vllm(params: dict[str, Any], *, hold: bool) -> dict[str, Any]:
    """What the engine gets: no stamp, and a hold only in the form that cannot wait for ever.

    A request that pulls and is held, and is scheduled again because its transfer failed, waits for `remote_num_tokens`
    tokens that nobody sends (vLLM 0.32, `nixl/pull_scheduler.py`). Without that key there is nothing to wait for; with
    decode context parallelism the pull itself needs it, and such a turn is not held.
    """
    kept = {key: value for key, value in params.items() if key != STAMP_KEY}
    if kept.get("do_remote_decode") is not True:
        return kept
    if not hold or kept.get("dcp_size", 1) != 1:
        return kept | {"do_remote_decode": False}
    return {key: value for key, value in kept.items() if key != "remote_num_tokens"}
