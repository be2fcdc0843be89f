from __future__ import annotations

import io
import os
import pickle

import pytest

from stabkit.checkpoints.pickles import globals_asked, not_inert


@pytest.mark.parametrize("protocol", range(6))
def test_globals_are_listed_for_every_protocol(protocol):
    asked = globals_asked(io.BytesIO(pickle.dumps({"a": os.getcwd, "b": [io.BytesIO]}, protocol)))
    assert {"posix.getcwd", "_io.BytesIO"} <= {name.replace("nt.", "posix.") for name in asked}


def test_every_tensor_builder_of_torch_is_inert_except_the_bytearray():
    from torch._weights_only_unpickler import _get_allowed_globals

    assert not_inert(set(_get_allowed_globals())) == ["builtins.bytearray"]


def test_names_that_only_look_like_torch_are_not_inert():
    names = {
        "torch.load",
        "torch.utils.x.Tensor",
        "torch._utils._import_dotted_name",
        "torch.hub.load",
        "torch.jit.Storage",
    }
    assert not_inert(names) == sorted(names)


def test_damaged_opcodes_are_a_value_error():
    with pytest.raises(ValueError, match="STOP"):
        globals_asked(io.BytesIO(pickle.dumps([1, 2])[:-1]))
