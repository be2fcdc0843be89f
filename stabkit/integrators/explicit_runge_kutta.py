"""Explicit Runge-Kutta methods, as data: the rows of A below the diagonal, and the weights b."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

from stabkit.integrators.catalogue_entry import Entry
from stabkit.integrators.construction import from_butcher
from stabkit.integrators.general_linear import GeneralLinearMethod

_HAIRER = "E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, 2nd ed. 1993"
_SSP = "S. Gottlieb, D. Ketcheson, C.-W. Shu, Strong Stability Preserving Time Discretizations, 2011"
_FAMILY = "explicit Runge-Kutta"

# name: (rows of A, one line each; weights; aliases; source)
_TABLEAUX: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "forward_euler": ("", "1", ("euler", "explicit_euler", "fe", "resnet", "rk1"), f"{_HAIRER}, II.1 (Euler 1768)"),
    "midpoint": ("; 1/2", "0 1", ("explicit_midpoint", "mid22", "runge2"), f"{_HAIRER}, II.1 (Runge 1895)"),
    "heun2": ("; 1", "1/2 1/2", ("heun", "heun22", "rk2", "improved_euler", "explicit_trapezoid"), f"{_HAIRER}, II.1"),
    "ralston2": ("; 2/3", "1/4 3/4", ("ralston", "mte22"), "A. Ralston, Math. Comp. 16 (1962) 431-437"),
    "ssp22": ("; 1", "1/2 1/2", ("ssprk22", "tvd_rk2"), f"{_SSP}, 2.4.1 (Shu and Osher 1988)"),
    "heun3": ("; 1/3; 0 2/3", "1/4 0 3/4", ("heun33",), f"{_HAIRER}, II.1 (Heun 1900)"),
    "kutta3": ("; 1/2; -1 2", "1/6 2/3 1/6", ("rk3",), f"{_HAIRER}, II.1 (Kutta 1901)"),
    "ralston3": ("; 1/2; 0 3/4", "2/9 1/3 4/9", (), "A. Ralston, Math. Comp. 16 (1962) 431-437"),
    "ssp33": ("; 1; 1/4 1/4", "1/6 1/6 2/3", ("ssprk33", "tvd_rk3", "shu_osher"), f"{_SSP}, 2.4.2"),
    "rk4": ("; 1/2; 0 1/2; 0 0 1", "1/6 1/3 1/3 1/6", ("rk44", "classical_rk4", "runge_kutta_4"), f"{_HAIRER}, II.1"),
    "three_eighths": (
        "; 1/3; -1/3 1; 1 -1 1",
        "1/8 3/8 3/8 1/8",
        ("rk4_38", "kutta38", "rk38", "3/8", "three_eighths_rule"),
        f"{_HAIRER}, II.1 (Kutta 1901)",
    ),
    "bogacki_shampine": (
        "; 1/2; 0 3/4",
        "2/9 1/3 4/9",
        ("bs3", "bosh3", "rk23", "bogacki_shampine_3"),
        "P. Bogacki, L. F. Shampine, Appl. Math. Lett. 2 (1989) 321-325; third-order weights",
    ),
    "cash_karp": (
        "; 1/5; 3/40 9/40; 3/10 -9/10 6/5; -11/54 5/2 -70/27 35/27; "
        "1631/55296 175/512 575/13824 44275/110592 253/4096",
        "37/378 0 250/621 125/594 0 512/1771",
        ("ck5", "cash_karp_5"),
        "J. R. Cash, A. H. Karp, ACM TOMS 16 (1990) 201-222; fifth-order weights",
    ),
    "fehlberg5": (
        "; 1/4; 3/32 9/32; 1932/2197 -7200/2197 7296/2197; 439/216 -8 3680/513 -845/4104; "
        "-8/27 2 -3544/2565 1859/4104 -11/40",
        "16/135 0 6656/12825 28561/56430 -9/50 2/55",
        ("fehlberg", "rkf45", "fehlberg45"),
        "E. Fehlberg, NASA TR R-315, 1969; fifth-order weights",
    ),
    "fehlberg4": (
        "; 1/4; 3/32 9/32; 1932/2197 -7200/2197 7296/2197; 439/216 -8 3680/513 -845/4104",
        "25/216 0 1408/2565 2197/4104 -1/5",
        ("rkf4",),
        "E. Fehlberg, NASA TR R-315, 1969; fourth-order weights",
    ),
    "dopri5": (
        "; 1/5; 3/40 9/40; 44/45 -56/15 32/9; 19372/6561 -25360/2187 64448/6561 -212/729; "
        "9017/3168 -355/33 46732/5247 49/176 -5103/18656",
        "35/384 0 500/1113 125/192 -2187/6784 11/84",
        ("dp5", "dormand_prince", "dormand_prince_5", "rk45", "ode45"),
        "J. R. Dormand, P. J. Prince, J. Comput. Appl. Math. 6 (1980) 19-26; fifth-order weights",
    ),
}  # fmt: skip

# Published as decimals: floats, and for SSP53 only about ten digits of the second-order condition hold.
_SSP53 = (
    "; .37726891511710; .37726891511710 .37726891511710; .16352294089771 .16352294089771 .16352294089771; "
    ".14904059394856 .14831273384724 .14831273384724 .34217696850008",
    ".19707596384481 .11780316509765 .11709725193772 .27015874934251 .29786487010104",
)
_TSIT5 = (
    "; .161; -.008480655492356989 .335480655492357; 2.8971530571054935 -6.359448489975075 4.3622954328695815; "
    "5.325864828439257 -11.748883564062828 7.4955393428898365 -.09249506636175525; "
    "5.86145544294642 -12.92096931784711 8.159367898576159 -.071584973281401 -.028269050394068383",
    ".09646076681806523 .01 .4798896504144996 1.379008574103742 -3.290069515436081 2.324710524099774",
)


def _read(name: str, rows: str, weights: str, source: str, *, decimal: bool = False) -> GeneralLinearMethod:
    number = float if decimal else Fraction
    A = [[number(x) for x in row.split()] for row in rows.split(";")]
    b = [number(x) for x in weights.split()]
    return from_butcher(A, b, name=name, source=source, precision=1e-9 if name == "ssp53" else None)


def _ssp104(name: str, source: str) -> GeneralLinearMethod:
    sixth, fifteenth = Fraction(1, 6), Fraction(1, 15)
    A = [[sixth] * i for i in range(5)] + [[fifteenth] * 5 + [sixth] * i for i in range(5)]
    return from_butcher(A, [Fraction(1, 10)] * 10, name=name, source=source)


def _dop853(name: str, source: str) -> GeneralLinearMethod:
    from scipy.integrate import DOP853  # slow to import, and needed by this one method only

    A, b = DOP853.A[:12, :12], DOP853.B
    return from_butcher(A.tolist(), b.tolist(), name=name, source=source)


def _decimals(name: str, data: tuple[str, str], source: str, aliases: tuple[str, ...]) -> Entry:
    return Entry(name, partial(_read, name, *data, source, decimal=True), source, aliases, family=_FAMILY)


def _computed() -> list[Entry]:
    ssp104 = f"D. I. Ketcheson, SIAM J. Sci. Comput. 30 (2008) 2113-2136; {_SSP}, 6.2"
    dop853 = f"{_HAIRER}, II.5 and II.10 (Dormand and Prince), eighth-order weights, as scipy.integrate.DOP853 has them"
    return [
        Entry("ssp104", partial(_ssp104, "ssp104", ssp104), ssp104, ("ssprk104",), family=_FAMILY),
        Entry("dop853", partial(_dop853, "dop853", dop853), dop853, ("dopri8", "dormand_prince_8"), family=_FAMILY),
    ]


ENTRIES: tuple[Entry, ...] = (
    *(
        Entry(name, partial(_read, name, rows, weights, source), source, aliases, family=_FAMILY)
        for name, (rows, weights, aliases, source) in _TABLEAUX.items()
    ),
    _decimals("ssp53", _SSP53, "R. J. Spiteri, S. J. Ruuth, SIAM J. Numer. Anal. 40 (2002) 469-491", ("ssprk53",)),
    _decimals("tsit5", _TSIT5, "C. Tsitouras, Comput. Math. Appl. 62 (2011) 770-775", ("tsitouras", "tsitouras5")),
    *_computed(),
)
