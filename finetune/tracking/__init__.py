"""A run's side in Weights & Biases.

Turns a config into a W&B run, and how the run ended into what the server shows. Without an account
it logs offline, into the run directory; it never waits at a prompt. Knows nothing about training.

    >>> tracker = Tracker.open(config, run_dir)  # doctest: +SKIP

| room | role |
|---|---|
| agent.py | what the environment and W&B's agents have decided beforehand |
| run.py | the run: opened, described, ended |
"""

from __future__ import annotations

from finetune.tracking.agent import fields_of_run, mode
from finetune.tracking.run import FOLDER, RUN_FILES, Tracker, told_to_sweep

__all__ = [
    "FOLDER",
    "RUN_FILES",
    "Tracker",
    "fields_of_run",
    "mode",
    "told_to_sweep",
]
