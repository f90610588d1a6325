"""The exceptions of this project: each has a message for the user and an exit code.

FinetuneError            exit code 1: the run failed
├── ConfigError          2: the command line or a config is wrong
│   └── MissingPackage   2: an optional package is needed; its pip line is named
├── DataError            1: pictures, folders, splits
├── WeightsError         1: weight files and checkpoints
├── RunDirError          1: a run directory that can't be used
├── DeviceError          1: a GPU that was assigned can't be used
├── Diverged             1: the loss is not finite
├── Shortage             1: disk, file handles or another resource are used up
└── Pruned               the sweep's early termination ends the run
Stopped                  the process ends by the signal; not an Exception, so that no
                         `except Exception` catches it
"""

import signal


class FinetuneError(Exception):
    """An error whose message says what was wrong, what is allowed, and what to do."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: the message."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(FinetuneError):
    """The command line or a config is wrong."""

    exit_code = 2


class MissingPackage(ConfigError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install {package} (or '.[{extra}]')")


class DataError(FinetuneError):
    """Pictures, folders or splits can't be used."""


class WeightsError(FinetuneError):
    """Weights or a checkpoint can't be found or read, or don't fit the network."""


class RunDirError(FinetuneError):
    """A run directory is in use, finished, damaged, of another config, or can't be written."""


class DeviceError(FinetuneError):
    """The GPU that this process was given can't be used."""


class Diverged(FinetuneError):
    """The loss is not finite."""


class Shortage(FinetuneError):
    """A resource of the machine is used up. What was written stays; the run can be resumed."""


class Pruned(FinetuneError):
    """The sweep ends this run early: others are better at the same epoch."""


class Stopped(BaseException):
    """A signal asked the process to stop; everything is written first."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
