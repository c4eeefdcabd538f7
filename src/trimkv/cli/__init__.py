"""The command line. Importing this costs click and nothing else: torch comes with the command that needs it."""

from .app import main

__all__ = ["main"]
