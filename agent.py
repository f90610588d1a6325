"""One run from the command line: what a sweep launches and a person types.

python agent.py --strategy partial --data_dir data/inaturalist_12K
"""

from __future__ import annotations

import sys

from finetune.config.fields import RunConfig
from finetune.config.flags import given_fields
from finetune.system.progress import close_bars
from finetune.system.shutdown import defer_stop, run_cli
from finetune.tracking.environment import fields_of_run, sweep_parameters
from finetune.tracking.tracker import report_early_failure


@close_bars()
def main() -> None:
    """Check the fields before anything heavy is imported, then run."""
    with report_early_failure():
        given = fields_of_run(given_fields(sys.argv[1:], swept=sweep_parameters()))
        if not given.keys() & {"config", "resume"}:
            RunConfig.from_fields(given)
        with defer_stop():  # an exception while torch is imported would abort the process
            from finetune.training.train import train_and_finetune

        train_and_finetune(**given)


if __name__ == "__main__":
    run_cli(main)
