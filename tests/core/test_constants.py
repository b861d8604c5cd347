"""The constants of placement are those that its page states."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from conserve_sdk.core import AFFINITY, DEFAULT, PlacementSettings

PAGE = Path(__file__).parents[2] / "docs" / "placement.md"
ROW = re.compile(r"^\|[^|]*\| (`[^|]+`) \| ([^|]+) \|", re.MULTILINE)
OF_THE_SCORE = {"harm_weight_ppm", "local_below_tokens"}
"""What a preset without a score leaves out."""


def stated() -> dict[str, int]:
    """Settings of the core by name, from the page's table; shares become parts per million there."""
    names = {field.name for field in fields(PlacementSettings)}
    found: dict[str, int] = {}
    for keys, values in ROW.findall(PAGE.read_text().partition("## Constants\n")[2].partition("\n## ")[0]):
        for key, value in zip(re.findall(r"`(\w+)`", keys), values.split(", "), strict=True):
            number = float(re.sub(r"[^\d.]", "", value))
            name = key if key in names else f"{key}_ppm"
            scale = 1_000_000 if name.endswith("_ppm") else 1_000 if value.endswith(" ms") else 1
            found[name] = round(number * scale)
    return found


@pytest.mark.parametrize(("preset", "left_out"), [(DEFAULT, set()), (AFFINITY, OF_THE_SCORE)])
def test_a_preset_has_the_constants_of_the_page(preset: PlacementSettings, left_out: set[str]) -> None:
    expected = stated()
    assert len(expected) == 20
    assert {name: getattr(preset, name) for name in expected} == expected | dict.fromkeys(left_out, 0)
