"""What a mutant meets: the chart of which test executes which line, and tests run in forks.

resode is never imported here, only in the forks; what it imports is, once.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from tests.trust.mutants import PACKAGES, ROOT, STORE, Mutant, essence, sources, statements, test_files

SLOWEST = 6.0  # seconds: a test that takes longer is none for mutants
TOLD = os.fdopen(os.dup(1), "w")  # what is printed, also by forks whose own output goes to a file
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
    other lines of its module, from the nearest file on, then all.
    """
    ranked = []
    for place, (name, found) in enumerate(charts.items()):
        imported, shared = _meets(mutant, found["import"]), _meets(mutant, found["shared"])
        for test, what in found["tests"].items():
            if shared or _meets(mutant, what["lines"]):
                ranked.append((0, 0, what["seconds"], name, test))
            elif imported:
                ranked.append((1 + (mutant.module not in what["lines"]), place, what["seconds"], name, test))
    picked: dict[str, dict[str, float]] = {}
    spent, count = 0.0, 0
    for _, _, seconds, name, test in sorted(ranked):
        spent, count = spent + seconds + 0.003, count + 1
        if spent > budget and count > 5:
            break
        picked.setdefault(name, {})[test] = seconds
    return picked


@functools.cache
def _statements(module: str) -> dict[int, tuple[int, int, str]]:
    return statements(ast.parse((ROOT / module).read_text()))


def _meets(mutant: Mutant, lines: Lines) -> bool:
    """Whether the mutated statement is among the lines."""
    first, last, _ = _statements(mutant.module).get(mutant.line, (mutant.line, mutant.line, ""))
    return any(first <= line <= last for line in lines.get(mutant.module, ()))


def run(package: str, mutants: list[Mutant], budget: float, file: Path) -> None:
    """Appends a row for each mutant to a file: killed (and by which test), timed out, survived, or no test.

    Where no test file's import executes the mutated statement, one process has imported them all, and each of its
    forks exchanges the code of the functions; the others import the mutated source.
    """
    charts = chart(package) if mutants else {}
    tests = {mutant.name: chosen(mutant, charts, budget) for mutant in mutants}

    def put(mutant: Mutant, begun: float, outcome: dict[str, Any]) -> None:
        times = [seconds for chosen in tests[mutant.name].values() for seconds in chosen.values()]
        row = {"tests": len(times), "clean": round(sum(times), 2), "seconds": round(time.time() - begun, 1)}
        row = {**asdict(mutant), **row, **outcome}
        del row["code"]
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(mutant.name, row["status"], row["seconds"], "s", row.get("by", "")[:150], file=TOLD, flush=True)

    for mutant in mutants:
        if not tests[mutant.name]:
            put(mutant, time.time(), {"status": "no test"})
    left = [mutant for mutant in mutants if tests[mutant.name]]
    quick = [mutant for mutant in left if not any(_meets(mutant, c["import"]) for c in charts.values())]
    files = list(dict.fromkeys(name for mutant in quick for name in tests[mutant.name]))
    if quick:
        done = fork(lambda: _served(files, quick, tests, put), 36000)
        if done.get("status") != "served":
            raise RuntimeError(str(done))
        left = [mutant for mutant in left if mutant not in quick or mutant.name in done["refused"]]
    for mutant in left:
        begun, wanted = time.time(), tests[mutant.name]
        limit = 120 + 20 * sum(sum(times.values()) for times in wanted.values())
        put(mutant, begun, fork(lambda mutant=mutant, wanted=wanted: _tried(mutant, wanted), limit))


def _served(files: list[str], mutants: list[Mutant], tests: dict, put: Callable) -> dict[str, Any]:
    """Imports the test files once, then a fork for each mutant. In a fork."""
    server = Server(mutants, tests, put)
    end = pytest.main([*files, *QUIET], plugins=[server])
    if end != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {end!r}")
    return {"status": "served", "refused": server.refused}


class Server:
    """A plugin of pytest that collects the tests, and runs them for each mutant in a fork."""

    def __init__(self, mutants: list[Mutant], tests: dict, put: Callable) -> None:
        self.mutants, self.tests, self.put = mutants, tests, put
        self.refused: list[str] = []
        self.by = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.by:
            self.by = report.nodeid

    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        live: dict[CodeType, list[FunctionType]] = {}
        for thing in gc.get_objects():
            if type(thing) is FunctionType and thing.__code__.co_filename.startswith(str(ROOT / "resode")):
                live.setdefault(thing.__code__, []).append(thing)
        gc.freeze()
        for mutant in self.mutants:
            begun = time.time()
            changes = _changes(mutant, live) if mutant.code else []
            if changes is None:
                self.refused.append(mutant.name)
                continue
            times = {test: s for chosen in self.tests[mutant.name].values() for test, s in chosen.items()}
            limit = 120 + 20 * sum(times.values())
            chosen = [(items[test], times[test]) for test in sorted(times, key=times.__getitem__)]
            self.put(mutant, begun, fork(lambda c=chosen, e=changes: self.tried(c, e), limit))
        return True

    def tried(self, chosen: list, changes: list[tuple[FunctionType, CodeType]]) -> dict[str, Any]:
        for function, code in changes:
            function.__code__ = code
        _limit_memory()
        for (item, seconds), following in itertools.zip_longest(chosen, chosen[1:]):
            signal.setitimer(signal.ITIMER_PROF, 4 + 6 * seconds)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following and following[0])
            if self.by:
                return {"status": "killed", "by": self.by}
        return {"status": "survived"}


def _changes(mutant: Mutant, live: dict[CodeType, list[FunctionType]]) -> list[tuple] | None:
    """The functions whose code the mutant changes, with their new code; None where that is not all of the change."""
    path = str(ROOT / mutant.module)

    def parts(code: CodeType) -> list[CodeType]:
        return [const for const in code.co_consts if isinstance(const, CodeType)]

    def shell(code: CodeType) -> tuple:
        *first, constants = essence(code)
        return (*first, [const for const in constants if isinstance(const[0], str)])

    def compare(old: CodeType, new: CodeType) -> list[tuple] | None:
        if essence(old) == essence(new):
            return []
        if old in live and old.co_freevars == new.co_freevars:
            return [(function, new) for function in live[old]]
        if len(parts(old)) != len(parts(new)):
            return None
        inner = [compare(*pair) for pair in zip(parts(old), parts(new), strict=True)]
        own = shell(old) == shell(new)  # of a module or a class: its functions alone may differ
        return [change for found in inner for change in found or ()] if own and None not in inner else None

    sources = ((ROOT / mutant.module).read_text(), mutant.code)
    return compare(*(compile(source, path, "exec", dont_inherit=True) for source in sources)) or None


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends this process, also within a long call


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
        signal.setitimer(signal.ITIMER_PROF, 4 + 6 * self.seconds[item.nodeid])
        return (yield)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.by = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed:
            self.by = f"{report.nodeid} (import)"


def _tried(mutant: Mutant, tests: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Runs tests on the mutated source. In a fork."""
    if mutant.code:
        sys.meta_path.insert(0, Mutated(mutant.module, mutant.code))
    _limit_memory()
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
    answer, log = (STORE / f"{name}.{os.getpid()}" for name in ("answer", "output"))
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
