"""Fields as Python text: what makes dx from x, with the shape of the state that each takes."""

# ruff: noqa: E501  (lines of programs are strings, as long as they are)
from __future__ import annotations

from textwrap import indent

WIDTH, INPUTS = 6, 4

# kind: shape, lines of __init__, lines of forward that make dx from x
FIELDS: dict[str, tuple[str, str, str]] = {
    "mlp": ("vector", "self.a = nn.Linear(6, 9)\nself.b = nn.Linear(9, 6)", "dx = self.b({act}(self.a(x)))"),
    "sequential mlp": ("vector", "self.net = nn.Sequential(nn.Linear(6, 9), nn.{Act}(), nn.Linear(9, 6))", "dx = self.net(x)"),
    "tanh(Wx+b)": ("vector", "self.a = nn.Linear(6, 6)", "dx = torch.tanh(self.a(x))"),
    "functional": ("vector", "self.w = nn.Parameter(torch.randn(6, 6) / 3)\nself.c = nn.Parameter(torch.zeros(6))",
                   "dx = {act}(torch.einsum('ij,...j->...i', self.w, x) + self.c)"),
    "swiglu": ("vector", "self.a = nn.Linear(6, 9)\nself.b = nn.Linear(6, 9)\nself.c = nn.Linear(9, 6)", "dx = self.c(F.silu(self.a(x)) * self.b(x))"),
    "norm first": ("vector", "self.norm = nn.LayerNorm(6)\nself.a = nn.Linear(6, 9)\nself.b = nn.Linear(9, 6)", "dx = self.b({act}(self.a(self.norm(x))))"),
    "rms norm first": ("vector", "self.g = nn.Parameter(torch.ones(6))\nself.a = nn.Linear(6, 9)\nself.b = nn.Linear(9, 6)",
                       "y = self.g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)\ndx = self.b({act}(self.a(y)))"),
    "linear term, matrix": ("vector", "self.a = nn.Linear(6, 6, bias=False)\nself.b = nn.Linear(6, 6)", "dx = self.a(x) + {act}(self.b(x))"),
    "linear term, decay": ("vector", "self.b = nn.Linear(6, 6)", "dx = -0.5 * x + {act}(self.b(x))"),
    "skew matrix times state": ("vector", "self.m = nn.Linear(6, 36)", "M = torch.tanh(self.m(x)).view(-1, 6, 6)\ndx = torch.einsum('bij,bj->bi', M - M.transpose(1, 2), x)"),
    "inverse matrix times field": ("vector", "self.m = nn.Linear(6, 36)\nself.b = nn.Linear(6, 6)",
                                   "L = self.m(x).view(-1, 6, 6)\nM = L @ L.transpose(1, 2) + torch.eye(6).to(x)\ndx = torch.linalg.solve(M, torch.tanh(self.b(x)).unsqueeze(-1)).squeeze(-1)"),
    "energy gradient": ("vector", "self.v = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1))",
                        "with torch.enable_grad():\n    y = x if x.requires_grad else x.detach().requires_grad_()\n    dx = -torch.autograd.grad(self.v(y).sum(), y, create_graph=True)[0]"),
    "antisymmetric": ("vector", "self.w = nn.Parameter(torch.randn(6, 6) / 3)\nself.c = nn.Parameter(torch.zeros(6))",
                      "dx = torch.tanh(x @ (self.w - self.w.T - 0.1 * torch.eye(6).to(x)).T + self.c)"),
    "layers in a list": ("vector", "self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])",
                         "dx = x\nfor layer in self.layers[:-1]:\n    dx = {act}(layer(dx))\ndx = self.layers[-1](dx)"),
    "residual inside": ("vector", "self.a = nn.Linear(6, 9)\nself.b = nn.Linear(9, 6)\nself.c = nn.Linear(6, 6)",
                        "y = x + self.b({act}(self.a(x)))\ndx = torch.tanh(self.c(y))"),
    "second order, one tensor": ("vector", "self.a = nn.Linear(3, 9)\nself.b = nn.Linear(9, 3)",
                                 "q, v = x.chunk(2, -1)\ndx = torch.cat([v, self.b({act}(self.a(q)))], -1)"),
    "Hamiltonian": ("vector", "self.v = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1))",
                    "with torch.enable_grad():\n    y = x if x.requires_grad else x.detach().requires_grad_()\n    g = torch.autograd.grad(self.v(y).sum(), y, create_graph=True)[0]\nq, p = g.chunk(2, -1)\ndx = torch.cat([p, -q], -1)"),
    "linear term, components": ("vector", "self.r = nn.Parameter(0.1 * torch.rand(4))",
                   "a, b = x[..., :3], x[..., 3:]\ndx = torch.cat([self.r[0] * a - self.r[1] * a * b, self.r[2] * a * b - self.r[3] * b], -1)"),
    "state times net": ("vector", "self.a = nn.Linear(6, 9)\nself.b = nn.Linear(9, 6)", "dx = x * self.b({act}(self.a(x)))"),
    "low rank matrix times state": ("vector", "self.u = nn.Linear(6, 12)", "U = torch.tanh(self.u(x)).view(-1, 6, 2)\ndx = -torch.einsum('bir,bjr,bj->bi', U, U, x)"),
    "sum of two nets": ("vector", "self.a = nn.Linear(6, 6)\nself.b = nn.Linear(6, 9)\nself.c = nn.Linear(9, 6)", "dx = torch.tanh(self.a(x)) + self.c({act}(self.b(x)))"),
    "weight norm": ("vector", "self.a = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))", "dx = torch.tanh(self.a(x))"),
    "causal attention": ("tokens", "self.qkv = nn.Linear(6, 18)\nself.o = nn.Linear(6, 6)",
                         "B, T, D = x.shape\nq, k, v = self.qkv(x).view(B, T, 3, 2, D // 2).permute(2, 0, 3, 1, 4)\ny = F.scaled_dot_product_attention(q, k, v, is_causal=True)\ndx = self.o(y.transpose(1, 2).reshape(B, T, D))"),
    "conv over tokens": ("tokens", "self.a = nn.Conv1d(6, 6, 3, padding=1)", "dx = {act}(self.a(x.transpose(1, 2))).transpose(1, 2)"),
    "linear term, diffusion": ("tokens", "self.w = nn.Linear(6, 6)\nself.register_buffer('adj', torch.softmax(torch.randn(5, 5), -1))",
                               "dx = torch.einsum('nm,bmd->bnd', self.adj, x) - x + torch.tanh(self.w(x))"),
    "linear scan inside": ("tokens", "self.a = nn.Parameter(torch.randn(6))\nself.b = nn.Linear(6, 6)\nself.c = nn.Linear(6, 6)\nself.norm = nn.LayerNorm(6)",
                           "u = self.b(self.norm(x))\ns = torch.zeros_like(u[:, 0])\nys = []\nfor j in range(u.shape[1]):\n    s = torch.sigmoid(self.a) * s + u[:, j]\n    ys.append(s)\ndx = self.c({act}(torch.stack(ys, 1)))"),
    "conv": ("map", "self.a = nn.Conv2d(3, 4, 3, padding=1)\nself.b = nn.Conv2d(4, 3, 3, padding=1)", "dx = self.b({act}(self.a(x)))"),
    "conv, norm first": ("map", "self.n = nn.GroupNorm(1, 3)\nself.a = nn.Conv2d(3, 3, 3, padding=1)", "dx = self.a({act}(self.n(x)))"),
    "symmetric conv": ("map", "self.k = nn.Parameter(0.2 * torch.randn(4, 3, 3, 3))",
                       "dx = -F.conv_transpose2d({act}(F.conv2d(x, self.k, padding=1)), self.k, padding=1)"),
    "self-attention": ("tokens", "self.norm = nn.LayerNorm(6)\nself.qkv = nn.Linear(6, 18)\nself.o = nn.Linear(6, 6)",
                       "q, k, v = self.qkv(self.norm(x)).chunk(3, -1)\nw = torch.softmax(q @ k.transpose(-1, -2) / 6**0.5, -1)\ndx = self.o(w @ v)"),
    "MultiheadAttention": ("tokens", "self.norm = nn.LayerNorm(6)\nself.mha = nn.MultiheadAttention(6, 2, batch_first=True)",
                           "y = self.norm(x)\ndx = self.mha(y, y, y, need_weights=False)[0]"),
    "token mlp": ("tokens", "self.norm = nn.LayerNorm(6)\nself.a = nn.Linear(6, 9)\nself.b = nn.Linear(9, 6)", "dx = self.b({act}(self.a(self.norm(x))))"),
    "graph, adjacency": ("tokens", "self.w = nn.Linear(6, 6)\nself.register_buffer('adj', torch.softmax(torch.randn(5, 5), -1))",
                         "dx = torch.tanh(self.w(torch.einsum('nm,bmd->bnd', self.adj, x)))"),
    "graph, messages": ("tokens", "self.m = nn.Linear(12, 6)\nself.register_buffer('src', torch.tensor([0, 1, 2, 3, 4, 0, 2]))\nself.register_buffer('dst', torch.tensor([1, 2, 3, 4, 0, 2, 4]))",
                        "e = torch.tanh(self.m(torch.cat([x[:, self.src], x[:, self.dst]], -1)))\ndx = torch.zeros_like(x).index_add(1, self.dst, e)"),
    "time concatenated": ("time", "self.a = nn.Linear(7, 9)\nself.b = nn.Linear(9, 6)",
                          "tt = t * torch.ones_like(x[..., :1])\ndx = self.b({act}(self.a(torch.cat([x, tt], -1))))"),
    "time embedding": ("time", "self.e = nn.Linear(4, 9)\nself.a = nn.Linear(6, 9)\nself.b = nn.Linear(9, 6)",
                       "w = t * torch.tensor([1.0, 4.0]).to(x)\ne = self.e(torch.cat([torch.sin(w), torch.cos(w)]))\ndx = self.b({act}(self.a(x) + e))"),
    "time FiLM": ("time", "self.e = nn.Linear(1, 18)\nself.a = nn.Linear(6, 9)\nself.b = nn.Linear(9, 6)",
                  "s, c = self.e(t * torch.ones(1).to(x)).chunk(2)\ndx = self.b({act}((1 + s) * self.a(x) + c))"),
}  # fmt: skip
OVER_TIME = {"linear scan inside": r"linear recurrence|diagonal|exponential|damped"}  # what runs inside a field
SEPARABLE = ("linear term", "sum of")  # a reader may tell a part of these fields apart
STATE = {"vector": (6,), "time": (6,), "map": (3, 5, 5), "tokens": (5, 6)}
NORM = {
    "vector": "nn.LayerNorm(6)",
    "time": "nn.LayerNorm(6)",
    "map": "nn.GroupNorm(1, 3)",
    "tokens": "nn.LayerNorm(6)",
}
FEATURE = {"vector": "6", "time": "6", "tokens": "6", "map": "3, 1, 1"}
STEM = {
    "vector": "nn.Linear(4, 6)",
    "time": "nn.Linear(4, 6)",
    "tokens": "nn.Linear(4, 6)",
    "map": "nn.Conv2d(2, 3, 3, padding=1)",
}
HEAD = {
    "vector": "nn.Linear(6, 2)",
    "time": "nn.Linear(6, 2)",
    "tokens": "nn.Linear(6, 2)",
    "map": "nn.Conv2d(3, 1, 1)",
}
RAW = {"vector": (4,), "time": (4,), "tokens": (5, 4), "map": (2, 5, 5)}
ACTS = {"torch.tanh": "Tanh", "F.gelu": "GELU", "F.silu": "SiLU", "torch.relu": "ReLU", "F.softplus": "Softplus"}


def block(text: str, by: int) -> str:
    """The lines moved to the right."""
    return indent(text.strip("\n"), " " * by)


def field_class(name: str, kind: str, act: str, takes: str, returns: str, drive: str, call: str) -> str:
    """The module of a field, with how time or input comes in, what it gives back and how it is called."""
    _, init, forward = FIELDS[kind]
    arguments = {"": "x", "t": "t, x", "u": "x, u"}[takes]
    fill = {"{act}": act, "{Act}": ACTS[act]}
    for key, value in fill.items():
        init, forward = init.replace(key, value), forward.replace(key, value)
    if takes == "u":
        more = {
            "added": ("self.inp = nn.Linear(4, 6)", "x = x + self.inp(u)"),
            "concatenated": ("self.inp = nn.Linear(10, 6)", "x = self.inp(torch.cat([x, u], -1))"),
            "projected before": ("", "x = x + u"),
            "gated": ("self.inp = nn.Linear(4, 6)", "x = x * torch.sigmoid(self.inp(u))"),
        }[drive]
        init, forward = f"{init}\n{more[0]}", f"{more[1]}\n{forward}"
    value = {"tensor": "dx", "tuple": "dx, dx.detach().norm()", "dict": '{"dx": dx, "size": dx.detach().abs().mean()}'}[
        returns
    ]
    return (
        f"class {name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n{block(init, 8)}\n\n"
        f"    def {'forward' if call == 'module' else 'rhs'}(self, {arguments}):\n{block(forward, 8)}\n        return {value}\n"
    )
