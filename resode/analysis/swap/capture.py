"""A module's own forward as a graph, its parts left whole, for a call as it came."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from types import NoneType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from resode.analysis.depth.lesion import unfused_attention
from resode.analysis.depth.sums import WatchesAdditions
from resode.calls import ModuleCall

_PLAIN = (NoneType, bool, int, float, str, torch.dtype, torch.device, torch.Size)


class Uncuttable(Exception):
    """Why a module's blocks cannot be taken out of it."""


class _Tracer(fx.Tracer):
    """Writes down one module's forward for arguments as they came; only `opened` modules are looked into.

    Where Python needs a value, as a loop its length or an `if` its condition, the graph so far is
    evaluated. A condition becomes a check in the graph, so that inputs for which it differs are refused.
    """

    def __init__(self, opened: Iterable[nn.Module], call: ModuleCall) -> None:
        super().__init__()
        self.opened, self.call, self.evaluating = set(opened), call, False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.opened

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        leaves, nested = self.call.leaves()
        given = [
            self.create_proxy("placeholder", f"given_{i}", (), {}) if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(given, nested)
        return (lambda root: root_fn(root, *args, **kwargs)), [self.root]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def iter(self, obj: fx.Proxy) -> Any:
        try:
            return super().iter(obj)
        except TraceError:
            value = self.value(obj.node)
            if not isinstance(value, tuple | list | Tensor):
                raise
            return iter([obj[i] for i in range(len(value))])  # pyright: ignore[reportIndexIssue]

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = self.value(obj.node)
        if isinstance(value, Tensor):
            raise Uncuttable(
                "what its forward does depends on the values of a tensor. Leave it out with blocks="
            )
        self.create_proxy("call_function", same_condition, (obj, bool(value)), {})
        return bool(value)

    def value(self, node: fx.Node) -> Any:
        """What a node gives for the call's arguments."""
        self.evaluating = True
        try:
            graph = fx.Graph()
            graph.output(graph.graph_copy(self.graph, copies := {}) or copies[node])
            with torch.no_grad():
                return fx.Interpreter(self.root, graph=graph).run(*self.call.tensors())
        finally:
            self.evaluating = False


def same_condition(value: Any, expected: bool) -> None:
    """The check of a condition that a converted forward was written down under."""
    if bool(value) is not expected:
        raise ValueError(
            "the converted network takes another branch of its forward for inputs of this shape: convert it "
            "again with an x like these."
        )


CHECKS = (same_condition, torch._assert)
"""Functions that a graph calls for their errors alone."""

_FACTORIES = ("arange", "empty", "eye", "full", "ones", "rand", "randn", "zeros")


@contextmanager
def _recorded_factories(tracer: _Tracer) -> Iterator[None]:
    """Within it torch.full and the like of sizes that are nodes are nodes, too."""

    def recorded(function: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return make

    before = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, function in before.items():
            setattr(torch, name, recorded(function))
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


class _Values(fx.Interpreter):
    """Runs a graph once and notes shapes, dtypes and the additions in it, and which values are None."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.additions = WatchesAdditions()

    def run_node(self, n: fx.Node) -> Any:
        before = self.additions.count
        value = super().run_node(n)
        n.meta["sums"] = range(before, self.additions.count)
        n.meta["seen"] = (value.shape, value.dtype) if isinstance(value, Tensor) else None
        leaves = pytree.tree_leaves(value)
        if (
            n.op not in ("placeholder", "output")
            and n.target not in CHECKS
            and not any(leaf is not None for leaf in leaves)
        ):
            n.meta["nothing"] = value  # as attention weights that were not asked for
        return value


def _without_nothings(graph: fx.Graph) -> None:
    """Write values that turned out to be None where they are read, and drop items that nothing reads."""
    for node in reversed(list(graph.nodes)):
        if "nothing" in node.meta:
            value = node.meta["nothing"]
            for user in list(node.users):
                user.args, user.kwargs = fx.map_arg(
                    (user.args, user.kwargs), lambda n, node=node, value=value: value if n is node else n
                )
        if not node.users and ("nothing" in node.meta or node.target in (operator.getitem, getattr)):
            graph.erase_node(node)


def capture(owner: nn.Module, opened: Iterable[nn.Module], call: ModuleCall) -> fx.Graph:
    """The module's forward; one placeholder for each tensor among the arguments, shapes in the nodes' meta.

    Args:
        owner: the module, in eval mode. Where forward reads `self.training`, so does the graph.
        opened: the modules within it whose forward is written down too.
        call: how it was called.

    Raises:
        Uncuttable: it is given objects that keep a state, or its forward cannot be written down.
    """
    for leaf in call.leaves()[0]:
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            kind = type(leaf).__name__
            hint = " (use_cache=False, in x or in model.config)" if "Cache" in kind else ""
            raise Uncuttable(f"it is given a {kind}, which every stage would change: call without it{hint}")
    graph = _with_mode(*[_written(owner, opened, call, training) for training in (False, True)])
    values = _Values(fx.GraphModule(owner, graph))
    with torch.no_grad(), unfused_attention(), values.additions:  # numbered as in a trace
        values.run(*call.tensors())
    _without_nothings(graph)
    return graph


def _written(owner: nn.Module, opened: Iterable[nn.Module], call: ModuleCall, training: bool) -> fx.Graph:
    modes = [(m, m.training) for m in opened]
    tracer = _Tracer(opened, call)
    try:
        for module in opened:
            module.training = training
        with _recorded_factories(tracer):
            return tracer.trace(owner)
    except Uncuttable:
        raise
    except Exception as error:  # whatever a forward does with what is no tensor
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].split(". ")[0].rstrip(".")
        raise Uncuttable(
            f"its forward cannot be written down as a graph ({reason}). Make the branch F a module of its "
            "own, so that forward says x + self.branch(x)"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


def _with_mode(evaluating: fx.Graph, training: fx.Graph) -> fx.Graph:
    """The graph in evaluation, with `self.training` where the two differ by nothing else.

    Raises:
        Uncuttable: they differ in more than a flag.
    """
    names: dict[fx.Node, fx.Node] = {}
    place: Any = None

    def both(a: Any, b: Any) -> Any:
        if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
            return type(a)([both(c, d) for c, d in zip(a, b, strict=True)])
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: both(a[key], b[key]) for key in a}
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(*[both(getattr(a, at), getattr(b, at)) for at in ("start", "stop", "step")])
        if a is False and b is True:
            with evaluating.inserting_before(place):
                return evaluating.get_attr("training")
        if a is names.get(b) if isinstance(b, fx.Node) else a is b or a == b:
            return a
        raise Uncuttable(
            "its forward does other things in training than in evaluation. Move what differs into a module "
            "of its own (nn.Dropout, resode.fields.StochasticDepth)"
        )

    pairs = list(zip_longest(list(evaluating.nodes), list(training.nodes)))
    for node, other in pairs:
        kinds = [getattr(n, "op", None) for n in (node, other)]
        both((kinds[0], getattr(node, "target", None)), (kinds[1], getattr(other, "target", None)))
        names[other], place = node, node
        node.args, node.kwargs = both((node.args, node.kwargs), (other.args, other.kwargs))
    return evaluating
