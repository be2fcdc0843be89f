"""Layers that the code writes as several modules or lists, and what few of them there are: where each of them ends."""

import pytest
import torch
from torch import nn

from stabkit import identify, trace

WIDTH = 6


def names(model, *inputs):
    return [record.name for record in identify(trace(model, *inputs))]


class TwoLists(nn.Module):
    """A residual stream with a list of gates' filters and one of projections, whose other half is summed up."""

    def __init__(self, layers):
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv1d(4, 8, 3, padding=1) for _ in range(layers))
        self.mixers = nn.ModuleList(nn.Conv1d(4, 8, 1) for _ in range(layers))
        self.head = nn.Conv1d(4, 3, 1)

    def forward(self, x):
        total = 0
        for filters, mixer in zip(self.filters, self.mixers, strict=True):
            a, b = filters(x).chunk(2, 1)
            residual, skip = mixer(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            x, total = (x + residual) * 0.5**0.5, total + skip
        return self.head(torch.relu(total))


@pytest.mark.parametrize("layers", [4, 6])
def test_a_layer_of_two_lists_is_one_step_however_few_there_are(layers):
    torch.manual_seed(0)
    *steps, head = identify(trace(TwoLists(layers), torch.randn(2, 4, 9)))
    assert [record.name.partition(" (")[0] for record in steps] == ["damped Euler"] * layers
    assert head.name == "transition"
    assert all(record.name.endswith("beside a sum of outputs") for record in steps[1:])
    # the outputs are other entries of what the field gives out than those that move the state
    assert {record.evidence for record in steps} == {"proven"}
    assert [record.step_size for record in steps] == pytest.approx([0.5**0.5] * layers)


class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, WIDTH))


class LookAhead(nn.Module):
    """Nesterov's momentum over sublayers, each a Sequential of a norm and a network of one of two kinds."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), Small() if i % 2 else nn.Linear(WIDTH, WIDTH)) for i in range(layers)
        )

    def forward(self, x):
        velocity = torch.zeros_like(x)
        for layer in self.layers:
            velocity = 0.9 * velocity + 0.3 * layer(x + 0.8 * velocity)
            x = x + velocity
        return x


def test_a_step_is_not_cut_between_a_norm_and_its_layer():
    torch.manual_seed(0)
    found = names(LookAhead(6), torch.randn(2, 3, WIDTH))
    assert found[1:] == ["Nesterov momentum (gamma = 0.9, look-ahead 0.8)"] * 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


class ShortHistory(nn.Module):
    """DenseFormer: after each of a few blocks a weighted sum of all results."""

    def __init__(self, layers):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(i + 2)) for i in range(layers))

    def forward(self, x):
        past = [x]
        for block, weights in zip(self.blocks, self.weights, strict=True):
            past.append(block(x))
            x = sum(w * y for w, y in zip(weights, past, strict=True))
        return x


@pytest.mark.parametrize("layers", [3, 4, 7])
def test_a_history_of_a_few_blocks_is_read_to_its_last(layers):
    torch.manual_seed(0)
    model = ShortHistory(layers)
    found = identify(trace(model, torch.randn(2, 3, WIDTH)))
    assert [r.name for r in found[1:]] == [
        f"general linear method with a growing history ({n} states)" for n in range(2, layers + 1)
    ]
    weights = ", ".join(f"{w:.3g}" for w in model.weights[-2].tolist())
    assert (
        f"all {layers} states before are read for the last time, and mixed with weights {weights}" in found[-1].notes[0]
    )


class Branches(nn.Module):
    """Like blocks side by side, each of the common input: no history."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(sum(block(x) for block in self.blocks))


def test_parallel_blocks_are_one_step():
    torch.manual_seed(0)
    assert len(names(Branches(), torch.randn(2, 3, WIDTH))) <= 2


class PostNorm(nn.Module):
    """A layer that is called again and again, its parts in the model's own forward; its norms behind, or in front."""

    def __init__(self, behind):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.behind = behind

    def forward(self, x):
        for _ in range(3):
            for field, norm in zip((self.first, self.second), self.norms, strict=False):
                x = norm(x + torch.tanh(field(x))) if self.behind else x + torch.tanh(field(norm(x)))
        return x if self.behind else self.norms[2](x)


def test_the_norm_behind_an_addition_belongs_to_it_where_that_recurs():
    torch.manual_seed(0)
    found = identify(trace(PostNorm(True), torch.randn(2, 3, WIDTH)))
    assert {record.name for record in found} == {"projected Euler (post-norm)"}
    found = identify(trace(PostNorm(False), torch.randn(2, 3, WIDTH)))
    assert "projected" not in " ".join(record.name for record in found)


class Decoder(nn.Module):
    """Residual blocks between what is kept for a decoder and where it is joined."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(4, 4, 3, 2, 1)
        self.deep = nn.Conv2d(4, 4, 3, 2, 1)
        self.middle = nn.ModuleList(Residual() for _ in range(2))
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(2))

    def forward(self, x):
        kept = [x, self.down(x)]
        x = self.deep(kept[-1])
        for block in self.middle:
            x = block(x)
        for up in self.up:
            x = up(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), kept.pop()], 1))
        return x


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


def test_the_last_block_before_a_decoder_ends_before_what_was_kept_is_joined():
    torch.manual_seed(0)
    assert names(Decoder(), torch.randn(2, 4, 8, 8)).count("forward Euler") == 2


class Squeezed(nn.Module):
    """i-RevNet: y_1 = x_2, y_2 = F(x_2) + x_1, with both streams squeezed to half the size in one of the layers."""

    def __init__(self):
        super().__init__()
        self.fields = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)])

    def forward(self, x):
        a, b = x[:, :2], x[:, 2:]
        for field in self.fields:
            moved = torch.tanh(field(b))
            if moved.shape != a.shape:
                a, b = (nn.functional.pixel_unshuffle(s, 2) for s in (a, b))
            a, b = b, moved + a
        return torch.cat([a, b], 1)


def test_streams_whose_entries_are_moved_besides_are_coupled_all_the_same():
    torch.manual_seed(0)
    found = identify(trace(Squeezed(), torch.randn(2, 4, 4, 4), depth=["fields.*"]))
    moved = [record for record in found if record.name.endswith("entries moved")]
    assert [record.name for record in moved] == ["additive coupling (half of a reversible step), entries moved"]
    assert moved[0].evidence == "measured"
    assert (moved[0].method, moved[0].skip) == (None, None)  # no number of one entry says what becomes of the next


class Dense(nn.Module):
    """A block that concatenates what its layers make of all before; or of the input alone."""

    def __init__(self, of_all):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 + 2 * i * of_all, 2, 3, padding=1) for i in range(3))
        self.of_all = of_all

    def forward(self, x):
        made = [x]
        for layer in self.layers:
            made.append(torch.relu(layer(torch.cat(made, 1) if self.of_all else x)))
        return torch.cat(made, 1)


def test_a_block_of_several_layers_that_concatenate_is_dense():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    assert names(nn.Sequential(Dense(True), nn.Conv2d(10, 4, 1)), x)[0] == "dense (concatenation, 3 layers)"
    assert names(nn.Sequential(Dense(False), nn.Conv2d(10, 4, 1)), x)[0] == "transition"


def test_what_multiplies_the_state_before_a_norm_is_told():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.field, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x):
            return self.norm(1.565 * x + torch.tanh(self.field(x)))

    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(Scaled(), Scaled()), torch.randn(2, 3, WIDTH)))
    assert {record.notes[0] for record in found} == {"a = 1.565 before the norm"}


def test_a_branch_does_not_belong_to_the_way_of_a_skip_that_a_fixed_norm_scales():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.norm = nn.BatchNorm2d(4)
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)

        def forward(self, x):
            return self.norm(x + self.b(torch.relu(self.a(x))))

    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(Fixed(), Fixed()).eval(), torch.randn(2, 4, 5, 5)))
    assert {record.name.partition(" (")[0] for record in found} == {"diagonal skip"}
    assert all("the skip was measured: it passes Add, NativeBatchNorm" in record.notes for record in found)
