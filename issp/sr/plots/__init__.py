"""Pictures: of one run, of several runs beside each other, of images."""

from issp.sr.plots.drawing import plain
from issp.sr.plots.dynamics import Activity, draw_dynamics
from issp.sr.plots.sheets import Panel, busiest, comparison
from issp.sr.plots.study import scores
from issp.sr.plots.trainability import draw_trainability
from issp.sr.plots.training import RunLogs, curves, draw_logs, gradients, layers, read_logs

__all__ = ["Activity", "Panel", "RunLogs", "busiest", "comparison", "curves", "draw_dynamics"]
__all__ += ["draw_logs", "draw_trainability", "gradients", "layers", "plain", "read_logs"]
__all__ += ["scores"]
