"""torch's default dtype and device are the user's: only what a tensor itself has counts here."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import issp
from issp import ops
from tests.asserts import assert_bitwise_equal

ROOT = Path(__file__).resolve().parent.parent
FACTORIES = {function.__name__ for function in _device_constructors()}
OF_DEFAULT_DTYPE = {
    *("empty", "zeros", "ones", "full", "rand", "randn", "linspace", "logspace", "eye"),
    *("tensor", "as_tensor", "asarray", "scalar_tensor"),
}
# Parameters of a new network follow torch's defaults, as those of torch's layers do.
PARAMETERS = {("issp/sr/models/swinir.py", "zeros"): 2}


def test_every_new_tensor_names_its_device_and_dtype():
    found, parameters = [], {}
    for folder in ("issp", "triton_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                    continue
                owner, function = call.func.value, call.func.attr
                if not (isinstance(owner, ast.Name) and owner.id == "torch"):
                    continue
                if function not in FACTORIES:
                    continue
                needed = {"device", *(["dtype"] if function in OF_DEFAULT_DTYPE else [])}
                lacking = needed - {keyword.arg for keyword in call.keywords}
                if lacking and (name, function) in PARAMETERS:
                    parameters[name, function] = parameters.get((name, function), 0) + 1
                elif lacking:
                    found.append(f"{name}:{call.lineno}: torch.{function} without {lacking}")
    assert not found and parameters == PARAMETERS


@contextlib.contextmanager
def defaults(dtype=torch.float32, device=None):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


OTHERS = {
    "float64": {"dtype": torch.float64},
    "float16": {"dtype": torch.float16},
    "meta": {"device": "meta"},
    "float64 on meta": {"dtype": torch.float64, "device": "meta"},
}
FLOAT_ON_CPU = {"dtype": torch.float32, "device": "cpu"}


def noise(*shape, seed=0):
    source = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=source, **FLOAT_ON_CPU)


def network():
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, **FLOAT_ON_CPU), nn.Conv2d(8, 4, 1, **FLOAT_ON_CPU)
    )
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(noise(*p.shape, seed=i))
    return net


def training(library, name, **options):
    def run():
        net = network()
        decayed = [p for p in net.parameters() if p.dim() > 1]
        rest = [p for p in net.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest}]
        opt = getattr(library, name)(groups, lr=1e-2, **options)
        average = {key: x.detach().clone() for key, x in net.named_parameters()}
        pruner = issp.attach(
            net,
            opt,
            sparsity=0.5,
            schedule=issp.Cubic(0.0, 0.5, begin=0, end=3),
            overrides={"1": issp.Keep(1, of=4)},
            ema=average,
        )
        for number in range(6):
            for i, p in enumerate(net.parameters()):
                p.grad = noise(*p.shape, seed=10 * number + i)
            opt.step()
            if number == 3:
                pruner.load_state_dict(pruner.state_dict())
                opt.load_state_dict(opt.state_dict())
                pruner.freeze()
        summary = pruner.summary()
        pruner.finalize()
        counts = torch.tensor([summary.zeros, summary.selected], device="cpu")
        states = [x for state in opt.state.values() for x in state.values() if x.dim()]
        return [*net.parameters(), *pruner.masks().values(), *average.values(), *states, counts]

    return run


class ScheduleFreeSketch(torch.optim.Optimizer):
    """The weight follows a second point, which is pruned like the weight."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.clone())
            z.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            p.lerp_(z, 0.1)


def schedule_free():
    net = network()
    opt = ScheduleFreeSketch(net.parameters(), lr=0.1)
    pruner = issp.attach(net, opt, sparsity=0.5, shrink=0.7)
    for number in range(4):
        for i, p in enumerate(net.parameters()):
            p.grad = noise(*p.shape, seed=10 * number + i)
        opt.step()
    return [*net.parameters(), *(opt.state[p]["z"] for p in net.parameters()), pruner.masks()["0"]]


def from_zeros():
    net = network()
    with torch.no_grad():
        net[0].weight[:4] = 0
    opt = issp.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    pruner = issp.attach(net, opt, from_zeros=True)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    return [*net.parameters(), *pruner.masks().values()]


def functions():
    weights = [noise(8, 12), noise(5, 7, seed=1)]
    state = ops.ShrinkState(weights, k=[40, 11])
    ops.soft_shrink_(weights, state, shrink=0.3)
    moments = [noise(8, 12, seed=2), noise(5, 7, seed=3)]
    ops.apply_masks_(moments, state)
    saved = state.state_dict()
    state.set_k([3, 4])
    state.set_masks(state.masks())
    state.load_state_dict(saved)
    grads = [torch.ones_like(w) for w in weights]
    ops.regularize_(grads, weights, torch.ones(2, **FLOAT_ON_CPU), state)
    results = [*weights, *moments, *grads, *state.masks(), state.thresholds]
    results.append(ops.magnitude_threshold(weights, [4, 9]))
    results.append(ops.magnitude_statistics(weights))
    results.append(ops.count_zeros(moments))
    return results


def reference_updates():
    """What plain torch computes where no native library is: selection, Adam, SGD."""
    table, results = issp.backends.implementations("reference"), []
    for name, moments in (("adam_soft_shrink_", 2), ("sgd_soft_shrink_", 1)):
        state = ops.ShrinkState([noise(4, 8)], k=[13])
        lists = [[noise(4, 8, seed=i).abs_()] for i in range(2 + moments)]
        scalars = [1e-2, 0.9, 0.99, 1e-8, 0.01, True, False, None, None]
        if moments == 1:
            scalars = [[False], 1e-2, 0.9, 0.1, 0.01, False, False, None, None]
        else:
            scalars.insert(0, [torch.zeros((), **FLOAT_ON_CPU)])
        pruning = [state.k, 0.5, state.thresholds, state.packed, state.flips, state.scratch]
        table[name](*lists, *scalars, *pruning, None, False, True, [])
        results += [x for tensors in lists for x in tensors] + state.masks()
    return results


def patterns():
    keep = issp.Keep(2, of=4)
    pruned = ops.nm_prune(noise(8, 8, 3, 3), keep)
    packed = ops.nm_pack(pruned, keep)
    x = noise(2, 8, 6, 6, seed=4).requires_grad_()
    y = ops.nm_conv2d(x, packed, noise(8, seed=5), stride=1, padding=1)
    y.backward(torch.ones_like(y))
    rows = ops.sparse_pack(noise(8, 8).relu_())
    return [pruned, packed.to_dense(), y, x.grad, rows.to_bsr().to_dense()]


def layers():
    results = []
    for mask in ("fixed", "ste", "sr-ste"):
        net = network()
        with torch.no_grad():
            net[0].weight[noise(8, 4, 3, 3).abs() < 0.7] = 0
        issp.nn.convert(net, exclude="1", mask=mask, sparsity=None if mask == "fixed" else 0.6)
        x = noise(1, 4, 8, 8, seed=6).requires_grad_()
        y = net(x)
        y.backward(torch.ones_like(y))
        results += [y, x.grad, *(p.grad for p in net.parameters())]
        results += [*net[0].to_dense().parameters()]
    return results


def packing():
    net = network()
    with torch.no_grad():
        net[0].weight[noise(8, 4, 3, 3).abs() < 1.5] = 0
    x = noise(1, 4, 16, 16, seed=7)
    packed = issp.pack(net, example=x)
    torch.testing.assert_close(packed(x), net(x), rtol=1e-4, atol=1e-5)
    return [*issp.unpack(packed).parameters()]


SWINIR = {
    **{"type": "SwinIR", "img_size": 8, "depths": [2], "embed_dim": 12, "num_heads": [2]},
    **{"window_size": 4, "upsampler": "pixelshuffledirect", "drop_path_rate": 0.5},
}


def files(folder):
    """Networks from files: what they compute, in tiles too, and what is written again."""

    def run():
        results = []
        image = issp.data.to_tensor(noise(18, 17, 3).mul(50).byte().numpy())
        for name in ("edsr", "swinir"):
            path = folder / f"{name}.safetensors"
            if not path.exists():
                torch.manual_seed(0)
                network = issp.models.from_config(SWINIR) if name == "swinir" else None
                issp.save(network or issp.models.build("edsr-tiny", scale=2), path)
            model = issp.load(path)
            results += [*model.parameters()]
            for tile in (None, 8, "auto"):
                results.append(issp.models.upscale(model, image[None], tile=tile))
            issp.save(model, folder / "again.safetensors")
            results += [*issp.load(folder / "again.safetensors").parameters()]
            model.train()
            torch.manual_seed(3)
            results.append(model(image[None, :, :16, :16]))
        return [*results, image]

    return run


def pictures():
    image = noise(24, 20, 3).abs().mul(60).clamp(0, 255).byte().numpy()
    small = issp.data.imresize(image, 0.5)
    scores = [issp.metrics.psnr(image, image[::-1], 2), issp.metrics.ssim(image, image[::-1], 2)]
    scores = torch.tensor(scores, dtype=torch.float64, device="cpu")
    return [torch.from_numpy(small), scores, issp.data.to_tensor(image)]


def batches():
    images = {str(i): noise(32, 32, 3, seed=i).abs().mul(60).byte().numpy() for i in range(4)}
    dataset = issp.data.TrainDataset(issp.data.PairedArrays(images, 2), 16)
    results = []
    for workers in (0, 1):
        loader = issp.data.TrainLoader(dataset, 2, num_workers=workers)
        for _ in range(3):
            results += [x for x in next(loader).values() if isinstance(x, Tensor)]
        loader.close()
    return results


def denormals():
    from issp.utils import denormals

    return [torch.tensor(len(denormals.mode()), device="cpu")]


PROGRAMS = {
    "torch's Adam": training(torch.optim, "Adam"),
    "Adam": training(issp.optim, "Adam"),
    "AdamW": training(issp.optim, "AdamW"),
    "SGD": training(issp.optim, "SGD", momentum=0.9),
    "schedule-free": schedule_free,
    "from zeros": from_zeros,
    "functions": functions,
    "reference": reference_updates,
    "patterns": patterns,
    "layers": layers,
    "packing": packing,
    "pictures": pictures,
    "batches": batches,
    "denormals": denormals,
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", [*PROGRAMS, "files"])
def test_results_do_not_depend_on_the_defaults(name, other, tmp_path, monkeypatch):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path))
    program = files(tmp_path) if name == "files" else PROGRAMS[name]
    with defaults():
        expected = [x.detach().clone() for x in program()]
    with defaults(**OTHERS[other]):
        actual = program()
    assert len(actual) == len(expected) > 0
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert isinstance(a, Tensor) and a.device.type == "cpu", (i, a.device)
        assert_bitwise_equal(a.detach(), b, f"result {i}")
