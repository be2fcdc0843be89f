import pytest

from stabkit import integrators
from stabkit.integrators.order_conditions import density, prunings, trees, vertices

ORDERS = {
    "forward_euler": 1, "ralston3": 3, "kutta3": 3, "three_eighths": 4, "cash_karp": 5, "fehlberg4": 4,
    "fehlberg5": 5, "tsit5": 5, "dop853": 8, "ssp53": 3, "ssp104": 4, "rkc1": 1, "rkc2": 2, "gauss4": 8,
    "radau_ia3": 5, "radau_iia4": 7, "lobatto_iiib3": 4, "lobatto_iiic4": 6, "sdirk3": 3, "sdirk34": 4, "tr_bdf2": 2,
    "ab5": 5, "am4": 5, "bdf4": 4, "leapfrog": 2, "nystrom3": 3, "milne_simpson": 4, "sspms43": 3, "sspms53": 3,
    "lie": 1, "strang": 2, "macaron": 1, "imex_euler": 1, "parallel": 1, "stormer_verlet": 2, "plain": 0,
    "damped_euler": 0, "polynet": 0, "momentum_resnet": 1, "lm_resnet": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_order(name):
    assert integrators.named(name).order == ORDERS[name]


def test_number_of_trees():
    # Butcher, table 300(I); with two colours, the coefficients of OEIS A000151
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    assert [len(trees(n, (0, 1))) for n in range(1, 6)] == [2, 4, 14, 52, 214]


def test_density_and_prunings_of_small_trees():
    leaf = (0, ())
    bush, tall = (0, (leaf, leaf)), (0, ((0, (leaf,)),))
    assert (density(bush), density(tall), vertices(tall)) == (3, 6, 3)
    # a bush: itself cut off whole, or none, one (twice) or both leaves cut off
    assert sorted(len(forest) for forest, _ in prunings(bush)) == [0, 1, 1, 1, 2]


def test_linear_order_can_exceed_the_order():
    # all conditions for y' = lambda y up to order 4, but only c = (0, 1/2, 0, ...) for the quadrature
    chain = integrators.from_stability_function([1, 1, "1/2", "1/6", "1/24"])
    assert chain.linear_order == 4
    assert chain.order < 4


def test_each_family_of_nodes_has_its_own_order():
    for s in (2, 3, 4):
        assert integrators.collocation_family("gauss", s).order == 2 * s
        assert integrators.collocation_family("radau_ia", s).order == 2 * s - 1
        assert integrators.collocation_family("radau_iia", s).order == 2 * s - 1
        for letter in "abc":
            assert integrators.collocation_family(f"lobatto_iii{letter}", s).order == 2 * s - 2
