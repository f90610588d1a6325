"""The frozen prefix's outputs, computed once and shared by epochs, runs and processes.

Turns pictures, a network and a plan into each epoch's batches, which enter the network as far up
as what is kept allows: features at fc, activations at a boundary, or decoded pictures. The numbers
are those that the whole network would have computed. Knows nothing about losses or optimizers.

    >>> feed = Feed(...); batches = feed.train_epoch(0)  # doctest: +SKIP

| room | role |
|---|---|
| forms.py | a split's pictures in every form in which they are kept |
| keeper.py | opens, weighs and fills the stores of one boundary |
| feed.py | each epoch's batches |
"""

from __future__ import annotations

from finetune.activations.feed import Feed
from finetune.activations.forms import enter

__all__ = ["Feed", "enter"]
