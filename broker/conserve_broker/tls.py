"""The broker's own certificate, and the authority of its clients' certificates.

A renewed certificate is taken over while the broker runs: new connections get it, those that exist go on. Authorities
of clients are only ever added to a running broker; one that is taken away counts until the restart.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
from pathlib import Path

from conserve_broker._access_tables import TlsTable
from conserve_broker._config_errors import ConfigProblem

__all__ = ["ServerTls"]

_POLL_S = 1.0
_log = logging.getLogger("conserve.broker")


class ServerTls:
    """A context for listening, kept up with its files.

    Attributes:
        context: what connections are accepted with.
        problem: why the files as they are now are not in force; empty when they are. For `/readyz`.

    Args:
        settings: with a certificate.

    Raises:
        ConfigProblem: the files cannot be used.
    """

    def __init__(self, settings: TlsTable) -> None:
        self._settings = settings
        self.problem = ""
        self._digest = self._digested()
        self.context = self._loaded(self._new_context())

    async def run(self) -> None:
        """Look at the files once a second until cancelled."""
        while True:
            await asyncio.sleep(_POLL_S)
            self.poll()

    def poll(self) -> bool:
        """Look at the files once; True when they were new and are in force now."""
        digest = self._digested()
        if digest == self._digest:
            return False
        try:
            self._loaded(self._new_context())  # a half-written pair must not get into the context in use
            self._loaded(self.context)
        except ConfigProblem as problem:
            if not self.problem:
                _log.error("tls: not taken over, the broker goes on with what it has: %s", problem)
            self.problem = str(problem)
            return False
        self._digest, self.problem = digest, ""
        _log.info("tls: %s is in force", self._settings.cert_file)
        return True

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self._settings.client_ca_file:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _loaded(self, context: ssl.SSLContext) -> ssl.SSLContext:
        settings = self._settings
        names = f"{settings.cert_file} with {settings.key_file}"
        try:
            context.load_cert_chain(settings.cert_file, settings.key_file, password=_no_password)
        except (OSError, ValueError) as error:  # `ssl.SSLError` is an OSError
            raise ConfigProblem([f"tls.cert_file: cannot use {names} ({error}); both must be PEM files"]) from error
        if settings.client_ca_file:
            try:
                context.load_verify_locations(settings.client_ca_file)
            except OSError as error:
                raise ConfigProblem(
                    [f"tls.client_ca_file: cannot use {settings.client_ca_file} ({error}); it must be a PEM file"]
                ) from error
        return context

    def _digested(self) -> bytes:
        settings = self._settings
        digest = hashlib.sha256()
        for name in filter(None, (settings.cert_file, settings.key_file, settings.client_ca_file)):
            try:
                digest.update(hashlib.sha256(Path(name).read_bytes()).digest())
            except OSError:
                digest.update(b"?")  # loading says why
        return digest.digest()


def _no_password() -> bytes:
    """OpenSSL would ask the terminal for the password of an encrypted key."""
    raise ValueError("the key is encrypted: give one without a password")
