"""What a gradient profile of a large transformer costs, on paper: ``examples/seventy_billion_parameters.md`` is `page`.

The counts of operations are those that torch's own counter finds on small models: see ``test_seventy_billion.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from stabkit.errors import ArgumentError
from stabkit.planning import sizes

_BF16, _FLOAT32, _FLOAT64 = 2, 4, 8  # bytes of a number
_CHECKS, _GAINS = 3, 2  # products with every block beside those with probes
_READINGS = 2  # and two more: a step is held against what is read of it, made anew of its fields


@dataclass(frozen=True)
class Transformer:
    """Sizes of a decoder: grouped-query attention, and an inner layer of two matrices, or three with a gate.

    Attributes:
        layers: blocks.
        width: how many numbers the state of a token has.
        heads: of attention.
        kv_heads: heads of keys and values.
        inner: width of the inner layer.
        vocabulary: rows of the embedding.
        gated: whether the inner layer has a gate.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    gated: bool = True

    @property
    def block_parameters(self) -> int:
        """Entries of the matrices of one block.

        Example:
            >>> Transformer(12, 768, 12, 12, 3072, 50257, gated=False).block_parameters == 12 * 768**2
            True
        """
        keys = self.width * self.kv_heads // self.heads
        return self.width * (2 * self.width + 2 * keys) + (3 if self.gated else 2) * self.width * self.inner

    @property
    def parameters(self) -> int:
        """Of all blocks, the embedding and the head."""
        return self.layers * self.block_parameters + 2 * self.vocabulary * self.width

    def forward_flops(self, tokens: int) -> float:
        """Operations of the blocks on one sequence: two a weight and token, and two products of attention."""
        return float(self.layers * (2 * self.block_parameters * tokens + 4 * tokens**2 * self.width))

    def product_flops(self, tokens: int) -> float:
        """Operations of one product with the transposed Jacobian of all blocks: attention has four products there."""
        return float(self.layers * (2 * self.block_parameters * tokens + 8 * tokens**2 * self.width))


@dataclass(frozen=True)
class Accelerator:
    """One of several like devices.

    Attributes:
        name: what the device is called.
        flops: operations per second that its data sheet promises in float32.
        efficiency: share of them that large matrix products reach.
        memory: bytes.
        link: bytes per second that reach it from the memory of its host, where the files are cached.
    """

    name: str
    flops: float
    efficiency: float
    memory: float
    link: float


@dataclass(frozen=True)
class PaperPrice:
    """Of a streamed gradient profile, one device's share.

    Attributes:
        flops: operations.
        compute_seconds: how long these products take, in seconds.
        read_bytes: weights that come to the device.
        read_seconds: how long reading takes, in seconds.
        block: bytes of the weights of one block.
        state: bytes of the state before a block.
        cotangents: bytes of its probes, before and after a block.
        recorded: bytes that the recorded graph of one block keeps.
        basis: bytes of the basis of the search for singular values.
        host: bytes of the states at all block boundaries, on the host or on disk.
    """

    flops: float
    compute_seconds: float
    read_bytes: float
    read_seconds: float
    block: float
    state: float
    cotangents: float
    recorded: float
    basis: float
    host: float

    @property
    def seconds(self) -> float:
        """Of both: a block is computed after it was read."""
        return self.compute_seconds + self.read_seconds

    @property
    def memory(self) -> float:
        """Bytes in use on the device at once."""
        return self.block + self.state + self.cotangents + self.recorded + self.basis


LLAMA_70B = Transformer(layers=80, width=8192, heads=64, kv_heads=8, inner=28672, vocabulary=128_256)
H100 = Accelerator("H100 SXM", flops=67e12, efficiency=0.7, memory=80e9, link=50e9)


def profile_price(
    model: Transformer,
    device: Accelerator,
    *,
    tokens: int,
    probes: int,
    devices: int,
    samples: int = 1,
    singular_products: int = 0,
) -> PaperPrice:
    """What `stabkit.streaming.analyze_files` costs on several devices; the dearest device's share.

    Every device runs the forward pass, block by block, and walks back with its share of the probes: it records each
    block anew, and spends a few products on checking the recording and on its gain.
    Singular values of the blocks are shared out by blocks.

    Args:
        model: the sizes.
        device: its rates.
        tokens: the number of tokens of a sequence.
        probes: random cotangents per sequence.
        devices: how many.
        samples: sequences.
        singular_products: products with each block's Jacobian or its transpose.

    Raises:
        ArgumentError: a count is below 1.

    Example:
        >>> price = profile_price(LLAMA_70B, H100, tokens=4096, probes=8, devices=8)
        >>> price.memory < H100.memory
        True
    """
    if min(tokens, probes, devices, samples) < 1:
        raise ArgumentError(
            f"tokens={tokens}, probes={probes}, devices={devices}, samples={samples}; expected at least 1 of each"
        )
    own = -(-probes // devices)
    blocks = -(-model.layers // devices)
    walks = own + _CHECKS + _GAINS + _READINGS + singular_products * blocks / model.layers
    flops = samples * (2 * model.forward_flops(tokens) + walks * model.product_flops(tokens))
    read = 2 * _BF16 * model.layers * model.block_parameters
    state = samples * tokens * model.width
    inner = (3 if model.gated else 2) * samples * tokens * model.inner
    attention = samples * model.heads * tokens**2
    return PaperPrice(
        flops=flops,
        compute_seconds=flops / (device.flops * device.efficiency),
        read_bytes=read,
        read_seconds=read / device.link,
        block=_FLOAT32 * model.block_parameters,
        state=_FLOAT32 * state,
        cotangents=2 * own * _FLOAT32 * state,
        recorded=_FLOAT32 * (8 * state + inner + 2 * attention),
        basis=_FLOAT64 * singular_products * state,
        host=(model.layers + 1) * _FLOAT32 * state,
    )


def page() -> str:
    """The page of the documentation on a model of 70 billion parameters, as Markdown."""
    model, device, tokens, probes, devices = LLAMA_70B, H100, 4096, 8, 8
    price = profile_price(model, device, tokens=tokens, probes=probes, devices=devices)
    spectra = profile_price(model, device, tokens=tokens, probes=probes, devices=devices, singular_products=60)

    def byte(number: float) -> str:
        return sizes.amount(number, "B")

    rows = [
        ("Parameters", sizes.amount(model.parameters, "").strip()),
        ("Files, in bf16", byte(_BF16 * model.parameters)),
        ("Forward pass through the blocks", sizes.amount(model.forward_flops(tokens), "FLOP")),
        ("One product with the transposed Jacobian", sizes.amount(model.product_flops(tokens), "FLOP")),
        ("Arithmetic of one GPU", sizes.amount(price.flops, "FLOP")),
        ("Time to compute", sizes.duration(price.compute_seconds)),
        ("Weights read by one GPU", f"{byte(price.read_bytes)} in {sizes.duration(price.read_seconds)}"),
        ("Memory: the weights of one block", byte(price.block)),
        ("Memory: a state and the probes", byte(price.state + price.cotangents)),
        ("Memory: the recorded graph of one block", byte(price.recorded)),
        ("**Memory of one GPU**", f"**{byte(price.memory)}** of {byte(device.memory)}"),
        (f"On the host or on disk: {model.layers + 1} states", byte(price.host)),
        ("**Time in all**", f"**{sizes.duration(price.seconds)}**"),
        (
            "With the largest singular value of every block, 60 products each",
            f"{sizes.duration(spectra.seconds)}, {byte(spectra.memory)}",
        ),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    disk = sizes.duration(_BF16 * model.parameters / 7e9)
    share = -(-probes // devices)
    return f"""# A model of 70 billion parameters, on paper

A gradient profile with {probes} probes of one sequence of {tokens} tokens, on {devices} {device.name}:

```sh
torchrun --nproc-per-node {devices} -m stabkit analyze DIR --stream --device cuda --probes {probes} --spectrum none
```

Nothing here was measured on such a machine: every number comes from the formulas in
`tests/planning/seventy_billion.py`, whose counts of operations are tested against torch's own counter on small models.

{table}

What is assumed:

- {model.layers} blocks of width {model.width}, {model.heads} heads, {model.kv_heads} of keys and values, a gated inner
  layer of {model.inner}. The files hold bf16; weights, states, probes and the recorded graph are in float32, as by
  default. Products in bf16 would be faster and are a preview at best: they were off by half the largest singular value
  on a ResNet block.
- The files are in the page cache of the host ({sizes.amount(device.link, "B/s")} to every GPU). Read from a disk of
  7 GB/s that all GPUs share, they arrive in {disk} a pass instead.
- Products reach {device.efficiency:.0%} of {sizes.amount(device.flops, "FLOP/s")}.
- The probes are shared out, {share} for each GPU; {_CHECKS} more products a block check what was recorded, {_READINGS}
  what was read of it, and {_GAINS} measure its gain. The forward pass runs twice on every GPU: once for the states,
  once more, block by block, to record what a product needs. A block is computed after it was read, not meanwhile.
- Attention keeps its matrix of weights, since its fused form has no second derivative:
  {byte(2 * _FLOAT32 * model.heads * tokens**2)} of the recorded graph.
- The embedding and the head are left out; cotangents start at the last state.
"""
