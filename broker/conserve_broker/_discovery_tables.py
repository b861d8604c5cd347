"""The tables of `broker.toml` for engines that no `[[engine]]` names: found by DNS, or registered by themselves."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from conserve_broker._config_tables import EngineTable, EnvName, Name, Table
from conserve_broker._url_guard import UrlGuard

_ID_CHARS_MAX = 64
_HASH_CHARS = 8


class DnsTable(Table):
    """`[[discovery.dns]]`: one name whose answers are engines; every other key is one of `[[engine]]`, for all of them.

    An A or AAAA answer is an address and takes `port`; an SRV answer brings host and port.
    """

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9._-]+$")]
    """What is asked for, such as a headless service."""
    record: Literal["A", "AAAA", "SRV"] = "A"
    """Kind of record."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Port of every answer; not with SRV, which names it."""
    scheme: Literal["http", "https"] = "http"
    """How the engines are spoken to."""
    id: Name | None = None
    """Begins the id of every engine found; default: the first label of `name`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.record == "SRV" and self.port is not None:
            raise ValueError("port: an SRV answer names its port; remove the key or set record = 'A'")
        if self.record != "SRV" and self.port is None:
            raise ValueError(f"port: is missing; {self.record} answers are addresses only")
        self.engine("host.invalid", 1)
        return self

    def engine(self, host: str, port: int) -> EngineTable:
        """The engine behind one answer.

        Raises:
            ValueError: the keys of `[[engine]]` do not fit; the message names them.
        """
        place = f"[{host}]" if ":" in host else host
        return engine_of(self._id_of(host, port), f"{self.scheme}://{place}:{port}", self.model_extra or {})

    def _id_of(self, host: str, port: int) -> str:
        slug = re.sub(r"[^A-Za-z0-9]+", "-", host).strip("-")
        label = self.id or self.name.strip("._-").split(".")[0] or "dns"
        whole = f"{label}-{slug}-{port}"
        if len(whole) <= _ID_CHARS_MAX:
            return whole
        digest = hashlib.sha256(whole.encode()).hexdigest()[:_HASH_CHARS]
        return f"{whole[: _ID_CHARS_MAX - _HASH_CHARS - 1]}-{digest}"


class DiscoveryTable(Table):
    """`[discovery]`: engines found by DNS. Those that leave the answer are drained, and go with their last lease."""

    refresh_ms: Annotated[int, Field(ge=100, le=3_600_000)] = 10_000
    """Time between two questions, in milliseconds."""
    timeout_ms: Annotated[int, Field(ge=100, le=60_000)] = 3_000
    """How long one question may take, in milliseconds; a failure keeps the last answer."""
    nameservers: tuple[Annotated[str, Field(pattern=r"^[0-9A-Fa-f.:\[\]]+$")], ...] = ()
    """Addresses to ask, `10.0.0.2` or `10.0.0.2:5353`; default: those of the system."""
    dns: tuple[DnsTable, ...] = ()
    """The names to ask for."""


class RegistrationTable(Table):
    """`[registration]`: engines may announce themselves with `PUT /v1/engines/{id}`, if their URL is allowed."""

    allow: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = ()
    """URLs an engine may register with: networks (`10.0.0.0/8`, for addresses only) or patterns
    (`http://*.workers.internal:8000`); empty: registration is off."""
    api_key_env: EnvName = ""
    """Environment variable with the API key of every engine that registers (vLLM's `--api-key`)."""
    api_key_file: Annotated[str, Field(max_length=4096)] = ""
    """File with it instead, relative to the configuration file."""

    @model_validator(mode="after")
    def _readable(self) -> Self:
        UrlGuard(self.allow)
        return self


def engine_of(engine_id: str, url: str, keys: dict[str, Any]) -> EngineTable:
    """An engine from its place and the other keys of `[[engine]]`.

    Raises:
        ValueError: they do not fit; the message names the keys.
    """
    try:
        return EngineTable.model_validate({**keys, "id": engine_id, "url": url})
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, finding['loc'])) or 'engine'}: {finding['msg'].removeprefix('Value error, ')}"
            for finding in error.errors(include_url=False)
            if finding["type"] != "default_factory_not_called"
        ]
        raise ValueError("; ".join(lines)) from None
