"""The same sweep.yaml without an account: a sweep run on this machine's own workers.

Turns a W&B sweep file into outcomes. The search and its storage are Optuna's. Importing the package
imports neither Optuna nor torch.

    python -m finetune sweep sweep.yaml --workers 2

| room | role |
|---|---|
| dimensions.py | W&B's parameter forms -> dimensions of a search |
| spec.py | everything that a sweep does: `Sweep` |
| reading.py | a sweep file, read and checked -> `Sweep` |
| search.py | a sweep -> Optuna's sampler, distributions, pruner |
| storage.py | `--storage` -> an Optuna storage; which processes are alive |
| joining.py | the sweep's study in a storage: made by one process, found by others |
| trials.py | what a trial tells of its key; copies of those that failed |
| board.py | the trials, shared by processes: claimed, ended, taken up again |
| workers.py | child processes, one a trial, from a fork server |
| child.py | such a process, from the inside |
| preload.py | what that server imports |
| view.py | the live table, and the final one |
| drive.py | a sweep, run to its end: `run_sweep` |
| from_wandb.py | a W&B sweep's runs -> a folder of run directories |
| confirmation.py | each strategy's best setting again, with fresh seeds |
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from finetune.errors import MissingPackage

if TYPE_CHECKING:
    from finetune.sweep.confirmation import confirm
    from finetune.sweep.drive import run_sweep, sweep_command
    from finetune.sweep.reading import read_sweep
    from finetune.sweep.spec import Sweep
    from finetune.sweep.view import Outcome, final_table

__all__ = [
    "Outcome",
    "Sweep",
    "confirm",
    "final_table",
    "read_sweep",
    "run_sweep",
    "sweep_command",
]

_ROOMS = {
    "run_sweep": "drive",
    "sweep_command": "drive",
    "confirm": "confirmation",
    "Sweep": "spec",
    "read_sweep": "reading",
    "Outcome": "view",
    "final_table": "view",
}

_ON_OPTUNA = frozenset({"drive", "confirmation"})


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'finetune.sweep' has no attribute {name!r}")
    if _ROOMS[name] in _ON_OPTUNA:
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise MissingPackage("optuna", "sweep", "the local sweep") from None
    return getattr(import_module(f"finetune.sweep.{_ROOMS[name]}"), name)
