"""What every trial needs imported, done once in the fork server.

Turns an import of this module into the imports that a run makes, also those that it makes late.
Computes nothing: a thread pool that exists before a fork would be dead after it.
"""

import atexit
import gc
import signal

import PIL.PngImagePlugin  # noqa: F401

import finetune.sweep.worker
import finetune.training.train  # noqa: F401

# Slurm and systemd signal every process of a job. The server is none that could be stopped: the
# parent would take its children for dead while they still write.
for _signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(_signum, signal.SIG_IGN)

# A child's garbage collector leaves alone what was imported; else its first full pass would copy
# every page that it touches, 0.2 s a trial.
gc.freeze()
atexit.register(gc.unfreeze)
