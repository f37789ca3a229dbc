"""issp: super-resolution networks that are sparse from the first iteration.

`issp.attach(model, optimizer, sparsity=0.95)` is the whole of it for most users; see the README.
"""

import importlib

from issp import backends

backends.register()

from issp import ops  # noqa: E402  (the ops exist only after registration)
from issp.keep import Keep  # noqa: E402
from issp.ops import num_pruned  # noqa: E402
