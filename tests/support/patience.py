"""How long a `ConServe` object waits for its broker, changed under way.

Tests of a broker that is away want short waits; in front of a broker that is there, a short wait is lost by a machine
that is busy for a moment.
"""

from __future__ import annotations

from dataclasses import replace

from conserve_sdk import ConServe, Timeouts

__all__ = ["be_patient", "hurry"]


def hurry(conserve: ConServe) -> None:
    """The broker is away: give up soon."""
    _wait(conserve, Timeouts(broker_s=0.05))


def be_patient(conserve: ConServe) -> None:
    """The broker is there: however long it takes."""
    _wait(conserve, Timeouts(broker_s=60.0))


def _wait(conserve: ConServe, timeouts: Timeouts) -> None:
    kit = conserve._runtime.kit
    kit.options = replace(kit.options, timeouts=timeouts)
