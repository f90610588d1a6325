"""What every trial needs imported, done once in the fork server.

Turns an import of this module into the imports that a run makes, also those that it makes late.
Computes nothing: a thread pool that exists before a fork would be dead after it.
"""

import PIL.PngImagePlugin  # noqa: F401

import finetune.train  # noqa: F401
