import subprocess
import sys

import numpy as np
import pytest

from stabkit import integrators


def test_names_resolve_and_say_their_source():
    for entry in integrators.entries():
        assert entry.source
        assert integrators.entry(entry.name) is entry
        assert all(integrators.entry(alias) is entry for alias in entry.aliases)
    assert len(set(integrators.names())) == len(integrators.names())


def test_no_alias_shadows_another_entry():
    seen = {}
    for entry in integrators.entries():
        for name in {entry.name, *entry.aliases}:
            key = name.replace("_", "").replace("-", "").lower()
            assert seen.setdefault(key, entry) is entry, name


@pytest.mark.parametrize("name", integrators.names())
def test_every_method_is_what_its_kind_says(name):
    method = integrators.named(name)
    assert np.all(np.isfinite(method.stability_matrix(-0.1)))
    assert method.real_interval() >= 0
    if method.order >= 1 and method.states == 1 and method.n_fields == 1:  # R(z) = exp(z) + O(z^(p+1))
        for h in (0.02, 0.02j):
            error = abs(method.stability_matrix(h)[0, 0] - np.exp(h))
            assert error <= 5 * 0.02 ** (min(method.order, 7) + 1) + 1e-14


@pytest.mark.parametrize(
    ("written", "name"),
    [("RK4", "rk4"), ("Dormand-Prince", "dopri5"), ("crank nicolson", "trapezoid"), ("resnet", "forward_euler"),
     ("Radau IIA 2", "radau_iia2"), ("SSPRK104", "ssp104"), ("GPT-J", "parallel")],
)  # fmt: skip
def test_spelling_does_not_matter(written, name):
    assert integrators.named(written) is integrators.named(name)


def test_parameters_inline_and_as_keywords():
    assert integrators.named("rkc1(10)") == integrators.named("rkc1", s=10) == integrators.rkc1(10)
    assert integrators.named("theta(theta=1)").is_L_stable
    assert integrators.named("damped_euler(1/2, lambda_in_resnet)").V[0, 0] == 0.5
    assert integrators.named("damped_euler", lam=0.25).real_interval() == 1.75
    assert integrators.named("stochastic_depth(survival=1/2, rescaled=True)").real_interval() == 1
    assert integrators.named("gauss6").order == 12
    assert integrators.named("bdf8").linear_order == 8


def test_unknown_names_suggest_near_ones():
    with pytest.raises(
        integrators.UnknownMethodError, match=r"no method is called 'foward_euler'; did you mean forward_euler"
    ):
        integrators.named("foward_euler")
    with pytest.raises(integrators.UnknownMethodError, match=r"lists them all"):
        integrators.named("qqqqqqqq")
    with pytest.raises(TypeError, match=r"rkc1 does not take stages; it takes s=5, damping=0"):
        integrators.named("rkc1", stages=3)
    with pytest.raises(TypeError, match="it takes no parameters"):
        integrators.named("rk4", s=3)


def test_every_method_has_a_name_a_source_and_an_interval():
    for name in integrators.names():
        method = integrators.named(name)
        assert method.name
        assert method.source
        assert method.real_interval() >= 0.0, name


def test_neither_torch_nor_matplotlib_is_imported():
    code = (
        "import sys, stabkit.integrators as i; i.named('dop853').region().area; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'networkx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
