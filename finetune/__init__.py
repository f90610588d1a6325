"""Compare ways to fine-tune a network on a folder of pictures.

    >>> from finetune import train_and_finetune  # doctest: +SKIP
    >>> model = train_and_finetune(strategy="partial", epochs=10)  # doctest: +SKIP

The functions are imported when they are first used: importing the package imports no torch.
"""

import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.api import confirm, evaluate, predict, report
    from finetune.config.backbones import Backbone, register_model
    from finetune.config.fields import RunConfig
    from finetune.model.network import load_best
    from finetune.runs.result import RunResult
    from finetune.training.train import train_and_finetune

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "RunConfig",
    "RunResult",
    "confirm",
    "evaluate",
    "load_best",
    "predict",
    "register_model",
    "report",
    "sweep",
    "train_and_finetune",
]

_LAZY = {
    "Backbone": "config.backbones",
    "RunConfig": "config.fields",
    "RunResult": "runs.result",
    "confirm": "api",
    "evaluate": "api",
    "load_best": "model.network",
    "predict": "api",
    "register_model": "config.backbones",
    "report": "api",
    "train_and_finetune": "training.train",
}


def _require_posix() -> None:
    """End the process with code 2 on Windows, whose Python has no file locks and stop signals."""
    missing = [name for name in ("SIGUSR1", "pthread_sigmask") if not hasattr(signal, name)]
    try:
        import fcntl  # noqa: F401
    except ImportError:
        missing.append("fcntl")
    if missing:
        print(
            f"error: finetune needs Linux or macOS; {', '.join(missing)} missing in this Python. "
            "On Windows, run it in WSL (https://learn.microsoft.com/windows/wsl/install)",
            file=sys.stderr,
        )
        sys.exit(2)


_require_posix()


def __dir__() -> list[str]:
    return sorted([*__all__, *globals()])


def __getattr__(name: str) -> Any:
    if name == "sweep":  # a package that can be called
        return import_module("finetune.sweep")
    if name not in _LAZY:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(f"finetune.{_LAZY[name]}"), name)
