"""The network that tests train: a ResNet18 of a few channels, or torchvision's own.

os.environ[NETWORK] = "real"  # from now on, here and in child processes
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NETWORK = "FINETUNE_TESTS_NETWORK"
"""The environment variable that chooses, at each call, between `tiny` and `real`."""

MODULE = "finetune.model.network"


def stand_in(module: ModuleType) -> None:
    """Make `finetune.model.network` create TinyResNets unless the environment says `real`."""
    from tests.support.tiny_network import tiny_resnet18

    real = module.resnet18
    if hasattr(real, "is_choice"):
        return

    def resnet18(*arguments: Any, **changed: Any) -> Any:
        choice = real if os.environ.get(NETWORK) == "real" else tiny_resnet18
        return choice(*arguments, **changed)

    resnet18.is_choice = True  # type: ignore[attr-defined]
    module.resnet18 = resnet18  # type: ignore[attr-defined]


class _Finder:
    """Finds MODULE as usual; calls `stand_in` after its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                stand_in(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Call `stand_in` as soon as the module is imported; torch isn't imported before."""
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
