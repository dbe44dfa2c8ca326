"""Properties as a table: one row a public name, with its law; how a call is made, varied and judged.

A call gives a result that satisfies its law, or an error with a rule in it: one that the library raises itself,
in words. Whatever comes up from inside (an IndexError, torch's own message) is a fault. Every call must also leave
alone what it was given: tensors, parameters, modes, hooks, gradients, and torch's settings.
"""

from __future__ import annotations

import inspect
import linecache
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resode
from trust.surface import resolve

PACKAGE = str(Path(resode.__file__).parent)
HERE = str(Path(__file__).parent)
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3, torch.complex128: 1e-7, torch.complex64: 2e-3}


@dataclass(frozen=True)
class Variant:
    """Under which dtype, layout, sizes and modes a call is made."""

    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    batch: int = 2
    size: int = 4
    train: bool = False
    grad: str = "plain"
    seed: int = 0

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def tensor(self, *shape: int, scale: float = 0.5, add: int = 0) -> Tensor:
        """Normal numbers in the variant's dtype and layout; `add` gives further ones."""
        generator = torch.Generator().manual_seed(1000 * add + self.seed)
        real = torch.randn(*shape, generator=generator, dtype=torch.float64)
        x = self.laid(real * scale if not self.dtype.is_complex else real * scale * (1 + 0.5j))
        return x.requires_grad_() if self.grad == "gradient" else x

    def laid(self, values: Tensor) -> Tensor:
        """The same numbers with other strides."""
        values = values.to(self.dtype)
        if self.layout == "transposed" and values.dim() > 1:
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        if self.layout == "strided":
            return torch.stack([values, values], dim=-1)[..., 0]
        if self.layout == "channels_last" and values.dim() == 4:
            return values.contiguous(memory_format=torch.channels_last)
        if self.layout == "offset":
            return torch.cat([values.flatten()[:1], values.flatten()])[1:].reshape(values.shape)
        return values.contiguous()

    def matrix(self, n: int | None = None, rate: float = 1.0) -> Tensor:
        """A matrix whose eigenvalues lie left of −rate/2; every eigenvalue of −A is in the right half-plane."""
        n = n or self.size
        m = torch.randn(n, n, generator=self.generator(), dtype=torch.float64) / max(1, n) ** 0.5
        m = m - torch.eye(n, dtype=torch.float64) * (torch.linalg.matrix_norm(m, 2) + rate / 2)
        return self.laid(m)

    def module(self, made: nn.Module) -> nn.Module:
        """The module in the variant's dtype and mode; the same weights at any seed of torch's."""
        for number, (name, parameter) in enumerate(made.named_parameters()):
            if name.endswith("bias"):
                parameter.data.fill_(0.05)
            elif parameter.dim() > 1:
                values = torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(number + self.seed)
                )
                parameter.data.copy_(values * 0.5 / parameter[0].numel() ** 0.5)
        return made.to(self.dtype).train(self.train)

    def stack(self, depth: int = 3, width: int | None = None, eta: float = 0.2, **options: Any) -> nn.Module:
        from resode import ResidualStack

        layers = [
            nn.Sequential(nn.Linear(width or self.size, width or self.size), nn.Tanh()) for _ in range(depth)
        ]
        return self.module(ResidualStack(layers, step_size=eta, **options))

    def network(self, depth: int = 3, classes: int = 3, **options: Any) -> nn.Module:
        return self.module(nn.Sequential(self.stack(depth, **options), nn.Linear(self.size, classes)))

    @property
    def tolerance(self) -> float:
        """Of a figure that is computed in the variant's dtype."""
        return TOLERANCE.get(self.dtype, 0.2)

    def close(self, found: Any, expected: Any, times: float = 1.0) -> None:
        found, expected = torch.as_tensor(found).detach(), torch.as_tensor(expected).detach()
        wide = torch.complex128 if found.is_complex() or expected.is_complex() else torch.float64
        bound = self.tolerance * times
        torch.testing.assert_close(found.to(wide), expected.to(wide), rtol=bound, atol=bound)


PLAIN = Variant()
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64)
LAYOUTS = ("contiguous", "transposed", "strided", "channels_last", "offset")
GRADS = ("plain", "gradient", "no_grad", "inference")


@dataclass
class Case:
    """One call: what goes in, and what must hold of what comes out."""

    arguments: dict[str, Any]
    law: Callable[[Any], None]
    order: Sequence[Any] = ()
    changes: tuple[str, ...] = ()
    """Arguments that the call is for changing, and others that it may."""


@dataclass(frozen=True)
class Row:
    """A public name, and how a call of it is made under a variant."""

    name: str
    make: Callable[[Variant], Case]
    slow: bool = False
    hostile: bool = True
    kinds: tuple[str, ...] = ()


ROWS: dict[str, Row] = {}
RECORDS: dict[str, str] = {}
"""Results, settings and data, which are made or met by another row: name -> by which."""


def row(name: str, **options: Any) -> Callable[[Callable[[Variant], Case]], Callable[[Variant], Case]]:
    def add(make: Callable[[Variant], Case]) -> Callable[[Variant], Case]:
        assert name not in ROWS, f"{name} has a row already"
        ROWS[name] = Row(name, make, **options)
        return make

    return add


class Broken(AssertionError):
    """A call neither satisfied its law nor was refused by a rule."""


@dataclass
class Outcome:
    """What became of a call."""

    held: bool
    said: str = ""
    warned: list[str] = field(default_factory=list)


def ruled(error: BaseException) -> bool:
    """Whether the library itself raised the error, and says something; or the user's own function did."""
    if isinstance(error, AssertionError | NotImplementedError | ImportError) or error.__traceback__ is None:
        return False
    trace, ours, users = error.__traceback__, True, False
    first = True
    while trace is not None:
        code = trace.tb_frame.f_code
        place, line = code.co_filename, trace.tb_lineno
        ours = place.startswith(PACKAGE)
        # After the library: a field of this folder's, or a module's own forward with what it cannot take.
        users = not ours and (
            users or (not first and (place.startswith(HERE) or code.co_name == "_call_impl"))
        )
        first, trace = first and not ours, trace.tb_next
    if users:
        return True
    said = linecache.getline(place, line).lstrip().startswith("raise ")
    return ours and said and len(str(error).split()) >= 4


def tensors_of(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from thing.state_dict(keep_vars=True).values()
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from tensors_of(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors_of(value)


def state_of(thing: Any) -> list[Any]:
    """All of an argument that a call could change behind one's back."""
    found: list[Any] = []
    for value in tensors_of(thing):
        if value.layout == torch.strided and value.device.type != "meta" and not value.is_quantized:
            content = value.detach().clone()
            found.append((content, value.requires_grad, value.grad is None, value.dtype))
    modules = [m for m in (thing if isinstance(thing, list | tuple) else [thing]) if isinstance(m, nn.Module)]
    for module in modules:
        for part in module.modules():
            hooks = sum(
                len(getattr(part, name, ()))
                for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            )
            found.append((part.training, hooks, "forward" in vars(part), type(part)))
    return found


def same(one: list[Any], two: list[Any]) -> bool:
    if len(one) != len(two):
        return False
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a, b, strict=True):
            alike = torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) if isinstance(x, Tensor) else x == y
            if not alike:
                return False
    return True


def settings() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
    )


@contextmanager
def mode(grad: str) -> Iterator[None]:
    with ExitStack() as stack:
        if grad == "no_grad":
            stack.enter_context(torch.no_grad())
        elif grad == "inference":
            stack.enter_context(torch.inference_mode())
        yield


def attempt(the: Row, variant: Variant, changed: Mapping[str, Any] | None = None) -> Outcome:
    """Make the call; `changed` arguments are hostile, and the law is asked of none of them.

    Raises:
        Broken: a law failed, an error came up from inside, a warning is none of ours, or an argument was changed.
    """
    torch.manual_seed(variant.seed)
    where = f"{the.name} under {variant}" + (f" with {describe(changed)}" if changed else "")
    before = settings()
    with mode(variant.grad), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        case = the.make(variant)
        arguments = case.arguments | dict(changed or {})
        left_alone = {name: state_of(value) for name, value in arguments.items() if name not in case.changes}
        function = resolve(the.name)
        try:
            result = function(*case.order, **arguments)  # type: ignore[operator]
            if inspect.isgenerator(result) or (changed and hasattr(result, "__next__")):
                result = list(result)
        except Exception as error:
            if not ruled(error):
                raise Broken(f"{where}: {type(error).__name__} from inside: {str(error)[:200]}") from error
            outcome = Outcome(False, f"{type(error).__name__}: {error}")
        else:
            outcome = Outcome(True)
            if not changed:
                try:
                    case.law(result)
                except Exception as error:
                    if not ruled(error):
                        raise Broken(
                            f"{where}: its law failed: {type(error).__name__} {str(error)[:400]}"
                        ) from error
                    outcome = Outcome(False, f"{type(error).__name__}: {error}")
        altered = [name for name, state in left_alone.items() if not same(state, state_of(arguments[name]))]
    if altered:
        raise Broken(f"{where}: it changed its argument {', '.join(altered)}")
    if settings() != before:
        raise Broken(f"{where}: it changed torch's settings, {before} to {settings()}")
    strange = [
        w for w in warned if not issubclass(w.category, UserWarning) or w.category is DeprecationWarning
    ]
    if strange:
        raise Broken(f"{where}: {strange[0].category.__name__} from inside: {str(strange[0].message)[:200]}")
    outcome.warned = [str(w.message) for w in warned]
    return outcome


def describe(changed: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"tensor {tuple(value.shape)} {value.dtype} {value.layout}"
        return repr(value)[:60]

    return ", ".join(f"{name}={text(value)}" for name, value in changed.items())


def hostile_values() -> dict[str, Any]:
    """What may come in the place of any argument; nothing that would be slow where it is accepted."""
    base = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    return {
        "None": None,
        "nothing": "",
        "text": "no such name",
        "bytes": b"\x00\xff",
        "-1": -1,
        "0": 0,
        "half": 0.5,
        "nan": float("nan"),
        "inf": float("inf"),
        "-inf": -float("inf"),
        "complex": 1 + 2j,
        "True": True,
        "list": [],
        "list of None": [None],
        "list of texts": ["a", "b"],
        "dict": {},
        "object": object(),
        "function": lambda *arguments: None,
        "raising": _Raises(),
        "empty tensor": torch.empty(0, dtype=torch.float64),
        "empty batch": torch.empty(0, 3, dtype=torch.float64),
        "no features": torch.empty(2, 0, dtype=torch.float64),
        "0-D tensor": torch.tensor(1.0, dtype=torch.float64),
        "1-D tensor": torch.ones(3, dtype=torch.float64),
        "tensor": base.clone(),
        "3-D tensor": torch.ones(2, 3, 4, dtype=torch.float64),
        "float16 tensor": base.half(),
        "int tensor": base.long(),
        "bool tensor": base > 2,
        "complex tensor": base * 1j,
        "nan tensor": base * float("nan"),
        "inf tensor": base / 0,
        "sparse tensor": base.to_sparse(),
        "meta tensor": base.to("meta"),
        "numpy array": base.numpy().copy(),
        "module": nn.Identity(),
        "empty module": nn.Sequential(),
    }


class _Raises:
    """A callable object that cannot be called; what it says must come through as it is."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise ValueError("a rule of the user's own function, which must come through as it is")


def parameters(name: str) -> list[str]:
    """The arguments that may be replaced: those by name."""
    thing = resolve(name)
    try:
        found = inspect.signature(thing).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in found.items() if p.kind in by_name]


def hostile_calls(the: Row) -> Iterator[tuple[str, str]]:
    """Every argument of a row with every hostile value, by their names."""
    if the.hostile:
        for argument in parameters(the.name):
            for value in hostile_values():
                yield argument, value


def varied(variant: Variant, **changes: Any) -> Variant:
    return replace(variant, **changes)
