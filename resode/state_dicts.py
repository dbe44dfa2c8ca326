"""State dicts that fit or are refused as a whole, with everything that is wrong in one message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

from torch import Tensor, nn

SHOWN = 20
"""How many names of a kind a message lists; the shortest come first and say the most."""


class WeightsMismatch(ValueError, RuntimeError):
    """A state dict that does not fit its module; a RuntimeError too, as torch's own is."""


class Checked(nn.Module):
    """A module whose `load_state_dict` changes nothing unless everything fits."""

    def __init_subclass__(cls) -> None:
        """Types of `forward` as they are and not as text, which a pickled graph of torch.fx cannot hold."""
        forward = cls.__dict__.get("forward")
        if forward is not None:
            forward.__annotations__.update(get_type_hints(forward))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, with one message about all names.

        Raises:
            WeightsMismatch: names are missing (with strict), unexpected (likewise) or of another shape.
        """
        if not any(module._load_state_dict_pre_hooks for module in self.modules()):  # these may rename
            problem = mismatch(self, state_dict, strict)
            if problem:
                raise WeightsMismatch(problem)
        return super().load_state_dict(state_dict, strict, assign)


def mismatch(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> str:
    """What keeps a state dict from fitting, as a message; empty where it fits.

    A batch norm's num_batches_tracked, which torch fills in where an old file lacks it, is not missed.

    Example:
        >>> print(mismatch(nn.Linear(2, 3), {"weight": nn.Linear(2, 4).weight, "bins": nn.Linear(2, 3).bias}))
        the weights do not fit Linear. Missing (1): bias. Unexpected (1): bins.
        Of another shape (1): weight (4, 2), not (3, 2).
        Build it with the options that the weights belong to.
    """
    own = module.state_dict()
    wrong: dict[str, list[str]] = {}
    if strict:
        wrong["Missing"] = [
            name
            for name in own
            if name not in state_dict and name.rpartition(".")[2] != "num_batches_tracked"
        ]
        wrong["Unexpected"] = [str(name) for name in state_dict if name not in own]
    shapes = {
        name: (_shape(state_dict[name], value.is_meta), tuple(value.shape))
        for name, value in own.items()
        if name in state_dict and isinstance(value, Tensor)
    }
    wrong["Of another shape"] = [name for name, (got, wanted) in shapes.items() if got != wanted]
    if not any(wrong.values()):
        return ""
    message = f"the weights do not fit {type(module).__name__}."
    for kind, names in wrong.items():
        if names:
            ordered = sorted(names, key=lambda name: (len(name), name))
            shown = [
                f"{name} {shapes[name][0]}, not {shapes[name][1]}" if kind == "Of another shape" else name
                for name in ordered[:SHOWN]
            ]
            if len(names) > SHOWN:
                shown.append(f"… and {len(names) - SHOWN} more")
            message += f" {kind} ({len(names)}): {('; ' if 'shape' in kind else ', ').join(shown)}."
    return message + " Build it with the options that the weights belong to."


def _shape(value: Any, meta: bool) -> tuple[int | str, ...]:
    """The shape of what is to be copied into a tensor, or in words why it can't be."""
    if not isinstance(value, Tensor):
        return ("no tensor",)
    return ("on the meta device, without values",) if value.is_meta and not meta else tuple(value.shape)
