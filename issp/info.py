"""`issp.info()`; the code is in issp.about, since a module of this name would hide the function."""

from issp.about import info

__all__ = ["info"]
