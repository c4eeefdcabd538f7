"""Retention gates: hidden states in, log_beta out."""

from .files import bundled

__all__ = ["bundled"]
