"""Pictures: of one run, of several runs beside each other, of images."""

from issp.sr.plots.sheets import Panel, busiest, comparison
from issp.sr.plots.study import scores
from issp.sr.plots.training import curves, gradients, layers, of_run

__all__ = ["Panel", "busiest", "comparison", "curves", "gradients", "layers", "of_run"]
__all__ += ["scores"]
