"""One run, from a config to a result."""

import os

# At its import Lightning reads its rank from these variables, and fails if one isn't a number. A
# run is a single process, so Lightning does without them.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
_given = {name: os.environ.pop(name) for name in _RANKS if name in os.environ}
try:
    import pytorch_lightning  # noqa: F401
finally:
    os.environ.update(_given)
