"""A metrics page in Prometheus' text format, read for single numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["MetricsPage"]

_SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"')


class MetricsPage:
    """The samples of one page."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for line in text.splitlines():
            found = _SAMPLE.match(line)
            if found:
                labels = dict(_LABEL.findall(found["labels"] or ""))
                self._samples.setdefault(found["name"], []).append((labels, _number(found["value"])))

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over all samples of that name and these labels; None without any."""
        values = [value for have, value in self._samples.get(name, ()) if labels.items() <= have.items()]
        return sum(values) if values else None

    def labels(self, name: str) -> dict[str, str]:
        """The labels of the first sample of that name; empty without any."""
        samples = self._samples.get(name)
        return samples[0][0] if samples else {}

    def has_prefix(self, prefix: str) -> bool:
        """Whether any sample's name begins so."""
        return any(name.startswith(prefix) for name in self._names())

    def _names(self) -> Iterator[str]:
        yield from self._samples


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
