"""Every result at a prompt and in a notebook: short repr, HTML, frame; and the names that `dir` and `help` show."""

import dataclasses
import importlib
import inspect
import pkgutil
import sys
import types

import pytest
import torch
from torch import nn

import resode
from resode import progress
from resode.analysis import bifurcation, depth_convergence, lesion_study, product_norm, step_scan
from resode.progress import Progress
from resode.results import Result
from resode.stability import stability_properties


class Frame(dict):
    """As much of pandas.DataFrame as is needed: columns of equal length."""

    def __init__(self, columns):
        lengths = {len(column) for column in columns.values()}
        assert len(lengths) <= 1, f"a frame's columns are of one length: {lengths}"
        super().__init__(columns)
        self.length = max(lengths, default=0)


@pytest.fixture
def pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=Frame))


def results():
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double().eval()
    states = torch.randn(4, 3, dtype=torch.float64)
    network = resode.networks.build("odenet20", in_channels=1, width=4).eval()
    x, target = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    points = resode.find_fixed_points(field, states)
    solved = resode.solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2))
    return {
        "limit": (resode.step_limit(torch.eye(3) * -2), 1),
        "limits": (resode.step_limit(field, states), 4),
        "points": (points, 4),
        "kinds": (resode.classify(field, points.points), 4),
        "solution": (solved, len(solved.t)),
        "stats": (solved.stats, 1),
        "profile": (resode.profile_depth(network, x, target, spectra=0, progress=False), 9),
        "diagnosis": (resode.diagnose(network, x, progress=False), 9),
        "swap": (resode.swap_report(network, [(x, target)], ("euler", "rk4"), (1,), recalibrate=False), 2),
        "bifurcation": (bifurcation(lambda x: x - x**3, torch.linspace(0.1, 1, 5), 0.3), 5),
        "scan": (step_scan(network, x, target, (1.0, 2.0)), 2),
        "lesion": (lesion_study(network, x)[0], 1),
        "product": (product_norm([nn.Linear(3, 3).double()] * 2, states[:2], step_size=0.1), 2),
        "convergence": (
            depth_convergence(lambda n: resode.ResidualStack(nn.Tanh(), depth=n), states, (4, 8, 16)),
            3,
        ),
        "properties": (stability_properties("rk4"), 1),
    }


@pytest.fixture(scope="module")
def found():
    return results()


def test_reprs_are_short(found):
    """Four kilobytes of dataclass is what a notebook's cell ended with; now it is a line."""
    for name, (result, _) in found.items():
        text = repr(result)
        assert type(result).__name__ in text and len(text) <= 400 and "\n" not in text, (name, text)
        assert "tensor(" not in text and "object at 0x" not in text, (name, text)


def test_html_is_escaped_and_whole(found):
    for name, (result, _) in found.items():
        html = result._repr_html_()
        assert html.startswith(("<div", "<table")) and html.count("<table>") == html.count("</table>"), name
    forged = dataclasses.replace(found["lesion"][0], name="<script>alert(1)</script>")
    assert "<script>" not in forged._repr_html_() and "&lt;script&gt;" in forged._repr_html_()


def test_frames_have_a_row_a_thing(found, pandas):
    for name, (result, length) in found.items():
        frame = result.to_dataframe()
        assert frame.length == length, (name, frame.length)
    points = found["points"][0]
    assert found["points"][0].to_dataframe()["points_2"] == points.points[:, 2].tolist()
    assert found["limits"][0].to_dataframe()["step"] == found["limits"][0].step.tolist()
    profile = found["profile"][0]
    assert profile.to_dataframe()["name"] == [row.name for row in profile.rows]
    both = resode.solve_ivp(lambda t, y: (-y[0], y[1]), (0.0, 1.0), (torch.ones(2), torch.ones(1)))
    assert set(both.to_dataframe()) == {"t", "y0_0", "y0_1", "y1_0"}


def test_without_pandas_the_error_says_what_to_do(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install pandas. Without it, to_csv writes the same"):
        found["profile"][0].to_dataframe()
    with pytest.raises(ModuleNotFoundError, match="the fields hold it all"):
        found["limit"][0].to_dataframe()


def test_nothing_imports_pandas_before_it_is_asked_for():
    assert "pandas" not in sys.modules or not any(m.startswith("resode") for m in vars(sys.modules["pandas"]))


def rooms():
    names = ["resode", *(f"resode.{m.name}" for m in pkgutil.iter_modules(resode.__path__) if m.ispkg)]
    return [n for n in names if n != "resode.cli"]


@pytest.mark.parametrize("place", rooms())
def test_dir_lists_lazy_names(place):
    module = importlib.import_module(place)
    assert set(getattr(module, "__all__", ())) <= set(dir(module))


@pytest.mark.parametrize("place", rooms())
def test_help_of_functions_is_whole(place):
    """A signature that names its arguments, and a docstring that speaks of each."""
    module = importlib.import_module(place)
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if not inspect.isfunction(thing):
            continue
        doc, arguments = inspect.getdoc(thing) or "", inspect.signature(thing).parameters
        assert doc, f"{place}.{name} has no docstring"
        unnamed = [a for a in arguments.values() if a.kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
        assert not unnamed or all(a.name in doc for a in unnamed), f"{place}.{name}{inspect.signature(thing)}"
        missing = [a for a in arguments if a not in doc]
        assert not missing, f"{place}.{name} says nothing of {missing}"


def test_progress_waits_shows_goes_and_can_be_silent(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("swap") as say:
        say("rk4, 1 of 2")
    assert capsys.readouterr().err == "", "not in the first two seconds"
    monkeypatch.setattr(progress, "AFTER", 0.0)
    with Progress("swap") as say:
        say("rk4, 1 of 2")
    shown = capsys.readouterr().err
    assert shown.startswith("\rswap: rk4, 1 of 2") and shown.endswith("\r")
    with Progress("swap", shown=False) as say:
        say("rk4")
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    with Progress("swap") as say:
        say("rk4")
    assert capsys.readouterr().err == "", "by argument, and in a pipe"


def test_results_are_results(found):
    assert all(isinstance(result, Result) for result, _ in found.values())
