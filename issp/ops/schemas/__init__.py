"""The op schemas: names, arguments, exact semantics and fakes of every op."""

from issp.ops.schemas.pruning import *  # noqa: F403
from issp.ops.schemas.sparse import *  # noqa: F403
from issp.ops.schemas.tiles import *  # noqa: F403
