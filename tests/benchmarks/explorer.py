"""How long the explorer's page takes to follow the hand: `python -m tests.benchmarks.explorer`.

Script time in headless Chromium with 2,000 eigenvalues of eight blocks, at 1,200 by 900 pixels.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from resode.explorer import NamedSpectrum, explorer_page
from tests.test_explorer import in_page

METHODS = ("euler", "rk4", "dopri8", "radau5", "rkl2_6")
SCRIPT = """
const now = () => page.performance.now();
const found = {};
for (const name of NAMES) {
  const begun = now();
  set('method', name);
  const limits = now() - begun;
  const times = [];
  for (let n = 0; n < 60; n++) {
    const start = now();
    at('eta').value = -1 + n / 40;
    at('eta').dispatchEvent(new page.Event('input'));
    page.draw();
    times.push(now() - start);
  }
  times.sort((a, b) => a - b);
  const start = now();
  at('fit').click();
  page.draw();
  found[name] = [times[0], times[30], limits, now() - start];
}
done(found);"""


def main() -> None:
    """Print a row a method."""
    rng = np.random.default_rng(0)
    spectra = []
    for n in range(8):
        matrix = rng.normal(size=(250, 250)) / 16 - np.eye(250) * (1.05 + 0.15 * n)
        spectra.append(NamedSpectrum(f"block {n}", 0.5, tuple(np.linalg.eigvals(matrix).tolist())))
    page = explorer_page(spectra, methods=("euler", "rk4", "rkl2_6"))
    with tempfile.TemporaryDirectory() as folder:
        found = in_page(page, Path(folder), SCRIPT.replace("NAMES", str(list(METHODS))))
    print(f"load {os.getloadavg()[0]:.1f}; milliseconds")
    print("method     least  median  limits  regions")
    for name, times in found.items():
        print(f"{name:8}" + "".join(f"{t:8.1f}" for t in times))


if __name__ == "__main__":
    main()
