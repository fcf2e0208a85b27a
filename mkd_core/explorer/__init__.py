"""The pseudo-label explorer: study.py finds what is shown, widget.py shows it."""

from .widget import Explorer, explore

__all__ = ["Explorer", "explore"]
