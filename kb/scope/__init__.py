"""Deciders: whether a question is about a fact."""

from __future__ import annotations

from kb.scope.base import Decider, ScopeError, Text

__all__ = ["Decider", "ScopeError", "Text"]
