"""What happens with every kind of file that people call a checkpoint: python -m tests.checkpoints.formats

Each file is made by the tool that makes it in practice, loaded, and compared with the model that was saved: "same"
means that every tensor is bit for bit what was saved and that the model gives the same output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stabkit.checkpoints import ArchitectureMissingError, load
from stabkit.errors import CheckpointError
from stabkit.weights import analyze_weights
from tests.processes import leave


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


@dataclass(frozen=True)
class Case:
    """One row: what is made, how it is asked for, and what ought to happen."""

    what: str
    tool: str
    make: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)
    expected: str = "same"
    needs: tuple[str, ...] = ()


def reference() -> nn.Module:
    torch.manual_seed(0)
    return network().eval()


def other() -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in reference().state_dict().items()}


def saved(content: Any, name: str = "model.pt", **how: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content() if callable(content) else content, folder / name, **how)
        return folder / name

    return make


def state() -> dict[str, torch.Tensor]:
    return reference().state_dict()


def training_dict() -> dict[str, Any]:
    optimizer = torch.optim.Adam(reference().parameters())
    return {"checkpoint": {"model_state_dict": state()}, "optimizer": optimizer.state_dict(), "epoch": 3}


def with_inert_values() -> dict[str, Any]:
    generator = np.random.RandomState(0).get_state()
    arguments = argparse.Namespace(lr=0.1, arch="mlp")
    return {"model": state(), "args": arguments, "best": np.float64(0.9), "rng": generator, "log": np.arange(3.0)}


def averaged() -> dict[str, Any]:
    return {"state_dict": other(), "state_dict_ema": state()}


def swa() -> dict[str, Any]:
    average = torch.optim.swa_utils.AveragedModel(reference())
    return {"model": other(), "model_ema": average.state_dict()}


def wrapped() -> dict[str, torch.Tensor]:
    module = torch.compile(nn.DataParallel(reference()))
    return module.state_dict()


def deep_prefix() -> dict[str, torch.Tensor]:
    return {f"module.model._orig_mod.net.{name}": value for name, value in state().items()}


def lightning(folder: Path) -> Path:
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    class Task(lightning.LightningModule):
        def __init__(self, width: int = 8, options: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def on_train_batch_end(self, *_: Any) -> None:
            self.net[1].num_batches_tracked.zero_()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    task = Task(options={"depth": 2})
    task.net.load_state_dict(state())
    callback = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}-{step}")
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    task.net[1].momentum = 0.0  # nothing may change: the learning rate is 0 as well
    trainer.fit(task, DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=4))
    return Path(callback.best_model_path)


def whole_module(folder: Path) -> Path:
    return saved(reference)(folder)


def safetensors(folder: Path) -> Path:
    from safetensors.torch import save_model

    save_model(reference(), str(folder / "model.safetensors"))
    return folder / "model.safetensors"


def exported(folder: Path) -> Path:
    torch.export.save(torch.export.export(reference(), (torch.randn(2, 3),)), folder / "model.pt2")
    return folder / "model.pt2"


def scripted(folder: Path) -> Path:
    torch.jit.script(reference()).save(str(folder / "model.pt"))
    return folder / "model.pt"


def distributed(folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": state(), "step": 12}, checkpoint_id=str(folder / "dcp"))
    return folder / "dcp"


def fsdp(folder: Path) -> Path:
    """Two processes with a shard each."""
    import torch.multiprocessing as processes

    processes.spawn(_fsdp_rank, (str(folder),), nprocs=2)
    return folder / "fsdp"


def _fsdp_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = reference()
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    dcp.save({"app": {"model": get_model_state_dict(model)}}, checkpoint_id=f"{folder}/fsdp")
    dist.destroy_process_group()
    leave()


def zero(folder: Path) -> Path:
    """The file names that DeepSpeed writes; only names are looked at."""
    (folder / "global_step1").mkdir()
    for rank in (0, 1):
        saved({}, f"global_step1/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")(folder)
    (folder / "global_step1" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"x")
    (folder / "latest").write_text("global_step1")
    return folder


def accelerated(folder: Path) -> Path:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = reference()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    accelerator.save_state(str(folder / "state"))
    return folder / "state"


def gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=50, n_positions=12, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def hugging_face(folder: Path) -> Path:
    gpt2().save_pretrained(folder / "hub")
    return folder / "hub"


def hugging_face_shards(folder: Path) -> Path:
    gpt2().save_pretrained(folder / "hub", max_shard_size="3KB")
    return folder / "hub"


def adapter(folder: Path) -> Path:
    import peft

    tuned = peft.get_peft_model(reference(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "3"]))
    tuned.save_pretrained(str(folder / "adapter"))  # its B is 0: the merged model is the base
    saved(state, "base.pt")(folder)
    return folder / "adapter"


def timm_checkpoint(folder: Path) -> Path:
    import timm
    from timm.utils import CheckpointSaver, ModelEmaV2

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), lr=0.1), args=argparse.Namespace(model="test_vit"),
        model_ema=ModelEmaV2(model), checkpoint_dir=str(folder), recovery_dir=str(folder),
    )  # fmt: skip
    saver.save_checkpoint(epoch=4, metric=0.5)
    return folder / "checkpoint-4.pth.tar"


def keras(folder: Path) -> Path:
    (folder / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    return folder / "model.h5"


MODEL: dict[str, Any] = {"model": network}
TIMM: dict[str, Any] = {"model": "timm:test_vit", "factory_args": {"num_classes": 3}}
CASES = (
    Case("state dict, zip", "torch.save", saved(state), MODEL),
    Case("state dict, legacy", "torch.save", saved(state, _use_new_zipfile_serialization=False), MODEL),
    Case("training dict, nested twice", "torch.save", saved(training_dict), MODEL),
    Case("... --key", "torch.save", saved(training_dict), {**MODEL, "key": "checkpoint.model_state_dict"}),
    Case("... with Namespace, numpy values", "torch.save", saved(with_inert_values), MODEL),
    Case(
        "... the same, legacy",
        "torch.save",
        saved(with_inert_values, _use_new_zipfile_serialization=False),
        MODEL,
    ),
    Case("Lightning .ckpt", "lightning", lightning, MODEL, needs=("lightning",)),
    Case("a whole pickled module", "torch.save", whole_module, {}, "refused: --trust-pickle"),
    Case("... with --trust-pickle", "torch.save", whole_module, {"trust_pickle": True}),
    Case("Hugging Face directory", "transformers", hugging_face, {}, "same gpt2", ("transformers",)),
    Case("... in shards", "transformers", hugging_face_shards, {}, "same gpt2", ("transformers",)),
    Case("safetensors", "safetensors", safetensors, MODEL),
    Case("torch.export .pt2", "torch.export", exported, {}, "refused: --allow-export"),
    Case("... with --allow-export", "torch.export", exported, {"allow_export": True}, "same output"),
    Case("TorchScript", "torch.jit", scripted, {}, "refused: --allow-torchscript"),
    Case("... with --allow-torchscript", "torch.jit", scripted, {"allow_torchscript": True}),
    Case("DCP directory", "torch DCP", distributed, MODEL),
    Case("FSDP directory, two ranks", "torch FSDP2", fsdp, MODEL),
    Case("accelerate save_state", "accelerate", accelerated, MODEL, needs=("accelerate",)),
    Case("DeepSpeed ZeRO directory", "file names", zero, MODEL, "refused: zero_to_fp32.py"),
    Case("LoRA adapter", "peft", adapter, MODEL, "refused: --base", ("peft",)),
    Case("... with --base", "peft", adapter, {**MODEL, "base": "base.pt"}, "same", ("peft",)),
    Case("EMA beside raw, --weights ema", "torch.save", saved(averaged), {**MODEL, "weights": "ema"}),
    Case("... AveragedModel", "torch swa_utils", saved(swa), {**MODEL, "weights": "ema"}),
    Case("... timm CheckpointSaver, raw", "timm", timm_checkpoint, TIMM, "same timm", ("timm",)),
    Case("... timm, --weights ema", "timm", timm_checkpoint, {**TIMM, "weights": "ema"}, "same timm", ("timm",)),
    Case("prefixes module., _orig_mod.", "torch.compile", saved(wrapped), MODEL),
    Case("prefixes at any depth", "torch.save", saved(deep_prefix), MODEL),
    Case("a key too many", "torch.save", saved(lambda: {**state(), "extra": torch.ones(1)}), MODEL, "refused: extra"),
    Case("no architecture", "torch.save", saved(state), {}, "weights only"),
    Case("DCP without architecture", "torch DCP", distributed, {}, "weights only"),
    Case("HDF5", "file header", keras, MODEL, "refused: HDF5"),
)


def expected_model(kind: str) -> nn.Module:
    if kind == "same gpt2":
        return gpt2()
    if kind == "same timm":
        import timm

        torch.manual_seed(0)
        return timm.create_model("test_vit", num_classes=3).eval()
    return reference()


def what_happens(case: Case, folder: Path) -> str:
    """The outcome in the words of ``Case.expected``, with what was said."""
    path = case.make(folder)
    options = dict(case.options)
    if "base" in options:
        options["base"] = folder / options["base"]
    given = {} if "same" not in case.expected or case.expected in ("same gpt2", "same timm") else {"input": "4x3"}
    given = {"input": "2x3"} if case.expected == "same output" else given
    try:
        loaded = load(path, **options, **given)
    except ArchitectureMissingError as missing:
        report = analyze_weights(missing.weights.tensors)
        return f"weights only: {len(report.matrices)} matrices"
    except CheckpointError as error:
        return f"refused: {str(error).replace(str(folder), '')}"
    ours, theirs = loaded.model.state_dict(), expected_model(case.expected).state_dict()
    same = set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    with torch.no_grad():
        output = loaded.model(*loaded.inputs, **loaded.kwargs)
        wanted = expected_model(case.expected)(*loaded.inputs, **loaded.kwargs)
    output, wanted = (getattr(y, "logits", y) for y in (output, wanted))
    close = torch.allclose(output, wanted, atol=1e-6)
    notes = "; ".join(line for line in loaded.description.splitlines() if not line.startswith(("source", "input")))
    verdict = "same" if same and close else "same output" if close else "NOT the same"
    return f"{verdict} ({notes})"


def holds(expected: str, found: str) -> bool:
    """Whether what happened is what ought to happen."""
    if expected.startswith("refused: "):
        return found.startswith("refused: ") and expected.removeprefix("refused: ") in found
    if expected.startswith("same"):
        return found.startswith("same output" if expected == "same output" else "same (") or found.startswith("same (")
    return found.startswith(expected)


def missing_tools(case: Case) -> list[str]:
    return [name for name in case.needs if importlib.util.find_spec(name) is None]


@contextlib.contextmanager
def quiet() -> Any:
    """What other tools print and warn about their own formats does not belong in the table."""
    previous = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(previous)


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wrong = 0
    for case in CASES:
        if missing := missing_tools(case):
            print(f"skip  {case.what:34} {case.tool:16} needs {', '.join(missing)}")
            continue
        with tempfile.TemporaryDirectory() as folder, quiet():
            found = what_happens(case, Path(folder))
        good = holds(case.expected, found)
        wrong += not good
        print(f"{'ok' if good else 'WRONG':5} {case.what:34} {case.tool:16} {found[:150]}", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
