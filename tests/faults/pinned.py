"""Seeds that found something once, and what it was."""

from __future__ import annotations

PINNED: dict[int, str] = {}
