"""What every trial needs imported, done once in the fork server.

Turns an import of this module into the imports that a run makes, also those that it makes late.
Computes nothing: a thread pool that exists before a fork would be dead after it.
"""

import atexit
import gc

import PIL.PngImagePlugin  # noqa: F401

import finetune.train  # noqa: F401

# A child's garbage collector leaves alone what was imported; else its first full pass would copy
# every page that it touches, 0.2 s a trial.
gc.freeze()
atexit.register(gc.unfreeze)
