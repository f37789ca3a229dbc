"""The reference: every op in plain torch, on any device, slow and obvious.

It takes the arguments of the op schemas and does not check them; `issp.ops.backends` does before.
"""

from issp.ops.reference.auxiliary import *  # noqa: F403
from issp.ops.reference.pruning import *  # noqa: F403
from issp.ops.reference.sparse import *  # noqa: F403
from issp.ops.reference.tiles import *  # noqa: F403
from issp.ops.reference.updates import *  # noqa: F403
