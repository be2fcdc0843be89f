from __future__ import annotations

import contextlib
import gc
import subprocess
import sys

import pytest

from stabkit.cli.imports import _COMPILER, _StandIn, quick_imports


def test_torchvision_is_imported_without_the_compiler():
    code = (
        "import sys; from stabkit.cli.imports import import_torchvision; import_torchvision(); "
        "print('torchvision.ops.roi_align' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"


def test_what_stands_in_for_the_compiler_answers_as_it_does():
    from torch._dynamo import utils

    stands_in = _StandIn(_COMPILER)
    assert stands_in.is_compile_supported("cpu") == utils.is_compile_supported("cpu")
    assert stands_in.counters is utils.counters
    assert not hasattr(stands_in, "__file__")  # inspect asks all modules for it, and must not bring the compiler in


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_after_imports_as_before(collects):
    before, kept = gc.isenabled(), gc.get_freeze_count()
    try:
        (gc.enable if collects else gc.disable)()
        with contextlib.suppress(ImportError), quick_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == collects
        assert gc.get_freeze_count() <= kept  # nothing of a library is kept; what goes is kept no more
    finally:
        (gc.enable if before else gc.disable)()


_AS_A_LIBRARY = "from stabkit.cli.imports import quick_imports\nwith quick_imports(): pass"


@pytest.mark.parametrize("entry", [_AS_A_LIBRARY, "from stabkit.cli import main; main()"])
def test_only_the_process_of_a_command_keeps_what_it_imported_from_its_collector(entry):
    code = "import atexit, gc, sys; sys.argv = ['stabkit', 'analyze', 'missing.pt']\n"
    code += f"atexit.register(lambda: print(gc.get_freeze_count()))\n{entry}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (int(done.stdout.splitlines()[-1]) > 0) == ("main" in entry)
