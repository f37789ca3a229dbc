"""Public names of `issp.sr.data`: images, data sets and batches."""

from issp.sr.data import *  # noqa: F403
from issp.sr.data import __all__ as __all__
