"""Stacks under torch's tools: compile, export, autocast, DDP, copies and pickles, memory formats."""

import copy
import io
import pickle

import children
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from resode import ODEBlock, ResidualStack
from resode.fields import Autonomous, ConvField
from resode.networks import build

OPTIONS = [
    {},
    {"solver": "rk4", "substeps": 2},
    {"solver": "rk4", "weights": "linear"},
    {"solver": "midpoint", "learn_step": "channel", "step_size": 0.3},
    {"solver": "heun3", "learn_step": True, "stochastic_depth": 0.5},
    {"solver": "rk4", "gradient": "checkpoint"},
]


def a_stack(options, norm="batch"):
    torch.manual_seed(0)
    return ResidualStack([ConvField(4, norm=norm) for _ in range(2)], **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_as_one_graph_it_gives_eagers_result(options):
    """Output, gradients and running statistics; aot_eager traces as the default backend does."""
    torch._dynamo.reset()
    eager = a_stack(options)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 4, 5, 5)
    results = []
    for model in (eager, compiled):
        torch.manual_seed(1)
        y = model(x)
        y.square().mean().backward()
        results.append(y)
    assert torch.allclose(*results, rtol=1e-5, atol=1e-5)
    for (name, p), q in zip(eager.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5), name
    for (name, a), b in zip(eager.named_buffers(), other.named_buffers(), strict=True):
        assert torch.allclose(a, b[1], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exported_it_gives_eagers_result(options):
    stack = a_stack(options).eval()
    x = torch.randn(4, 4, 5, 5)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(stack, (x,), dynamic_shapes=({0: batch},))
    for images in (x, torch.randn(7, 4, 5, 5)):
        assert torch.allclose(program.module()(images), stack(images), rtol=1e-5, atol=1e-5)
    assert stack.stats is not None, "eager calls keep their statistics"


@pytest.mark.parametrize(
    "options", [*OPTIONS, {"solver": "dopri5"}, {"solver": "tsit5", "per_sample": False}], ids=str
)
def test_copies_and_pickles_after_a_call_give_the_same(options):
    stack = a_stack(options)
    x = torch.randn(4, 4, 5, 5)
    stack(x).sum().backward()
    stack.eval()
    y = stack(x)
    assert torch.equal(copy.deepcopy(stack)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(stack))(x), y)
    file = io.BytesIO()
    torch.save(stack.state_dict(), file)
    file.seek(0)
    other = a_stack({**options, "solver": "euler"}).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    other.solver = options.get("solver", "euler")
    assert torch.equal(other(x), y)
    assert list(other.state_dict()) == list(stack.state_dict())


@pytest.mark.parametrize("options", [*OPTIONS, {"solver": "dopri5"}], ids=str)
def test_autocast_and_channels_last(options):
    stack = a_stack(options, norm="group").eval()
    x = torch.randn(2, 4, 6, 6)
    exact = stack(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = stack(x)
        rough.square().mean().backward()
    assert rough.dtype == torch.float32
    # bf16 keeps 8 bits: F is right to about 1 %, and the sum of a few of them too
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    nhwc = copy.deepcopy(stack).to(memory_format=torch.channels_last)
    y = nhwc(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, exact, rtol=1e-3, atol=1e-4)


def test_adaptive_solvers_refuse_a_state_of_low_precision():
    for dtype in (torch.bfloat16, torch.float16):
        stack = a_stack({"solver": "dopri5"}, "group").to(dtype)
        with pytest.raises(TypeError, match=f"dopri5 can't control an error in {dtype}"):
            stack(torch.zeros(1, 4, 5, 5, dtype=dtype))
    a_stack({"solver": "rk4"}, "none").bfloat16()(torch.zeros(1, 4, 5, 5).bfloat16())


def test_odenet_drops_the_blocks_that_the_pre_activation_net_drops():
    """To the bit under one seed: with Euler and η = 1 both write x + F(x) · mask / (1 − p)."""
    odenet, preact = build("odenet20", stochastic_depth=0.5), build("preact20", stochastic_depth=0.5)
    from resode.networks import preact_names

    names = preact_names(odenet)
    preact.load_state_dict({names[name]: value for name, value in odenet.state_dict().items()})
    x = torch.randn(4, 3, 8, 8)
    results = []
    for model in (odenet, preact):
        torch.manual_seed(5)
        results.append(model(x))
    assert torch.equal(*results)
    assert [s.stochastic_depth[-1] for s in odenet.stacks()] == pytest.approx(
        [0.5 * i / 9 for i in (3, 6, 9)]
    )


def _worker(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for index, (model, x) in enumerate(_models()):
        wrapped = DistributedDataParallel(model)
        wrapped(x[rank::2]).square().mean().backward()
        torch.save([p.grad for p in model.parameters()], folder / f"{rank}-{index}.pt")
        del wrapped  # before the group: see `TrainingLoop.close`
    dist.barrier()  # else the faster process closes the connection that the other still uses
    dist.destroy_process_group()


def _models():
    """Without batch norm, whose batch would be another one.

    In float64: the errors that choose dopri5's steps are near float32's rounding, which differs with the batch.
    """
    torch.manual_seed(0)
    x = torch.randn(8, 4, 5, 5).double()

    def field():
        return ConvField(4, norm="group").double()

    for options in ({"solver": "rk4", "learn_step": True}, {"solver": "midpoint", "weights": "linear"}):
        yield ResidualStack([field() for _ in range(2)], **options), x
    yield ResidualStack(field(), depth=3, solver="dopri5", gradient="checkpoint"), x
    yield ODEBlock(Autonomous(field()), solver="rk4", n_steps=2), x


@pytest.mark.usefixtures("seeds_as_written")
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """DDP averages them; the mean loss over two halves of a batch is the whole's.

    Forked processes leave without tearing Python down: gloo's threads outlive the group while a DDP module does,
    and one that lets go of a tensor after Python has ended aborts the process.
    """
    said = tmp_path / "said"
    processes = children.start_together(2, _worker, tmp_path, said=said)
    assert children.ended(processes) == [0, 0], [(said / str(rank)).read_text() for rank in range(2)]
    for index, (model, x) in enumerate(_models()):
        model(x).square().mean().backward()
        each = [torch.load(tmp_path / f"{rank}-{index}.pt", weights_only=True) for rank in range(2)]
        for p, first, second in zip(model.parameters(), *each, strict=True):
            assert torch.equal(first, second), "the processes agree"
            assert torch.allclose(first, p.grad, rtol=1e-4, atol=1e-6 * float(p.grad.abs().max()))
