"""Anyone's residual network with its blocks as stacks, whose solver can then be swapped."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import nn

from resode.analysis.depth.tracing import Addition, trace
from resode.analysis.swap.capture import Uncuttable
from resode.analysis.swap.cutting import Block, Cut, branch, common_factor, cut, replaced
from resode.analysis.swap.stand_ins import Advance, Branch, HandOver, Rewritten, Whole
from resode.blocks import ODEBlock, ResidualStack
from resode.blocks.solving import other_solver, stacks_of
from resode.blocks.stack import solver_method
from resode.calls import ModuleCall, call, matching, recorded, tensors_in, within
from resode.checks import checked
from resode.modes import evaluating

_KINDS = {
    "projection": "its shortcut is a projection, so it leads to another state space; it stays as it is",
    "parameter-free": "its shortcut changes the state's size or values, so S(x) is not x; it stays as it is",
    "gated": "its shortcut is gated: S(x) + F(x) with S(x) other than x is no Euler step of F",
}


@dataclass(frozen=True)
class Refusal:
    """A residual addition that stays as it is.

    Args:
        name: the module in which it happens.
        reason: why, and what can be done.
    """

    name: str
    reason: str


class Converted(nn.Module):
    """A network whose residual blocks are steps of `ResidualStack`s; called as the original is.

    Args:
        network: the network, a copy of the original's structure; its parameters and buffers are the
            original's own tensors.
        stacks: name within `network` and stack, in the order of the forward pass.
        new_names: the original's state_dict name to this module's.
        old_names: the reverse.
        refused: what stays as it is, and why.
        difference: max|z' − z| / max|z| between its outputs and the original's at the given x; 0 where they
            agree to the bit.
    """

    def __init__(self, network: nn.Module, refused: list[Refusal]) -> None:
        super().__init__()
        self.network = network
        self.refused = refused
        self.new_names: dict[str, str] = {}
        self.old_names: dict[str, str] = {}
        self.difference = 0.0

    @property
    def stacks(self) -> dict[str, _Stack]:
        """Name within the network and stack, in the order of the forward pass."""
        found = [(n, m) for n, m in self.network.named_modules() if isinstance(m, _Stack)]
        return dict(sorted(found, key=lambda pair: int(pair[1].place)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original gives for these arguments, or one mapping of them, under the stacks' solvers."""
        if len(args) == 1 and isinstance(args[0], Mapping) and not kwargs:
            return call(self.network, args[0])
        return self.network(*args, **kwargs)

    def __str__(self) -> str:
        """A line a stack: its blocks, its state, its solver; then what stays as it is."""
        lines = [f"{'stack':<44}{'blocks':>7}  {'state':<18}solver"]
        for name, stack in self.stacks.items():
            shape = "×".join(map(str, stack.state))
            lines.append(
                f"{_short(name or 'the network', 43):<44}{stack.depth:>7}  {shape:<18}{stack.solver}"
            )
        return "\n".join(lines + _grouped(self.refused))


class _Stack(ResidualStack):
    """A stack made by `convert`: it knows its place in the pass, and one sample's shape."""

    place: int = 0
    state: tuple[int, ...] = ()


@checked
def convert(
    model: nn.Module, x: Any, *, solver: str = "euler", blocks: str | Sequence[str] | None = None
) -> Converted:
    r"""The same network with its residual blocks x + F(x) as steps of `ResidualStack`s.

    Blocks are found by running the model once, wherever the sum is written. Blocks in a row, each of which
    hands its state to the next, become one stack; its fields are the branches F, with their parameters,
    dropout and stochastic depth. Everything else stays. With `solver="euler"` it is the same function, to the
    bit where the branches of a block need not be added up anew, as a parallel block's.

    Args:
        model: a network in any mode; it is left as it is, and its parameters are shared.
        x: an example input: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            Other batches and sizes go as far as the model's own code lets them.
        solver: an explicit method's name, for all stacks; set each afterwards as `stack.solver = "rk4"`.
        blocks: patterns of module names (* and ? stand for anything but a dot): only blocks within these. A
            named module without any x + F(x) that can be taken out is taken whole, F(x) = M(x) − x, which is
            the same function to rounding.

    Returns:
        The network; str() is a table of its stacks and of what was refused, with the reason.

    Raises:
        TypeError: the model is no nn.Module.
        ValueError: no block can be converted: there is no residual addition, or each is post-activation,
            gated, shared, a solver's step already, or in a forward that cannot be written down; the message
            says which, and the way out. Or an unknown solver, or `blocks` that name no module, or one that
            changes the shape.

    Note:
        Hooks on a module whose forward holds the sum are not called. What the original takes between two
        blocks (intermediate features) must be taken from `stack(x, return_path=True)`. A key-value cache
        cannot be kept, because each stage of a solver would add to it: call with use_cache=False.

    Source:
        E, Commun. Math. Stat. 5 (2017): x + F(x) as an Euler step; torch.fx: Reed et al. (2022).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.linear(torch.relu(self.norm(x)))
        >>> model, x = nn.Sequential(nn.Linear(2, 4), Block(), Block(), nn.Linear(4, 3)), torch.randn(5, 2)
        >>> converted = convert(model, x)
        >>> [stack.depth for stack in converted.stacks.values()], bool((converted(x) == model(x)).all())
        ([2], True)
        >>> converted.new_names["1.linear.weight"]
        'network.2.graph.stack.fields.0.linear.weight'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a network, an nn.Module: got {type(model).__name__}.")
    solver_method(solver)
    with evaluating(model), torch.no_grad():
        expected = call(model, x)
    found = None
    for joined in (True, False):  # where a state between two modules is read elsewhere, they stay apart
        found = _converted(model, x, blocks, joined)
        with evaluating(found), torch.no_grad():
            found.difference = _difference(call(found, x), expected)
        if found.difference <= _tolerance(expected):
            break
    else:
        raise ValueError(
            f"the converted network's output differs from the model's by {found.difference:.1e} of it, so it "
            "was given up. Random numbers in evaluation do that, and a state that forward keeps between "
            "calls; leave the modules that have them out with blocks=."
        )
    for stack in found.stacks.values():
        stack.solver = solver
    return found


def _converted(model: nn.Module, x: Any, blocks: Any, joined: bool) -> Converted:
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    network = copy.deepcopy(model, memo)  # the structure alone: hooks and modes of its own
    modes = {module: module.training for module in network.modules()}
    with evaluating(network):
        names = matching(network, blocks)
        solving = {n: m for n, m in network.named_modules() if isinstance(m, ResidualStack | ODEBlock)}
        # A solver with steps of its own has no additions to be seen; graphs must show those of the trace.
        with other_solver(network, "euler") if stacks_of(network) else nullcontext():
            traced = trace(network, x)
            additions = [a for a in traced.additions if within(a.module, names)]
            additions = [a for a in additions if not within(a.module, solving)]
            calls = _calls(network, x)
            cuts, refused = _cuts(network, additions, traced.numbers, calls)
        refused += [
            Refusal(name, reason.rstrip(".")) for name, reason in traced.refused if within(name, names)
        ]
        solved = {name for name in names or () if any(_touch(name, other) for other in solving)}
        for name in sorted(set(names or ()) - solved):
            if not any(within(part.name, name) and part.runs for part in cuts):
                cuts.append(_taken_whole(name, network.get_submodule(name), calls))
                refused = [r for r in refused if not within(r.name, name)]
        cuts = [part for part in cuts if part.runs]
        if not cuts:
            shown = [n for n in solving if names is None or any(_touch(n, name) for name in names)]
            raise ValueError(_nothing(refused, {name: solving[name] for name in shown}))
        network = _rebuilt(network, cuts, joined)
    result = Converted(network, refused)
    for module in result.modules():
        module.training = modes.get(module, model.training)
    result.new_names, result.old_names = _names(model, result)
    return result


def _nothing(refused: list[Refusal], solving: Mapping[str, nn.Module]) -> str:
    whole = "Modules that keep the state's shape can be taken whole, as x + (M(x) − x), with blocks=."
    if solving:
        shown = ", ".join(_steps_of(name, module) for name, module in list(solving.items())[:8])
        more = f" and {len(solving) - 8} more" if len(solving) > 8 else ""
        done = (
            f"nothing is left to convert: residual blocks are a solver's steps already, in {shown}{more}. "
            'Set the solver there (stack.solver = "rk4"), or ask resode.swap_report what that does.'
        )
        return "\n".join([done, *_grouped(refused)])
    if not refused:
        return (
            "no residual block was found: no sum of a state x and of a branch F(x) with weights. Name "
            "modules that keep the state's shape with blocks=, to take M(x) as x + (M(x) − x)."
        )
    return "\n".join(["no residual block can be converted.", *_grouped(refused), whole])


def _steps_of(name: str, module: nn.Module) -> str:
    """A stack or an ODE block, in words."""
    what = "an ODE block"
    if isinstance(module, ResidualStack):
        what = f"{module.depth} block{'s' * (module.depth > 1)}, {module.solver}"
    return f"{name or 'the network itself'} ({what})"


def _grouped(refused: list[Refusal]) -> list[str]:
    """A line a reason, with the modules that it holds for."""
    groups: dict[str, list[str]] = {}
    for r in refused:
        groups.setdefault(r.reason, []).append(r.name or "the network")
    lines = []
    for reason, names in groups.items():
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        lines.append(f"{len(names)} left as they are ({shown}): {reason}.")
    return lines


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _touch(one: str, other: str) -> bool:
    """Whether one of two modules lies in the other."""
    return within(one, other) or within(other, one)


def _calls(network: nn.Module, x: Any) -> dict[nn.Module, ModuleCall]:
    """How each module is called in a pass; of several calls the first."""
    first: dict[nn.Module, ModuleCall] = {}
    with torch.no_grad(), recorded(dict(network.named_modules())) as calls:
        call(network, x)
    for made in calls:
        if first.setdefault(made.module, made) is not made:
            first[made.module].count += 1
    return first


def _cuts(
    network: nn.Module,
    additions: Sequence[Addition],
    numbers: Mapping[str, range],
    calls: Mapping[nn.Module, ModuleCall],
) -> tuple[list[Cut], list[Refusal]]:
    """The modules whose forward holds blocks, cut, in the order of the pass; and what is refused."""
    refused = [
        Refusal(a.module, _KINDS[a.kind if a.kind != "identity" else "parameter-free"])
        for a in additions
        if a.kind != "identity" or not a.keeps_shape
    ]
    wanted = [a for a in additions if a.kind == "identity" and a.keeps_shape]
    pending: dict[str, list[Addition]] = {}
    for a in wanted:
        pending.setdefault(a.module, []).append(a)
    cuts: list[Cut] = []
    while pending:
        name = max(pending, key=lambda n: n.count(".") + bool(n))  # the deepest
        own = pending.pop(name)
        try:
            part = _best(network, name, own, numbers, calls)
        except Uncuttable as error:
            refused += [Refusal(m, str(error)) for m in sorted({a.module for a in own})]
            continue
        if part.name != name:  # the state comes in further up, where other blocks may be
            pending[part.name] = sorted([*pending.get(part.name, []), *own], key=lambda a: a.number)
            continue
        refused += [Refusal(name, reason) for reason in part.refused]
        cuts.append(part)
    order = list(calls)  # by their ends
    return sorted(cuts, key=lambda part: order.index(part.owner)), refused


def _best(
    network: nn.Module,
    name: str,
    additions: Sequence[Addition],
    numbers: Mapping[str, range],
    calls: Mapping[nn.Module, ModuleCall],
) -> Cut:
    """The lowest module at or above `name` in which all the blocks are found, else the most of them."""
    opened = {network.get_submodule(above) for a in additions for above in _path(name, a.module)}
    part = cut(name, network.get_submodule(name), opened, calls, (additions, numbers[name]))
    found = sum(map(len, part.runs)) + len(part.refused)
    if found >= len(additions):
        return part
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        if network.get_submodule(parent) not in calls:  # a list of modules
            continue
        try:
            higher = _best(network, parent, additions, numbers, calls)
        except Uncuttable:
            break
        if sum(map(len, higher.runs)) + len(higher.refused) > found:
            return higher
        break
    if found:
        return part
    raise Uncuttable("the sum is of no form x + F(x) that could be taken out of forward")


def _path(top: str, name: str) -> list[str]:
    """The modules from `top` down to `name`."""
    rest = (name[len(top) :].strip(".").split(".")) if name != top else []
    return [".".join([*filter(None, [top]), *rest[:i]]) for i in range(len(rest) + 1)]


def _taken_whole(name: str, module: nn.Module, calls: Mapping[nn.Module, ModuleCall]) -> Cut:
    given = calls.get(module)
    if given is None:
        raise ValueError(f"blocks= names {name}, which is not called in a pass.")
    given.check_shape()
    whole = Whole(module).eval()
    try:
        return cut(name, whole, [whole], {**calls, whole: given})
    except Uncuttable as error:
        raise ValueError(f"{name} cannot be a block: {error}.") from None


def _rebuilt(network: nn.Module, cuts: list[Cut], joined: bool) -> nn.Module:
    """The network with stacks in the runs' places; runs over several modules stand in the last of these."""
    groups: list[list[Cut]] = []
    for part in cuts:
        last = groups[-1][-1] if groups else None
        if (
            joined
            and last is not None
            and last.whole()
            and part.whole()
            and last.state_out() is part.state_in()
        ):
            groups[-1].append(part)
        else:
            groups.append([part])
    place = 0
    modules: dict[str, list[tuple[str, nn.Module]]] = {}
    for group in groups:
        runs = [[(part, block) for block in run] for part in group for run in part.runs]
        for run in [list(chain(*runs))] if len(group) > 1 else runs:
            step_size = common_factor([block for _, block in run])
            fields = {block: _field(block, part.owner) for part, block in run}
            stack = _Stack(list(fields.values()), step_size=step_size)
            stack.place, stack.state = place, tuple(run[0][1].x.meta["seen"][0][1:])
            place += 1
            for part in dict.fromkeys(part for part, _ in run):
                own = [block for of, block in run if of is part]
                placed = modules.setdefault(part.name, [])
                taken = {name for name, _ in (*part.owner.named_children(), *placed)}
                placed.append(_placed(own, fields, stack, part is run[-1][0], taken))
    for part in sorted(cuts, key=lambda part: -part.name.count(".") - bool(part.name)):
        fresh = Rewritten(part.name, part.owner, part.call, replaced(part, modules[part.name]))
        if not part.name:
            return fresh
        parent, _, child = part.name.rpartition(".")
        network.get_submodule(parent).register_module(child, fresh)
    return network


def _field(block: Block, owner: nn.Module) -> nn.Module:
    field = branch(block, owner)
    return Branch(field) if block.context else field


def _placed(
    own: list[Block], fields: Mapping[Block, nn.Module], stack: ResidualStack, last: bool, taken: set[str]
) -> tuple[str, nn.Module]:
    """What stands in a module's graph for its part of a run, and under which name."""
    counts, own_fields = [len(block.context) for block in own], [fields[block] for block in own]
    if not last:
        return _free("hand_over", taken), HandOver(own_fields, counts)
    if any(counts):
        return _free("advance", taken), Advance(stack, own_fields, counts)
    return _free("stack", taken), stack


def _free(name: str, taken: set[str]) -> str:
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)


def _names(model: nn.Module, converted: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """State_dict names, old to new and new to old, by the tensors that both share."""
    old, new = (dict(m.state_dict(keep_vars=True)) for m in (model, converted))
    places: dict[int, list[str]] = {}
    for name, tensor in new.items():
        places.setdefault(id(tensor), []).append(name)
    to_new = {}
    for name, tensor in old.items():
        candidates = places.get(id(tensor))
        if candidates:
            to_new[name] = max(candidates, key=lambda other: _common_end(name, other))
    first = {}
    for name, tensor in old.items():
        first.setdefault(id(tensor), name)
    to_old = {other: first[id(tensor)] for other, tensor in new.items() if id(tensor) in first}
    return to_new, to_old | {other: name for name, other in to_new.items()}


def _common_end(one: str, other: str) -> int:
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count


def _difference(output: Any, expected: Any) -> float:
    worst = 0.0
    for z, z0 in zip(tensors_in(output), tensors_in(expected), strict=True):
        if z.shape != z0.shape:
            return float("inf")
        if z0.numel():
            size = float(z0.double().abs().max()) if z0.is_floating_point() else 1.0
            worst = max(worst, float((z.double() - z0.double()).abs().max()) / (size or 1.0))
    return worst


def _tolerance(expected: Any) -> float:
    """1e-6, or what rounding makes of sums in another order."""
    eps = [torch.finfo(t.dtype).eps for t in tensors_in(expected) if t.is_floating_point()]
    return max(1e-6, 100 * max(eps, default=0.0))
