"""The whole campaign, part by part, with a table at the end: python -m tests.trust [PART …].

What a part found stands in .trust/PART.txt; a part that has one is not done again (`--again` does).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(".trust")
PYTEST = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider")
PARTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "properties": ((*PYTEST, "tests/trust/test_public.py"), {"TRUST_EXAMPLES": "40"}),
    "arguments": (("-m", "tests.trust.hostile"), {}),
    "laws": ((*PYTEST, "tests/trust/test_laws.py"), {"TRUST_EXAMPLES": "40"}),
    "faults": (
        (*PYTEST, "tests/trust/test_faults.py", "tests/test_run_trouble.py"),
        {"TRUST_EXAMPLES": "40"},
    ),
    "kills": (("-m", "tests.benchmarks.kills", "20"), {}),
    "files": (
        (*PYTEST, "tests/test_hostile_files.py", "tests/test_formats.py", "tests/test_archives.py"),
        {},
    ),
    "soak": (("-m", "tests.trust.soak"), {}),
    "fuzzing": (("-m", "tests.trust.fuzz", "20", ".trust/fuzz"), {}),
    "coverage": (("-m", "coverage", "run", "--source=resode", *PYTEST[:3], "tests", "resode"), {}),
}
"""Name -> arguments of Python, and variables of the environment."""


def done(name: str, again: bool) -> list[str]:
    """What a part printed, from the file of an earlier call where there is one."""
    file = FOLDER / f"{name}.txt"
    if again or not file.exists():
        arguments, environment = PARTS[name]
        begun = time.monotonic()
        place = os.pathsep.join(
            [str(Path("tests").resolve()), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
        )
        told = subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": place} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if name == "fuzzing":
            told.stdout += "\n" + (FOLDER / "fuzz" / "found.json").read_text()
        if name == "coverage":
            shown = [sys.executable, "-m", "coverage", "report", "--format=total"]
            total = subprocess.run(shown, stdout=subprocess.PIPE, text=True).stdout.strip()
            told.stdout += f"\nlines covered: {total} %"
        text = f"{told.stdout}\nexit {told.returncode} after {time.monotonic() - begun:.0f} s\n"
        file.with_suffix(".part").write_text(text)
        os.replace(file.with_suffix(".part"), file)
    return [line for line in file.read_text().splitlines() if line.strip()]


def main() -> int:
    wanted = [argument for argument in sys.argv[1:] if argument != "--again"] or list(PARTS)
    FOLDER.mkdir(exist_ok=True)
    failed = 0
    for name in wanted:
        lines = done(name, "--again" in sys.argv[1:])
        failed += not lines[-1].startswith("exit 0 ")
        shown = lines[-5:] if name in ("soak",) else lines[-2:]
        print(f"{name:11} " + "\n            ".join(shown), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
