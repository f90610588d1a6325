"""One run from the command line: what a sweep launches and a person types.

python agent.py --strategy partial --data_dir data/inaturalist_12K
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from finetune.config.fields import RunConfig
from finetune.config.flags import given_fields
from finetune.system.progress import close_bars, show_details
from finetune.system.shutdown import defer_stop, run_cli
from finetune.system.text import command_line
from finetune.tracking.environment import fields_of_run, sweep_parameters
from finetune.tracking.tracker import report_early_failure


@close_bars()
def main() -> None:
    """Check the fields before anything heavy is imported, then run."""
    with report_early_failure():
        arguments = [word for word in sys.argv[1:] if word != "--verbose"]
        if len(arguments) < len(sys.argv[1:]):
            show_details()
        given = fields_of_run(given_fields(arguments, swept=sweep_parameters()))
        if not given.keys() & {"config", "resume"}:
            RunConfig.from_fields(given)
        print("loading PyTorch", flush=True)
        with defer_stop():  # an exception while torch is imported would abort the process
            from finetune.training.train import train_and_finetune

        model: Any = train_and_finetune(**given)
        run_dir: Path = model.run_dir
        for words in (("evaluate", run_dir), ("predict", run_dir, "PICTURE_OR_FOLDER")):
            print(f"next: {command_line('-m', 'finetune', *words)}")


if __name__ == "__main__":
    run_cli(main)
