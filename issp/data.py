"""Public name of `issp.sr.data`."""

from issp.sr.data import *  # noqa: F403
from issp.sr.data import __all__ as __all__
