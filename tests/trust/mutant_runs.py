"""What a mutant meets: the chart of which test executes which line, and tests run in forks.

resode is never imported here, only in the forks; what it imports is, once.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

from tests.trust.mutants import PACKAGES, ROOT, STORE, Mutant, sources, statements, test_files

SLOWEST = 6.0  # seconds: a test that takes longer is none for mutants
MEMORY = 16 << 30  # bytes of address space
Lines = dict[str, list[int]]


def chart(package: str) -> dict[str, dict[str, Any]]:
    """For each test file of a package: its tests, each with its seconds and the lines of resode it executes.

    What is stored is taken where neither the test file nor the package's sources have changed.
    """
    now = {str(path.relative_to(ROOT)): _digest(path) for path in sources(package)}
    charts = {}
    for name in test_files(package):
        path = STORE / "chart" / f"{name.replace('/', '+')}.json"
        found = json.loads(path.read_text()) if path.exists() else {"digests": {}}
        known = {**now, name: _digest(ROOT / name)}
        if any(found["digests"].get(module) != digest for module, digest in known.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            found = fork(lambda name=name: _charted(name), 1200)
            if "tests" not in found:
                raise RuntimeError(f"{name}: no chart: {found}")
            found["digests"] = {
                **{str(p.relative_to(ROOT)): _digest(p) for other in PACKAGES for p in sources(other)},
                name: known[name],
            }
            path.write_text(json.dumps(found))
            print(f"chart of {name}: {len(found['tests'])} tests, {found['seconds']:.0f} s", flush=True)
            if found["failed"]:
                print("  left out, as they fail without a fault:", *found["failed"], flush=True)
        charts[name] = found
    return charts


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Chart:
    """A plugin of pytest: seconds of each test, and coverage with a context for each."""

    def __init__(self, cover: Any) -> None:
        self.cover = cover
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        _clear_caches()
        self.cover.switch_context(item.nodeid)
        begun = time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.process_time() - begun
            self.cover.switch_context("")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        self.cover.switch_context("shared")  # by all tests of the file
        try:
            return (yield)
        finally:
            self.cover.switch_context(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0])

    def pytest_runtest_logreport(self, report):
        if report.failed or report.skipped:
            self.failed.append(report.nodeid)


def _charted(name: str) -> dict[str, Any]:
    """Runs a test file under coverage, one context a test. In a fork."""
    import coverage

    cover = coverage.Coverage(data_file=None, source=[str(ROOT / "resode")], messages=False)

    begun = time.process_time()
    cover.start()
    code = pytest.main([name, *QUIET], plugins=[plugin := Chart(cover)])
    cover.stop()
    if code not in (0, 1):  # passed, or some failed
        raise RuntimeError(f"pytest ended with {code!r}")
    data = cover.get_data()
    lines: dict[str, Lines] = {test: {} for test in ("", "shared", *plugin.seconds)}
    for path in data.measured_files():
        for line, contexts in data.contexts_by_lineno(path).items():
            for context in contexts:
                lines[context].setdefault(str(Path(path).relative_to(ROOT)), []).append(line)
    for modules in lines.values():  # of the five packages alone
        for module in [m for m in modules if not any(ROOT / m in sources(package) for package in PACKAGES)]:
            del modules[module]
    tests = {
        test: {"seconds": round(seconds, 4), "lines": lines[test]}
        for test, seconds in plugin.seconds.items()
        if test not in plugin.failed and seconds < SLOWEST
    }
    shared = {"import": lines[""], "shared": lines["shared"]}
    return {"tests": tests, **shared, "failed": plugin.failed, "seconds": time.process_time() - begun}


def _clear_caches() -> None:
    """What one test has filled, the next one must fill again: else only the first executes the lines."""
    for name in [name for name in sys.modules if name.startswith("resode")]:
        for thing in vars(sys.modules[name]).values():
            if type(thing) is functools._lru_cache_wrapper:
                thing.cache_clear()


def chosen(mutant: Mutant, charts: dict[str, dict[str, Any]], budget: float) -> dict[str, dict[str, float]]:
    """The tests for a mutant, by file: those that execute its statement, the fastest, `budget` seconds of them.

    A statement that is executed by the import (a table, a default) is everybody's: first come the tests that execute
    other lines of its module, then all.
    """
    table = statements(ast.parse((ROOT / mutant.module).read_text()))
    first, last, _ = table.get(mutant.line, (mutant.line, mutant.line, ""))
    span = set(range(first, last + 1))

    def meets(lines: Lines) -> bool:
        return not span.isdisjoint(lines.get(mutant.module, ()))

    ranked = []
    for place, (name, found) in enumerate(charts.items()):
        imported, shared = meets(found["import"]), meets(found["shared"])
        for test, what in found["tests"].items():
            if meets(what["lines"]) or shared:
                ranked.append((0, what["seconds"], place, name, test))
            elif imported:
                ranked.append((1 + (mutant.module not in what["lines"]), what["seconds"], place, name, test))
    picked: dict[str, dict[str, float]] = {}
    spent, count = 0.0, 0
    for _, seconds, _, name, test in sorted(ranked):
        spent, count = spent + seconds + 0.003, count + 1
        if spent > budget and count > 5:
            break
        picked.setdefault(name, {})[test] = seconds
    return dict(sorted(picked.items(), key=lambda item: (sum(item[1].values()) / len(item[1]), item[0])))


def judge(
    mutant: Mutant, code: str | None, charts: dict[str, dict[str, Any]], budget: float
) -> dict[str, Any]:
    """killed (and by which test), timed out, survived, or no test."""
    tests = chosen(mutant, charts, budget)
    if not tests:
        return {"status": "no test"}
    count, seconds = sum(map(len, tests.values())), sum(sum(times.values()) for times in tests.values())
    outcome = fork(lambda: _tried(mutant, code, tests), 120 + 20 * seconds)
    return {"tests": count, "clean": round(seconds, 2), **outcome}


class Chosen:
    """A plugin of pytest: these tests, the fastest first, each with a limit of processor time."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.by = seconds, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        kept = [item for item in items if item.nodeid in self.seconds]
        items[:] = sorted(kept, key=lambda item: self.seconds[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        signal.setitimer(signal.ITIMER_PROF, 10 + 8 * self.seconds[item.nodeid])
        return (yield)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.by = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed:
            self.by = f"{report.nodeid} (import)"


def _tried(mutant: Mutant, code: str | None, tests: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Runs tests on the mutated source. In a fork."""
    if code is not None:
        sys.meta_path.insert(0, Mutated(mutant.module, code))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends this process, also within a long call

    for name, seconds in tests.items():
        signal.setitimer(signal.ITIMER_PROF, 60)  # to import the test file
        end = pytest.main([name, "-x", *QUIET], plugins=[plugin := Chosen(seconds)])
        if end != pytest.ExitCode.OK:
            return {"status": "killed", "by": plugin.by or f"{name} ({end!r})"}
    return {"status": "survived"}


class Mutated:
    """Finds one module of resode, and gives a source of its own."""

    def __init__(self, module: str, code: str) -> None:
        self.path, self.code = ROOT / module, code
        self.name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None

        class Loader(SourceFileLoader):
            def get_code(_self, fullname):  # type: ignore[override]
                return compile(self.code, str(self.path), "exec", dont_inherit=True)

        where = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, self.path, loader=Loader(name, str(self.path)), submodule_search_locations=where
        )


QUIET = ["-q", "--no-header", "--no-summary", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"]
QUIET += ["-o", "addopts=--doctest-modules"]


def fork(work: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """The result of `work` in a fork of this process: killed where the fork dies, timed out where it takes too long."""
    warm_up()
    STORE.mkdir(exist_ok=True)
    answer, log = STORE / f"answer.{os.getpid()}", STORE / f"output.{os.getpid()}"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            os.chdir(ROOT)
            result = work()
            answer.write_text(json.dumps(result))
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    end, pause = time.time() + limit, 0.005
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.time() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"status": "timed out", "by": "the clock"}
        time.sleep(pause := min(0.1, 1.2 * pause))
    try:
        os.killpg(child, signal.SIGKILL)  # what it has left behind
    except ProcessLookupError:
        pass
    if os.WIFSIGNALED(ended[1]):
        late = os.WTERMSIG(ended[1]) == signal.SIGPROF
        return {"status": "timed out" if late else "killed", "by": f"signal {os.WTERMSIG(ended[1])}"}
    if not answer.exists():
        return {"status": "broken", "by": log.read_text()[-2000:]}
    return json.loads(answer.read_text())


def warm_up() -> None:
    """Imports what the forks need, save resode."""
    if "torch" in sys.modules:
        return
    for name in (
        "torch torch.func torchdiffeq scipy.integrate scipy.linalg scipy.optimize scipy.sparse.linalg numpy mpmath "
        "hypothesis matplotlib.pyplot torch._dynamo torch.utils.checkpoint torch.fx"
    ).split():
        __import__(name)
    assert not any(name.split(".")[0] == "resode" for name in sys.modules)
