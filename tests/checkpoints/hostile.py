"""Files made to exhaust whoever reads them, and a program that reads them all: python -m tests.checkpoints.hostile DIR

The program limits its own address space and time, and prints for each file what was said and how long it took.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

SECONDS, GIGABYTES = 10, 2
STATE = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}


def zipped(data_pickle: bytes) -> bytes:
    """A checkpoint as torch.save writes it, with another pickle."""
    good = io.BytesIO()
    torch.save(STATE, good)
    out = io.BytesIO()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(out, "w") as archive:
        for entry in source.infolist():
            data = data_pickle if entry.filename.endswith("data.pkl") else source.read(entry)
            archive.writestr(entry.filename, data)
    return out.getvalue()


def saved(content: object, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def doubling(codec: str, times: int) -> bytes:
    """A pickle that applies a codec to its own result: 2 ** times bytes from one."""
    call = b"c_codecs\nencode\n"
    body = b"C\x01a"
    for _ in range(times):
        body = call + body + b"X" + struct.pack("<I", len(codec)) + codec.encode() + b"\x86R"
    return b"\x80\x04}X\x06\x00\x00\x00weight" + body + b"s."


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def zip_of_many_entries() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for i in range(20_000):
            archive.writestr(f"a/{i}", b"")
    return out.getvalue()


def with_forged_size(size: int) -> bytes:
    """A zip whose directory claims another size for an entry."""
    data = bytearray(saved(STATE))
    where = data.rindex(b"PK\x01\x02")
    data[where + 20 : where + 28] = struct.pack("<II", size, size)
    return bytes(data)


def expanded() -> torch.Tensor:
    return torch.ones(1).expand(2**20, 2**20)


def nested(depth: int) -> bytes:
    return b"\x80\x04" + b"(" * depth + b"t" * depth + b"."


HUGE_MEMO = b"\x80\x04}r\xff\xff\xff\x7f."
HUGE_BYTES = b"\x80\x04\x8e" + struct.pack("<Q", 2**42) + b"x."
HUGE_BYTEARRAY = b"\x80\x05\x96" + struct.pack("<Q", 2**42) + b"x."
HUGE_FRAME = b"\x80\x04\x95" + struct.pack("<Q", 2**42) + b"}."
LONG_NUMBER = b"\x80\x04L" + b"9" * 5_000_000 + b"L\n."
CYCLE = b"\x80\x04}q\x00X\x01\x00\x00\x00ah\x00s."

FILES: dict[str, Callable[[], bytes]] = {
    "memo.pt": lambda: zipped(HUGE_MEMO),
    "memo_legacy.pt": lambda: saved(STATE, legacy=True)[:40] + HUGE_MEMO,
    "bytes.pt": lambda: zipped(HUGE_BYTES),
    "bytearray.pt": lambda: zipped(HUGE_BYTEARRAY),
    "frame.pt": lambda: zipped(HUGE_FRAME),
    "number.pt": lambda: zipped(LONG_NUMBER),
    "nested.pt": lambda: zipped(nested(200_000)),
    "cycle.pt": lambda: zipped(CYCLE),
    "hex.pt": lambda: zipped(doubling("hex", 45)),
    "hex_spelt.pt": lambda: zipped(doubling("HEX-codec", 45)),
    "base64.pt": lambda: zipped(doubling("base64", 90)),
    "expanded.pt": lambda: saved({"weight": expanded(), "bias": torch.ones(2)}),
    "expanded_legacy.pt": lambda: saved({"weight": expanded()}, legacy=True),
    "sparse.pt": lambda: saved({"weight": torch.sparse_coo_tensor(torch.zeros(2, 1).long(), [1.0], (2**30, 2**30))}),
    "meta.pt": lambda: saved({"weight": torch.empty(2**40, device="meta")}),
    "entries.pt": zip_of_many_entries,
    "size.pt": lambda: with_forged_size(2**31),
    "terabytes.safetensors": lambda: safetensors(
        {"weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ),
    "header.safetensors": lambda: struct.pack("<Q", 2**62) + b"{}",
    "negative.safetensors": lambda: safetensors(
        {"weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"
    ),
    "overlap.safetensors": lambda: safetensors(
        {f"w{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(100_000)}, b"1234"
    ),
    "brackets.safetensors": lambda: safetensors(b'{"a":' + b"[" * 1_000_000),
    "duplicate.safetensors": lambda: safetensors(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "dcp_memo/.metadata": lambda: HUGE_MEMO,
    "dcp_bytes/.metadata": lambda: HUGE_BYTES,
    "dcp_bytearray/.metadata": lambda: HUGE_BYTEARRAY,
    "dcp_number/.metadata": lambda: LONG_NUMBER,
    "dcp_nested/.metadata": lambda: nested(200_000),
    "dcp_cycle/.metadata": lambda: CYCLE,
    "dcp_hex/.metadata": lambda: doubling("hex", 45),
    "dcp_class/.metadata": lambda: pickle.dumps(pickle.PickleBuffer, 4),
}


def write(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content())
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    torch.save(
        {
            "base_model.model.0.lora_A.weight": torch.ones(1).expand(1, 2**25),
            "base_model.model.0.lora_B.weight": torch.ones(1).expand(2**25, 1),
        },
        adapter / "adapter_model.bin",
    )
    save_file({"weight": torch.ones(2, 2)}, folder / "good.safetensors")


def main(folder: Path) -> None:
    from stabkit.checkpoints import ArchitectureMissingError, load
    from stabkit.errors import CheckpointError
    from stabkit.weights import analyze_weights

    class Late(BaseException):
        """No handler of the code under test takes it for an error of the file."""

    def late(*_: object) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30, -1))
    for path in sorted([*(folder / name for name in FILES), folder / "adapter"]):
        for base in (
            {"base": torch.nn.Linear(2, 2)} if path.name == "adapter" else {"model": torch.nn.Linear(2, 2)},
            {},
        ):
            start = time.perf_counter()
            signal.alarm(SECONDS)
            try:
                load(path, input="1x2", **base)
                outcome = "loaded"
            except ArchitectureMissingError as missing:
                outcome = f"weights: {len(analyze_weights(missing.weights.tensors).matrices)}"
            except CheckpointError as error:
                outcome = f"refused: {str(error)[:150]}"
            except BaseException as error:
                outcome = f"BROKE: {type(error).__name__}: {error}"
            finally:
                signal.alarm(0)
            shown = path.relative_to(folder)
            print(json.dumps([str(shown), bool(base), outcome, round(time.perf_counter() - start, 2)]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
