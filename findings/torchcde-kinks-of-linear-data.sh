#!/usr/bin/env bash
# torchcde 0.2.5: at its defaults `cdeint` along linear interpolation misses rtol=1e-4 by factors of hundreds.
#
# A guess: cdeint's default solver is adaptive with rtol=1e-4, so along data that it interpolated itself it ends
# within a few times that.
# Behaviour: the derivative of linear interpolation jumps at each knot, the default solver is not told of the knots,
# and steps over kinks pass with errors of 100 to 2,000 times the tolerance, here against the exact product of matrix
# exponentials. options={'jump_t': X.grid_points} brings them to about 1 to 5; nothing warns without.
#
# Installs torch==2.13.0 torchdiffeq==0.2.5 torchcde==0.2.5 torchsde==0.2.6 numpy==2.3.5 scipy==1.16.3 in a temporary folder, and fails where the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchdiffeq==0.2.5 torchcde==0.2.5 torchsde==0.2.6 numpy==2.3.5 scipy==1.16.3
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torchcde

F64 = torch.float64


def missed(n, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, 2, generator=generator, dtype=F64)
    a = torch.randn(2, 3, 3, generator=generator, dtype=F64) / 2
    path = torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x))
    start = exact = torch.ones(1, 3, dtype=F64)
    for step in x[0].diff(dim=0):
        exact = exact @ torch.linalg.matrix_exp(torch.einsum("c,cij->ij", step, a)).T
    settings = {"options": {"jump_t": path.grid_points}, "method": "dopri5", "rtol": 1e-4, "atol": 1e-6} if options else {}
    end = torchcde.cdeint(path, lambda t, z: torch.einsum("cij,bj->bic", a, z), start, path.interval, adjoint=False,
                          **settings)[:, -1]
    return ((end - exact).norm() / exact.norm()).item() / 1e-4


default = [missed(n, seed) for n, seed in ((10, 0), (20, 1), (50, 2))]
told = [missed(n, seed, jump_t=True) for n, seed in ((10, 0), (20, 1), (50, 2))]
print(f"torchcde {torchcde.__version__}: relative error over 1e-4 with 10, 20, 50 knots: {[round(e, 1) for e in default]} by "
      f"default, {[round(e, 1) for e in told]} with jump_t")
assert min(default) > 30 and max(default) > 500 and max(told) < 20
PYTHON
