"""The tables of `broker.toml` for who may do what: API keys, what stays open, and TLS."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, field_serializer, field_validator, model_validator

from conserve_broker._config_tables import Name, Table

DENIALS = ("key_missing", "key_unknown", "key_expired", "scope_missing", "rate_limited")
"""Codes of the problems with which a request is turned away."""
Rate = Annotated[float, Field(ge=0.0, le=1_000_000.0)]
Scopes = Annotated[tuple[Literal["agent", "worker", "admin"], ...], Field(min_length=1, max_length=3)]


class ApiKeyTable(Table):
    """`[[access.keys]]`: one API key, as `conserve broker keygen` prints it. A tenant may have several at once."""

    id: Name
    """Name of the key; it stands in logs, and in the key itself."""
    tenant: Name
    """Whose key it is: leases belong to this tenant, whatever a request says."""
    scopes: Scopes
    """`agent` (leases), `worker` (register an engine) and `admin` (everything, of every tenant)."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the whole key, in hexadecimal digits; never the key itself."""
    expires_at: AwareDatetime | None = None
    """From when on it is refused, with an offset from UTC; default: never."""
    requests_per_s: Rate | None = None
    """Requests per second that it may send on; default: `access.requests_per_s`; 0: no limit."""
    burst: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests it may send at once; default: `access.burst`."""

    @field_serializer("expires_at")
    def _shown(self, at: AwareDatetime | None) -> str | None:
        return None if at is None else at.isoformat()

    @field_validator("expires_at")
    @classmethod
    def _plain_offset(cls, at: AwareDatetime | None) -> AwareDatetime | None:
        offset = None if at is None else at.utcoffset()
        if offset is not None and offset % timedelta(minutes=1):
            raise ValueError("must have an offset of whole minutes from UTC")
        return at


class AccessTable(Table):
    """`[access]`: API keys. Without any key everybody who reaches the broker may do everything."""

    keys: tuple[ApiKeyTable, ...] = ()
    """The keys; read again while the broker runs."""
    key_file: str = ""
    """A TOML file of its own with more of them as `[[keys]]`, relative to the configuration file; read again, too."""
    requests_per_s: Rate = 0.0
    """Requests per second that each key may send on; 0: no limit."""
    burst: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """Requests that each key may send at once."""
    share_engine_credentials: Literal["none", "agent"] = "none"
    """`agent`: leases bring the API keys of their engines along, for keys of scope `agent`; `none`: agents bring their
    own."""
    metrics: Literal["open", "admin"] = "open"
    """Who may read `/metrics` where there are keys: everybody, or keys of scope `admin`."""


class KeyFile(Table):
    """The file that `access.key_file` names."""

    keys: tuple[ApiKeyTable, ...] = ()
    """`[[keys]]` tables with the keys of `[[access.keys]]`."""


class TlsTable(Table):
    """`[tls]`: HTTPS instead of HTTP. The files are PEM, relative to the configuration file."""

    cert_file: str = ""
    """The broker's certificate, with those between it and its authority; empty: plain HTTP. Read again when renewed."""
    key_file: str = ""
    """Its private key, without a password."""
    client_ca_file: str = ""
    """Authorities of client certificates: with it, no client without one gets as far as a request."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together; set both")
        if self.client_ca_file and not self.cert_file:
            raise ValueError("client_ca_file needs cert_file and key_file; set them")
        return self

    @property
    def enabled(self) -> bool:
        """Whether the broker speaks HTTPS."""
        return bool(self.cert_file)
