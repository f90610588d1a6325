"""Source weights as other programs write them, adapted to the names of a network.

state, note = adapt(torch.load("model.ckpt", weights_only=True), network.state_dict())
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from finetune.model.weights import State
from finetune.system.errors import WeightsError
from finetune.system.text import listed

ENTRIES = ("state_dict", "model", "model_state_dict", "net")
"""Where a checkpoint keeps its state dict; the first entry that is one is read."""

HEADS = ("fc", "head", "classifier")
"""The modules that map features to classes. A network of other classes needs its own."""

COUNTER = "num_batches_tracked"
"""Of a BatchNorm, which reads it only without a momentum. torch before 0.4.1 did not write it."""


def adapt(content: Mapping[str, Any], own: State) -> tuple[State, str]:
    """A state dict with the names and shapes of `own`, and a note on what was changed.

    Its head is the whole of `own`'s, or left out. Raises `WeightsError` if the rest doesn't fit.
    """
    found, note = _state_dict_in(content)
    state, notes = found, [note]
    for step in _STEPS:
        state, note = step(state, own)
        notes.append(note)
    if problems := _problems(state, own):
        raise WeightsError(f"{problems}; found {len(found)} entries: {listed(list(found), 4)}")
    return state, "; ".join(filter(None, notes))


def _state_dict_in(content: Mapping[str, Any]) -> tuple[State, str]:
    if _is_state_dict(content):
        return dict(content), ""
    for name in ENTRIES:
        if _is_state_dict(content.get(name)):
            return dict(content[name]), f"entry {name!r} read"
    raise WeightsError(
        f"no state dict is in the file itself or in an entry {' or '.join(ENTRIES)}; "
        f"found {len(content)} entries: {listed([str(key) for key in content], 4)}"
    )


def _is_state_dict(value: object) -> bool:
    """Whether it maps names to tensors and nothing else."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def _without_prefix(state: State, own: State) -> tuple[State, str]:
    """Only the entries below the prefix that holds the whole network, without that prefix."""
    names = [key for key in own if not _is_head(key) and not key.endswith(COUNTER)]
    candidates = [key.removesuffix(names[0]) for key in state if key.endswith(names[0])]
    whole = [p for p in candidates if all(p + name in state for name in names)]
    prefixes = [p for p in whole if p == "" or p.endswith(".")]
    if len(prefixes) > 1:
        shown = listed([repr(prefix) for prefix in prefixes])
        raise WeightsError(f"several networks are in it, with the prefixes {shown}; save one alone")
    if prefixes in ([], [""]):
        return state, ""
    outside = [key for key in state if not key.startswith(prefixes[0])]
    inside = {k.removeprefix(prefixes[0]): v for k, v in state.items() if k.startswith(prefixes[0])}
    left_out = f", {listed(outside, 4)} outside it left out" if outside else ""
    return inside, f"prefix {prefixes[0]!r} removed{left_out}"


def _with_counters(state: State, own: State) -> tuple[State, str]:
    missing = [key for key in own if key.endswith(COUNTER) and key not in state]
    filled = {key: torch.zeros_like(own[key]) for key in missing}
    return state | filled, f"{COUNTER} missing, taken as 0" if missing else ""


def _with_whole_head_or_none(state: State, own: State) -> tuple[State, str]:
    needed = {key: tensor.shape for key, tensor in own.items() if _is_head(key)}
    fits = all(key in state and state[key].shape == shape for key, shape in needed.items())
    left_out = [key for key in state if _is_head(key) and not (fits and key in needed)]
    modules = list(dict.fromkeys(key.rpartition(".")[0] or key for key in left_out))
    kept = {key: tensor for key, tensor in state.items() if key not in left_out}
    return kept, f"head {listed(modules, 4)} left out" if modules else ""


def _is_head(key: str) -> bool:
    return key.partition(".")[0] in HEADS


_STEPS: tuple[Callable[[State, State], tuple[State, str]], ...] = (
    _without_prefix,
    _with_counters,
    _with_whole_head_or_none,
)


def _problems(state: State, own: State) -> str:
    """How many entries don't fit, with the first of each kind; or nothing."""
    found = {
        "missing": [
            f"{key} {tuple(own[key].shape)}"
            for key in own
            if key not in state and not _is_head(key)
        ],
        "of shape": [
            f"{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
        "unknown": [key for key in state if key not in own],
    }
    return "; ".join(f"{len(k)} {what}: {listed(k, 4)}" for what, k in found.items() if k)
