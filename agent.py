"""One run from the command line: what a sweep launches, and what a person types.

python agent.py --strategy partial --data_dir data/inaturalist_12K
"""

from __future__ import annotations

import sys

from finetune.config import RunConfig
from finetune.flags import given_fields
from finetune.progress import bars_end
from finetune.stopping import run_door, undivided
from finetune.tracking import fields_of_run, told_to_sweep


@bars_end()
def main() -> None:
    """Check the fields before anything heavy is imported, then run."""
    with told_to_sweep():
        given = fields_of_run(given_fields(sys.argv[1:]))
        if not given.keys() & {"config", "resume"}:
            RunConfig.from_fields(given)
        with undivided():  # an exception in the middle of torch's own start aborts the process
            from finetune.train import train_and_finetune

        train_and_finetune(**given)


if __name__ == "__main__":
    run_door(main)
