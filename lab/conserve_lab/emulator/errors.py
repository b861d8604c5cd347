"""Errors as the API shows them."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that cannot be served; rendered in vLLM's error shape.

    Args:
        message: What is wrong and what to do.
        status: HTTP status.
        kind: vLLM's error type.
        param: The request field at fault.
        reason: For refusals that stand for a crash or a wrong answer of real vLLM: a stable code, counted in
            `conserve_emulator_refusals_total`.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "BadRequestError",
        param: str | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.reason = reason

    def body(self) -> dict[str, Any]:
        """Return the JSON document of the error."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        if self.reason:
            error["reason"] = self.reason
        return {"error": error}


def invalid(message: str, *, param: str) -> ApiError:
    """Return vLLM's answer to a field that is missing or of another type: its type is the HTTP phrase."""
    return ApiError(message, kind="Bad Request", param=param)


def internal_error() -> ApiError:
    """Return what vLLM answers when the engine failed a request (`kv_load_failure_policy=fail`)."""
    return ApiError("Internal server error", status=500, kind="InternalServerError")


def unknown_model(model: object) -> ApiError:
    """Return vLLM's answer to a model it does not serve."""
    return ApiError(f"The model `{model}` does not exist.", status=404, kind="NotFoundError", param="model")


def prompt_too_long(prompt_tokens: int, *, max_model_len: int) -> ApiError:
    """Return vLLM's answer to a prompt that leaves no room for a token."""
    return ApiError(
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
        f"{prompt_tokens} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
        f"length of the input prompt. (parameter=input_tokens, value={prompt_tokens})",
        param="input_tokens",
    )
