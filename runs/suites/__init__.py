"""Suites: named sets of cells, written as Python."""

from __future__ import annotations

from runs.suites.plan import Plan, Selection, plan, preset_names, suites, variants

__all__ = ["Plan", "Selection", "plan", "preset_names", "suites", "variants"]
