"""What a gradient profile of a large transformer costs, on paper: the same counts that `plan` measures, as formulas."""

from __future__ import annotations

from dataclasses import dataclass

from stabkit.planning import sizes

_BF16, _FLOAT32 = 2, 4  # bytes of a number


@dataclass(frozen=True)
class Transformer:
    """Sizes of a decoder: grouped-query attention, and an inner layer of two matrices, or three with a gate.

    Attributes:
        layers: blocks.
        width: of the state of a token.
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
        name: of it.
        flops: operations per second that its data sheet promises for dense bf16.
        efficiency: share of them that large matrix products reach.
        memory: bytes.
        link: bytes per second that it receives from its neighbours.
    """

    name: str
    flops: float
    efficiency: float
    memory: float
    link: float


@dataclass(frozen=True)
class PaperPrice:
    """Of a gradient profile, one device's share.

    Attributes:
        flops: operations.
        compute_seconds: of them.
        gathered_bytes: weights received from the neighbours.
        gather_seconds: of that; it overlaps with computing where it is shorter.
        weights: bytes of its shard of the weights.
        blocks: bytes of two gathered blocks, one in use and one on its way.
        states: bytes of the states at all block boundaries.
        cotangents: bytes of its probes, before and after a block.
        recorded: bytes that the recorded graph of one block keeps.
    """

    flops: float
    compute_seconds: float
    gathered_bytes: float
    gather_seconds: float
    weights: float
    blocks: float
    states: float
    cotangents: float
    recorded: float

    @property
    def seconds(self) -> float:
        """The longer of the two, since weights arrive while the block before is computed."""
        return max(self.compute_seconds, self.gather_seconds)

    @property
    def memory(self) -> float:
        """Bytes in use at once."""
        return self.weights + self.blocks + self.states + self.cotangents + self.recorded


LLAMA_70B = Transformer(layers=80, width=8192, heads=64, kv_heads=8, inner=28672, vocabulary=128_256)
H100 = Accelerator("H100 SXM", flops=989e12, efficiency=0.4, memory=80e9, link=450e9)


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
    """What one of several devices does when weights are sharded, blocks gathered in turn, and probes shared out.

    Every device runs the forward pass once to find the states, and once more block by block to record it; then it
    pulls its own probes back, and spends ``singular_products`` on every block's spectrum, shared out by blocks.

    Args:
        model: the sizes.
        device: its rates.
        tokens: of a sequence.
        probes: random cotangents per sequence.
        devices: how many.
        samples: sequences.
        singular_products: products with each block's Jacobian or its transpose.

    Raises:
        ValueError: a count is below 1.

    Example:
        >>> price = profile_price(LLAMA_70B, H100, tokens=4096, probes=8, devices=8)
        >>> price.memory < H100.memory
        True
    """
    if min(tokens, probes, devices, samples) < 1:
        raise ValueError(
            f"tokens={tokens}, probes={probes}, devices={devices}, samples={samples}; expected at least 1 of each"
        )
    own = -(-probes // devices)
    walks = own + singular_products / devices
    flops = samples * (2 * model.forward_flops(tokens) + walks * model.product_flops(tokens))
    passes = 2 + (1 if singular_products else 0)  # of all weights through every device
    received = passes * _BF16 * model.layers * model.block_parameters * (devices - 1) / devices
    state = samples * tokens * model.width
    inner = (3 if model.gated else 2) * samples * tokens * model.inner
    attention = samples * model.heads * tokens**2
    return PaperPrice(
        flops=flops,
        compute_seconds=flops / (device.flops * device.efficiency),
        gathered_bytes=received,
        gather_seconds=received / device.link,
        weights=_BF16 * model.parameters / devices,
        blocks=2 * _BF16 * model.block_parameters,
        states=(model.layers + 1) * _BF16 * state,
        cotangents=2 * own * _FLOAT32 * state,
        recorded=_BF16 * (8 * state + inner + 2 * attention),
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
        ("Forward pass through the blocks", sizes.amount(model.forward_flops(tokens), "FLOP")),
        ("One product with the transposed Jacobian", sizes.amount(model.product_flops(tokens), "FLOP")),
        ("Arithmetic of one GPU", sizes.amount(price.flops, "FLOP")),
        ("Time to compute", sizes.duration(price.compute_seconds)),
        ("Weights received by one GPU", f"{byte(price.gathered_bytes)} in {sizes.duration(price.gather_seconds)}"),
        ("Memory: shard of the weights", byte(price.weights)),
        ("Memory: two gathered blocks", byte(price.blocks)),
        (f"Memory: {model.layers + 1} states", byte(price.states)),
        ("Memory: probes", byte(price.cotangents)),
        ("Memory: the recorded graph of one block", byte(price.recorded)),
        ("**Memory of one GPU**", f"**{byte(price.memory)}** of {byte(device.memory)}"),
        ("**Time in all**", f"**{sizes.duration(price.seconds)}**"),
        ("With the largest singular value of every block, 60 products each", sizes.duration(spectra.seconds)),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    return f"""# A model of 70 billion parameters, on paper

A gradient profile with {probes} probes of one sequence of {tokens} tokens, on {devices} {device.name}. Nothing here was
measured on such a machine: every number comes from the formulas in `stabkit.planning.transformer`, whose counts of
operations are tested against torch's own counter on small models.

{table}

What is assumed:

- {model.layers} blocks of width {model.width}, {model.heads} heads, {model.kv_heads} of keys and values, a gated inner
  layer of {model.inner}; weights, states and recorded tensors in bf16, probes in float32. Products in bf16 are a
  preview: they were off by half the largest singular value on a ResNet block. In float32, weights, states and the graph
  take twice the memory.
- Every GPU holds one part of the weights in {devices} and receives one block after the other while it computes with the
  one before ({sizes.amount(device.link, "B/s")}). Products reach {device.efficiency:.0%} of
  {sizes.amount(device.flops, "FLOP/s")}.
- The probes are shared out, {probes // devices} for each GPU. The forward pass runs twice on all of them: once for the
  states, once more, block by block, to record what a product needs.
- Attention keeps its matrix of weights, since its fused form has no second derivative. Pulling probes back alone can do
  without: then the recorded graph is {byte(price.recorded - 2 * _BF16 * model.heads * tokens**2)}.
- The embedding, the head and the loss are left out; cotangents start at the last state.
"""
