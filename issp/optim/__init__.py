"""torch's Adam, AdamW and SGD whose step prunes as well: update and shrink in one pass.

Arguments, defaults, `param_groups` and `state_dict` are torch's; states load both ways. With a
pruner attached, a parameter group costs one op call per step; without one, and for what the op does
not take, the step is torch's own and `report` says why.
"""

from issp.optim.adam import Adam, AdamW
from issp.optim.sgd import SGD
from issp.optim.step import Way

__all__ = ["SGD", "Adam", "AdamW", "Way"]
