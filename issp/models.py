"""Public name of `issp.sr.models`."""

from issp.sr.models import *  # noqa: F403
from issp.sr.models import __all__ as __all__
