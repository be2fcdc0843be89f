"""Stock models at default initialisation must raise nothing: ``python -m tests.diagnosis.silence [--only PATTERN]``.

The mode ``loss`` is training with the loss that people would use: a cross entropy of random classes for logits, a
squared error of normal targets for everything else. One row per model and mode, as a line of JSON in a file, so that a
run that was stopped goes on where it was; the table is made of what the file holds. A model that takes longer than the
limit counts as not answered.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from stabkit.diagnosis import Diagnosis, examine
from stabkit.tracing import trace
from tests.diagnosis.soundness import unsound
from tests.models.__main__ import subjects
from tests.models.preparation import Built
from tests.models.vision import image, torchvision_model
from tests.models.zoo import Subject

FAMILIES = ("torchvision", "timm", "transformers", "torch.nn", "architectures")
MODES = ("eval", "train")
LOGITS = 500  # entries of the last of three dimensions from which they are logits of a vocabulary


def timm_model(name: str, size: int = 224) -> Callable[[], Built]:
    """A model of timm as `timm.create_model` makes it, with a batch of images of normal noise."""
    return lambda: (importlib.import_module("timm").create_model(name), (torch.randn(*image(size)),), {})


def transformer(name: str, **config: Any) -> Callable[[], Built]:
    """A model of transformers in the configuration that its class has by default, but for what is given."""

    def build() -> Built:
        library = importlib.import_module("transformers")
        settings = getattr(library, re.sub("(LMHead|ForCausalLM|ForMaskedLM|)(Model)?$", "", name) + "Config")(**config)
        torch.manual_seed(0)
        return getattr(library, name)(settings), (torch.randint(3, 1000, (2, 24)),), {}

    return build


_TORCHVISION = """resnet18 vit_b_16 mobilenet_v3_large efficientnet_b0 shufflenet_v2_x1_0 mnasnet1_0 convnext_tiny
    densenet121 swin_t regnet_y_400mf googlenet squeezenet1_1"""
_TIMM = """vit_small_patch16_224 deit_small_patch16_224 cait_xxs24_224 convmixer_768_32 resnet50 mixer_s32_224
    resmlp_12_224 xcit_nano_12_p16_224 levit_128s poolformer_s12"""
_SMALL = {"hidden_size": 256, "num_hidden_layers": 8}
_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {},
    "BertModel": {},
    "DistilBertModel": {},
    "LlamaForCausalLM": _SMALL | {"intermediate_size": 688},
    "Gemma2ForCausalLM": _SMALL | {"intermediate_size": 688},
    "Olmo2ForCausalLM": _SMALL | {"intermediate_size": 688},
    "OPTForCausalLM": _SMALL | {"ffn_dim": 1024, "num_attention_heads": 8},
}
#: whole models, in the size in which people use them
WHOLE = [
    *(Subject(f"whole {n}", torchvision_model(n, image(224)), family="torchvision") for n in _TORCHVISION.split()),
    *(Subject(f"whole {name}", timm_model(name), family="timm") for name in _TIMM.split()),
    *(Subject(f"whole {n}", transformer(n, **c), family="transformers") for n, c in _TRANSFORMERS.items()),
]


def stock() -> list[Subject]:
    """Every stock model, by family."""
    return [*(s for s in subjects() if s.family in FAMILIES), *WHOLE]


def named(subject: Subject) -> str:
    """The name of a model, with its family."""
    return f"{subject.family}: {subject.name}"


@dataclass(frozen=True)
class Row:
    """What was said of one model in one mode."""

    name: str
    mode: str
    verdict: str = ""
    summary: str = ""
    growth: float = 0.0
    found: tuple[str, ...] = ()
    unsound: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str = ""


class TimeUpError(Exception):
    """A model took longer than it may."""


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """At most so many seconds of the processor: what else runs on the machine is not held against a model."""

    def stop(*_: object) -> None:
        raise TimeUpError(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def told(diagnosis: Diagnosis) -> dict[str, Any]:
    """Verdict and findings, in short."""
    return {
        "verdict": diagnosis.verdict.name,
        "summary": diagnosis.verdict.summary,
        "growth": diagnosis.verdict.growth,
        "found": tuple(
            f"{f.severity} {f.kind} at {f.module_path!r} {list(f.steps[:3])}: {f.evidence[:300]} | {f.remedy[:160]}"
            for f in diagnosis.findings
        ),
        "unsound": tuple(unsound(diagnosis)),
    }


def usual_loss(out: Any) -> Tensor:
    """A loss of the first output that has a gradient: pooled outputs behind a tanh, say, are no logits."""
    found = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad and t.numel()][:1]
    generator = torch.Generator().manual_seed(1)
    losses = []
    for t in found:
        if t.dim() > 1 and (t.dim() == 2 or t.shape[-1] > LOGITS) and t.shape[-1] > 1:
            labels = torch.randint(t.shape[-1], t.shape[:-1], generator=generator)
            losses.append(functional.cross_entropy(t.flatten(0, -2).float(), labels.flatten()))
        else:
            losses.append((t - torch.randn(t.shape, generator=generator).to(t.dtype)).abs().square().mean())
    return torch.stack([loss.float() for loss in losses]).mean()


def diagnosed(subject: Subject, model: Any, args: tuple[Any, ...], kwargs: Any, loss: Any = None) -> Diagnosis:
    """The diagnosis of a model of the zoo, as it is called there."""
    return examine(trace(model, *args, kwargs=kwargs, target=subject.target, check=False, **subject.options), loss)


def larger(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """More images, where the zoo takes two and batch norms need more."""
    return tuple(torch.randn(8, *a.shape[1:]) if a.dim() > 3 else a for a in args)


def row(subject: Subject, mode: str, seconds: int) -> Row:
    """Build, trace and diagnose one model in one mode."""
    began = time.process_time()
    torch.manual_seed(0)
    said: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        try:
            with limit(seconds):
                model, args, kwargs = subject.build()
                if isinstance(model, nn.Module):
                    model.train(mode != "eval")
                loss = usual_loss if mode == "loss" else None
                diagnosis = diagnosed(subject, model, args, kwargs, loss)
                if "too small" in diagnosis.verdict.summary:
                    diagnosis = diagnosed(subject, model, larger(args), kwargs, loss)
                said = told(diagnosis)
        except Exception as error:  # the table shows it
            said = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return Row(subject.name, mode, seconds=round(time.process_time() - began, 1), **said)


def alarms(row: dict[str, Any]) -> list[str]:
    """What was said of it at warning or above."""
    return [text for text in row["found"] if not text.startswith("info")]


def unjudged(rows: list[dict[str, Any]]) -> list[str]:
    """Why verdicts are missing, with how many models of which family."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        if row["verdict"] == "not judged":
            why = re.sub(r"^Not judged: |[.]$", "", re.sub(r"\d+", "N", row.get("summary", "")))
            found.setdefault(why, Counter())[row["name"].split(":")[0]] += 1
    return [f"not judged: {why}: {dict(counts)}" for why, counts in found.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """Models by mode, silent or not, the alarms by kind, and why some were not judged."""
    lines = []
    for mode in dict.fromkeys(r["mode"] for r in rows):
        inside = [r for r in rows if r["mode"] == mode]
        answered = [r for r in inside if not r["error"]]
        kinds = Counter(text.split()[1] for r in answered for text in alarms(r))
        silent = sum(not alarms(r) for r in answered)
        lines.append(
            f"{mode:6s} {len(inside)} models, {len(answered)} answered, {silent} silent; "
            f"verdicts {dict(Counter(r['verdict'] for r in answered))}; alarms {dict(kinds) or 'none'}"
        )
    return "\n".join([*lines, *unjudged(rows)])


def main() -> int:
    """Run what is not yet in the file; the number of alarms."""
    parser = argparse.ArgumentParser(prog="python -m tests.diagnosis.silence", description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression on family and name")
    parser.add_argument("--every", type=int, default=1, help="take one of so many models")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seconds", type=int, default=60, help="limit of one model in one mode")
    parser.add_argument("--file", type=Path, default=Path("/tmp/stabkit-silence.jsonl"))
    wanted = parser.parse_args()
    models = [s for s in stock() if re.search(wanted.only, f"{s.family} {s.name}")][:: wanted.every]
    rows = [json.loads(line) for line in wanted.file.read_text().splitlines()] if wanted.file.exists() else []
    done = {(r["name"], r["mode"]) for r in rows}
    for subject in models:
        for mode in wanted.modes.split(","):
            name = named(subject)
            if (name, mode) in done:
                continue
            new = vars(row(subject, mode, wanted.seconds)) | {"name": name}
            rows.append(new)
            with wanted.file.open("a") as file:
                file.write(json.dumps(new) + "\n")
            what = new["error"] or new["verdict"]
            print(f"{new['seconds']:6.1f}s {mode:5s} {name:45s} {what}", flush=True)
            for text in [*alarms(new), *(f"UNSOUND {text}" for text in new["unsound"])]:
                print(f"          {text}", flush=True)
    print(table(rows))
    return sum(len(alarms(r)) for r in rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(min(main(), 1))
