"""How a program proves itself to the broker and knows it: API key, certificate authority, client certificate."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext
from typing import Any, Self

from conserve_sdk._tls import verify_for

__all__ = ["API_KEY_ENV", "AccessFaultError", "BrokerAccess"]

API_KEY_ENV = "CONSERVE_BROKER_API_KEY"
API_KEY_FILE_ENV = "CONSERVE_BROKER_API_KEY_FILE"
CA_ENV = "CONSERVE_BROKER_CA"
CERT_ENV = "CONSERVE_BROKER_CERT"
CERT_KEY_ENV = "CONSERVE_BROKER_CERT_KEY"
_KEY = re.compile(r"[\x21-\x7e]{1,256}")


class AccessFaultError(ValueError):
    """An option or variable is wrong.

    Attributes:
        key: which one.
    """

    def __init__(self, message: str, *, key: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerAccess:
    """What it takes to speak to a broker that does not speak to everybody.

    The API key stays in this process: neither `repr` nor a pickle holds it. A copy in another process has the key of
    that process's environment.

    Attributes:
        api_key: sent as `Authorization: Bearer`; "" sends none.
        ca_file: PEM file with the authorities that vouch for the broker; "": those of the system.
        cert_file, cert_key_file: this program's own certificate and key (PEM), for brokers that ask for one.
    """

    api_key: str = field(default="", repr=False)
    ca_file: str = ""
    cert_file: str = ""
    cert_key_file: str = ""

    @classmethod
    def resolve(
        cls,
        *,
        api_key: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        cert_key_file: str | None = None,
    ) -> Self:
        """What was given, completed from the environment (`CONSERVE_BROKER_API_KEY`, `CONSERVE_BROKER_CA`, ...).

        Raises:
            AccessFaultError: a value that cannot be right; the message shows no key.
        """
        access = cls(
            api_key=_key_of_environment() if api_key is None else api_key,
            ca_file=_of_environment(CA_ENV) if ca_file is None else str(ca_file),
            cert_file=_of_environment(CERT_ENV) if cert_file is None else str(cert_file),
            cert_key_file=_of_environment(CERT_KEY_ENV) if cert_key_file is None else str(cert_key_file),
        )
        access._check()
        return access

    def headers(self) -> dict[str, str]:
        """What goes with every request to the broker."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def verify(self, urls: Iterable[str]) -> SSLContext | bool:
        """What to pass as `verify=` to an httpx2 transport that talks to these brokers.

        Raises:
            AccessFaultError: a file cannot be used.
        """
        try:
            return verify_for(urls, ca_file=self.ca_file, cert_file=self.cert_file, key_file=self.cert_key_file)
        except OSError as error:  # `ssl.SSLError` is one
            names = ", ".join(filter(None, (self.ca_file, self.cert_file, self.cert_key_file)))
            raise AccessFaultError(
                f"cannot use {names} for TLS to the broker ({error}): are they PEM files, and do they fit together?",
                key="broker_ca" if self.ca_file else "broker_cert",
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.ca_file, self.cert_file, self.cert_key_file)

    def _check(self) -> None:
        if self.api_key and not _KEY.fullmatch(self.api_key):
            raise AccessFaultError(
                "broker_api_key is no API key: it has blanks, other than ASCII characters, or more than 256 of them",
                key="broker_api_key",
            )
        if bool(self.cert_file) != bool(self.cert_key_file):
            raise AccessFaultError(
                f"broker_cert and broker_cert_key go together ({CERT_ENV}, {CERT_KEY_ENV})", key="broker_cert"
            )


def _rebuilt(ca_file: str, cert_file: str, cert_key_file: str) -> BrokerAccess:
    return BrokerAccess.resolve(ca_file=ca_file, cert_file=cert_file, cert_key_file=cert_key_file)


def _of_environment(name: str) -> str:
    return os.environ.get(name, "").strip()


def _key_of_environment() -> str:
    path = _of_environment(API_KEY_FILE_ENV)
    if not path or _of_environment(API_KEY_ENV):
        return _of_environment(API_KEY_ENV)
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise AccessFaultError(f"{API_KEY_FILE_ENV}: cannot read {path} ({why})", key="broker_api_key") from None
