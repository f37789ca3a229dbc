"""Public names of `issp.sr.models`: super-resolution networks."""

from issp.sr.models import *  # noqa: F403
from issp.sr.models import __all__ as __all__
