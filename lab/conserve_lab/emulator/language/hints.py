"""What a text offers for filling in arguments: numbers, quoted words, names in other scripts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from conserve_lab.emulator.language.images import without_images

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")
_QUOTED = re.compile(r"`([^`\n]{1,200})`|\"([^\"\n]{1,200})\"|(?<!\w)'([^'\n]{1,200})'(?!\w)")
_OTHER_SCRIPT = re.compile(r"[^\x00-\u024f\s\u2000-\u206f]+")
_KEY = re.compile(r"[`'\"]([\w-]+)[`'\"]")
_KEYS = re.compile(r"((?:[`'\"][\w-]+[`'\"](?:\s*,)?\s+(?:and\s+|or\s+)?)+)(?:keys?|fields?|properties)\b")
_WORD = re.compile(r"[A-Za-z][\w.\-/]{2,}")


@dataclass(frozen=True, slots=True)
class Hints:
    """Candidates for argument values, in order of appearance."""

    numbers: tuple[float, ...] = ()
    quoted: tuple[str, ...] = ()
    other_script: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    """Keys that the text asks a JSON object to have: `with 'setup' and 'punchline' keys`."""

    @property
    def phrases(self) -> tuple[str, ...]:
        """Quoted text first, else single words."""
        return self.quoted or self.words


def hints_of(text: str) -> Hints:
    """Return the hints in a text (only its first 4000 characters are read)."""
    text = without_images(text)[:4000]
    asked_for = _KEYS.search(text)
    return Hints(
        numbers=tuple(float(found) for found in _NUMBER.findall(text)),
        quoted=tuple(next(filter(None, groups)) for groups in _QUOTED.findall(text)),
        other_script=tuple(_OTHER_SCRIPT.findall(text)),
        keys=tuple(_KEY.findall(asked_for[1])) if asked_for else (),
        words=tuple(word.rstrip(".-/") for word in _WORD.findall(text)),
    )
