"""Draw the import contracts of pyproject.toml as `docs/import-contracts.svg`: `python .ci/contracts_picture.py`.

One panel per contract of layers, the top layer on top; below them, what some modules must not import at all.
"""

import textwrap
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/import-contracts.svg"
WIDTH = 980
GAP = 14
LINE = 16
CHAR = 7.3
"""Width of a monospaced character of 12 pixels, generously."""
COLOURS = ("#ecfdf5", "#047857"), ("#f8fafc", "#94a3b8"), ("#fff7ed", "#c2410c")


@dataclass
class Sheet:
    """Elements of the picture, and how far down it goes."""

    elements: list[str] = field(default_factory=list)
    bottom: int = GAP

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        """Add one line of text; `style`: further attributes."""
        self.elements.append(f'<text x="{x:g}" y="{y:g}"{style}>{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, colours: tuple[str, str]) -> None:
        """Add a rounded box, `colours` of its inside and its border."""
        fill, stroke = colours
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{stroke}"/>'
        )


def draw() -> str:
    """The picture as SVG text; the same contracts make the same text."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layered = [contract for contract in contracts if contract["type"] == "layers"]
    sheet = Sheet()
    packages, *inside = layered
    sheet.bottom = _panel(sheet, packages, x=GAP, y=sheet.bottom, width=WIDTH - 2 * GAP)
    half = (WIDTH - 3 * GAP) // 2
    for left, right in zip(inside[::2], [*inside[1::2], None], strict=False):
        ends = [_panel(sheet, left, x=GAP, y=sheet.bottom, width=half)]
        if right is not None:
            ends.append(_panel(sheet, right, x=half + 2 * GAP, y=sheet.bottom, width=half))
        sheet.bottom = max(ends)
    for contract in contracts:
        if contract["type"] == "forbidden":
            _forbidden(sheet, contract)
    body = "\n  ".join(sheet.elements)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {sheet.bottom + GAP}" \
font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12" fill="#0f172a" role="img" aria-labelledby="t">
  <title id="t">The import contracts of ConServe</title>
  <rect width="{WIDTH}" height="{sheet.bottom + GAP}" fill="#ffffff"/>
  {body}
</svg>
"""


def _panel(sheet: Sheet, contract: dict[str, Any], *, x: int, y: int, width: int) -> int:
    """A contract of layers; returns where the next panel may begin."""
    containers = ", ".join(contract.get("containers", []))
    title = f"{contract['name'].partition(':')[0]}{f' ({containers})' if containers else ''}"
    sheet.text(x, y + LINE, title, ' font-weight="bold"')
    y += LINE + GAP // 2
    layers = contract["layers"]
    for number, layer in enumerate(layers):
        lines = textwrap.wrap(_row(layer), int((width - 2 * GAP) / CHAR))
        colours = COLOURS[0 if number == len(layers) - 1 else 2 if number == 0 else 1]
        height = len(lines) * LINE + 8
        sheet.box(x, y, width, height, colours)
        for row, line in enumerate(lines):
            sheet.text(x + width / 2, y + LINE + row * LINE - 1, line, ' text-anchor="middle"')
        y += height + 4
    return y + GAP


def _row(layer: str) -> str:
    """The names of one layer: a bar where they know nothing of each other, else a dot."""
    if "|" in layer:
        return " | ".join(name.strip() for name in layer.split("|"))
    return " · ".join(name.strip() for name in layer.split(":"))


def _forbidden(sheet: Sheet, contract: dict[str, Any]) -> None:
    names = " ".join(name.strip() for name in contract["source_modules"])
    directly = "" if not contract.get("allow_indirect_imports") else " directly"
    sheet.text(GAP, sheet.bottom + LINE, contract["name"], ' font-weight="bold"')
    sheet.bottom += LINE
    words = f"{names} must not import{directly}: {' '.join(contract['forbidden_modules'])}"
    for line in textwrap.wrap(words, int((WIDTH - 2 * GAP) / CHAR)):
        sheet.text(GAP, sheet.bottom + LINE, line, ' fill="#475569"')
        sheet.bottom += LINE
    sheet.bottom += GAP // 2


if __name__ == "__main__":
    PICTURE.write_text(draw())
