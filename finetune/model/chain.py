"""A network divided into the parts of its backbone, each of which runs on its own.

    chain = Chain(network, find_backbone("resnet18"))
    activations = chain.forward(pictures, "stem", "layer3")
    logits = chain.forward(activations, "layer3", None)

torch.fx traces the network's own forward, without looking into modules that lie within one part; so
the parts compute exactly what the network computes.

Legend: B batch, H height, W width, C channels, D features, K classes.
"""

from collections.abc import Collection, Iterable, Mapping
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from finetune.config.backbones import Backbone
from finetune.model.weights import State
from finetune.system.errors import ConfigError
from finetune.system.text import listed


class Chain:
    """The parts of a network, which share their parameters and buffers with it."""

    def __init__(self, network: nn.Module, backbone: Backbone) -> None:
        """Raises `ConfigError` if the network is not a chain of these parts."""
        self.network = network
        self.backbone = backbone
        self.parts = backbone.part_names
        nodes = _divided(_trace(network, backbone), backbone)
        self._owners = _owners(nodes)
        for part, begin in backbone.parts.items():
            if self.owner(begin) != part:
                raise ConfigError(f"{begin} does not run in {part}, which should begin there")
        graphs = _graphs(nodes)
        # They hold the network's own modules and parameters: they see loaded and moved weights.
        self._functions = {part: fx.GraphModule(network, g) for part, g in graphs.items()}
        if strangers := [key for key, _ in _entries(network) if self.owner(key) is None]:
            raise ConfigError(f"its forward doesn't use {listed(strangers, 4)}")
        self.part_of_key: Mapping[str, str] = {
            key: self.owner(key) or self.parts[0] for key in network.state_dict()
        }

    def forward(self, x: Tensor, start: str, stop: str | None) -> Tensor:
        """Run the parts from `start` up to, but not including, `stop`; None: up to the logits.

        The input of the first part is normalised pictures, (B, 3, H, W); the output of the last is
        logits, (B, K). Between parts are activations, (B, C, H, W) or of another shape that the
        network has there; the input of the head is usually pooled features, (B, D).
        """
        end = len(self.parts) if stop is None else self.parts.index(stop)
        for part in self.parts[self.parts.index(start) : end]:
            x = self._functions[part](x)
        return x

    def part(self, name: str) -> nn.Module:
        """The computation of a part, with its parameters under their names in the network."""
        return self._functions[name]

    def logits(self, x: Tensor, start: str) -> Tensor:
        """The logits, float32, (B, K), from the input of a part.

        Under autocast the head computes in float32 too: it is small, and the loss depends on it.
        """
        kind, head = x.device.type, self.parts[-1]
        x = self.forward(x, start, head)
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return self.forward(x, head, None)
        with torch.autocast(kind, enabled=False):
            return self.forward(x.float(), head, None)

    def parts_before(self, boundary: str) -> tuple[str, ...]:
        return self.parts[: self.parts.index(boundary)]

    def modules(self, part: str) -> list[nn.Module]:
        """The outermost modules that belong to a part alone."""
        paths = [path for path, owner in self._owners.items() if owner == part]
        found = [_attribute(self.network, path) for path in paths]
        return [module for module in found if isinstance(module, nn.Module)]

    def parameters(self, part: str) -> list[nn.Parameter]:
        named = self.network.named_parameters()
        return [value for key, value in named if self.part_of_key[key] == part]

    def state(self, parts: Collection[str]) -> State:
        """The entries of the state dict that belong to these parts."""
        state = self.network.state_dict()
        return {key: value for key, value in state.items() if self.part_of_key[key] in parts}

    def owner(self, key: str) -> str | None:
        """The part of the module, parameter or buffer of this path; None if no part uses it."""
        path = key
        while path and path not in self._owners:
            path = path.rpartition(".")[0]
        return self._owners.get(path)


class _Tracer(fx.Tracer):
    """Traces into the modules that contain the beginning of a part, and into no others."""

    def __init__(self, begins: Iterable[str]) -> None:
        super().__init__()
        self._traced = {path[:i] for path in begins for i, c in enumerate(path) if c == "."}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._traced


def _trace(network: nn.Module, backbone: Backbone) -> fx.Graph:
    _, *others = signature(network.forward).parameters.values()
    constants = {p.name: p.default for p in others if p.default is not p.empty}
    try:
        graph: fx.Graph = _Tracer(backbone.parts.values()).trace(network, constants)
    except Exception as error:  # whatever the network's own code raises on a symbolic input
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"its forward can't be traced: {reason}") from None
    return graph


def _divided(graph: fx.Graph, backbone: Backbone) -> dict[str, list[fx.Node]]:
    """The nodes of each part: a part begins at the first call within its module."""
    nodes: dict[str, list[fx.Node]] = {part: [] for part in backbone.parts}
    remaining = list(backbone.parts.items())
    part = remaining.pop(0)[0]
    for node in graph.nodes:
        path = f"{node.target}." if node.op in ("call_module", "get_attr") else ""
        reached = [i for i, (_, begin) in enumerate(remaining) if path.startswith(f"{begin}.")]
        if reached and reached[0] > 0:
            (name, missed), (later, begin) = remaining[0], remaining[reached[0]]
            raise ConfigError(f"{missed} ({name}) does not run before {begin} ({later})")
        if reached:
            part, _ = remaining.pop(0)
        nodes[part].append(node)
    if remaining:
        name, begin = remaining[0]
        raise ConfigError(f"it runs no module {begin}, at which the part {name} begins")
    return nodes


def _graphs(nodes: Mapping[str, list[fx.Node]]) -> dict[str, fx.Graph]:
    """A graph of one input and one output for each part. Raises `ConfigError` if one has more."""
    position = {node: i for i, part in enumerate(nodes) for node in nodes[part]}
    exits = []
    for i, (part, following) in enumerate(pairwise(nodes)):
        crossing = [
            node
            for node, at in position.items()
            if at <= i and any(position[user] > i for user in node.users)
        ]
        if len(crossing) != 1:
            raise ConfigError(f"{len(crossing)} tensors go from {part} or before to {following}")
        exits += crossing
    graphs, entry = {}, None
    for part, exit_node in zip(nodes, [*exits, None], strict=True):
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        if entry is not None:
            copies[entry] = graph.placeholder("x")
        for node in nodes[part]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if exit_node is not None:
            graph.output(copies[exit_node])
        graphs[part], entry = graph, exit_node
    return graphs


def _owners(nodes: Mapping[str, list[fx.Node]]) -> dict[str, str]:
    """The part of each module or parameter that a node names."""
    owners: dict[str, str] = {}
    for part, part_nodes in nodes.items():
        for node in part_nodes:
            if node.op in ("call_module", "get_attr"):
                path = str(node.target)
                if owners.setdefault(path, part) != part:
                    raise ConfigError(f"{path} is used by {owners[path]} and by {part}")
    return owners


def _entries(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _attribute(network: nn.Module, path: str) -> Any:
    value: Any = network
    for name in path.split("."):
        value = getattr(value, name)
    return value
