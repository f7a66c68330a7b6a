"""Base models that bring Python files of their own."""

from __future__ import annotations


def remedy_for(error: Exception, otherwise: str) -> str:
    """What to do about a model that transformers does not load: it may only lack the leave to run its files."""
    if "trust_remote_code" in str(error):
        return "Set TRUST_REMOTE_CODE=true if the Python files of the base model may run here"
    return otherwise
