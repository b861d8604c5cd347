"""The API keys of the engines themselves (vLLM's `--api-key`): read from variables or files, never put into a lease.

The core, the journal and the tokens know engines by id and URL only. What a key is needed for asks here: the scraper,
and the answer to an agent where the configuration says that agents get it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from conserve_broker._config_errors import ConfigProblem
from conserve_broker._config_tables import EngineTable
from conserve_broker._discovery_tables import DnsTable, RegistrationTable
from conserve_sdk.core.units import EngineId

__all__ = ["EngineKeys", "resolve"]

_KEY = re.compile(r"[\x21-\x7e]{1,1024}")


class _Keyed(Protocol):
    @property
    def api_key_env(self) -> str: ...
    @property
    def api_key_file(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKeys:
    """All keys; "" where an engine has none.

    Attributes:
        of_file: by the id of an `[[engine]]`.
        of_dns: by the name of a `[[discovery.dns]]`, for all its engines.
        of_registered: for every engine that registers.
    """

    of_file: Mapping[EngineId, str] = field(default_factory=dict, repr=False)
    of_dns: Mapping[str, str] = field(default_factory=dict, repr=False)
    of_registered: str = field(default="", repr=False)


def resolve(
    engines: tuple[EngineTable, ...], names: tuple[DnsTable, ...], registration: RegistrationTable
) -> EngineKeys:
    """Read the keys.

    Raises:
        ConfigProblem: a variable is not set, a file cannot be read, or what they hold is no key.
    """
    return EngineKeys(
        of_file={EngineId(engine.id): _read(engine, f"engine.{engine.id}") for engine in engines},
        of_dns={table.name: _read(table.engine("host.invalid", 1), f"discovery.dns.{table.name}") for table in names},
        of_registered=_read(registration, "registration"),
    )


def _read(keyed: _Keyed, where: str) -> str:
    env, file = keyed.api_key_env, keyed.api_key_file
    if env and file:
        raise ConfigProblem([f"{where}: set api_key_env or api_key_file, not both"])
    if not env and not file:
        return ""
    if env:
        source, key = f"{where}.api_key_env: {env}", os.environ.get(env, "").strip()
    else:
        source, key = f"{where}.api_key_file: {file}", _content(Path(file), where)
    if not _KEY.fullmatch(key):
        raise ConfigProblem([f"{source} holds no key: one word of printable ASCII is expected"])
    return key


def _content(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigProblem(
            [f"{where}.api_key_file: cannot read {path} ({error.strerror}); correct the path"]
        ) from error
    except UnicodeDecodeError:
        return ""
