"""A program as Python text, as a person would write it."""

from __future__ import annotations

import re
from textwrap import dedent

from tests.identification.generated_fields import (
    FEATURE,
    HEAD,
    INPUTS,
    NORM,
    RAW,
    STATE,
    STEM,
    WIDTH,
    block,
    field_class,
)
from tests.identification.generated_methods import with_calls
from tests.identification.generated_programs import STEPS, Program

BATCH = 3
SCHEDULES = {
    "alphas": f"[0.1 + 0.85 * i / {STEPS} for i in range({STEPS} + 1)]",
    "sigmas": f"[3.0 * (1 - i / {STEPS + 2}) ** 2 for i in range({STEPS} + 1)]",
    "ts": f"[(i / {STEPS}) ** 2 for i in range({STEPS} + 1)]",
}
HEADER = "import math\n\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
MODULE = "class {name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n{init}\n\n"


def source(program: Program) -> str:
    """A module with ``build()``, which gives the model, its inputs and its keyword inputs."""
    return _Text(program).whole()


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


class _Text:
    """The parts of one program."""

    def __init__(self, program: Program) -> None:
        self.p = p = program
        self.fields = list(p.kinds)
        self.in_row = p.layout in ("sequential", "nested")
        self.in_function = p.layout in ("helper", "odeint")
        self.with_ends = p.ends == "stem and head"
        self.state = "s" if p.state != "vars" else ", ".join(p.method.states)
        self.more = ", u" if p.axis == "seq" else ", t" if p.takes == "t" else ""
        self.start = _lines(*(f"{name} = {value}" for name, value in (p.method.init or {}).items()))
        self.unpack, self.pack = self._unpack(), self._pack()
        self.step = _lines(self.unpack, self._body(), self.pack)

    def whole(self) -> str:
        p = self.p
        parts = [f'"""seed {p.seed}: ' + "; ".join(f"{k}={v}" for k, v in p.choices.items()) + '"""', HEADER]
        for f, kind in p.kinds.items():
            parts.append(field_class(f"Field{f.upper()}", kind, p.act, p.takes, p.returns, p.drive, p.call))
        for name, values in SCHEDULES.items():
            if f"{name}[" in p.body:
                parts.append(f"{name} = {values}\n")
        if self.in_row or p.layout == "modulelist":
            parts.append(self._step_module("Block", "forward"))
        parts.append(self._row() if self.in_row else self._model())
        parts.append(self._build())
        return re.sub(r"\n{4,}", "\n\n\n", "\n\n".join(part.strip("\n") for part in parts) + "\n")

    # ---------------------------------------------------------------- one step

    def _unpack(self) -> str:
        states, idiom, dim = self.p.method.states, self.p.state, 1 if self.p.shape == "map" else -1
        names = ", ".join(states)
        return {
            "vars": "",
            "tuple": f"{names} = s",
            "cat": f"{names} = s.chunk({len(states)}, dim={dim})",
            "dict": f"{names} = " + ", ".join(f's["{n}"]' for n in states),
            "stack": f"{names} = s.unbind(1)",
            "slices": f"{names} = " + ", ".join(f"s[..., {WIDTH * i}:{WIDTH * (i + 1)}]" for i in range(len(states))),
        }[idiom]

    def _pack(self) -> str:
        states, idiom, dim = self.p.method.states, self.p.state, 1 if self.p.shape == "map" else -1
        names = ", ".join(states)
        return {
            "vars": "",
            "tuple": f"s = ({names})",
            "cat": f"s = torch.cat([{names}], dim={dim})",
            "dict": "s = {" + ", ".join(f'"{n}": {n}' for n in states) + "}",
            "stack": f"s = torch.stack([{names}], 1)",
            "slices": f"s = torch.cat([{names}], dim=-1)",
        }[idiom]

    def _body(self) -> str:
        """The lines of a step with the calls of its fields and its step size written in."""
        p = self.p
        owned = self.in_row or p.layout in ("modulelist", "solver") or (p.axis != "own" and not self.in_function)
        prefix, method = "self." if owned else "", ".rhs" if p.call == "method" else ""
        taken = {"tensor": "", "tuple": "[0]", "dict": '["dx"]'}[p.returns]

        def call(name: str, node: str, inside: str) -> str:
            inside = with_calls(inside, call)
            when = {"0": "t", "1": "t + $h"}.get(node, f"t + ({node}) * $h")
            arguments = {"": inside, "t": f"{when}, {inside}", "u": f"{inside}, u"}[p.takes]
            return f"{prefix}{name}{method}({arguments}){taken}"

        body = with_calls(p.body.replace("{feature}", FEATURE[p.shape]), call)
        if p.size == "one":
            for factor in ("$h ** 2 * ", "$h * $h * ", "$h * "):
                body = body.replace(factor, "")
            return body.replace(", alpha=$h)", ")").replace(" * $h", "").replace("$h", "1.0")
        return body.replace("$h", "h" if self.in_function else self._size("self", "(1 / {})"))

    def _size(self, owner: str, depth: str) -> str:
        """The step size as an expression."""
        return {
            "one": "1.0",
            "const": repr(self.p.h),
            "depth": depth.format(STEPS),
            "softplus": f"F.softplus({owner}.h)",
        }.get(self.p.size, f"{owner}.h")

    def _members(self) -> str:
        """What the owner of a step makes in its ``__init__``."""
        p, feature = self.p, FEATURE[self.p.shape]
        made = (f"self.{f} = Field{f.upper()}()" for f in self.fields)
        setup = p.method.setup.format(feature=feature, inputs=INPUTS, norm=NORM[p.shape]) if p.method.setup else ""
        size = {
            "attribute": f"self.h = {p.h}",
            "learned": f"self.h = nn.Parameter(torch.tensor({p.h}))",
            "softplus": f"self.h = nn.Parameter(torch.tensor({p.h}).expm1().log())",
            "vector": f"self.h = nn.Parameter({p.h} * (0.5 + torch.rand({feature})))",
        }.get(p.size, "")
        return _lines(*made, setup, size) or "pass"

    def _step_module(self, name: str, method: str) -> str:
        return MODULE.format(name=name, init=block(self._members(), 8)) + (
            f"    def {method}(self, {self.state}{self.more}):\n{block(self.step, 8)}\n        return {self.state}\n"
        )

    # ---------------------------------------------------------------- modules in a row

    def _row(self) -> str:
        text, first, last = "", "", ""
        if len(self.p.method.states) > 1:
            start = MODULE.split("    def __init__")[0]
            text = (
                start.format(name="Start")
                + f"    def forward(self, x):\n{block(self.start, 8)}\n{block(self.pack, 8)}\n        return s\n\n\n"
                + start.format(name="End")
                + f"    def forward(self, s):\n{block(self.unpack, 8)}\n        return x\n\n\n"
            )
            first, last = "Start(), ", ", End()"
        if self.with_ends:
            first, last = f"{STEM[self.p.shape]}, {first}", f"{last}, {HEAD[self.p.shape]}"
        half = f"nn.Sequential(*[Block() for _ in range({STEPS // 2})])"
        own = f"*[Block() for _ in range({STEPS})]" if self.p.layout == "sequential" else f"{half}, {half}"
        blocks, shared = (own, "") if self.p.axis == "own" else (f"*[block] * {STEPS}", "    block = Block()\n")
        return f"{text}def make_layers():\n{shared}    return [{first}{blocks}{last}]\n"

    # ---------------------------------------------------------------- a loop in forward

    def _model(self) -> str:
        """A model whose forward loops over blocks, fields, inputs or times, and what stands before it."""
        p = self.p
        before, keep, once = self._once()
        begin, begun = self._begin()
        if p.layout == "odeint":
            run, result = self._solve()
        else:
            run, result = self._loop(once)
        if self.with_ends:
            begun = _lines(
                begun, "" if p.axis == "seq" else f"self.stem = {STEM[p.shape]}", f"self.head = {HEAD[p.shape]}"
            )
            result = result if p.output == "stack" and p.shape == "map" else f"self.head({result})"
        forward = _lines(begin, *run, f"return {result}")
        taken = "inputs" if p.axis == "seq" else "x"
        return (
            before
            + MODULE.format(name="Model", init=block(dedent(_lines(keep, begun)), 8))
            + f"    def forward(self, {taken}):\n{block(forward, 8)}\n"
        )

    def _once(self) -> tuple[str, str, str]:
        """What stands before the model, what the model makes in its ``__init__``, and a step inside its loop."""
        p, s, own = self.p, self.state, self.p.axis == "own"
        before, keep, once = "", self._members(), self.step
        if p.layout == "modulelist":
            keep = f"self.blocks = nn.ModuleList([Block() for _ in range({STEPS})])" if own else "self.block = Block()"
            once = f"{s} = {'block' if own else 'self.block'}({s}{self.more})"
        elif own:  # fields in lists
            lists = (f"self.{f} = nn.ModuleList([Field{f.upper()}() for _ in range({STEPS})])" for f in self.fields)
            keep = _lines(*lists, f"self.h = {p.h}" if p.size == "attribute" else "")
        if self.in_function:
            passed = "".join(f"{f}, " for f in self.fields)
            before = f"def step({passed}{s}, h{self.more}):\n{block(self.step, 4)}\n    return {s}\n\n\n"
            handed = passed if own or p.layout == "odeint" else "".join(f"self.{f}, " for f in self.fields)
            size = "h" if p.layout == "odeint" else self._size("self", "1 / {}")
            once = f"{s} = step({handed}{s}, {size}{self.more})"
        if p.layout == "odeint":
            before += self._odeint(once)
        if p.layout == "solver":
            constants = ""
            if self.step.startswith("A = [["):  # the tableau is a constant of the module
                rows = self.step.split("\n")
                constants, self.step = "\n".join(rows[:3]) + "\n\n\n", "\n".join(rows[3:])
            before = constants + self._step_module("Solver", "step") + "\n\n"
            keep, once = "self.solver = Solver()", f"{s} = self.solver.step({s}{self.more})"
        return before, keep, once

    def _odeint(self, once: str) -> str:
        number = "float(t1 - t0)" if re.search(r"alpha=|math|value=", self.step) else "t1 - t0"
        body = _lines(f"t, h = t0, {number}", once, self.unpack, "solution.append(x)")
        return (
            f"def odeint({''.join(f'{f}, ' for f in self.fields)}x, ts):\n"
            + block(_lines(self.start, self.pack, "solution = [x]", "for t0, t1 in zip(ts[:-1], ts[1:]):"), 4)
            + f"\n{block(body, 8)}\n    return torch.stack(solution)\n\n\n"
        )

    def _solve(self) -> tuple[list[str], str]:
        times = f"ts = torch.linspace(0.0, {STEPS * self.p.h}, {STEPS + 1})"
        run = f"sol = odeint({''.join(f'self.{f}, ' for f in self.fields)}x, ts)"
        return [times, run], "sol" if self.p.output == "stack" else "sol[-1]"

    def _begin(self) -> tuple[str, str]:
        """The first state, and the modules that it needs."""
        p, first = self.p, self.p.order == "batch first"
        if p.axis != "seq":
            return ("x = self.stem(x)" if self.with_ends else ""), ""
        batch = f"inputs.shape[{0 if first else 1}]"
        lines, made = {
            "encoded": (
                f"x = torch.tanh(self.enc(inputs[{':, 0' if first else '0'}]))",
                f"self.enc = nn.Linear({INPUTS}, {WIDTH})",
            ),
            "learned": (f"x = self.x0.expand({batch}, {WIDTH})", f"self.x0 = nn.Parameter(torch.randn({WIDTH}))"),
            "zeros": (f"x = inputs.new_zeros({batch}, {WIDTH})", ""),
        }[p.start]  # fmt: skip
        if p.drive == "projected before":
            made = _lines(made, f"self.project = nn.Linear({INPUTS}, {WIDTH})")
            lines = _lines(lines, "inputs = self.project(inputs)")
        return lines, made

    def _loop(self, once: str) -> tuple[list[str], str]:
        """The loop, line by line, and what it gives."""
        p, stack = self.p, self.p.output == "stack"
        loop, head = self._over()
        if p.layout != "prealloc":
            tail = [self.unpack, "outs.append(x)"] if stack else []
            if self._counts_time():
                loop, head = f"t = 0.0\nwhile t < {STEPS * p.h - p.h / 2}:", []
                tail.append(f"t = t + {self._size('self.solver' if p.layout == 'solver' else 'self', '1 / {}')}")
            body = block(_lines(*head, once, *tail), 4)
            run = [self.start, self.pack, "outs = []" if stack else "", loop, body, "" if stack else self.unpack]
            return run, "torch.stack(outs, 1)" if stack else "x"
        names = p.method.states
        stores = [f"{n}s = {n}.new_zeros(({STEPS} + 1,) + {n}.shape)\n{n}s[0] = {n}" for n in names]
        head += [f"{n} = {n}s[i].clone()" for n in names] if p.seed % 2 else []
        body = block(_lines(*head, once, *(f"{n}s[i + 1] = {n}" for n in names)), 4)
        return [self.start, *stores, loop, body], "xs" if stack else "xs[-1]"

    def _counts_time(self) -> bool:
        """Whether the loop over a grid runs while the time is not over."""
        return self.p.axis == "grid" and self.p.seed % 3 == 0 and not self.p.method.layouts

    def _over(self) -> tuple[str, list[str]]:
        """The line that opens the loop, and the first lines inside."""
        p, head = self.p, []
        loop = f"for i in range({STEPS}):"
        if p.axis == "own":
            names = ["block"] if p.layout == "modulelist" else self.fields
            lists = ["self.blocks"] if p.layout == "modulelist" else [f"self.{f}" for f in self.fields]
            loop = f"for {', '.join(names)} in {lists[0] if len(lists) == 1 else 'zip(' + ', '.join(lists) + ')'}:"
        if p.axis == "seq":
            first = p.order == "batch first"
            if p.seed % 2 and p.layout != "prealloc" and p.method.name != "summed increments":
                loop = f"for u in inputs.unbind({1 if first else 0}):"
            else:
                head = [f"u = {'inputs[:, i]' if first else 'inputs[i]'}"]
        if p.takes == "t":
            owner = {"solver": "self.solver", "modulelist": "self.block"}.get(p.layout, "self")
            head = [*head, f"t = i * {self._size(owner, '1 / {}')}"]
        return loop, head

    def _build(self) -> str:
        p = self.p
        if p.axis == "seq":
            given = str((BATCH, STEPS, INPUTS) if p.order == "batch first" else (STEPS, BATCH, INPUTS))
        else:
            given = str((BATCH, *(RAW[p.shape] if self.with_ends else STATE[p.shape])))
        layers = "    layers = make_layers()\n" if self.in_row else ""
        model = "nn.Sequential(*layers)" if self.in_row else "Model()"
        return (
            f"def build():\n    torch.manual_seed({p.seed})\n{layers}    return {model}, (torch.randn{given},), {{}}\n"
        )
