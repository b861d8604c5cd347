"""What can keep a demo from running at all; everything else is a figure of its report."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot go on; the message says in one line why and what to do."""
