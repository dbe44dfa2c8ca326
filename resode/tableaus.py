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

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction as Q
from math import sqrt

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

    # What a step reads: the non-zero coefficients as floats.
    a_rows: tuple[Row, ...] = field(init=False, repr=False)
    b_row: Row = field(init=False, repr=False)
    error_row: Row = field(init=False, repr=False)
    dense_rows: tuple[Row, ...] = field(init=False, repr=False)
    stage_times: tuple[float, ...] = field(init=False, repr=False)

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
            if abs(sum(row) - self.c[i]) > 1e-14:
                raise ValueError(
                    f"tableau {self.name!r}: c must be the row sums of a; "
                    f"row {i} of a sums to {float(sum(row))}, c is {float(self.c[i])}."
                )
        if abs(sum(self.b) - 1) > 1e-14:
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

    @property
    def adaptive(self) -> bool:
        """Whether an explicit method carries an error estimate that can steer its step."""
        return bool(self.explicit) and self.b_error is not None


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

_S3, _S6 = sqrt(3), sqrt(6)

_IMPLICIT = [
    ButcherTableau("implicit_euler", ((Q(1),),), (Q(1),), (Q(1),), order=1, source=_HW + ", IV.3"),
    ButcherTableau(
        "implicit_midpoint",
        ((Q(1, 2),),),
        (Q(1),),
        (Q(1, 2),),
        order=2,
        source=_HW + ", IV.3",
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
    ),
]

METHODS: dict[str, ButcherTableau] = {t.name: t for t in (*_EXPLICIT, *_IMPLICIT)}
"""Every method by name. The implicit ones serve analysis only."""


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
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are: {', '.join(METHODS)}.")
    return METHODS[method]


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
