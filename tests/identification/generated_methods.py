"""Methods as lines of code, with what is true of them: names that may be told, and M(z) from the lines themselves.

In a body ``@f(y)`` evaluates the field ``f`` at ``y``, ``@f{1/2}(y)`` does so half a step later, and ``$h`` is the step
size. A body reads and assigns the variables of its states. What a body does to x' = lambda x is found by running it
with numbers, so that the truth of a program never comes from the reader that is tested.
"""

# ruff: noqa: E501  (a spelling of a method is one string, as long as it is)
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

EULER = r"forward[_ ]Euler(?!.*(noise|parallel))"


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: what the table calls it.
        bodies: the spellings of one step by the name of the idiom.
        names: pattern of the names that are true.
        states: the variables that one step hands to the next; the first is the position.
        fields: the fields that it evaluates.
        init: what the other states start from.
        setup: lines of ``__init__`` that make its parameters.
        linear: whether a step with fields lambda x is linear in the state, with the same numbers in every entry.
        axes: where it can stand.
        steps: patterns of whole readings that are also true when one step is read as several, with how many.
        starters: pattern of names that may be told of the first steps, while its history fills.
        fills: how many steps its history takes to fill, where the states do not show it.
        weak: pattern of names that are true and not all that there is to tell.
        exact: M(z) of the method that the steps come near to, for unrolled implicit ones, by the name's pattern.
        layouts: the only layouts in which it can stand, where not in all.
        sizes: which spellings of the step size it bears.
    """

    name: str
    bodies: dict[str, str]
    names: str
    states: tuple[str, ...] = ("x",)
    fields: tuple[str, ...] = ("f",)
    init: dict[str, str] | None = None
    setup: str = ""
    linear: bool = True
    axes: tuple[str, ...] = ("own", "shared", "seq", "grid")
    steps: tuple[tuple[str, float], ...] = ()
    starters: str = ""
    fills: int = 0
    weak: str = ""
    layouts: tuple[str, ...] = ()
    exact: Callable[[complex], complex] | None = None
    sizes: tuple[str, ...] = ("const", "one", "depth", "attribute")


TABLEAUX: dict[str, tuple[list[list[str]], list[str], str]] = {
    "midpoint": ([["1/2"]], ["0", "1"], r"^midpoint|(2-stage )?Runge-Kutta.*midpoint"),
    "heun2": ([["1"]], ["1/2", "1/2"], r"^heun2|^ssp22|explicit trapezoid"),
    "ralston2": ([["2/3"]], ["1/4", "3/4"], r"^ralston2"),
    "kutta3": ([["1/2"], ["-1", "2"]], ["1/6", "2/3", "1/6"], r"^kutta3"),
    "heun3": ([["1/3"], ["0", "2/3"]], ["1/4", "0", "3/4"], r"^heun3"),
    "ralston3": ([["1/2"], ["0", "3/4"]], ["2/9", "1/3", "4/9"], r"^ralston3|^bogacki_shampine"),
    "rk4": ([["1/2"], ["0", "1/2"], ["0", "0", "1"]], ["1/6", "1/3", "1/3", "1/6"], r"^rk4"),
    "three_eighths": (
        [["1/3"], ["-1/3", "1"], ["1", "-1", "1"]], ["1/8", "3/8", "3/8", "1/8"], r"^three_eighths"),
}  # fmt: skip


def _sum(weights: list[str], h: str = "$h") -> str:
    terms = [f"k{i + 1}" if w == "1" else f"{w} * k{i + 1}" for i, w in enumerate(weights) if w != "0"]
    return f"{h} * {terms[0]}" if len(terms) == 1 else f"{h} * ({' + '.join(terms)})".replace("+ -", "- ")


def _spellings(rows: list[list[str]], weights: list[str]) -> dict[str, str]:
    """A Runge-Kutta step as people write it: line by line, from a tableau in loops, stacked, in preallocated slices."""
    nodes = ["0", *("+".join(f"({a})" for a in row) for row in rows)]
    lines = ["k1 = @f(x)"]
    lines += [f"k{i + 2} = @f{{{nodes[i + 1]}}}(x + {_sum(row)})" for i, row in enumerate(rows)]
    alpha = ["k1 = @f(x)"]
    for i, row in enumerate(rows):
        terms = [(a, j) for j, a in enumerate(row) if a != "0"]
        alpha.append(f"y = torch.add(x, k{terms[0][1] + 1}, alpha=$h * ({terms[0][0]}))")
        alpha += [f"y = torch.add(y, k{j + 1}, alpha=$h * ({a}))" for a, j in terms[1:]]
        alpha.append(f"k{i + 2} = @f{{{nodes[i + 1]}}}(y)")
    alpha += [f"x = torch.add(x, k{j + 1}, alpha=$h * ({b}))" for j, b in enumerate(weights) if b != "0"]
    table = f"A = [[], {', '.join('[' + ', '.join(row) + ']' for row in rows)}]"
    b, c = f"b = [{', '.join(weights)}]", f"c = [{', '.join(nodes)}]"
    head = f"{table}\n{b}\n{c}\n"
    loop = (
        "ks = []\nfor row, node in zip(A, c):\n    y = x\n    for a, k in zip(row, ks):\n        y = y + $h * a * k\n"
        "    ks.append(@f{node}(y))\n"
    )
    stages = len(weights)
    return {
        "lines": "\n".join([*lines, f"x = x + {_sum(weights)}"]),
        "torch.add alpha": "\n".join(alpha),
        "tableau loop": f"{head}{loop}x = x + $h * sum(w * k for w, k in zip(b, ks))",
        "tableau stack einsum": f'{head}{loop}x = x + $h * torch.einsum("s,s...->...", x.new_tensor(b), torch.stack(ks))',
        "tableau prealloc": (
            f"{head}K = x.new_zeros(({stages},) + x.shape)\nfor i, (row, node) in enumerate(zip(A, c)):\n"
            "    y = x.clone()\n    for j, a in enumerate(row):\n        y += $h * a * K[j]\n    K[i] = @f{node}(y)\n"
            "x = x + $h * torch.tensordot(x.new_tensor(b), K, dims=1)"
        ),
    }


MORE = {
    "heun2": {"Shu-Osher": "y = x + $h * @f(x)\nx = 0.5 * x + 0.5 * (y + $h * @f{1}(y))",
              "halves": "k1 = @f(x)\nk2 = @f{1}(x + $h * k1)\nx = x + $h / 2 * (k1 + k2)"},
    "midpoint": {"nested": "x = x + $h * @f{1/2}(x + $h / 2 * @f(x))"},
    "rk4": {"textbook": "k1 = @f(x)\nk2 = @f{1/2}(x + $h / 2 * k1)\nk3 = @f{1/2}(x + $h / 2 * k2)\nk4 = @f{1}(x + $h * k3)\n"
                        "x = x + $h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)",
            "increments": "k1 = $h * @f(x)\nk2 = $h * @f{1/2}(x + k1 / 2)\nk3 = $h * @f{1/2}(x + 0.5 * k2)\nk4 = $h * @f{1}(x + k3)\n"
                          "x = x + (k1 + 2 * k2 + 2 * k3 + k4) / 6",
            "accumulate": "k = @f(x)\nacc = k\nk = @f{1/2}(x + 0.5 * $h * k)\nacc = acc + 2 * k\nk = @f{1/2}(x + 0.5 * $h * k)\n"
                          "acc = acc + 2 * k\nacc = acc + @f{1}(x + $h * k)\nx = x + $h / 6 * acc"},
}  # fmt: skip


def _runge_kutta() -> list[Method]:
    return [Method(name, {**_spellings(A, b), **MORE.get(name, {})}, names) for name, (A, b, names) in TABLEAUX.items()]


def _iterated(k: int, line: str, last: str = "x = y") -> dict[str, str]:
    unrolled = "\n".join(["y = x", *[line] * k, last])
    return {"loop": f"y = x\nfor _ in range({k}):\n    {line}\n{last}", "unrolled": unrolled}


GLM = r"general linear method of 2 s"
RK = r"(\d+)-stage Runge-Kutta"
ONE = ("const", "one", "depth", "attribute", "learned", "vector")

METHODS: tuple[Method, ...] = (
    Method("forward Euler", {
        "lines": "x = x + $h * @f(x)", "torch.add alpha": "x = torch.add(x, @f(x), alpha=$h)",
        "add_": "x = x.clone().add_($h * @f(x))", "+=": "y = @f(x)\ny = y * $h\ny += x\nx = y",
        "addcmul": "k = @f(x)\nx = torch.addcmul(x, k, torch.ones_like(k), value=$h)",
    }, EULER),
    Method("scaled Euler", {
        "lines": "x = x + $h * @f(x)", "mul first": "k = @f(x) * $h\nx = k + x", "addcmul": "x = torch.addcmul(x, @f(x), $h * torch.ones_like(x))",
    }, EULER, sizes=("learned", "vector"), linear=False, axes=("own", "shared")),
    Method("damped", {
        "lines": "x = 0.7 * x + $h * @f(x)", "leaky": "x = x + $h * (@f(x) - x)", "lerp": "x = torch.lerp(x, @f(x), $h)",
        "convex": "x = (1 - $h) * x + $h * @f(x)", "add_": "x = x.mul(0.8).add_(@f(x), alpha=$h)",
    }, r"damped[_ ]Euler|in_resnet|leaky|^gated Euler|" + EULER + "(?=.*relax)", sizes=("const", "attribute")),
    *_runge_kutta(),
    Method("ssp33", {
        "Shu-Osher": "y = x + $h * @f(x)\ny = 3/4 * x + 1/4 * (y + $h * @f{1}(y))\nx = 1/3 * x + 2/3 * (y + $h * @f{1/2}(y))",
        "lerp": "y = x + $h * @f(x)\ny = torch.lerp(x, y + $h * @f{1}(y), 0.25)\nx = torch.lerp(x, y + $h * @f{1/2}(y), 2 / 3)",
        **_spellings([["1"], ["1/4", "1/4"]], ["1/6", "1/6", "2/3"]),
    }, r"^ssp33"),
    Method("ab2", {
        "lines": "k = @f(x)\nx = x + $h * (1.5 * k - 0.5 * p)\np = k", "torch.add alpha": "k = @f(x)\nx = torch.add(x, k, alpha=1.5 * $h)\nx = torch.sub(x, p, alpha=0.5 * $h)\np = k",
        "stack": 'k = @f(x)\nx = x + $h * torch.einsum("s...,s->...", torch.stack([k, p]), x.new_tensor([1.5, -0.5]))\np = k',
    }, r"^ab2", states=("x", "p"), init={"p": "torch.zeros_like(x)"}, starters=r".*"),
    Method("ab3", {
        "lines": "k = @f(x)\nx = x + $h / 12 * (23 * k - 16 * p + 5 * r)\nr = p\np = k",
        "swap": "k = @f(x)\nx = x + $h * (23 / 12 * k - 4 / 3 * p + 5 / 12 * r)\np, r = k, p",
    }, r"^ab3", states=("x", "p", "r"), init={"p": "torch.zeros_like(x)", "r": "torch.zeros_like(x)"}, starters=r".*"),
    Method("two-step", {
        "lines": "y = 0.8 * x + 0.2 * p + $h * @f(x)\np = x\nx = y", "swap": "x, p = (1 - 0.3) * x + 0.3 * p + $h * @f(x), x",
        "lerp": "y = torch.lerp(x, p, 0.25) + $h * @f(x)\nx, p = y, x",
    }, r"two-step|lm_resnet|LM-ResNet|" + GLM, states=("x", "p"), init={"p": "x"}, starters=r".*"),
    Method("momentum", {
        "lines": "v = 0.9 * v + 0.1 * @f(x)\nx = x + v", "lerp": "v = torch.lerp(@f(x), v, 0.9)\nx = x + v", "heavy ball": "v = 0.8 * v + $h * @f(x)\nx = x + v",
        "alpha": "v = torch.add(0.9 * v, @f(x), alpha=1 - 0.9)\nx = torch.add(x, v)", "step": "v = 0.9 * v + $h * @f(x)\nx = x + $h * v",
    }, r"momentum|heavy[ _]ball|damped oscillator|" + GLM, states=("x", "v"), init={"v": "torch.zeros_like(x)"}, starters=r".*"),
    Method("leapfrog, two-step", {
        "lines": "y = p + 2 * $h * @f(x)\np = x\nx = y", "swap": "x, p = torch.add(p, @f(x), alpha=2 * $h), x",
    }, r"^leapfrog|nystrom2|explicit midpoint \(two|" + GLM, states=("x", "p"), init={"p": "x"}, starters=r".*"),
    Method("Verlet, position form", {
        "lines": "y = 2 * x - p + $h ** 2 * @f(x)\np = x\nx = y", "difference": "x, p = x + (x - p) + $h * $h * @f(x), x",
    }, r"second_order_leapfrog|[Vv]erlet|" + GLM, states=("x", "p"), init={"p": "x"}, starters=r".*"),
    Method("velocity Verlet", {
        "kick drift kick": "v = v + 0.5 * $h * @f(x)\nx = x + $h * v\nv = v + 0.5 * $h * @f{1}(x)",
        "textbook": "a = @f(x)\nx = x + $h * v + 0.5 * $h ** 2 * a\nv = v + 0.5 * $h * (a + @f{1}(x))",
    }, r"[Vv]erlet|leapfrog|" + GLM, states=("x", "v"), init={"v": "torch.zeros_like(x)"}, starters=r".*"),
    Method("Verlet, drift kick drift", {  # of steps cut at half time, symplectic Euler is the same map
        "lines": "x = x + 0.5 * $h * v\nv = v + $h * @f{1/2}(x)\nx = x + 0.5 * $h * v",
        "alpha": "y = torch.add(x, v, alpha=0.5 * $h)\nv = torch.add(v, @f{1/2}(y), alpha=$h)\nx = torch.add(y, v, alpha=0.5 * $h)",
    }, r"[Vv]erlet|leapfrog|symplectic[ _]Euler|Gauss-Seidel Euler|" + GLM, states=("x", "v"), init={"v": "0.3 * x"}, starters=r".*"),
    Method("Verlet, two streams", {
        "lines": "v = v + 0.5 * $h * @f(x)\nx = x + $h * @g(v)\nv = v + 0.5 * $h * @f(x)",
        "in place": "v = v.clone()\nv += 0.5 * $h * @f(x)\nx = torch.add(x, @g(v), alpha=$h)\nv = torch.add(v, @f(x), alpha=$h / 2)",
    }, r"[Vv]erlet|leapfrog|" + GLM, states=("x", "v"), fields=("f", "g"), init={"v": "0.5 * x"}, starters=r".*", weak="couplings in turn"),
    Method("symplectic Euler", {
        "lines": "v = v + $h * @f(x)\nx = x + $h * v", "alpha": "v = torch.add(v, @f(x), alpha=$h)\nx = torch.add(x, v, alpha=$h)",
        "position first": "x = x + $h * v\nv = v + $h * @f(x)",
    }, r"symplectic[ _]Euler|Gauss-Seidel Euler|second_order_leapfrog|Stormer|" + GLM, states=("x", "v"), init={"v": "torch.zeros_like(x)"}, starters=r".*"),
    Method("symplectic Euler, two fields", {
        "lines": "x = x + $h * @f(v)\nv = v - $h * @g(x)", "reversible": "y = x + $h * @f(v)\nv = v + $h * @g(y)\nx = y",
    }, r"symplectic[ _]Euler|reversible|revnet|" + GLM, states=("x", "v"), fields=("f", "g"), init={"v": "0.5 * x"}, starters=r".*"),
    Method("oscillator", {
        "lines": "v = v + $h * (@f(x) - 1.3 * x - 0.7 * v)\nx = x + $h * v",
        "merged": "v = (1 - 0.4 * $h) * v + $h * (@f(x) - 2.0 * x)\nx = torch.add(x, v, alpha=$h)",
    }, r"oscillator|coRNN|cornn|symplectic[ _]Euler|momentum|" + GLM, states=("x", "v"), init={"v": "torch.zeros_like(x)"}, starters=r".*", sizes=("const", "attribute")),
    Method("Lie, 2 fields", {
        "lines": "x = x + $h * @f(x)\nx = x + $h * @g(x)", "alpha": "y = torch.add(x, @f(x), alpha=$h)\nx = torch.add(y, @g(y), alpha=$h)",
        "nested": "y = x + $h * @f(x)\nx = y + $h * @g(y)",
    }, r"Lie|^lie$", fields=("f", "g"), steps=((EULER, 2),)),
    Method("Lie, 3 fields", {
        "lines": "x = x + $h * @f(x)\nx = x + $h * @g(x)\nx = x + $h * @q(x)",
    }, r"Lie splitting \(3|^lie$", fields=("f", "g", "q"), steps=((EULER, 3), (r"Lie splitting \(2 Euler", 1.5))),
    Method("Strang, Euler inside", {
        "lines": "x = x + 0.5 * $h * @f(x)\nx = x + $h * @g(x)\nx = x + 0.5 * $h * @f(x)",
        "alpha": "x = torch.add(x, @f(x), alpha=$h / 2)\nx = torch.add(x, @g(x), alpha=$h)\nx = torch.add(x, @f(x), alpha=$h / 2)",
    }, r"Strang|strang|macaron|Macaron", fields=("f", "g"), steps=((EULER, 3),), weak=r"^Lie"),
    Method("Strang, midpoint inside", {
        "lines": "y = x + 0.25 * $h * @f(x)\nx = x + 0.5 * $h * @f(y)\ny = x + 0.5 * $h * @g(x)\nx = x + $h * @g(y)\n"
                 "y = x + 0.25 * $h * @f(x)\nx = x + 0.5 * $h * @f(y)",
    }, r"Strang|strang", fields=("f", "g"), steps=((r"^midpoint", 3),), weak=r"^Lie.*3 times midpoint"),
    Method("parallel branches", {
        "lines": "x = x + $h * @f(x) + $h * @g(x)", "grouped": "x = x + $h * (@f(x) + @g(x))", "stack": "x = x + $h * torch.stack([@f(x), @g(x)]).sum(0)",
    }, EULER + "|parallel", fields=("f", "g")),
    Method("exponential Euler, scalar", {
        "lines": "E = math.exp(-0.5 * $h)\nx = E * x + (1 - E) / 0.5 * @f(x)", "expm1": "x = x * math.exp(-0.8 * $h) - math.expm1(-0.8 * $h) / 0.8 * @f(x)",
    }, r"exponential|damped|in_resnet", sizes=("const", "one", "attribute")),
    Method("exponential Euler, diagonal", {
        "lines": "d = F.softplus(self.rate)\nE = torch.exp(-$h * d)\nx = E * x + (1 - E) / d * @f(x)",
        "lerp": "E = torch.exp(-$h * torch.exp(self.rate))\nx = torch.lerp(@f(x), x, E)",
    }, r"exponential|diagonal|by entry|damped", setup="self.rate = nn.Parameter(torch.rand({feature}) + 0.3)", linear=False,
        sizes=("const", "one", "attribute")),
    *(Method(f"backward Euler, {k} iterations", _iterated(k, "y = x + $h * @f{1}(y)"),
             rf"backward_euler \(by {k}|implicit Euler \(by {k}|{RK}" + (r"|backward_euler" if k > 4 else ""),
             starters="^plain", exact=lambda z: 1 / (1 - z)) for k in (2, 6)),
    Method("trapezoid, 5 iterations", {
        "loop": "a = @f(x)\ny = x + $h * a\nfor _ in range(4):\n    y = x + 0.5 * $h * (a + @f{1}(y))\nx = y",
    }, rf"trapezoid|Crank|{RK}", starters="^plain", exact=lambda z: (1 + z / 2) / (1 - z / 2)),
    Method("implicit midpoint, 5 iterations", _iterated(5, "y = x + 0.5 * $h * @f{1/2}(y)", "x = 2 * y - x"),
           rf"implicit_midpoint|{RK}", starters="^plain", exact=lambda z: (1 + z / 2) / (1 - z / 2)),
    Method("predictor-corrector, AB2-AM1", {
        "lines": "k = @f(x)\ny = x + $h * (1.5 * k - 0.5 * p)\nx = x + 0.5 * $h * (k + @f{1}(y))\np = k",
    }, r"predictor|PEC|general linear", states=("x", "p"), init={"p": "torch.zeros_like(x)"}, starters=r".*"),
    Method("gated, GRU-like", {
        "lines": "z = torch.sigmoid(@g(x))\nx = (1 - z) * x + z * torch.tanh(@f(x))", "lerp": "x = torch.lerp(x, @f(x), torch.sigmoid(@g(x)))",
        "delta": "z = torch.sigmoid(@g(x))\nx = x + z * (@f(x) - x)", "addcmul": "z = @g(x).sigmoid()\nx = torch.addcmul(z * @f(x), 1 - z, x)",
        "reset": "r = torch.sigmoid(@q(x))\nz = torch.sigmoid(@g(x))\nx = z * x + (1 - z) * torch.tanh(@f(r * x))",
    }, r"gated|GRU|highway", fields=("f", "g", "q"), linear=False, sizes=("one",)),
    Method("linear recurrence, diagonal", {
        "lines": "x = torch.sigmoid(self.a) * x + self.b(u)", "addcmul": "x = torch.addcmul(self.b(u), torch.exp(-torch.exp(self.a)), x)",
        "einsum": "x = torch.einsum('d,bd->bd', torch.tanh(self.a), x) + self.b(u)",
    }, r"linear recurrence|diagonal|exponential|damped", fields=(), setup="self.a = nn.Parameter(torch.randn({feature}))\nself.b = nn.Linear({inputs}, {feature})",
        linear=False, axes=("seq",), sizes=("one",)),
    Method("linear recurrence, matrix", {
        "lines": "x = x @ self.a.T + self.b(u)", "einsum": "x = torch.einsum('ij,bj->bi', self.a, x) + self.b(u)", "functional": "x = F.linear(x, self.a, self.b.bias) + F.linear(u, self.b.weight)",
    }, r"linear recurrence|plain", fields=(), setup="self.a = nn.Parameter(torch.randn({feature}, {feature}) / 3)\nself.b = nn.Linear({inputs}, {feature})",
        linear=False, axes=("seq",), sizes=("one",)),
    Method("plain layer", {"lines": "x = @f(x)", "tanh": "x = torch.tanh(@f(x))"}, r"^plain", linear=False, sizes=("one",)),
    Method("post-norm", {"lines": "x = self.norm(x + $h * @f(x))", "after": "y = torch.add(x, @f(x))\nx = self.norm(y)"},
           r"post-norm|projected|" + EULER, setup="self.norm = {norm}", linear=False, sizes=("const", "one"), axes=("own", "shared", "seq")),
    Method("Euler-Maruyama", {
        "lines": "x = x + $h * @f(x) + 0.1 * math.sqrt($h) * torch.randn_like(x)", "alpha": "dw = torch.randn_like(x) * math.sqrt($h)\nx = torch.add(x, @f(x), alpha=$h).add_(0.2 * dw)",
    }, r"[Ee]uler.*noise|Maruyama", sizes=("const", "attribute")),
    Method("semi-implicit decay", {
        "lines": "x = (x + $h * @f(x)) / (1 + $h * 0.8)", "mul": "x = torch.div(torch.add(x, @f(x), alpha=$h), 1.0 + 0.5 * $h)",
    }, r"semi-implicit|imex|damped", sizes=("const", "attribute")),
    Method("ReLU after", {"lines": "x = F.relu(x + $h * @f(x))", "in place": "x = @f(x).add_(x).relu_()"},
           EULER + "|projected", linear=False, sizes=("one",)),
    Method("summed increments", {"stack": "ks.append(@f(x))\nx = x0 + $h * torch.stack(ks).sum(0)", "sum": "ks.append($h * @f(x))\nx = x0 + sum(ks)"},
           EULER, init={"x0": "x", "ks": "[]"}, linear=False, layouts=("inline",), starters=".*"),
    Method("Nesterov", {"lines": "y = x + 0.6 * (x - p)\np = x\nx = y + $h * @f(y)", "lerp": "y = torch.lerp(p, x, 1.5)\nx, p = y + $h * @f(y), x"},
           r"[Nn]esterov|" + GLM, states=("x", "p"), init={"p": "x"}, starters=r".*"),
    Method("bdf2, 6 iterations", {"loop": "b = (4 * x - p) / 3\ny = x\nfor _ in range(6):\n    y = b + 2 / 3 * $h * @f{1}(y)\nx, p = y, x"},
           r"^bdf2|BDF|" + GLM, states=("x", "p"), init={"p": "x"}, starters=r".*"),
    Method("LSTM-like", {"lines": "o = torch.sigmoid(@o(x))\nc = torch.sigmoid(@g(x)) * c + torch.sigmoid(@q(x)) * torch.tanh(@f(x))\nx = o * torch.tanh(c)"},
           r"gated|LSTM|memory", states=("x", "c"), fields=("f", "g", "q", "o"), init={"c": "torch.zeros_like(x)"}, linear=False, sizes=("one",), starters=r".*"),
    Method("LTC", {"lines": "g = torch.sigmoid(@f(x))\nx = (x + $h * g * self.a) / (1 + $h * (0.7 + g))"},
           r"semi-implicit|LTC", setup="self.a = nn.Parameter(torch.randn({feature}))", linear=False, sizes=("const", "attribute")),
    Method("decay and source", {"lines": "g = F.softplus(@g(x))\nx = x + $h * (@f(x) - g * x)", "merged": "g = torch.sigmoid(@g(x))\nx = (1 - $h * g) * x + $h * g * @f(x)"},
           r"gated|damped|parallel|" + EULER, fields=("f", "g"), linear=False, sizes=("const", "attribute")),
    Method("selective scan", {"lines": "d = F.softplus(self.d(u))\nx = torch.exp(-d * self.a.exp()) * x + d * self.b(u)"},
           r"exponential|gated|linear recurrence|diagonal|selective", fields=(), linear=False, axes=("seq",), sizes=("one",),
           setup="self.a = nn.Parameter(torch.randn({feature}))\nself.b = nn.Linear({inputs}, {feature})\nself.d = nn.Linear({inputs}, {feature})"),
    Method("linear oscillator", {"lines": "v = v + $h * (self.b(u) - self.a * x)\nx = x + $h * v", "damped": "v = (1 - 0.3 * $h) * v + $h * (self.b(u) - self.a.exp() * x)\nx = x + $h * v"},
           r"oscillator|symplectic|linear recurrence|" + GLM, fields=(), states=("x", "v"), init={"v": "torch.zeros_like(x)"}, linear=False, axes=("seq",),
           setup="self.a = nn.Parameter(torch.rand({feature}))\nself.b = nn.Linear({inputs}, {feature})", sizes=("const", "attribute"), starters=r".*"),
    Method("bilinear recurrence", {"lines": "I = torch.eye({feature}).to(x)\nx = torch.linalg.solve(I - $h / 2 * self.a, (x @ (I + $h / 2 * self.a).T + $h * self.b(u)).T).T"},
           r"linear recurrence|trapezoid|bilinear|implicit_midpoint|semi-implicit", fields=(), linear=False, axes=("seq",), sizes=("const", "attribute"),
           setup="self.a = nn.Parameter(torch.randn({feature}, {feature}) / 3)\nself.b = nn.Linear({inputs}, {feature})"),
    Method("ab2, Euler first", {"None": "k = @f(x)\nif p is None:\n    x = x + $h * k\nelse:\n    x = x + $h * (1.5 * k - 0.5 * p)\np = k",
                                "or": "k = @f(x)\nx = x + $h / 2 * (3 * k - (k if p is None else p))\np = k"},
           r"^ab2", states=("x", "p"), init={"p": "None"}, linear=False, layouts=("inline", "helper", "solver"), starters=r".*"),
    Method("ab3, list", {"plms": "ks.append(@f(x))\nif len(ks) == 1:\n    d = ks[-1]\nelif len(ks) == 2:\n    d = (3 * ks[-1] - ks[-2]) / 2\nelse:\n    d = (23 * ks[-1] - 16 * ks[-2] + 5 * ks[-3]) / 12\nx = x + $h * d",
                         "table": "ks = [@f(x), *ks[:2]]\nw = [[1], [3/2, -1/2], [23/12, -4/3, 5/12]][len(ks) - 1]\nx = x + $h * sum(a * k for a, k in zip(w, ks))"},
           r"^ab3|Adams-Bashforth.*three", init={"ks": "[]"}, linear=False, layouts=("inline",), starters=r".*", fills=2),
    Method("two states, forward Euler", {"lines": "x, v = x + $h * (@f(x) - v), v + $h * 0.3 * (x - 0.5 * v)",
                                         "named": "dx = @f(x) - v\ndv = 0.2 * x - 0.1 * v\nx = x + $h * dx\nv = v + $h * dv"},
           EULER + "|general linear|two states", states=("x", "v"), init={"v": "torch.zeros_like(x)"}, starters=r".*", sizes=("const", "attribute")),
    Method("two states, midpoint", {"lines": "k, l = v, @f(x)\nm, n = v + 0.5 * $h * l, @f{1/2}(x + 0.5 * $h * k)\nx, v = x + $h * m, v + $h * n"},
           "^midpoint|general linear|[Nn]ystrom", states=("x", "v"), init={"v": "0.5 * x"}, starters=r".*"),
    Method("two states, rk4", {"lines": "k1, l1 = v, @f(x)\nk2, l2 = v + 0.5 * $h * l1, @f{1/2}(x + 0.5 * $h * k1)\nk3, l3 = v + 0.5 * $h * l2, @f{1/2}(x + 0.5 * $h * k2)\n"
                                        "k4, l4 = v + $h * l3, @f{1}(x + $h * k3)\nx = x + $h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)\nv = v + $h / 6 * (l1 + 2 * l2 + 2 * l3 + l4)"},
           "^rk4|general linear|[Nn]ystrom", states=("x", "v"), init={"v": "0.5 * x"}, starters=r".*", sizes=("const", "one", "attribute")),
    Method("substeps", {"lines": "for _ in range(3):\n    x = x + $h / 3 * @f(x)", "four": "k = $h / 4\nfor j in range(4):\n    x = torch.add(x, k * @f(x))"},
           r"[34]-stage Runge-Kutta", steps=((EULER, 3),), weak="^Lie"),
    Method("complex recurrence", {"lines": "z = torch.exp(torch.complex(-self.nu.exp(), self.th)) * z + self.b(u)\nx = z.real",
                                  "polar": "z = torch.polar(torch.sigmoid(self.nu), self.th) * z + self.b(u)\nx = 2 * z.real"},
           r"linear recurrence|diagonal|exponential|rotation|oscillator", fields=(), states=("x", "z"), init={"z": "x + 0j"}, linear=False, axes=("seq",), sizes=("one",),
           setup="self.nu = nn.Parameter(torch.randn({feature}))\nself.th = nn.Parameter(torch.rand({feature}))\nself.b = nn.Linear({inputs}, {feature})", starters=r".*"),
    Method("rotation", {"lines": "c, s = torch.cos(self.th), torch.sin(self.th)\nx, y = 0.9 * (c * x - s * y) + self.b(u), 0.9 * (s * x + c * y)"},
           r"linear recurrence|diagonal|exponential|rotation|oscillator|general linear", fields=(), states=("x", "y"), init={"y": "torch.zeros_like(x)"}, linear=False, axes=("seq",),
           setup="self.th = nn.Parameter(torch.rand({feature}))\nself.b = nn.Linear({inputs}, {feature})", sizes=("one",), starters=r".*"),
    Method("uneven Euler", {"lines": "x = x + (ts[i + 1] - ts[i]) * @f(x)"}, EULER, linear=False, axes=("grid",), sizes=("one",), layouts=("inline", "prealloc")),
    Method("sigma Euler", {"lines": "d = (x - @f(x)) / sigmas[i]\nx = x + d * (sigmas[i + 1] - sigmas[i])"},
           r"damped|DDIM|exponential|" + EULER, linear=False, axes=("grid",), sizes=("one",), layouts=("inline", "prealloc")),
    Method("sigma Heun", {"lines": "d = (x - @f(x)) / sigmas[i]\ny = x + d * (sigmas[i + 1] - sigmas[i])\ne = (y - @f(y)) / sigmas[i + 1]\nx = x + (sigmas[i + 1] - sigmas[i]) * 0.5 * (d + e)"},
           r"^heun2|Heun|2-stage Runge", linear=False, axes=("grid",), sizes=("one",), layouts=("inline", "prealloc")),
    Method("DDIM", {
        "lines": "a, b = alphas[i], alphas[i + 1]\ne = @f(x)\nd = (x - math.sqrt(1 - a) * e) / math.sqrt(a)\nx = math.sqrt(b) * d + math.sqrt(1 - b) * e",
    }, r"damped|DDIM|exponential|scaled|^lambda", linear=False, axes=("grid",), sizes=("one",), layouts=("inline", "prealloc")),
)  # fmt: skip
BY_NAME = {method.name: method for method in METHODS}


def with_calls(body: str, call: Callable[[str, str, str], str]) -> str:
    """The body with ``call(field, node, argument)`` in place of each ``@field{node}(argument)``."""
    while found := re.search(r"@(\w+)(?:\{([^}]*)\})?\(", body):
        depth, end = 1, found.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(body[end], 0)
            end += 1
        body = body[: found.start()] + call(found[1], found[2] or "0", body[found.end() : end - 1]) + body[end:]
    return body


def stability_matrix(method: Method, body: str, h: float, values: dict[str, complex]) -> torch.Tensor:
    """M of one step with fields f(x) = values[f] x, found by running its lines on unit vectors in double precision."""
    code = with_calls(body, lambda name, _, inside: f"(lam_{name} * ({inside}))").replace("$h", repr(h))
    columns = []
    for state in method.states:
        scope: dict[str, Any] = {name: torch.zeros(1, dtype=torch.complex128) for name in method.states}
        scope[state] = torch.ones(1, dtype=torch.complex128)
        scope |= {f"lam_{name}": value for name, value in values.items()}
        quiet = SimpleNamespace(**{n: getattr(torch, n) for n in dir(torch) if not n.startswith("_")})
        quiet.randn_like = torch.zeros_like
        exec(code, {"torch": quiet, "math": __import__("math")}, scope)
        columns.append(torch.stack([scope[name] for name in method.states])[:, 0])
    return torch.stack(columns, 1)
