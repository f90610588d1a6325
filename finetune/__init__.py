"""Compare ways to fine-tune ResNet18 on a folder of pictures.

    >>> from finetune import train_and_finetune  # doctest: +SKIP
    >>> model = train_and_finetune(strategy="partial", epochs=10)  # doctest: +SKIP

The functions are imported when they are first used: importing the package imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config.fields import RunConfig
    from finetune.model.network import load_best
    from finetune.runs.result import RunResult
    from finetune.training.train import train_and_finetune

__version__ = "0.1.0"
__all__ = ["RunConfig", "RunResult", "load_best", "train_and_finetune"]

_LAZY = {
    "RunConfig": "config.fields",
    "RunResult": "runs.result",
    "load_best": "model.network",
    "train_and_finetune": "training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(f"finetune.{_LAZY[name]}"), name)
