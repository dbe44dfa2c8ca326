r"""Butcher tableaus: every Runge-Kutta method of resode, as data.

One step of size η on x' = f(t, x) with a tableau (A, b, c) is

    k_i = f(t + c_i η, x + η Σ_j a_ij k_j),        x⁺ = x + η Σ_i b_i k_i.

The same numbers advance the state (`resode.solve`), are the residual block when the method is
Euler (`resode.ResidualStack`), and give the stability function R(z) = 1 + z bᵀ(I − zA)⁻¹1 that
limits the step (`resode.stability`). A new method is one entry in this file.

Coefficients are exact fractions where the method has them. Tsitouras' method is stored
to 36 digits and Prince and Dormand's eighth-order one as its published fractions: both meet their
order conditions beyond float64, though not exactly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from fractions import Fraction as Q
from functools import lru_cache
from math import isqrt, sqrt

from resode.checks import did_you_mean

Number = Q | float
"""A coefficient: an exact fraction, or a float where the method is irrational."""


Row = tuple[tuple[int, float], ...]
"""The non-zero coefficients of a combination of stages: (stage, coefficient)."""


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: hashing fractions is slow
class ButcherTableau:
    """A Runge-Kutta method as data.

    Args:
        name: how users ask for it.
        a: stage coefficients A, `stages` rows of `stages` numbers (dimensionless, as b and c).
        b: weights of the step, `stages` numbers.
        c: stage times as fractions of the step, `stages` numbers, the row sums of A.
        b_error: b − b̂ with b̂ the embedded method's weights, or None without one; the local
            error estimate is η Σ b_error_i k_i.
        order: order of the solution that is advanced with b.
        stages, explicit, fsal: derived from A and b where None, checked against them where given.
            `explicit`: A is strictly lower triangular. `fsal` (first same as last): the last stage
            is f at the step's end, so it is the next step's first stage.
        source: where the coefficients were published.
        interpolant: the method's own dense output, or None: row i holds the coefficients of
            θ, θ², … in b_i(θ), so that x(t + θη) ≈ x + η Σ b_i(θ) k_i for 0 ≤ θ ≤ 1. With `dense_a` it has
            a row for each stage, then one for f at the step's end and one for each row of `dense_a`.
        dense_a: coefficients of further stages that only the interpolant needs, or None: each row over the
            stages, f at the step's end and the rows before it; its time is its sum.
        rational: (numerator, denominator) of R(z), lowest degree first, where it is known exactly
            although the coefficients are irrational.
        error_start: weight of f at the step's start in the error estimate, of a method that has no stage
            there.
        recurrence: (μ_j, ν_j, μ̃_j, γ̃_j) for j = 1 … stages of a method whose stages Y_j = x + d_j follow
            d_j = μ_j d_{j−1} + ν_j d_{j−2} + η (μ̃_j f(Y_{j−1}) + γ̃_j f(x)) with d₀ = 0, and x⁺ = Y_stages;
            a step is taken and R evaluated by it, because sums over A cancel where there are many stages.
        recurrence_weights: w_j for j = 1 … stages where x⁺ = x + Σ w_j d_j instead.
        error_filter: γ of the estimate (I − ηγJ)⁻¹ η Σ b_error_i k_i, which stays bounded on stiff parts of
            the solution, where the sum alone grows with ηJ; None for the sum alone.

    Raises:
        ValueError: the parts disagree; the message names the first that does.

    Source:
        Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, II.1.

    Example:
        >>> heun = ButcherTableau("my_heun", a=((0, 0), (1, 0)), b=(Q(1, 2), Q(1, 2)), c=(0, 1),
        ...                       order=2, source="Heun (1900)")
        >>> heun.stages, heun.explicit, heun.fsal
        (2, True, False)
    """

    name: str
    a: tuple[tuple[Number, ...], ...]
    b: tuple[Number, ...]
    c: tuple[Number, ...]
    b_error: tuple[Number, ...] | None = None
    order: int = 1
    stages: int | None = None
    explicit: bool | None = None
    fsal: bool | None = None
    source: str = ""
    interpolant: tuple[tuple[Number, ...], ...] | None = None
    dense_a: tuple[tuple[Number, ...], ...] | None = None
    rational: tuple[tuple[Q, ...], tuple[Q, ...]] | None = None
    error_start: Number | None = None
    error_filter: Number | None = None
    recurrence: tuple[tuple[Q, Q, Q, Q], ...] | None = None
    recurrence_weights: tuple[Q, ...] | None = None

    # What a step reads: the non-zero coefficients as floats.
    a_rows: tuple[Row, ...] = field(init=False, repr=False)
    b_row: Row = field(init=False, repr=False)
    error_row: Row = field(init=False, repr=False)
    dense_rows: tuple[Row, ...] = field(init=False, repr=False)
    stage_times: tuple[float, ...] = field(init=False, repr=False)
    recurrence_rows: tuple[tuple[float, ...], ...] = field(init=False, repr=False)
    recurrence_sum: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stages = len(self.b)
        further = 0 if self.dense_a is None else 1 + len(self.dense_a)
        shapes = {
            "a": len(self.a),
            "c": len(self.c),
            **{f"row {i} of a": len(row) for i, row in enumerate(self.a)},
            **({} if self.b_error is None else {"b_error": len(self.b_error)}),
            **({} if self.interpolant is None else {"interpolant": len(self.interpolant) - further}),
        }
        for part, length in shapes.items():
            if length != stages:
                raise ValueError(
                    f"tableau {self.name!r}: every part must have as many entries as b, "
                    f"which has {stages}; {part} has {length}."
                )
        for i, row in enumerate(self.a):
            if abs(sum(row) - self.c[i]) > 1e-14 * max(1, stages / 10):
                raise ValueError(
                    f"tableau {self.name!r}: c must be the row sums of a; "
                    f"row {i} of a sums to {float(sum(row))}, c is {float(self.c[i])}."
                )
        if abs(sum(self.b) - 1) > 1e-14 * max(1, stages / 10):
            raise ValueError(f"tableau {self.name!r}: b must sum to 1, got {float(sum(self.b))}.")
        derived = {
            "stages": stages,
            "explicit": all(self.a[i][j] == 0 for i in range(stages) for j in range(i, stages)),
            "fsal": tuple(self.a[-1]) == tuple(self.b) and abs(self.c[-1] - 1) < 1e-14 and stages > 1,
        }
        for name, value in derived.items():
            given = getattr(self, name)
            if given is not None and given != value:
                raise ValueError(f"tableau {self.name!r}: {name} is {value} by a and b, not {given}.")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "a_rows", tuple(map(_row, self.a)))
        object.__setattr__(self, "b_row", _row(self.b))
        object.__setattr__(self, "error_row", _row(self.b_error or ()))
        object.__setattr__(self, "dense_rows", tuple(map(_row, self.dense_a or ())))
        object.__setattr__(self, "stage_times", tuple(map(float, self.c)))
        rows = tuple(tuple(map(float, row)) for row in self.recurrence or ())
        object.__setattr__(self, "recurrence_rows", rows)
        weights = tuple(map(float, self.recurrence_weights or ()))
        object.__setattr__(self, "recurrence_sum", weights or (0.0,) * (len(rows) - 1) + (1.0,) * bool(rows))

    def __repr__(self) -> str:
        kind = "explicit" if self.explicit else "implicit"
        return f"<{self.name}: {kind} Runge-Kutta method of order {self.order}, {self.stages} stages>"

    @property
    def adaptive(self) -> bool:
        """Whether the method carries an error estimate that can steer its step."""
        return self.b_error is not None

    @property
    def looks_ahead(self) -> bool:
        """Whether a stage lies beyond the step's end, as one of kvaerno5's does."""
        return max(self.stage_times) > 1 + 1e-12

    @property
    def error_power(self) -> int:
        """The power of the step that the error estimate is proportional to."""
        if self.explicit or self.b_error is None:
            return self.order
        power = 1  # while Σ e_i c_i^(power − 1) = 0; f at the start counts in the first of these sums alone
        sums = float(sum(self.b_error)) + float(self.error_start or 0)
        while abs(sums) < 1e-9 and power <= self.order:
            sums = sum(float(e) * c**power for e, c in zip(self.b_error, self.stage_times, strict=True))
            power += 1
        return power


def _row(numbers: Sequence[Number]) -> Row:
    return tuple((i, float(x)) for i, x in enumerate(numbers) if x != 0)


def _explicit(
    name: str,
    rows: str,
    b: str,
    order: int,
    source: str,
    *,
    b_hat: str | None = None,
    b_error: str | None = None,
    interpolant: str | None = None,
    dense_a: str | None = None,
) -> ButcherTableau:
    """An explicit tableau from tables as text: of A the non-zero triangle, row i holds a_i1 … a_i,i-1."""
    (weights,) = _table(b)
    a = tuple((*row, *[Q(0)] * (len(weights) - len(row))) for row in ((), *_table(rows)))
    error = None if b_error is None else _table(b_error)[0]
    if b_hat is not None:
        error = tuple(x - y for x, y in zip(weights, _table(b_hat)[0], strict=True))
    return ButcherTableau(
        name=name,
        a=a,
        b=weights,
        c=tuple(sum(row, Q(0)) for row in a),
        b_error=error,
        order=order,
        source=source,
        interpolant=None if interpolant is None else _table(interpolant),
        dense_a=None if dense_a is None else _table(dense_a),
    )


def _table(text: str) -> tuple[tuple[Q, ...], ...]:
    """Rows, with semicolons between them, of integers, fractions and decimals: each exactly as it stands."""
    return tuple(tuple(map(Q, row.split())) for row in text.split(";") if row.strip())


_HNW = "Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I (1993)"
_HW = "Hairer & Wanner, Solving Ordinary Differential Equations II (1996)"


# Dense output of order 7 for dopri8, continuously differentiable, solved from the order conditions. Its 13
# stages and f at the step's end reach order 5 alone; three further stages do where the first of them is at
# this one time, while those of the other two are free (0.65, 0.375).
_DOPRI8_DENSE_A = """
0.042592905157956114 0 0 0 0 -0.012513416658256414 0.2298158328773131 0.12184101324361385
-0.09671855414062712 0.02455490677932793 0.0035589767590403568 -0.0012449643985955369 0.011726099419349222
-0.012595035543912352;
0.04169835935507749 0 0 0 0 0.07728839863003316 0.230622665709898 0.10220588389857532 0.2008085183184729
-0.05356799238394521 0.022298342289848293 -0.13326029919366286 0.09374347464437997 0.028756038653577218
0.03940661007774569;
0.045239697151271234 0 0 0 0 0.16598078346783976 0.2173068110579465 -0.10946124278524438 0.07464190748465592
0.022185318033506513 0.003389863656356423 0.017147316624201988 -0.009812795893863545 -0.00874506612059546
0.010394025770493337 -0.0532666184465683
"""
_DOPRI8_INTERPOLANT = """
1 -8.009430476178714 32.005824711629685 -70.26831988409201 85.3909212826233 -53.66079694060503
13.583548797764301;
0 0 0 0 0 0 0;
0 0 0 0 0 0 0;
0 0 0 0 0 0 0;
0 0 0 0 0 0 0;
0 10.762218850519488 -76.45183850336034 218.7233702553389 -316.2622164988442 227.96241569223704
-64.7894021245021;
0 18.155058732570794 -115.00695510595095 311.6236111421709 -425.82902622519333 287.71493543523206
-76.41831117162828;
0 2.110532008210344 -1.407021338806899 0 0 0 0;
0 3.4889314006191756 -31.753755504959674 80.5030455510643 -93.24489635272019 49.23270377228907
-8.98578848010715;
0 5.032775704517764 -33.67937741596115 114.83310595256222 -201.67914108557136 173.03653667116785
-56.88333679579304;
0 1.4927252796581607 -14.017457814686034 52.532157159014105 -97.26998822077528 86.65702220253245
-29.236271123233276;
0 -3.34108255735512 30.350650781535233 -108.73422784272218 194.4469536716745 -169.0551809258178
56.09477733393253;
0 2.665512226220702 -25.99951286317384 97.47531980934436 -180.13946617689027 160.27346324733932
-54.025316242840276;
0 -0.021841667201152857 2.2564432975879636 -13.875010163938104 33.078880255908544 -34.449294874348865
13.010823151991616;
0 -28.444203343650575 268.03762682737005 -904.9728333176292 1414.4476253701462 -1043.9062413786319
294.8380258423955;
0 -10.233368614289615 79.92798570347907 -266.86624210440397 446.0339725303351 -360.01431848992667
111.151970974806;
0 6.342172456358747 -114.2626127747031 489.02602344329074 -858.9736185506931 676.2087555885325
-198.34072016278583
"""

_EXPLICIT = [
    _explicit("euler", "", "1", 1, "Euler, Institutionum calculi integralis (1768)"),
    _explicit("midpoint", "1/2", "0 1", 2, "Runge (1895); " + _HNW + ", II.1"),
    _explicit("heun2", "1", "1/2 1/2", 2, "Heun (1900); " + _HNW + ", II.1"),
    _explicit("ralston2", "2/3", "1/4 3/4", 2, "Ralston, Math. Comp. 16 (1962)"),
    _explicit("kutta3", "1/2; -1 2", "1/6 2/3 1/6", 3, "Kutta (1901), third order"),
    _explicit("heun3", "1/3; 0 2/3", "1/4 0 3/4", 3, "Heun (1900); " + _HNW + ", II.1"),
    _explicit("ssprk3", "1; 1/4 1/4", "1/6 1/6 2/3", 3, "Shu & Osher, J. Comput. Phys. 77 (1988)"),
    _explicit(
        "rk4",
        "1/2; 0 1/2; 0 0 1",
        "1/6 1/3 1/3 1/6",
        4,
        "Kutta (1901), the classic method; " + _HNW + ", II.1",
    ),
    _explicit(
        "rk4_38",
        "1/3; -1/3 1; 1 -1 1",
        "1/8 3/8 3/8 1/8",
        4,
        "Kutta (1901), the 3/8 rule (torchdiffeq's rk4); " + _HNW + ", II.1",
    ),
    _explicit(
        "bosh3",
        "1/2; 0 3/4; 2/9 1/3 4/9",
        "2/9 1/3 4/9 0",
        3,
        "Bogacki & Shampine, Appl. Math. Lett. 2 (1989)",
        b_hat="7/24 1/4 1/3 1/8",
    ),
    _explicit(
        "fehlberg45",
        """
        1/4;
        3/32 9/32;
        1932/2197 -7200/2197 7296/2197;
        439/216 -8 3680/513 -845/4104;
        -8/27 2 -3544/2565 1859/4104 -11/40
        """,
        "16/135 0 6656/12825 28561/56430 -9/50 2/55",
        5,
        "Fehlberg, NASA TR R-315 (1969), advanced with the fifth-order weights",
        b_hat="25/216 0 1408/2565 2197/4104 -1/5 0",
    ),
    _explicit(
        "dopri5",
        """
        1/5;
        3/40 9/40;
        44/45 -56/15 32/9;
        19372/6561 -25360/2187 64448/6561 -212/729;
        9017/3168 -355/33 46732/5247 49/176 -5103/18656;
        35/384 0 500/1113 125/192 -2187/6784 11/84
        """,
        "35/384 0 500/1113 125/192 -2187/6784 11/84 0",
        5,
        "Dormand & Prince, J. Comput. Appl. Math. 6 (1980); dense output: Shampine, Math. Comp. 46 (1986)",
        b_hat="5179/57600 0 7571/16695 393/640 -92097/339200 187/2100 1/40",
        interpolant="""
        1 -8048581381/2820520608 8663915743/2820520608 -12715105075/11282082432;
        0 0 0 0;
        0 131558114200/32700410799 -68118460800/10900136933 87487479700/32700410799;
        0 -1754552775/470086768 14199869525/1410260304 -10690763975/1880347072;
        0 127303824393/49829197408 -318862633887/49829197408 701980252875/199316789632;
        0 -282668133/205662961 2019193451/616988883 -1453857185/822651844;
        0 40617522/29380423 -110615467/29380423 69997945/29380423
        """,
    ),
    _explicit(
        "tsit5",
        """
        0.161;
        -0.00848065549235698854442687425023077468 0.335480655492356988544426874250230775;
        2.89715305710549343213043259419293876 -6.35944848997507484314815991238382563
        4.36229543286958141101772731819088686;
        5.32586482843925660442887792084051132 -11.7488835640628278777471703397857730
        7.49553934288983620830460478456435816 -0.0924950663617552492565020793320719161;
        5.86145544294642002865925148698264789 -12.9209693178471092917061186817833594
        8.15936789857615864318040079453925349 -0.0715849732814009972245305425258297387
        -0.0282690503940683829090030572127122415;
        0.0964607668180652295181673131651287633 0.01 0.479889650414499574775249532290596520
        1.37900857410374189319227482185687277 -3.29006951543608067990104758571136385
        2.32471052409977398241535591839876580
        """,
        """
        0.0964607668180652295181673131651287633 0.01 0.479889650414499574775249532290596520
        1.37900857410374189319227482185687277 -3.29006951543608067990104758571136385
        2.32471052409977398241535591839876580 0
        """,
        5,
        "Tsitouras, Comput. Math. Appl. 62 (2011)",
        b_error="""
        -0.00178001105222577144337855060753953478 -0.000816434459656746903223636063354686240
        0.00788087801026199601031472767252630424 -0.144711007173262907537165147972635117
        0.582357165452555225019937610652042179 -0.458082105929186946661636518832554297 1/66
        """,
        # b_i(θ) was published factored; these are the products, lowest power of θ first.
        interpolant="""
        1.0 -2.763706197274826 2.9132554618219126 -1.0530884977290216;
        0.0 0.13169999999999998 -0.2234 0.1017;
        0.0 3.9302962368947516 -5.941033872131505 2.490627285651252793;
        0.0 -12.411077166933676 30.33818863028232 -16.54810288924490272;
        0.0 37.50931341651104 -88.1789048947664 47.37952196281928122;
        0.0 -27.896526289197286 65.09189467479366 -34.87065786149660974;
        0.0 1.5 -4.0 2.5
        """,
    ),
    _explicit(
        "dopri8",
        """
        1/18;
        1/48 1/16;
        1/32 0 3/32;
        5/16 0 -75/64 75/64;
        3/80 0 0 3/16 3/20;
        29443841/614563906 0 0 77736538/692538347 -28693883/1125000000 23124283/1800000000;
        16016141/946692911 0 0 61564180/158732637 22789713/633445777 545815736/2771057229
        -180193667/1043307555;
        39632708/573591083 0 0 -433636366/683701615 -421739975/2616292301 100302831/723423059
        790204164/839813087 800635310/3783071287;
        246121993/1340847787 0 0 -37695042795/15268766246 -309121744/1061227803 -12992083/490766935
        6005943493/2108947869 393006217/1396673457 123872331/1001029789;
        -1028468189/846180014 0 0 8478235783/508512852 1311729495/1432422823 -10304129995/1701304382
        -48777925059/3047939560 15336726248/1032824649 -45442868181/3398467696 3065993473/597172653;
        185892177/718116043 0 0 -3185094517/667107341 -477755414/1098053517 -703635378/230739211
        5731566787/1027545527 5232866602/850066563 -4093664535/808688257 3962137247/1805957418
        65686358/487910083;
        403863854/491063109 0 0 -5068492393/434740067 -411421997/543043805 652783627/914296604
        11173962825/925320556 -13158990841/6184727034 3936647629/1978049680 -160528059/685178525
        248638103/1413531060 0
        """,
        """
        14005451/335480064 0 0 0 0 -59238493/1068277825 181606767/758867731 561292985/797845732
        -1041891430/1371343529 760417239/1151165299 118820643/751138087 -528747749/2220607170 1/4
        """,
        8,
        "Prince & Dormand, J. Comput. Appl. Math. 7 (1981), RK8(7)13M",
        b_hat="""
        13451932/455176623 0 0 0 0 -808719846/976000145 1757004468/5645159321 656045339/265891186
        -3867574721/1518517206 465885868/322736535 53011238/667516719 2/45 0
        """,
        dense_a=_DOPRI8_DENSE_A,
        interpolant=_DOPRI8_INTERPOLANT,
    ),
]

_S2, _S3, _S6 = sqrt(2), sqrt(3), sqrt(6)


def _collocation(c: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Dense output of a collocation method: b_i(θ) = ∫₀^θ ℓ_i, ℓ_i Lagrange's polynomials of the nodes c."""
    rows = []
    for i, node in enumerate(c):
        poly = [1.0]
        for other in (*c[:i], *c[i + 1 :]):  # times (θ − other) / (node − other)
            shifted, kept = [0.0, *poly], [*poly, 0.0]
            poly = [(p - other * q) / (node - other) for p, q in zip(shifted, kept, strict=True)]
        rows.append(tuple(p / (n + 1) for n, p in enumerate(poly)))
    return tuple(rows)


def _esdirk(
    name: str,
    gamma: float,
    rows: Sequence[Sequence[float]],
    order: int,
    source: str,
    *,
    b_hat: Sequence[float] | None = None,
    error_filter: float | None = None,
    rational: tuple[tuple[Q, ...], tuple[Q, ...]] | None = None,
    interpolant: tuple[tuple[float, ...], ...] | None = None,
) -> ButcherTableau:
    """A stiffly accurate method with an explicit first stage and γ on the diagonal below it.

    Row i of `rows` holds what stands before γ. The embedded method is the row before the last one where b_hat
    is None: stiffly accurate too.
    """
    stages = len(rows) + 1
    lower = [(0.0,), *((*row, gamma) for row in rows)]
    a = tuple((*row, *(0.0,) * (stages - len(row))) for row in lower)
    b_hat = a[-2] if b_hat is None else b_hat
    return ButcherTableau(
        name=name,
        a=a,
        b=a[-1],
        c=tuple(sum(row) for row in a),
        b_error=tuple(x - y for x, y in zip(a[-1], b_hat, strict=True)),
        order=order,
        source=source,
        error_filter=error_filter,
        rational=rational,
        interpolant=interpolant,
    )


_G2 = 1 - _S2 / 2  # sdirk2: R(z) has order 2 and vanishes at infinity
_Q2 = 1 - Q(isqrt(2 * 10**80), 10**40) / 2
"""The same to 40 digits, rounded up: |R(iy)| ≤ 1 holds for every γ from there on, and for no smaller one."""
_L2 = ((Q(1), 1 - 2 * _Q2), (Q(1), -2 * _Q2, _Q2**2))
"""R of sdirk2 and of trbdf2, (1 + (1 − 2γ)z) / (1 − γz)²."""
_G3 = 0.4358665215084589994  # kvaerno3: a root of 6γ³ − 18γ² + 9γ − 1, for the same with order 3
_GR = 1 / (3 + 3 ** (2 / 3) - 3 ** (1 / 3))  # radau5: the real eigenvalue of A
_RADAU_ERROR = (-0.4282982941153681, 0.24503907438491653, -0.0916296098652258)

_IMPLICIT = [
    ButcherTableau("implicit_euler", ((Q(1),),), (Q(1),), (Q(1),), order=1, source=_HW + ", IV.3"),
    ButcherTableau(
        "implicit_midpoint",
        ((Q(1, 2),),),
        (Q(1),),
        (Q(1, 2),),
        order=2,
        source=_HW + ", IV.3",
        interpolant=((Q(1),),),
    ),
    ButcherTableau(
        "trapezoid",
        ((Q(0), Q(0)), (Q(1, 2), Q(1, 2))),
        (Q(1, 2), Q(1, 2)),
        (Q(0), Q(1)),
        order=2,
        source=_HW + ", IV.3",
    ),
    ButcherTableau(
        "gauss4",
        ((1 / 4, 1 / 4 - _S3 / 6), (1 / 4 + _S3 / 6, 1 / 4)),
        (Q(1, 2), Q(1, 2)),
        (1 / 2 - _S3 / 6, 1 / 2 + _S3 / 6),
        order=4,
        source="Hammer & Hollingsworth (1955); " + _HW + ", IV.5",
        rational=((Q(1), Q(1, 2), Q(1, 12)), (Q(1), Q(-1, 2), Q(1, 12))),
        interpolant=_collocation((1 / 2 - _S3 / 6, 1 / 2 + _S3 / 6)),
    ),
    ButcherTableau(
        "radau5",
        (
            ((88 - 7 * _S6) / 360, (296 - 169 * _S6) / 1800, (-2 + 3 * _S6) / 225),
            ((296 + 169 * _S6) / 1800, (88 + 7 * _S6) / 360, (-2 - 3 * _S6) / 225),
            ((16 - _S6) / 36, (16 + _S6) / 36, 1 / 9),
        ),
        ((16 - _S6) / 36, (16 + _S6) / 36, 1 / 9),
        ((4 - _S6) / 10, (4 + _S6) / 10, 1.0),
        order=5,
        source="Ehle (1969), Radau IIA; " + _HW + ", IV.5",
        rational=(
            (Q(1), Q(2, 5), Q(1, 20)),
            (Q(1), Q(-3, 5), Q(3, 20), Q(-1, 60)),
        ),
        # η (γ₀ f(t, x) + Σ e_i k_i) vanishes up to order 3 (Hairer & Wanner, IV.8, eq. 8.18: γ₀ is A's real
        # eigenvalue, and e A⁻¹ = γ₀ (−13 − 7√6, −13 + 7√6, −1) / 3).
        b_error=_RADAU_ERROR,
        error_start=_GR,
        error_filter=_GR,
        interpolant=_collocation(((4 - _S6) / 10, (4 + _S6) / 10, 1.0)),
    ),
    ButcherTableau(
        "sdirk2",
        ((_G2, 0.0), (1 - _G2, _G2)),
        (1 - _G2, _G2),
        (_G2, 1.0),
        b_error=(-_G2, _G2),  # b̂ = (1, 0)
        order=2,
        source="Alexander, SIAM J. Numer. Anal. 14 (1977)",
        error_filter=_G2,
        rational=_L2,
    ),
    _esdirk(
        "trbdf2",
        _G2,
        [[_G2], [_S2 / 4, _S2 / 4]],
        2,
        "Bank et al., IEEE Trans. CAD 4 (1985); error estimate: Hosea & Shampine, Appl. Numer. Math. 20 "
        "(1996)",
        b_hat=((4 - _S2) / 12, (4 + 3 * _S2) / 12, _G2 / 3),
        error_filter=_G2,
        rational=_L2,
    ),
    _esdirk(
        "kvaerno3",
        _G3,
        [
            [_G3],
            [(-4 * _G3**2 + 6 * _G3 - 1) / (4 * _G3), (1 - 2 * _G3) / (4 * _G3)],
            [
                (6 * _G3 - 1) / (12 * _G3),
                -1 / ((24 * _G3 - 12) * _G3),
                (-6 * _G3**2 + 6 * _G3 - 1) / (6 * _G3 - 3),
            ],
        ],
        3,
        "Kværnø, BIT 44 (2004), ESDIRK 3/2",
    ),
    _esdirk(
        "kvaerno5",
        0.26,
        [
            [0.26],
            [0.13, 0.84033320996790809],
            [0.22371961478320505, 0.47675532319799699, -0.06470895363112615],
            [0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998],
            [0.13855640231268224, 0.0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676],
            [
                0.13659751177640291,
                0.0,
                -0.05496908796538376,
                -0.04118626728321046,
                0.62993304899016403,
                0.06962479448202728,
            ],
        ],
        5,
        "Kværnø, BIT 44 (2004), ESDIRK 5/4",
        # Of order 4, with f as its slope at both ends, and least in what it misses of order 5 (in the mean
        # square over θ). A cubic through the ends errs by ten times the tolerance between them.
        interpolant=(
            (1.0, -2.128901672145751, 1.8041933913971178, -0.5386942074749628),
            (0.0, 0.0, 0.0, 0.0),
            (0.0, 0.4794091150396763, -1.1786945819408885, 0.6443163789358279),
            (0.0, -2.5724037534664306, 4.980062437800015, -2.448844951616796),
            (0.0, 3.561807532192784, -4.603882868424914, 1.6720083852222931),
            (0.0, 0.4055337841505934, -0.5325683903730767, 0.19665940070451204),
            (0.0, 0.25455499422912287, -0.4691099884582399, 0.47455499422911895),
        ),
    ),
]

METHODS: dict[str, ButcherTableau] = {t.name: t for t in (*_EXPLICIT, *_IMPLICIT)}
"""Every method by name; `get_tableau` knows those with any number of stages too."""


MOST_STAGES = 1000
"""Of a stabilised method."""


@lru_cache(maxsize=64)
def stabilised(family: str, stages: int) -> ButcherTableau:
    r"""An explicit method with as many stages as the real stability interval asks for.

    R is a shifted Chebyshev ("rkc1", "rkc2") or Legendre polynomial ("rkl1", "rkl2") of order 1 or 2. With s
    stages the interval is about 1.93 s², 0.653 (s² − 1), s² + s and (s² + s − 2)/2, for s evaluations of the
    field.

    Args:
        family: "rkc1" with damping ε = 1/20, "rkc2" with ε = 2/13, "rkl1" or "rkl2".
        stages: s, from 2 to `MOST_STAGES`.

    Source:
        Sommeijer, Shampine & Verwer, RKC, J. Comput. Appl. Math. 88 (1998); Hairer & Wanner II, IV.2, for
        rkc1; Meyer, Balsara & Aslam, J. Comput. Phys. 257 (2014), for rkl1 and rkl2.

    Example:
        >>> tableau = stabilised("rkl1", 3)
        >>> [str(w) for w in tableau.recurrence[0]]
        ['0', '0', '1/6', '0']
    """
    s, second = stages, family.endswith("2")
    j = range(s + 1)
    if family.startswith("rkc"):
        w0 = 1 + (Q(2, 13) if second else Q(1, 20)) / s**2
        t, dt, ddt = _chebyshev(w0, s)
        w1 = dt[s] / ddt[s] if second else t[s] / dt[s]
        b = [ddt[max(i, 2)] / dt[max(i, 2)] ** 2 if second else 1 / t[i] for i in j]
        start = [1 - b[i] * t[i] for i in j] if second else [Q(0)] * (s + 1)
        rise = [(2 * w0, Q(-1), 2 * w1)] * (s + 1)
        first = b[1] * w1
    else:
        w1 = Q(4, s * s + s - 2) if second else Q(2, s * s + s)
        b = [Q(m * m + m - 2, 2 * m * (m + 1)) if second else Q(1) for m in (max(i, 2) for i in j)]
        start = [1 - b[i] if second else Q(0) for i in j]
        rise = [(Q(2 * i - 1, i), Q(1 - i, i), Q(2 * i - 1, i) * w1) if i else (Q(0),) * 3 for i in j]
        first = b[1] * w1
    rows = [(Q(0), Q(0), first, Q(0))]
    for i in j[2:]:
        up, down, slope = rise[i]
        slope = slope * b[i] / b[i - 1]
        rows.append((up * b[i] / b[i - 1], down * b[i] / b[i - 2], slope, -start[i - 1] * slope))
    order = 2 if second else 1
    source = (
        "Sommeijer, Shampine & Verwer (1998)" if family.startswith("rkc") else "Meyer, Balsara & Aslam (2014)"
    )
    return of_recurrence(f"{family}_{s}", rows, None, order, source)


def of_recurrence(
    name: str, rows: Sequence[tuple[Q, Q, Q, Q]], weights: Sequence[Q] | None, order: int, source: str
) -> ButcherTableau:
    """The method whose steps a recurrence takes; see `ButcherTableau` for its rows and weights."""
    *a, last = _sums(rows)
    b = list(last) if weights is None else [0.0] * len(rows)
    for w, row in zip(weights or (), (*a[1:], last), strict=weights is not None):
        b = [x + float(w) * y for x, y in zip(b, row, strict=True)]
    for _ in range(2):  # sums of large terms: what they lost to rounding
        b[0] += 1.0 - sum(b)
    return ButcherTableau(
        name,
        tuple(a),
        tuple(b),
        tuple(map(sum, a)),
        order=order,
        source=source,
        recurrence=tuple(rows),
        recurrence_weights=None if weights is None else tuple(weights),
    )


def _chebyshev(w: Q, s: int) -> tuple[list[Q], list[Q], list[Q]]:
    """T_j(w), T_j'(w) and T_j''(w) for j = 0 … s, w ≥ 1, to 50 digits: exact ones would have thousands."""
    with localcontext(prec=50):
        x = Decimal(w.numerator) / w.denominator
        t, dt, ddt = [Decimal(1), x], [Decimal(0), Decimal(1)], [Decimal(0), Decimal(0)]
        for _ in range(s - 1):
            ddt.append(2 * x * ddt[-1] - ddt[-2] + 4 * dt[-1])
            dt.append(2 * x * dt[-1] - dt[-2] + 2 * t[-1])
            t.append(2 * x * t[-1] - t[-2])
    return list(map(Q, t)), list(map(Q, dt)), list(map(Q, ddt))


def _sums(rows: Sequence[Sequence[Q]]) -> list[tuple[float, ...]]:
    """What Y_0 … Y_s of a recurrence are as sums over the stages: the rows of A, then b."""
    s = len(rows)
    a = [[0.0] * s]
    for j, row in enumerate(rows):
        mu, nu, slope, at_start = map(float, row)
        new = [mu * x + nu * y for x, y in zip(a[-1], a[-2] if j else a[-1], strict=True)]
        new[j] += slope
        new[0] += at_start
        a.append(new)
    return list(map(tuple, a))


ON_DEMAND = "rkc1_S, rkc2_S, rkl1_S, rkl2_S"
"""Names of methods that are made when they are asked for."""

_ON_DEMAND = re.compile(r"(rkc1|rkc2|rkl1|rkl2)_(\d+)")


def on_demand(name: object) -> ButcherTableau | None:
    """The stabilised method that a name as "rkc2_20" asks for, None for other names.

    Raises:
        ValueError: too few or too many stages.

    Example:
        >>> on_demand("rkc2_20").stages, on_demand("rk4")
        (20, None)
    """
    found = _ON_DEMAND.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        return None
    family, stages = found[1], int(found[2])
    if not 2 <= stages <= MOST_STAGES:
        raise ValueError(f"{family}_S takes from 2 to {MOST_STAGES} stages S, got {stages}.")
    return stabilised(family, stages)


def get_tableau(method: str | ButcherTableau) -> ButcherTableau:
    """The tableau of a method given by name; a tableau is returned as it is.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
        TypeError: neither a name nor a tableau.

    Example:
        >>> get_tableau("rk4").order
        4
    """
    if isinstance(method, ButcherTableau):
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"a method is a name in resode.METHODS or a ButcherTableau, got {type(method).__name__}."
        )
    if (tableau := METHODS.get(method) or on_demand(method)) is None:
        raise ValueError(
            f"unknown method {method!r}.{did_you_mean(method, METHODS)} The methods are: "
            f"{', '.join(METHODS)}, and with S stages {ON_DEMAND}."
        )
    return tableau


def explicit_tableau(method: str | ButcherTableau, what: str) -> ButcherTableau:
    """The tableau of a method, for what needs an explicit one.

    Raises:
        ValueError: the name is unknown, or the method is implicit.
    """
    tableau = get_tableau(method)
    if not tableau.explicit:
        names = ", ".join(name for name, t in METHODS.items() if t.explicit)
        raise ValueError(f"{what} an explicit method, and {tableau.name} is implicit. Valid: {names}.")
    return tableau
