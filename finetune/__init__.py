"""Compare ways to fine-tune ResNet18 on a folder of pictures.

    >>> from finetune import train_and_finetune  # doctest: +SKIP
    >>> model = train_and_finetune(strategy="partial", epochs=10)  # doctest: +SKIP

The door is lazy: importing the package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.model import load_best
    from finetune.result import RunResult
    from finetune.train import train_and_finetune

__version__ = "0.1.0"
__all__ = ["RunConfig", "RunResult", "load_best", "train_and_finetune"]

_ROOMS = {
    "RunConfig": "config",
    "RunResult": "result",
    "load_best": "model",
    "train_and_finetune": "train",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(f"finetune.{_ROOMS[name]}"), name)
