from __future__ import annotations

import pytest
import torch

from stabkit.monitor import Monitor
from tests.monitor.networks import mlp, train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0; expected at least 1"),
        ({"every": 1.5}, "every=1.5 is float; expected a whole number"),
        ({"history": "9"}, "history='9' is str"),
        ({"capsules": True}, "capsules=True is bool"),
        ({"preset": "economic"}, "economy, standard, full; did you mean economy"),
        ({"blocks": ["33"]}, "no module '33'; did you mean 3"),
        ({"blocks": []}, "blocks is empty"),
        ({"writers": ["run.txt"]}, r"ends in one of \.jsonl, \.ndjson, \.csv, and none of tensorboard, wandb, mlflow"),
        ({"writers": "tensorbord"}, "did you mean tensorboard"),
        ({"writers": [3]}, "got int"),
        ({"writers": 3}, "got int"),
        ({"optimizer": "adam"}, "optimizer holds str"),
        ({"optimizer": [None]}, "optimizer holds NoneType"),
        ({"on_alert": 3}, "on_alert holds int"),
        ({"rules": 3}, "rules is int; expected stabkit.monitor.AlertRules"),
        ({"directory": 3}, "directory is int"),
        ({"scaler": 3}, "scaler is int; expected the torch.amp.GradScaler"),
        ({"model_factory": mlp}, "model_factory is function; expected 'pkg.mod:factory'"),
    ],
)
def test_bad_arguments_are_refused_with_the_nearest_fix(options, message):
    with pytest.raises(ValueError, match=message):
        Monitor(mlp(), **options)


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="model is int"):
        Monitor(3)


def test_a_capsule_needs_a_directory():
    with pytest.raises(ValueError, match="directory"):
        Monitor(mlp()).capsule()


def test_one_writer_needs_no_list(tmp_path):
    seen = []
    for writers in (tmp_path / "run.csv", str(tmp_path / "run.jsonl"), seen.append):
        train(mlp(), lambda: torch.ones(2, 8), 2, lambda model, _, given=writers: Monitor(model, 1, writers=given))
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == len(seen) == 2
    assert (tmp_path / "run.csv").read_text().startswith("step,")
