"""Collects scenes: what a program does, and what must have come of it in either colour."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from tests.parity.program import Program

__all__ = ["SCENES", "Scene", "scene"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One scene.

    Attributes:
        play: the program.
        setting: makes what stands behind it (`Program`'s options), anew for each colour.
    """

    name: str
    play: Callable[[Program], Coroutine[Any, Any, None]]
    setting: Callable[[], dict[str, Any]]


SCENES: list[Scene] = []


def scene(setting: Callable[[], dict[str, Any]] = dict):
    """Collect a scene. Its own assertions hold in both colours, so that no two equal nothings pass."""

    def collect(play: Callable[[Program], Coroutine[Any, Any, None]]):
        SCENES.append(Scene(name=play.__name__, play=play, setting=setting))
        return play

    return collect
