"""Source weights as other programs write them, adapted to the names of a network.

state, note = adapt(torch.load("model.ckpt", weights_only=True), network.state_dict(), ["fc.bias"])
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torchvision.models.vision_transformer import interpolate_embeddings

from finetune.config.backbones import HEADS, POSITIONS
from finetune.model.weights import State
from finetune.system.errors import WeightsError
from finetune.system.text import listed

ENTRIES = ("state_dict", "model", "model_state_dict", "net")
"""Where a checkpoint keeps its state dict; the first entry that is one is read."""

COUNTER = "num_batches_tracked"
"""Of a BatchNorm, which reads it only without a momentum. torch before 0.4.1 did not write it."""


def adapt(content: Mapping[str, Any], own: State, own_head: Collection[str]) -> tuple[State, str]:
    """A state dict with the names and shapes of `own`, and a note on what was changed.

    `own_head`: the entries of `own` that belong to the head. The head is loaded as a whole or left
    out. Raises `WeightsError` if the rest doesn't fit.
    """
    found, note = _state_dict_in(content)
    state, notes = found, [note]
    body = {key: tensor for key, tensor in own.items() if key not in own_head}
    head = {key: tensor for key, tensor in own.items() if key in own_head}
    for step in _STEPS:
        state, note = step(state, body, head)
        notes.append(note)
    if problems := _problems(state, body, head):
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


def _without_prefix(state: State, body: State, head: State) -> tuple[State, str]:
    """Only the entries below the prefix that holds the whole network, without that prefix."""
    names = [key for key in body if not key.endswith(COUNTER)]
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


def _with_counters(state: State, body: State, head: State) -> tuple[State, str]:
    missing = [key for key in body if key.endswith(COUNTER) and key not in state]
    filled = {key: torch.zeros_like(body[key]) for key in missing}
    return state | filled, f"{COUNTER} missing, taken as 0" if missing else ""


def _with_positions(state: State, body: State, head: State) -> tuple[State, str]:
    """A vision transformer's position embeddings, interpolated to another size of pictures."""
    key = POSITIONS
    if key not in body or key not in state or state[key].shape == body[key].shape:
        return state, ""
    side = math.isqrt(body[key].shape[1] - 1)  # of the square of patches; 1 is the class token
    try:
        resized = interpolate_embeddings(side, 1, OrderedDict({key: state[key]}))
    except ValueError as error:
        raise WeightsError(f"{key}: {error}") from None
    return state | resized, f"{key} interpolated to {side}x{side} patches"


def _with_whole_head_or_none(state: State, body: State, head: State) -> tuple[State, str]:
    fits = all(key in state and state[key].shape == own.shape for key, own in head.items())
    heads = [key for key in state if key in head or (key not in body and _is_head(key))]
    left_out = [key for key in heads if not (fits and key in head)]
    modules = list(dict.fromkeys(key.rpartition(".")[0] or key for key in left_out))
    kept = {key: tensor for key, tensor in state.items() if key not in left_out}
    return kept, f"head {listed(modules, 4)} left out" if modules else ""


def _is_head(key: str) -> bool:
    return key.partition(".")[0] in HEADS


_STEPS: tuple[Callable[[State, State, State], tuple[State, str]], ...] = (
    _without_prefix,
    _with_counters,
    _with_positions,
    _with_whole_head_or_none,
)


def _problems(state: State, body: State, head: State) -> str:
    """How many entries don't fit, with the first of each kind; or nothing."""
    own = body | head
    found = {
        "missing": [f"{key} {tuple(body[key].shape)}" for key in body if key not in state],
        "of shape": [
            f"{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
        "unknown": [key for key in state if key not in own],
    }
    return "; ".join(f"{len(k)} {what}: {listed(k, 4)}" for what, k in found.items() if k)
