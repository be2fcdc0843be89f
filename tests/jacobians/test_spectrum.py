import dataclasses
import json

import numpy as np
import pytest

from stabkit.jacobians import eigenvalues, singular_values

ROTATION = np.array([[0.0, -1.0], [1.0, 0.0]])


def test_a_spectrum_draws_itself_on_new_or_given_axes():
    ax = eigenvalues(ROTATION).plot()
    x, y = np.concatenate([np.asarray(points.get_offsets()) for points in ax.collections]).T
    np.testing.assert_allclose(np.sort(y), [-1, 1], atol=1e-12)
    np.testing.assert_allclose(x, 0, atol=1e-12)
    assert singular_values(np.diag([3.0, 1.0])).plot(ax=ax) is ax


def test_a_spectrum_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        eigenvalues(ROTATION).method = "guess"


def test_the_dictionary_says_how_the_numbers_came_about():
    stored = json.loads(json.dumps(singular_values(np.eye(3), 2).to_dict()))
    assert stored["method"] == stored["path"] == "dense"
    assert "LAPACK is cheaper" in stored["reason"]
    assert stored["stopped"] == "done"
    assert stored["n_products"] == 3
