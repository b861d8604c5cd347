"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["Finding", "fail", "note", "ok", "reason"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found out about one subject.

    Attributes:
        verdict: `fail` makes the exit code 1; `note` is for what is absent but not needed, or could not be found out.
        check: stable name of what was asked, for scripts.
        fix: what to change; empty unless something is wrong or unknown.
    """

    verdict: Literal["ok", "note", "fail"]
    subject: str
    check: str
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        told = f"{self.detail}: {self.fix}" if self.fix else self.detail
        return f"{self.verdict:<4}  {self.subject}: {told}"

    def as_json(self) -> dict[str, str]:
        """The fields, for `--json`."""
        return asdict(self)


def ok(subject: str, check: str, detail: str) -> Finding:
    """All is well."""
    return Finding(verdict="ok", subject=subject, check=check, detail=detail)


def note(subject: str, check: str, detail: str, *, fix: str = "") -> Finding:
    """Good to know."""
    return Finding(verdict="note", subject=subject, check=check, detail=detail, fix=fix)


def fail(subject: str, check: str, detail: str, *, fix: str) -> Finding:
    """Something is wrong; `fix` says what to change."""
    return Finding(verdict="fail", subject=subject, check=check, detail=detail, fix=fix)


def reason(exc: Exception) -> str:
    """An exception in one line."""
    text = str(exc).splitlines()[0] if str(exc) else ""
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
