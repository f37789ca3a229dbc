"""`freeze(accelerate=...)`: the kept weights alone are trained; what is saved is dense."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import issp
from issp.nn import autotune
from issp.nn.sparse_training import SparseTrainingConv2d, SparseTrainingLayer
from issp.pruning import layer_choice
from tests.asserts import assert_bitwise_equal
from tests.deploy.networks import timed_fixture  # noqa: F401
from tests.pruning.networks import step, train, weights

SPARSITY = 0.8
EXAMPLE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(9))
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "issp.Adam": lambda p: issp.optim.Adam(p, 1e-2),
    "issp.SGD": lambda p: issp.optim.SGD(p, 1e-2, momentum=0.9),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def times(timed):
    """Sparse layers are faster, whatever a clock would say."""
    return timed


def net(seed=0):
    """Without a normalization, whose invariances leave Adam nothing but rounding to follow."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )


def setup(kind="Adam", pruning_steps=3, **kwargs):
    """A network after its pruning stage, not frozen yet."""
    model = net()
    opt = OPTIMIZERS[kind](model.parameters())
    pruner = issp.attach(model, opt, sparsity=SPARSITY, **kwargs)
    train(model, opt, range(pruning_steps))
    return model, opt, pruner


def sparse_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, SparseTrainingLayer)]


def state_tensors(opt):
    return {
        (i, name): x
        for i, state in opt.state_dict()["state"].items()
        for name, x in state.items()
        if isinstance(x, torch.Tensor)
    }


class TestTraining:
    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_trains_as_the_masked_dense_network_does(self, kind):
        dense, sparse = setup(kind), setup(kind)
        dense[2].freeze()
        sparse[2].freeze(accelerate=EXAMPLE)
        assert sparse_names(sparse[0]) == ["0", "2.0", "4"]
        for model, opt, _ in (dense, sparse):
            train(model, opt, range(3, 23))
        for (name, x), y in zip(
            dense[0].state_dict().items(), sparse[0].state_dict().values(), strict=True
        ):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-5), name
            assert torch.equal(x == 0, y == 0), name

    @pytest.mark.full
    def test_500_steps_stay_as_close_to_float64_as_those_of_the_masked_dense_network(self):
        def trained(dtype, **kwargs):
            torch.manual_seed(0)
            model = issp.models.build("edsr-tiny", 2).to(dtype)
            opt = torch.optim.Adam(model.parameters(), 1e-4)
            pruner = issp.attach(model, opt, sparsity=0.9)
            random = torch.Generator().manual_seed(1)
            for i in range(510):
                if i == 10:
                    pruner.freeze(**kwargs)
                x = torch.rand(1, 3, 12, 12, generator=random).to(dtype)
                target = torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic")
                opt.zero_grad()
                (model(x) - target).square().mean().backward()
                opt.step()
            return torch.cat([p.double().flatten() for p in model.state_dict().values()])

        exact, dense = trained(torch.float64), trained(torch.float32)
        sparse = trained(torch.float32, accelerate=torch.rand(1, 3, 12, 12))
        ours, theirs = ((x - exact).square().mean().sqrt() for x in (sparse, dense))
        assert 0 < ours <= 2 * theirs

    def test_gradients_moments_and_weights_are_as_small_as_what_is_kept(self):
        model, opt, pruner = setup()
        pruner.freeze(accelerate=EXAMPLE)
        train(model, opt, [3])
        kept = {name: int(mask.sum()) for name, mask in pruner.masks().items()}
        for name in sparse_names(model):
            weight = model.get_submodule(name).weight
            sizes = [weight.numel(), weight.grad.numel()]
            sizes += [x.numel() for x in opt.state[weight].values() if x.dim()]
            assert sizes == [kept[name]] * 4, name

    def test_parameters_stay_the_same_objects_under_the_same_names(self):
        model, opt, pruner = setup()
        before = dict(model.named_parameters())
        pruner.freeze(accelerate=EXAMPLE)
        after = dict(model.named_parameters())
        assert all(after[name] is p for name, p in before.items())
        assert list(after) == list(before)
        train(model, opt, [3])
        assert pruner.finalize() is model
        assert all(p is before[name] for name, p in model.named_parameters())

    def test_a_loss_that_is_still_held_does_not_keep_the_old_shapes(self):
        model, opt, pruner = setup()
        loss = model(EXAMPLE).square().mean()
        loss.backward()
        pruner.freeze(accelerate=EXAMPLE)
        again = model(EXAMPLE).square().mean()
        again.backward()
        assert loss.grad_fn is not None and loss.item() != again.item()
        opt.step()

    def test_gradients_that_were_accumulated_before_go_on(self):
        model, _, pruner = setup()
        pruner.freeze()
        model(EXAMPLE).square().mean().backward()
        expected = {
            n: p.grad * pruner.masks()[n[:-7]]
            for n, p in model.named_parameters()
            if n[:-7] in pruner.masks() and n.endswith("weight")
        }
        pruner.freeze(accelerate=EXAMPLE)
        for name, grad in expected.items():
            layer = model.get_submodule(name[:-7])
            assert_bitwise_equal(layer.positions.expand(layer.weight.grad), grad + 0.0, name)

    def test_schedulers_clipping_and_scaling_go_on(self):
        model, opt, pruner = setup()
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        pruner.freeze(accelerate=EXAMPLE)
        for _ in range(4):
            opt.zero_grad()
            scaler.scale(model(EXAMPLE).square().mean()).backward()
            scaler.unscale_(opt)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            before = weights(model)
            scaler.step(opt)
            scaler.update()
            scheduler.step()
            assert norm > 0 and not torch.equal(before["0.weight"], model[0].weight)
        assert opt.param_groups[0]["lr"] == 1e-2 * 0.25

    def test_trains_under_autocast(self):
        model, opt, pruner = setup()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pruner.freeze(accelerate=EXAMPLE)
            loss = model(EXAMPLE).float().square().mean()
        assert sparse_names(model) == ["0", "2.0", "4"]
        loss.backward()
        assert model[0].weight.grad.dtype == torch.float32
        opt.step()


class TestSaved:
    def test_all_that_is_saved_is_dense_with_the_same_keys(self):
        dense, sparse = setup(), setup()
        dense[2].freeze()
        sparse[2].freeze(accelerate=EXAMPLE)
        for a, b in ((0, 0), (2, 2)):
            expected, actual = dense[a].state_dict(), sparse[b].state_dict()
            if a == 2:
                assert actual.pop("acceleration")["rows"] == {"0": 1, "2.0": 1, "4": 1}
                expected, actual = repr(expected), repr(actual)
                assert actual == expected
                continue
            for name, x in expected.items():
                assert_bitwise_equal(actual[name], x, name)
        expected, actual = state_tensors(dense[1]), state_tensors(sparse[1])
        for name, x in expected.items():
            assert_bitwise_equal(actual[name], x, str(name))

    @pytest.mark.parametrize("kind", ["Adam", "issp.Adam", "SGD"])
    @pytest.mark.parametrize("accelerated", [False, True])
    def test_a_resumed_run_goes_on_with_or_without(self, kind, accelerated):
        model, opt, pruner = setup(kind)
        pruner.freeze(accelerate=EXAMPLE)
        train(model, opt, range(3, 6))
        saved = copy.deepcopy([x.state_dict() for x in (model, opt, pruner)])
        train(model, opt, range(6, 9))

        other = net(seed=5)
        other_opt = OPTIMIZERS[kind](other.parameters())
        other_pruner = issp.attach(other, other_opt, sparsity=SPARSITY)
        for part, state in zip((other, other_opt, other_pruner), saved, strict=True):
            part.load_state_dict(state)
        if accelerated:
            other_pruner.freeze(accelerate=EXAMPLE)
        train(other, other_opt, range(6, 9))
        for (name, x), y in zip(
            model.state_dict().items(), other.state_dict().values(), strict=True
        ):
            if accelerated:
                assert_bitwise_equal(y, x, name)
            else:
                assert torch.allclose(x, y, rtol=1e-4, atol=1e-5), name
                assert torch.equal(x == 0, y == 0), name

    def test_what_was_chosen_is_not_measured_again_on_the_same_machine(self, times):
        model, opt, pruner = setup()
        times |= {"rows": 1.0}
        pruner.freeze(accelerate=EXAMPLE)
        saved = pruner.state_dict()
        other, other_opt, other_pruner = setup()
        other_pruner.load_state_dict(saved)
        times["measured"].clear()
        other_pruner.freeze(accelerate=EXAMPLE)
        assert times["measured"] == []
        assert sparse_names(other) == sparse_names(model)
        # On another machine it is.
        saved["acceleration"]["machine"] = "another one"
        third, _, third_pruner = setup()
        third_pruner.load_state_dict(saved)
        times["rows"] = 9.0
        autotune.Cache().path.unlink()
        third_pruner.freeze(accelerate=EXAMPLE)
        assert sparse_names(third) == []

    def test_states_are_loaded_into_an_accelerated_run(self):
        model, opt, pruner = setup()
        pruner.freeze(accelerate=EXAMPLE)
        train(model, opt, [3])
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        train(model, opt, [4])
        end = weights(model)
        model.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        train(model, opt, [4])
        for name, x in weights(model).items():
            assert_bitwise_equal(x, end[name], name)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda w: w + 1, "has weights where the fixed mask has none"),
            (lambda w: w[:1], r"is \(1, 3, 3, 3\): the layer's weight is \(8, 3, 3, 3\)"),
        ],
    )
    def test_weights_that_do_not_fit_the_mask_are_refused(self, change, sentence):
        model, _, pruner = setup()
        pruner.freeze(accelerate=EXAMPLE)
        state = model.state_dict()
        state["0.weight"] = change(state["0.weight"])
        with pytest.raises(RuntimeError, match=sentence):
            model.load_state_dict(state)

    def test_a_pruner_that_trains_sparse_loads_no_state(self):
        _, _, pruner = setup()
        pruner.freeze(accelerate=EXAMPLE)
        with pytest.raises(RuntimeError, match="load the state into a new pruner"):
            pruner.load_state_dict(pruner.state_dict())

    @pytest.mark.parametrize("saved", [3, {}, {"machine": "m", "rows": {"9": 1}}, {"machine": "m"}])
    def test_a_damaged_record_is_refused(self, saved):
        _, _, pruner = setup()
        state = {**pruner.state_dict(), "acceleration": saved}
        with pytest.raises(ValueError, match="the acceleration in the pruner's state is damaged"):
            pruner.load_state_dict(state)

    def test_packs_and_writes_the_dense_weights(self, tmp_path):
        torch.manual_seed(0)
        model = issp.models.build("edsr-tiny", 2)
        opt = torch.optim.Adam(model.parameters())
        pruner = issp.attach(model, opt, sparsity=0.9)
        x = torch.rand(1, 3, 8, 8)
        pruner.step()
        pruner.freeze(accelerate=x)
        assert len(sparse_names(model)) == 20
        issp.save(model, tmp_path / "m.safetensors")
        loaded, packed = issp.load(tmp_path / "m.safetensors"), issp.pack(model, x)
        kept = sum(int(mask.sum()) for mask in pruner.masks().values())
        assert (
            sum(int(m.weight.count_nonzero()) for m in loaded.modules() if isinstance(m, nn.Conv2d))
            == kept
        )
        unpacked = issp.unpack(model)
        pruner.finalize()
        for name, value in model.state_dict().items():
            assert_bitwise_equal(loaded.state_dict()[name], value, name)
            assert_bitwise_equal(unpacked.state_dict()[name], value, name)
        assert type(unpacked.conv_first) is nn.Conv2d
        assert torch.allclose(packed(x), model(x), atol=1e-4)


class TestPruner:
    def test_masks_summary_and_counts_stay(self):
        dense, sparse = setup()[2], setup()[2]
        dense.freeze()
        sparse.freeze(accelerate=EXAMPLE)
        assert str(sparse.summary()) == str(dense.summary())
        assert sparse.thresholds() == dense.thresholds() and sparse.flips() == dense.flips()
        for name, mask in dense.masks().items():
            assert torch.equal(sparse.masks()[name], mask)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_finalize_gives_the_dense_network_back(self, memory_format):
        model = net().to(memory_format=memory_format)
        opt = torch.optim.Adam(model.parameters(), 1e-2)
        pruner = issp.attach(model, opt, sparsity=SPARSITY)
        train(model, opt, range(3))
        strides = {n: p.stride() for n, p in model.named_parameters()}
        pruner.freeze(accelerate=EXAMPLE)
        train(model, opt, range(3, 5))
        saved = model.state_dict()
        pruner.finalize()
        assert [type(m) for m in model.modules() if hasattr(m, "weight")] == [
            nn.Conv2d,
            nn.Conv2d,
            nn.Linear,
        ]
        for name, p in model.named_parameters():
            assert_bitwise_equal(p, saved[name], name)
            assert p.stride() == strides[name] and p.grad.shape == p.shape
            assert opt.state[p]["exp_avg"].shape == p.shape
        assert pruner.acceleration is None
        train(model, opt, [5])

    def test_freeze_a_second_time_accelerates_what_is_frozen(self):
        model, opt, pruner = setup(freeze_at=3)
        assert pruner.frozen and pruner.acceleration is None
        pruner.freeze(accelerate=EXAMPLE)
        report = pruner.acceleration
        assert sparse_names(model) == ["0", "2.0", "4"]
        pruner.freeze(accelerate=EXAMPLE)
        assert pruner.acceleration is report
        train(model, opt, [3])
        assert pruner.step_count == 4

    def test_the_report_says_what_is_dense_and_why(self, times):
        times |= {"dense": 3.0, "dense channels_last": 2.0, "rows": 2.5}
        model, _, pruner = setup()
        pruner.freeze(accelerate=EXAMPLE)
        # The linear layer has no channels_last: there sparse wins.
        assert sparse_names(model) == ["4"]
        lines = {line.name: line for line in pruner.acceleration.lines}
        assert lines["4"].choice == "rows" and lines["0"].choice == "dense channels_last"
        assert "sparse takes 1.25 times as long" in lines["0"].reason
        assert "1 of 3 layers are sparse" in pruner.acceleration()

    def test_every_layer_that_can_trains_sparse_where_nothing_is_to_be_timed(self, times):
        times["rows"] = 9.0
        model, opt, pruner = setup()
        pruner.freeze(accelerate=True)
        assert sparse_names(model) == ["0", "2.0", "4"] and times["measured"] == []
        assert "3 of 3 layers are sparse." in pruner.acceleration()
        train(model, opt, [3])

    def test_the_model_stays_dense_where_it_is_slower_as_a_whole(self, times):
        times["sparse"] = 9.0
        model, opt, pruner = setup()
        before = weights(model)
        pruner.freeze(accelerate=EXAMPLE)
        assert sparse_names(model) == [] and pruner.frozen
        assert "The model is dense throughout" in pruner.acceleration()
        assert all(before[n].shape == p.shape for n, p in model.named_parameters())
        train(model, opt, [3])

    def test_measuring_changes_neither_the_model_nor_the_random_generator(self, monkeypatch):
        seen = []
        choose = layer_choice.choose

        def spy(model, *args):
            before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
            result = choose(model, *args)
            seen.append(torch.equal(before[1], torch.get_rng_state()))
            seen.extend(torch.equal(x, model.state_dict()[n]) for n, x in before[0].items())
            return result

        monkeypatch.setattr(layer_choice, "choose", spy)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 3)
        )
        opt = torch.optim.Adam(model.parameters())
        pruner = issp.attach(model, opt, sparsity=SPARSITY)
        pruner.step()
        pruner.freeze(accelerate=EXAMPLE)
        assert len(seen) == 10 and all(seen)

    def test_a_pattern_may_share_its_positions(self, times):
        times |= {"rows": 2.0, "rows v=4": 1.0}
        model = nn.Sequential(nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 4, 1))
        opt = torch.optim.SGD(model.parameters(), 0.1)
        pruner = issp.attach(model, opt, pattern=issp.Keep(1, of=4, v=4))
        pruner.step()
        pruner.freeze(accelerate=torch.randn(1, 8, 5, 5))
        assert model[0].weight.shape == (8 * 9 * 2 // 4, 4)
        x = torch.randn(2, 8, 5, 5)
        y, single = model(x), model(x[0])
        pruner.finalize()
        assert torch.allclose(y, model(x), atol=1e-5)
        assert torch.allclose(single, model(x)[0], atol=1e-5)

    def test_another_pruner_is_refused_while_it_trains_sparse(self):
        model, opt, pruner = setup()
        pruner.freeze(accelerate=EXAMPLE)
        with pytest.raises(ValueError, match=r"call finalize\(\) of that pruner"):
            issp.attach(model, torch.optim.Adam(model.parameters()))

    def test_records_go_on(self, tmp_path):
        model, opt, pruner = setup()
        with issp.Recorder(pruner, tmp_path) as recorder:
            train(model, opt, [3])
            pruner.freeze(accelerate=EXAMPLE)
            train(model, opt, [4])
            recorder.flush()
        rows = (tmp_path / "masks.csv").read_text().splitlines()
        pruned = {name: int((~mask).sum()) for name, mask in pruner.masks().items()}
        zeros = {r.split(",")[1]: int(r.split(",")[-1]) for r in rows if r.startswith("5,")}
        assert zeros == pruned
        gradients = (tmp_path / "gradients.csv").read_text().splitlines()
        norms = {r.split(",")[2]: float(r.split(",")[3]) for r in gradients if r.startswith("5,")}
        for name, norm in norms.items():
            grad = model.get_submodule(name).weight.grad
            assert norm == pytest.approx(float(grad.double().norm()), rel=1e-6)


class TestAverages:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_the_average_trains_along(self, wrapped):
        def run(**kwargs):
            model = net()
            if wrapped:
                ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            else:
                ema = copy.deepcopy(model)
            opt = torch.optim.Adam(model.parameters(), 1e-2)
            pruner = issp.attach(model, opt, sparsity=SPARSITY, ema=ema)
            for seed in range(8):
                if seed == 4:
                    pruner.freeze(**kwargs)
                step(model, opt, seed)
                if wrapped:
                    ema.update_parameters(model)
                else:
                    with torch.no_grad():
                        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.1)
            during = ema(EXAMPLE)
            pruner.finalize()
            return ema, during

        dense, _ = run()
        sparse, during = run(accelerate=EXAMPLE)
        assert torch.allclose(during, sparse(EXAMPLE), atol=1e-5)
        for (name, x), y in zip(
            dense.state_dict().items(), sparse.state_dict().values(), strict=True
        ):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-5), name
            assert torch.equal(x == 0, y == 0), name

    def test_an_average_in_a_dict_is_refused_before_anything_changes(self):
        model = net()
        opt = torch.optim.Adam(model.parameters())
        average = {n: p.detach().clone() for n, p in model.named_parameters()}
        pruner = issp.attach(model, opt, sparsity=SPARSITY, ema=average)
        with pytest.raises(ValueError, match="pass a module to attach as ema"):
            pruner.freeze(accelerate=EXAMPLE)
        assert not pruner.frozen


class TestRefused:
    def test_no_optimizer(self):
        pruner = issp.attach(net(), sparsity=SPARSITY)
        with pytest.raises(ValueError, match="pass the optimizer to attach"):
            pruner.freeze(accelerate=EXAMPLE)
        assert not pruner.frozen

    def test_an_optimizer_that_may_treat_a_weight_as_a_whole(self):
        class Lamb(torch.optim.Adam):
            pass

        model = net()
        pruner = issp.attach(model, Lamb(model.parameters()), sparsity=SPARSITY)
        with pytest.raises(ValueError, match="does not know that Lamb treats every weight by"):
            pruner.freeze(accelerate=EXAMPLE)
        assert not pruner.frozen

    def test_after_finalize(self):
        _, _, pruner = setup()
        pruner.finalize()
        with pytest.raises(RuntimeError, match="finalized"):
            pruner.freeze(accelerate=EXAMPLE)

    def test_layers_that_cannot_say_why_and_stay_dense(self):
        shared = nn.Linear(6, 6)
        model = nn.Sequential(shared, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
        twin = nn.Linear(6, 6)
        twin.weight = shared.weight
        model.append(twin)
        model[1].weight = nn.Parameter(torch.randn(2, 6, 6)[0])
        model[2].weight.register_post_accumulate_grad_hook(lambda p: None)
        opt = torch.optim.SGD(model.parameters(), 0.1)
        pruner = issp.attach(model, opt, sparsity=0.5)
        pruner.step()
        pruner.freeze(accelerate=torch.randn(2, 6))
        reasons = {line.name: line.reason for line in pruner.acceleration.lines}
        assert reasons["0"] == "its weight is shared by 0, 4"
        assert reasons["1"] == "its weight is a part of a larger tensor"
        assert reasons["2"].startswith("its weight has hooks of its own")
        assert sparse_names(model) == ["3"]

    def test_a_layer_of_another_class(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 3, 2, 2))
        types = (nn.Conv2d, nn.ConvTranspose2d)
        opt = torch.optim.SGD(model.parameters(), 0.1)
        pruner = issp.attach(model, opt, sparsity=0.5, types=types)
        pruner.freeze(accelerate=torch.randn(1, 3, 4, 4))
        assert "it is a ConvTranspose2d" in pruner.acceleration.lines[1].reason
        assert sparse_names(model) == ["0"]


class TestCopies:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies_train_on_by_themselves(self, duplicate):
        model, opt, pruner = setup()
        pruner.freeze(accelerate=EXAMPLE)
        train(model, opt, [3])
        other, other_opt, other_pruner = duplicate((model, opt, pruner))
        other_pruner.reattach(other_opt)
        before = weights(model)
        train(other, other_opt, [4])
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
        train(model, opt, [4])
        for (name, x), y in zip(
            model.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert_bitwise_equal(y, x, name)
        assert [x.shape for x in state_tensors(other_opt).values()] == [
            x.shape for x in state_tensors(opt).values()
        ]
        other_pruner.finalize()
        assert type(other[0]) is nn.Conv2d and type(model[0]) is SparseTrainingConv2d

    def test_a_traced_model_has_dense_layers(self):
        model, _, pruner = setup()
        pruner.freeze(accelerate=EXAMPLE)
        traced = torch.jit.trace(model, EXAMPLE)
        assert torch.allclose(traced(EXAMPLE), model(EXAMPLE), atol=1e-5)

    def test_is_not_initialised_anew(self):
        model, _, pruner = setup()
        pruner.freeze(accelerate=EXAMPLE)
        with pytest.raises(RuntimeError, match="not initialised anew"):
            model[0].reset_parameters()
        assert "kept=43 of 216" in repr(model[0])


def test_the_measurement_is_of_forward_and_backward():
    _, _, pruner = setup()
    pruner.freeze(accelerate=EXAMPLE)
    lines = pruner.acceleration.lines
    assert all("forward and backward" in line.key for line in lines)
    assert "without gradient" in lines[0].key and "without gradient" not in lines[1].key
    stored = autotune.Cache().get(pruner.acceleration.machine, lines[0].key)
    assert stored.name == "rows"
