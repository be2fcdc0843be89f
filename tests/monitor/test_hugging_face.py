"""The callback in a real run of the Hugging Face Trainer."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about devices and pinned memory


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(16, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def build():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def fit(directory, callbacks):
    model = build()
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        seed=0,
    )
    transformers.Trainer(model, arguments, train_dataset=Tokens(), callbacks=callbacks).train()
    return model


def test_a_run_is_recorded_trains_the_same_and_replays(tmp_path):
    from stabkit import TrainerCallback
    from stabkit.monitor import replay

    class Asking(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.monitor.capsule()

    plain = fit(tmp_path / "plain", [])
    callback = Asking(every=1)
    watched = fit(tmp_path / "watched", [callback])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    monitor = callback.monitor
    assert all(2.0 < r.loss < 3.5 for r in monitor.records)  # the log of 16 words, as the Trainer adds it up
    assert [r.step for r in monitor.records] == list(range(6))
    names = [b.name for b in monitor.records[0].blocks]
    assert [n for n in names if ".h." in n] == [f"transformer.h.{i}" for i in range(3)]
    assert monitor.records[0].blocks[names.index("transformer.h.1")].calls == 2
    assert (tmp_path / "watched" / "records.jsonl").is_file()
    again = replay(monitor.capsules[0], build)
    differences = dict(again.differences)
    differences.pop("parameter_gradient_norm")  # the Trainer has clipped them
    assert max(differences.values()) < 1e-5
