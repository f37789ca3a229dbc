"""The pruner: works inside `optimizer.step()`; the stages from there to hard zeros."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from issp.nn import sharding
from issp.nn.report import LayerReport
from issp.nn.selection import Layer
from issp.pruning import acceleration as accelerating
from issp.pruning import capture, methods
from issp.pruning import state as saved_state
from issp.pruning import summary as summaries
from issp.pruning.acceleration import Acceleration, Recorded
from issp.pruning.buckets import WeightBucket, WeightBuckets
from issp.pruning.ema import EMAWeights
from issp.pruning.hooks import Hooks, Work
from issp.pruning.joint_calls import JointCalls
from issp.pruning.prune_step import PruneStep
from issp.pruning.schedules import Schedule
from issp.pruning.shards import ShardedBucket
from issp.pruning.step_counter import StepCounter, is_skipped
from issp.pruning.wrappers import see_through


class Pruner:
    """Prunes a model while it trains; `attach` builds it.

    Attributes:
        method: the method, with its options.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        wrappers: list[Any],
        layers: list[Layer],
        *,
        unpruned: Mapping[str, str],
        method: methods.Method,
        schedule: Schedule | None,
        freeze_at: int | None,
        ema: EMAWeights | None,
        hook: bool,
    ) -> None:
        self.method = method
        self._model = model
        self._joint_calls = JointCalls()
        self._buckets = WeightBuckets(layers, optimizers, wrappers, self._sharded_bucket)
        self._fsdp_modules = sharding.fsdp_modules(model)
        self._unpruned = unpruned
        self._schedule, self._freeze_at, self._ema, self._hook = schedule, freeze_at, ema, hook
        self._stage = "pruning"  # then "frozen", then "final"
        self._counter = StepCounter()
        self._pruning_steps = 0  # once the masks are fixed: steps of the pruning stage
        self._ratio: float | None = None  # that the counts of the buckets follow
        self._hooks = Hooks()
        self._callbacks: list[Callable[[Pruner], None]] = []
        self._inspected: set[int] = set()  # optimizers whose state has been looked at
        self._loss_taken: bool | None = None  # None: no step has looked at it yet
        self._penalized = False  # since the latest step
        self._acceleration: Acceleration | None = None
        self._recorded: Recorded | None = None  # of the state that was loaded
        self._captured: list[WeightBucket] = []  # their memory is that of a CUDA graph as well
        self._buckets.warn_missing()
        self._buckets.check_maskable(ema)
        self._prepare_capture()
        self._attach_hooks()
        for index in range(len(optimizers)):
            self._name_unmasked(index)

    def start(self, from_zeros: bool = False) -> None:
        """Lets the method begin; `attach` calls it.

        Args:
            from_zeros: fix the masks to the present zeros instead.

        Raises:
            ValueError: the method does not suit the model, or no weight to prune is zero.
        """
        if from_zeros:
            self.freeze_zeros()
            return
        self._start_method()
        if self.method.fixes_masks:
            self.freeze()

    def _sharded_bucket(self, layers: Sequence[Layer], optimizer: int) -> WeightBucket:
        methods.check_shards(self.method, layers)
        bucket = ShardedBucket(layers, optimizer)
        self._joint_calls.watch(bucket.mesh)
        return bucket

    def _start_method(self) -> None:
        self.method.start(methods.Setting(self._model, self._buckets, self._freeze_at))

    def __repr__(self) -> str:
        layers = self._buckets.prunable
        targets = " ".join(dict.fromkeys(summaries.target_text(x.target, x.unit) for x in layers))
        return f"Pruner({self._title()}, {len(layers)} layers, target {targets})"

    def _title(self) -> str:
        return f"{self.method.name}, step {self.step_count}, {self._stage}"

    @property
    def step_count(self) -> int:
        """Optimizer steps taken; a step that AMP skipped does not count."""
        return self._counter.synchronize()

    @property
    def frozen(self) -> bool:
        """Whether the masks are fixed."""
        return self._stage != "pruning"

    @property
    def newest_step(self) -> int:
        """Number of the newest step, without waiting for AMP's flag on a GPU.

        If AMP has skipped that step, the next one has the same number.
        """
        return self._counter.upper_bound

    def stage_of(self, step: int) -> str:
        """The stage of a step, "pruning" or "fine-tuning"; the one that fixes the masks prunes.

        With a method that fixes them when it is attached, `freeze_at` alone ends the first stage.
        """
        at_once = self._freeze_at if self.method.fixes_masks else None
        last = max(self._pruning_steps, at_once or 0)
        return "fine-tuning" if self.frozen and step > last else "pruning"

    @property
    def buckets(self) -> WeightBuckets:
        """The weights to prune with their masks, to be read only."""
        return self._buckets

    @property
    def attached(self) -> bool:
        """Whether every optimizer has the pruner's hook."""
        return bool(self._buckets.optimizers) and self._hooks.present(self._buckets.optimizers)

    def loss(self) -> Tensor:
        """What the method adds to the training loss: add it to your own before `backward()`.

        Returns:
            A scalar with a gradient; a zero for methods without a loss, and where it is off.
        """
        self._loss_taken = True
        value = None if self.frozen else self.method.loss()
        if value is None:
            device = next((w.device for w in self._buckets.weights()), torch.device("cpu"))
            value = torch.zeros((), dtype=torch.float32, device=device)
        return value

    def regularize(self, grad_scale: Tensor | None = None) -> None:
        """Adds the method's penalty to the gradients, for loops without the hook.

        Call it before each step of the optimizer; methods without a penalty add nothing.

        Args:
            grad_scale: by which the gradients are still multiplied (AMP), one element.
        """
        for index in range(max(1, len(self._buckets.optimizers))):
            self._penalize(index, grad_scale)

    def _penalize(self, index: int, grad_scale: Tensor | None) -> None:
        """The penalty of the weights of optimizer `index`, whose gradients are ready."""
        self._penalized = True
        if self.frozen or not self.method.penalizes:
            return
        if index == 0:
            self._counter.synchronize()
        self._refresh()
        for bucket in self._buckets:
            if bucket.optimizer == index:
                lambdas = self.method.penalty(self._running_step(index), bucket)
                if lambdas is not None:
                    bucket.regularize(lambdas, grad_scale)

    def _running_step(self, index: int) -> int:
        """The number of the step that optimizer `index` takes now; the first is 1."""
        count = self._counter.known
        return count + 1 if index == 0 else max(1, count)

    @contextlib.contextmanager
    def masked(self, ema: nn.Module | Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Within this context the unimportant weights are zero; afterwards they are as before.

        It is how a model looks that would be frozen now: what a validation during the pruning stage
        should score.

        Args:
            ema: mask a moving average of the model instead, see `attach`.
        """
        layers = [layer for bucket in self._buckets for layer in bucket.layers]
        kept = [mask for bucket in self._buckets for mask in bucket.masks()]
        fsdp_modules = self._fsdp_modules
        if ema is not None:
            fsdp_modules = sharding.fsdp_modules(ema) if isinstance(ema, nn.Module) else []
        sharding.reshard(fsdp_modules)
        weights = [layer.weight.data for layer in layers]
        if ema is not None:
            averages = EMAWeights(ema, layers)
            self._buckets.check_maskable(averages)
            weights = averages.tensors(layers)
        saved = [weight.clone() for weight in weights]
        with torch.no_grad():
            try:
                for weight, mask in zip(weights, kept, strict=True):
                    weight.masked_fill_(~mask.to(weight.device), 0)
                yield
            finally:
                for weight, values in zip(weights, saved, strict=True):
                    weight.copy_(values)
                sharding.reshard(fsdp_modules)

    def step(self, found_inf: Tensor | None = None) -> None:
        """One step by hand, for loops without the hook; call it after the optimizer's step.

        Args:
            found_inf: float32 tensor of one element; when it is not 0 the step does not count.
        """
        if self._hooks.fired:
            warnings.warn(
                "pruner.step() is one more step: optimizer.step() has pruned already; drop the "
                "call, or attach with hook=False",
                stacklevel=2,
            )
        if self.method.penalizes and not (self._penalized or self.frozen):
            raise RuntimeError(
                f"{self.method.name} adds a penalty to the gradients: call pruner.regularize() "
                "before each step of the optimizer, or attach with the hook"
            )
        for index in range(max(1, len(self._buckets.optimizers))):
            self._finish_step(index, found_inf, None)

    def on_step(self, callback: Callable[[Pruner], None]) -> Callable[[], None]:
        """Calls `callback(pruner)` after every step; returns a function that ends it."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def _begin_step(
        self, index: int, found_inf: Tensor | None, deferred: str = "", exact: bool = True
    ) -> PruneStep:
        """What is to be done in a step of optimizer `index`, with the counts of that step set.

        exact: see `WeightBuckets.refresh`.
        """
        self._check_open()
        if deferred and not self.frozen:
            return PruneStep((), self.method.factor, self.frozen, deferred)
        if capture.is_capturing():
            self._begin_capture()
        elif index == 0:
            self._counter.synchronize()
        self._refresh(exact)
        step = self._running_step(index)
        if not (self.frozen or self.method.ranks_after(step)):
            for bucket in self._buckets if index == 0 else ():
                bucket.clear_flips()
            return PruneStep((), self.method.factor, self.frozen)
        if not (self.frozen or is_skipped(found_inf)):
            self._set_ratio(step)
        buckets = tuple(bucket for bucket in self._buckets if bucket.optimizer == index)
        return PruneStep(buckets, self.method.factor, self.frozen)

    def _finish_step(
        self, index: int, found_inf: Tensor | None, remaining: Sequence[WeightBucket] | None
    ) -> None:
        """The work after a step of optimizer `index`; see `Hooks.attach`."""
        self._check_open()
        if found_inf is not None and found_inf.device.type != "cuda":
            if is_skipped(found_inf):
                return
            found_inf = None
        try:
            remaining = self._prune(index, found_inf, remaining, exact=False)
        except (TypeError, ValueError):
            # An op that refuses weights that have moved has written nothing yet.
            if not self._buckets.is_one_call:
                raise
            remaining = self._prune(index, found_inf, None, exact=True)
        if self.frozen:
            for bucket in remaining:
                bucket.clear_flips()
        else:
            if not self.method.ranks_after(self._running_step(index)):
                for bucket in self._buckets:
                    if bucket.optimizer == index:
                        bucket.clear_flips()
            if self.method.factor != 1.0:
                self._buckets.shrink_iterates(remaining, self.method.factor, found_inf)
        if index == 0:
            self._count_step(found_inf)
            if not self.frozen and self._counter.reached(self._freeze_at):
                self.freeze()
            for callback in self._callbacks:
                callback(self)
        self._name_unmasked(index)

    def _prepare_capture(self) -> None:
        for device in {bucket.weights[0].device for bucket in self._buckets}:
            if capture.can_capture(device):
                self._counter.prepare(device)

    def _begin_capture(self) -> None:
        """Refuses to capture what would be wrong in a replay.

        Raises:
            RuntimeError: Python decides something in every step, or has to see the step itself.
        """
        capture.check_local(self._buckets)
        capture.check_callbacks(self._callbacks)
        if not self.frozen:
            capture.check_settled(self.method, self._schedule, self._freeze_at, self._counter.known)
        self._captured = list(self._buckets)

    def _warn_of_captured(self) -> None:
        """Says that a captured step does not follow what changes now."""
        if self._captured:
            warnings.warn(
                "a CUDA graph that was captured before replays the pruner's step as it was then: "
                "capture it anew",
                stacklevel=4,
            )

    def _prune(
        self,
        index: int,
        found_inf: Tensor | None,
        remaining: Sequence[WeightBucket] | None,
        exact: bool,
    ) -> Sequence[WeightBucket]:
        """Shrinks or masks the buckets that remain, all of the optimizer's if None; returns them.

        exact: see `WeightBucket.refresh`.
        """
        if remaining is None:
            remaining = self._begin_step(index, found_inf, exact=exact).buckets
        if self.frozen:
            self._buckets.apply_masks(remaining, exact)
        else:
            for bucket in remaining:
                bucket.shrink(self.method.factor, found_inf)
        return remaining

    def _count_step(self, found_inf: Tensor | None) -> None:
        """Counts a step of the first optimizer, and lets the method act on it."""
        if capture.is_capturing():
            self._counter.add_captured(found_inf)
            return
        step = self._counter.known + 1
        self._counter.add(found_inf)
        self._penalized = False
        if self.frozen:
            return
        # Waits for AMP's flag: only methods that act on single steps pay for it.
        acts = type(self.method).after_step is not methods.Method.after_step
        if acts and self._counter.synchronize() == step:
            self.method.after_step(step)
        if self.method.has_loss:
            if self._loss_taken is None:
                warnings.warn(
                    f"{self.method.name} has a loss: add pruner.loss() to yours before backward()",
                    stacklevel=2,
                )
            self._loss_taken = bool(self._loss_taken)  # warned of once

    def _name_unmasked(self, index: int) -> None:
        """Names once, as soon as an optimizer has a state, what in it the masks will not reach."""
        optimizers = self._buckets.optimizers
        if index in self._inspected or index >= len(optimizers) or not optimizers[index].state:
            return
        self._inspected.add(index)
        unmasked = self._buckets.unmasked_states(index)
        if unmasked:
            names = ", ".join(f"{name} ({kind})" for name, kind in unmasked.items())
            warnings.warn(
                f"the masks will not reach {names} in the state of "
                f"{type(optimizers[index]).__name__}: they are no strided float tensors of their "
                "weight's shape; the weights themselves stay zero once the masks are fixed",
                stacklevel=2,
            )

    def _refresh(self, exact: bool = True) -> None:
        sharding.reshard(self._fsdp_modules)
        if self._buckets.refresh(exact):
            self._after_rebuild()

    def _after_rebuild(self) -> None:
        self._warn_of_captured()
        self._prepare_capture()
        self._ratio = None
        if self._stage == "pruning":
            self._start_method()
        if self.frozen:
            self._buckets.fix_masks(self._ema)
            self.method.detach()

    def _check_open(self) -> None:
        if self._stage == "final":
            raise RuntimeError("the pruner is finalized: attach a new one to prune further")

    def _set_ratio(self, step: int) -> None:
        ratio, final = 1.0, 1.0
        if self._schedule is not None:
            ratio, final = self._schedule(step), self._schedule.final
        if ratio != self._ratio:
            for bucket in self._buckets:
                bucket.set_ratio(ratio, final)
            self._ratio = ratio

    def freeze(self, accelerate: Any = None) -> None:
        """Fixes the masks of the last selection; weights, moments and EMA are masked from now on.

        Before the first step a selection with the full sparsity is made. A second call has no
        effect but that of `accelerate`.

        Args:
            accelerate: input of the model (or a tuple of its arguments), shaped as in training, to
                train the kept weights alone from now on. Each layer is timed on it, forward and
                backward, and so is the whole model; what is not faster stays dense (see
                `acceleration`). Parameters stay the same objects, but hold the kept values, and so
                do moments and EMA; all that is saved stays dense. Call it between two steps, under
                the autocast of training. True: every layer that can, without timing any.

        Raises:
            ValueError: an optimizer or an average that cannot follow; nothing has been changed.
        """
        if accelerate is not None and self._acceleration is None:
            self._check_open()
            accelerating.check(self._model, self._buckets, self._ema)
        self._freeze()
        if accelerate is not None and self._acceleration is None:
            self._refresh()
            chosen = accelerating.choose(self._model, self._buckets, accelerate, self._recorded)
            self._accelerate(*chosen)

    @torch.inference_mode(False)
    def _accelerate(self, recorded: Recorded, report: LayerReport) -> None:
        self._acceleration = Acceleration(self._model, self._buckets, self._ema, recorded, report)

    @property
    def acceleration(self) -> LayerReport | None:
        """What each layer's training takes, sparse and dense, if `freeze` was to accelerate it."""
        return None if self._acceleration is None else self._acceleration.report

    def _freeze(self) -> None:
        if self.frozen:
            return
        self._joint_calls.check("freeze()")
        count = self.step_count
        if self._hook:
            self._hooks.warn_if_missing(self._buckets.optimizers)
        if count and self._schedule is not None and count < self._schedule.end:
            warnings.warn(
                f"frozen at step {count}, before the schedule ends at step "
                f"{self._schedule.end}: the sparsity stays at {self._schedule(count):.4g}",
                stacklevel=3,
            )
        self._warn_of_replaced()
        self._refresh()
        self._warn_of_captured()
        self.method.before_freeze()
        self._buckets.fix_masks(self._ema)
        self._stage, self._pruning_steps = "frozen", count
        self.method.after_freeze()
        self.method.detach()

    def freeze_zeros(self) -> None:
        """Fixes the masks to the present zeros: training goes on from a sparse model.

        Raises:
            ValueError: no weight of the pruned layers is zero.
        """
        kept = {layer.name: layer.weight.detach() != 0 for layer in self._buckets.prunable}
        if not any(summaries.zeros([layer.weight for layer in self._buckets.prunable])):
            raise ValueError(
                "from_zeros: no weight to prune is zero; load the sparse weights before attaching"
            )
        for bucket in self._buckets:
            bucket.set_masks([kept[layer.name] for layer in bucket.layers])
        self._buckets.fix_masks(self._ema)
        self._stage = "frozen"

    def finalize(self) -> nn.Module:
        """Freezes if that has not happened, writes hard zeros, removes the hooks.

        Returns:
            The model given to `attach`.
        """
        if self._stage != "final":
            self._joint_calls.check("finalize()")
            if self.frozen:
                self._warn_of_replaced()
            if self._acceleration is not None:
                self._acceleration.end()
                self._acceleration = None
            self.freeze()
            self._refresh()
            self._buckets.fix_masks(self._ema)
            self.detach()
            self._stage = "final"
        return self._model

    def _warn_of_replaced(self) -> None:
        """Names layers that are no longer in the model; users' calls call it."""
        present = set(map(id, self._model.modules()))
        names = [x.name for x in self._buckets.prunable if id(x.module) not in present]
        if names:
            warnings.warn(
                f"no longer in the model: {', '.join(names)}; what has taken the place since "
                "attach is not pruned, and the counts are those of the layer that was there: call "
                "reattach(opt, model) with an optimizer of the new weights, or attach anew",
                stacklevel=3,
            )

    def detach(self) -> None:
        """Removes the hooks; masks and counters stay, `reattach` goes on."""
        self._hooks.detach()
        self.method.detach()

    def reattach(
        self, opt: Optimizer | Sequence[Optimizer] | None = None, model: nn.Module | None = None
    ) -> None:
        """Goes on with a rebuilt, copied or unpickled optimizer, and model if that is a copy too.

        Args:
            opt: the optimizer(s) that train the weights from now on; None: those known already.
            model: a copy of the model with the same layers; None: the model known already.

        Raises:
            ValueError: the model lacks a layer, or the optimizer has none of the weights, or
                another pruner of them; nothing has been changed.
            RuntimeError: the pruner is finalized.
        """
        self._check_open()
        fsdp_modules = sharding.fsdp_modules(self._model if model is None else model)
        sharding.reshard(fsdp_modules)
        before = self._buckets.optimizers, self._buckets.wrappers
        after = before if opt is None else see_through(opt)
        self._buckets.rebind(model, *after)
        try:
            self._hooks.check(after[0] if self._hook else [], self._work())
        except ValueError:
            self._buckets.rebind(None if model is None else self._model, *before)
            raise
        self._model = self._model if model is None else model
        self._fsdp_modules = fsdp_modules
        if self._acceleration is not None:
            self._acceleration.follow(self._model)
        self._after_rebuild()
        self._hooks.detach()
        self._attach_hooks()
        self._inspected.clear()

    def _work(self) -> Work:
        buckets = self._buckets
        return Work(
            begin_step=self._begin_step,
            penalize=self._penalize if self.method.penalizes else None,
            finish_step=self._finish_step,
            weights=buckets.weights,
            describe=self.__repr__,
            wrappers=buckets.wrappers,
        )

    def _attach_hooks(self) -> None:
        self._hooks.attach(self._buckets.optimizers if self._hook else [], self._work())

    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool tensor in the weight's shape, True = kept; at first all are."""
        return summaries.by_name(
            self._buckets,
            lambda bucket: bucket.masks(),
            lambda layer: torch.ones_like(layer.weight, dtype=torch.bool),
        )

    def thresholds(self) -> dict[str, float]:
        """Layer name -> magnitude of the last selected weight; NaN before the first selection."""
        self._joint_calls.check("thresholds()")
        return summaries.by_name(self._buckets, lambda b: b.thresholds(), lambda _: float("nan"))

    def flips(self) -> dict[str, int]:
        """Layer name -> mask bits that the latest step changed."""
        self._joint_calls.check("flips()")
        return summaries.by_name(self._buckets, lambda b: b.flips(), lambda _: 0)

    def summary(self) -> summaries.Summary:
        """Counts per layer, taken from the masks and weights as they are now; `print` it.

        Raises:
            DivergedRanksError: of ranks that have shards, not all call it; this holds as well for
                `thresholds`, `flips`, `state_dict`, `freeze` and `finalize`.
        """
        self._joint_calls.check("summary()")
        if self._hook:
            self._hooks.warn_if_missing(self._buckets.optimizers)
        self._warn_of_replaced()
        sharding.reshard(self._fsdp_modules)
        return summaries.summary(self._title(), self._buckets, self._unpruned, self.method.notes())

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs besides model and optimizer; loads weights_only."""
        self._joint_calls.check("state_dict()")
        return {
            **self._configuration(),
            "stage": self._stage,
            "step_count": self.step_count,
            "layers": saved_state.pack(self._buckets.layer_states()),
            **({"method_state": learned} if (learned := self.method.state_dict()) else {}),
            **({"acceleration": recorded.state()} if (recorded := self._recorded_now()) else {}),
        }

    def _recorded_now(self) -> Recorded | None:
        return self._recorded if self._acceleration is None else self._acceleration.recorded

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Restores what `state_dict` returned, in a pruner attached with the same arguments.

        Args:
            state: from `state_dict`.
            strict: False allows another method, shrink, sparsity, schedule or freeze_at.

        Raises:
            ValueError: the state belongs to other layers or settings; nothing has been changed.
        """
        self._check_open()
        sharding.reshard(self._fsdp_modules)
        if self._acceleration is not None:
            raise RuntimeError(
                "layers train sparse, by the masks as they are: load the state into a new pruner, "
                "before freeze(accelerate=...)"
            )
        configuration = self._configuration() if strict else {}
        layer_states = saved_state.unpack(state, self._buckets.layers, configuration)
        recorded = Recorded.of(state.get("acceleration"), list(layer_states))
        self._buckets.check_maskable(self._ema)
        if strict or "method_state" in state:
            self.method.load_state_dict(saved_state.method_state(state))
        self._buckets.rebuild(layer_states, active=layer_states)
        self._stage = "pruning" if state["stage"] == "pruning" else "frozen"
        self._counter.set(state["step_count"])
        self._pruning_steps = self._counter.known
        self._recorded = recorded
        self._after_rebuild()

    def _configuration(self) -> dict[str, object]:
        return {
            "version": 1,
            "method": self.method.name,
            "shrink": self.method.factor,
            **({"options": repr(options)} if (options := self._method_options()) else {}),
            "schedule": repr(self._schedule),
            "freeze_at": self._freeze_at,
            "targets": {layer.name: _target_text(layer) for layer in self._buckets.layers},
        }

    def _method_options(self) -> dict[str, Any]:
        """The options that decide how training goes on, besides `shrink`."""
        given = self.method.options()
        return {name: given[name] for name in given if name not in ("shrink", "example")}

    def __getstate__(self) -> dict[str, Any]:
        self._counter.synchronize()
        return {**self.__dict__, "_callbacks": [], "_captured": []}


def _target_text(layer: Layer) -> str:
    """A layer's target as it is saved: two states of different targets do not fit together."""
    return repr(layer.target) + (f" in {layer.unit!r}" if layer.unit else "")
