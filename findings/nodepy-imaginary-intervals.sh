#!/usr/bin/env bash
# nodepy 1.1.1: the imaginary stability intervals of Tsit5 and of PD8 are wrong by rounding.
#
# A guess: with mode='exact', the default, imaginary_stability_interval() of the package's own coefficients is right
# to a few digits: for Tsit5 |R(iy)| <= 1 for y up to 0.478, for PD8 (Prince and Dormand's method of order 8) for no y
# > 0, because |R(iy)|^2 = 1 + 5e-8 y^10 + ... there.
# Behaviour: it gives 0 for Tsit5 and 0.105 for PD8. Coefficients of |R(iy)|^2 - 1 that vanish by the order conditions
# are 1e-17 or so in the stored decimals, with either sign, and decide near y = 0. DP5's 0.997 and RK44's 2.828 are
# right.
#
# Installs nodepy==1.1.1 six==1.17.0 numpy==2.3.5 in a temporary folder, and fails where the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nodepy==1.1.1 six==1.17.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from nodepy import rk

lengths = {name: float(rk.loadRKM(name).imaginary_stability_interval()) for name in ("Tsit5", "PD8", "DP5", "RK44")}


def growth(name, y):
    """|R(iy)|^2 - 1 of a step, by its stages."""
    method, z, stages = rk.loadRKM(name), 1j * y, []
    for i in range(len(method)):
        stages.append(1 + z * sum(complex(method.A[i, j]) * stages[j] for j in range(i)))
    return abs(1 + z * sum(complex(b) * k for b, k in zip(method.b, stages))) ** 2 - 1


print(f"nodepy {version('nodepy')}: {lengths}; |R(iy)|^2 - 1 of Tsit5 at y = 0.4: {growth('Tsit5', 0.4):.2e}, at 0.5: "
      f"{growth('Tsit5', 0.5):.2e}, of PD8 at y = 0.5: {growth('PD8', 0.5):.2e}")
assert growth("Tsit5", 0.4) < -1e-8 and growth("Tsit5", 0.5) > 1e-8 and growth("PD8", 0.5) > 1e-12
assert lengths["Tsit5"] == 0 and 0.05 < lengths["PD8"] < 0.2
PYTHON
