"""Which layers stand directly before a residual addition."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import issp
from issp.nn.residual_groups import constrained_layers, shape_groups
from issp.nn.selection import select


def conv(inputs=4, outputs=4, side=3):
    return nn.Conv2d(inputs, outputs, side, padding=side // 2)


def layers_of(model, names):
    modules = dict(model.named_modules())
    return [modules[name] for name in names]


# The networks of issp.models (docs/method.md, section 3.2).


@pytest.mark.parametrize("features, blocks, scale", [(16, 3, 2), (32, 1, 3), (256, 32, 4)])
def test_edsr(features, blocks, scale):
    with torch.device("meta"):
        model = issp.models.EDSR(num_feat=features, num_block=blocks, upscale=scale)
    names = constrained_layers(model)
    assert names == [*(f"body.{i}.conv2" for i in range(blocks)), "conv_after_body"]
    assert shape_groups(layers_of(model, names)) == [layers_of(model, names)]


def test_swinir_light_in_full_size():
    with torch.device("meta"):
        model = issp.models.build("swinir-light", scale=4)
    names = constrained_layers(model)
    blocks = [f"layers.{i}.residual_group.blocks.{j}" for i in range(4) for j in range(6)]
    expected = {f"{block}.{layer}" for block in blocks for layer in ("attn.proj", "mlp.fc2")}
    expected |= {"conv_after_body", *(f"layers.{i}.conv" for i in range(4))}
    assert set(names) == expected
    assert names == [n for n, _ in model.named_modules() if n in expected]  # in module order
    groups = shape_groups(layers_of(model, names))
    sizes = {tuple(group[0].weight.shape): len(group) for group in groups}
    assert sizes == {(60, 60): 24, (60, 120): 24, (60, 60, 3, 3): 5}


@pytest.mark.full
def test_cat_r_in_full_size():
    with torch.device("meta"):
        model = issp.models.build("cat-r", scale=4)
    names = constrained_layers(model)
    blocks = [f"layers.{i}.blocks.{j}" for i in range(6) for j in range(6)]
    expected = {f"{block}.{layer}" for block in blocks for layer in ("proj", "mlp.fc2")}
    expected |= {"conv_after_body", *(f"layers.{i}.conv" for i in range(6))}
    assert set(names) == expected
    groups = shape_groups(layers_of(model, names))
    sizes = {tuple(group[0].weight.shape): len(group) for group in groups}
    assert sizes == {(180, 180): 36, (180, 720): 36, (180, 180, 3, 3): 7}


SWINIR = {"img_size": 8, "window_size": 4, "embed_dim": 12, "depths": [2], "num_heads": [2]}
CAT = {"img_size": 8, "embed_dim": 32, "depth": [2], "num_heads": [2], "split_size_0": [2]}
BLOCK = ["layers.0.blocks.{}.proj", "layers.0.blocks.{}.mlp.fc2"]


@pytest.mark.parametrize(
    "options",
    [
        {"upscale": 2, "upsampler": "pixelshuffledirect"},
        {"upscale": 4, "upsampler": "nearest+conv", "ape": True, "mlp_ratio": 2},
        {"upscale": 3, "upsampler": "pixelshuffle", "use_checkpoint": True, "drop_rate": 0.5},
    ],
    ids=str,
)
def test_small_swinir(options):
    names = constrained_layers(issp.models.SwinIR(**SWINIR, **options))
    blocks = [f"layers.0.residual_group.blocks.{i}" for i in range(2)]
    expected = [f"{block}.{layer}" for block in blocks for layer in ("attn.proj", "mlp.fc2")]
    assert names == [*expected, "layers.0.conv", "conv_after_body"]


def test_restoration_with_bottlenecks():
    """The image is a stream too; of three convolutions in a row the last one is before it."""
    model = issp.models.SwinIR(**SWINIR, upsampler="", resi_connection="3conv")
    names = constrained_layers(model)
    assert names[-3:] == ["layers.0.conv.4", "conv_after_body.4", "conv_last"]
    assert len(names) == 7


@pytest.mark.parametrize("axial", [True, False])
def test_small_cat(axial):
    more = {"block_name": "CATB_axial"} if axial else {"block_name": "CATB_regular"}
    more |= {} if axial else {"split_size_1": [4]}
    model = issp.models.CAT(**CAT, **more, upscale=2, upsampler="pixelshuffle")
    blocks = [name.format(i) for i in range(2) for name in BLOCK]
    assert constrained_layers(model) == [*blocks, "layers.0.conv", "conv_after_body"]


# What counts as a residual addition, and as directly before it. Each network is judged twice: by
# its symbolic trace, and by a run of one that cannot be traced.


class Net(nn.Module):
    """Layers a, b, c, d of four channels, and what to do with them."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c, self.d = (conv() for _ in range(4))
        self.table = nn.Parameter(torch.randn(1, 4, 6, 6))
        self.gamma = nn.Parameter(torch.randn(4, 1, 1))
        self.norm, self.group_norm = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


class Untraceable(Net):
    def forward(self, x):
        if x.sum() == 0:
            raise AssertionError
        return super().forward(x)


def iadd(net, x):
    y = net.a(x)
    y += net.b(net.relu(y))
    return y


def written_in_place(net, x):
    y = net.a(x)
    y.add_(net.b(F.relu(y)))
    return y - net.c(y)


def method_with_factors(net, x):
    y = net.a(x)
    y = y.add(0.1 * net.b(y) / 2 * net.gamma, alpha=0.5)
    return torch.add(input=net.c(y) + 1, other=y)


def attention(net, x):
    q, k, v = net.a(x).flatten(2), net.b(x).flatten(2), net.c(x).flatten(2)
    scores = q.transpose(1, 2) @ k + net.table[:, 0].flatten() + k.new_zeros(36)
    return x + net.d((v @ scores.softmax(-1)).reshape(x.shape))


def windows(net, x):
    y = net.a(x).roll((1, 1), (2, 3)).permute(0, 2, 3, 1).reshape(-1, 9, 4)
    y = y.contiguous().view(-1, 6, 6, 4).permute(0, 3, 1, 2).to(x.dtype)
    return torch.cat(y.chunk(2, 1), 1).relu() + x + net.drop(y).flip(2)


def overwritten(net, x):
    """The ReLU writes over the convolution's result, which is then no result of that layer."""
    y = net.a(x)
    net.relu(y)
    return y + x


CASES = {
    "operator": (lambda m, x: x + m.b(m.a(x).relu()), "b"),
    "the branch first": (lambda m, x: m.b(m.a(x).relu()) + x, "b"),
    "+=": (iadd, "b"),
    "add_": (written_in_place, "bc"),
    "method, factors": (method_with_factors, "bc"),
    "the difference": (lambda m, x: x - m.a(x), "a"),
    "a chain": (lambda m, x: x + m.a(x) + m.b(x) + m.c(m.d(x)), "abc"),
    "a sum as branch": (lambda m, x: x + (m.a(x) + m.b(x).relu()), "a"),
    "builtin sum": (lambda m, x: sum([m.a(x), m.b(x), x]), "ab"),
    "a dense block": (lambda m, x: m.b((y := m.a(x)) + x) * 0.2 + y, "ab"),
    "the head of the stream": (lambda m, x: (y := m.a(x)) + m.c(m.b(y).relu()), "c"),
    "a projection shortcut": (lambda m, x: m.a(x) + m.norm(m.c(m.b(x).relu())), "ac"),
    "a projection shortcut, batch normalization": (lambda m, x: m.norm(m.a(x)) + m.b(x), "ab"),
    "one side ends in no layer": (lambda m, x: m.a(x) + m.b(x).relu(), ""),
    "a nonlinearity": (lambda m, x: x + m.a(x).relu(), ""),
    "another normalization": (lambda m, x: x + m.group_norm(m.a(x)), ""),
    "a gate": (lambda m, x: x + m.a(x) * m.b(x).sigmoid(), ""),
    "one over it": (lambda m, x: x + 1 / m.a(x), ""),
    "concatenation": (lambda m, x: torch.cat([x, m.a(x)], 1), ""),
    "a bias and a table": (lambda m, x: m.a(x) + m.table + m.gamma, ""),
    "a mean, taken and given": (
        lambda m, x: m.b((x - (mean := x.new_full((1, 1, 1, 1), 0.5))).relu()) + mean,
        "",
    ),
    "a table of the shape": (lambda m, x: m.a(x) + m.b(torch.ones_like(x)), ""),
    "attention": (attention, "d"),
    "windows": (windows, "a"),
    "overwritten": (overwritten, ""),
    "resampled": (lambda m, x: F.interpolate(F.avg_pool2d(m.a(x), 2), size=6) + x, ""),
    "resampled branch": (lambda m, x: F.interpolate(m.a(x), scale_factor=1) + x, "a"),
    "one layer used twice": (lambda m, x: (y := x + m.a(x)) + m.b(m.a(y)), "ab"),
    "an attribute": (lambda m, x: x + m.a(x).mT.data.mT, "a"),
    "a table of the batch's size": (lambda m, x: x + m.a(m.table.repeat(x.size(0), 1, 1, 1)), ""),
    "a table of the result's shape": (lambda m, x: x + m.table.expand_as(m.a(x)), ""),
    "as in evaluation": (lambda m, x: x + (m.a(x).relu() if m.training else m.a(x)), "a"),
    "twice the same": (lambda m, x: (y := m.a(x)) + y, ""),
}
X = torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_traced", [True, False])
def test_what_counts(case, is_traced):
    forward, expected = CASES[case]
    model = (Net if is_traced else Untraceable)(forward)
    assert constrained_layers(model, example=None if is_traced else X) == list(expected)


def test_two_inputs_that_meet_are_no_residual():
    class Fusion(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x, y, mask=None):
            return self.a(x) + self.b(y) + (0 if mask is None else mask)

    assert constrained_layers(Fusion()) == []


def test_arguments_with_defaults_are_left_out():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()

        def forward(self, x, gate=None):
            return x + (self.a(x) if gate is None else self.a(x) * gate)

    assert constrained_layers(Masked()) == ["a"]


class InNumpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() * 2)


def test_a_run_follows_values_through_modules_and_parts():
    """What a module computes without torch, and assignments to parts of a tensor."""
    model = nn.Sequential(InNumpy(), Untraceable(lambda m, x: x + m.a(x)))
    assert constrained_layers(model, example=X) == ["1.a"]

    def assigned(m, x):
        y = torch.zeros(x.shape)
        y[:, :2] = x[:, 2:]
        return y + m.b(y)

    assert constrained_layers(Untraceable(assigned), example=X) == ["b"]


class BasicBlock(nn.Module):
    """As torchvision's."""

    def __init__(self, inputs, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1:
            projection = nn.Conv2d(inputs, planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(planes))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def test_resnet_blocks():
    blocks = [BasicBlock(8, 8), BasicBlock(8, 8), BasicBlock(8, 16, 2), BasicBlock(16, 16)]
    model = nn.Sequential(conv(3, 8, 7), nn.BatchNorm2d(8), nn.ReLU(inplace=True), *blocks)
    names = constrained_layers(model)
    assert names == ["3.conv2", "4.conv2", "5.conv2", "5.downsample.0", "6.conv2"]
    groups = shape_groups(select(model, nn.Conv2d, (), {}, 0.5))
    assert [[layer.name for layer in group] for group in groups] == [
        ["3.conv1", "3.conv2", "4.conv1", "4.conv2"],
        ["5.conv2", "6.conv1", "6.conv2"],
    ]


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_transformer(norm_first):
    """The attention's output layer is computed without a call of it."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(block)
    with pytest.raises(ValueError, match="torch.fx cannot trace the model"):
        constrained_layers(model)
    example = torch.randn(2, 5, 8)
    assert constrained_layers(model, example=example) == ["0.self_attn.out_proj", "0.linear2"]


def test_sparse_layers_are_layers():
    model = issp.models.EDSR(num_feat=8, num_block=2, upscale=2)
    issp.attach(model, sparsity=0.9).finalize()
    issp.nn.convert(model)
    types = (issp.nn.SparseConv2d, nn.Conv2d)
    assert isinstance(model.body[0].conv2, issp.nn.SparseConv2d)
    assert constrained_layers(model, types) == ["body.0.conv2", "body.1.conv2", "conv_after_body"]


def test_types_decide_what_a_layer_is():
    model = nn.Sequential(BasicBlock(4, 4))
    assert constrained_layers(model, nn.Linear) == []


@pytest.mark.parametrize("is_traced", [True, False])
def test_tied_weights_have_their_first_name(is_traced):
    model = (Net if is_traced else Untraceable)(lambda m, x: x + m.c(m.b(x).relu()))
    model.c.weight = model.a.weight
    assert constrained_layers(model, example=X) == ["a"]
    assert select(model, nn.Conv2d, (), {}, 0.5)[0].aliases == ("c",)


@pytest.mark.parametrize("is_traced", [True, False])
def test_wrappers_around_and_inside(is_traced):
    model = (Net if is_traced else Untraceable)(lambda m, x: x + m.b(m.a(x).relu()))
    model.b = torch.compile(model.b, backend="eager")
    wrapped = torch.compile(nn.DataParallel(nn.Sequential(model)), backend="eager")
    assert constrained_layers(wrapped, example=None if is_traced else X) == ["0.b"]


# Nothing changes, and refusals.


class Stateful(Net):
    """Has everything that a call may leave a trace in."""

    def __init__(self, is_traced):
        super().__init__(lambda m, x: x + m.drop(m.norm(m.a(x))))
        self.is_traced = is_traced
        self.register_buffer("calls", torch.zeros(()))
        self.last = self.a(X)  # cannot be copied

    def forward(self, x):
        self.calls += torch.rand(())
        self.last = x
        return super().forward(x) if self.is_traced or x.sum() != 0 else x


@pytest.mark.parametrize("is_traced", [True, False])
def test_the_model_stays_as_it_is(is_traced):
    model = Stateful(is_traced)
    model.drop.eval()
    last, fired = model.last, []
    for module in (model, model.a):
        module.register_forward_hook(lambda *_: fired.append("forward"))
        module.register_forward_pre_hook(lambda *_: fired.append("pre"))
        module.register_full_backward_hook(lambda *_: fired.append("backward"))
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    rng = torch.get_rng_state()

    assert constrained_layers(model, example=X) == ["a"]
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes
    assert [module._forward_hooks for module in model.modules()] == hooks
    for module, before in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[name] is value for name, value in before.items())
    assert model.last is last
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model(X)
    assert fired == ["pre", "pre", "forward", "forward"]


def test_weights_are_not_copied(monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight is copied")

    model = Untraceable(lambda m, x: x + m.a(x))
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    assert constrained_layers(model, example=X) == ["a"]


def test_a_model_that_cannot_be_traced_needs_an_example():
    model = Untraceable(lambda m, x: x + m.a(x))
    with pytest.raises(ValueError) as error:
        constrained_layers(model)
    message = str(error.value)
    assert message.startswith("torch.fx cannot trace the model (symbolically traced variables")
    assert "example=" in message and "constrained=" in message and "\n" not in message
    assert constrained_layers(model, example=(X,)) == ["a"]
