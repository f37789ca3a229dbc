"""Small imitations of the optimizers that other packages wrap around an optimizer.

The real ones are tried too where they are installed (`test_wrappers.py`); these always run.
"""

from collections import OrderedDict, defaultdict

import torch
from torch.optim import Optimizer


class Delegating(Optimizer):
    """An optimizer by type that has the parameter groups and the state of another."""

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    def zero_grad(self):
        self.optimizer.zero_grad()


class Wrapper(Delegating):
    """As the wrappers of pytorch_optimizer: its own hooks, the parameter groups of the other."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.defaults = optimizer.defaults
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._patch_step_function()

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]


class Lookahead(Wrapper):
    """Every second step moves the weights halfway back to slow weights of its own."""

    state = None

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.state, self.count = defaultdict(dict), 0
        for p in self.parameters():
            self.state[p]["slow_params"] = p.detach().clone()

    @torch.no_grad()
    def own_step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for p in self.parameters():
                p.lerp_(self.state[p]["slow_params"], 0.5)
                self.state[p]["slow_params"].copy_(p)
        return loss

    def step(self, closure=None):
        return self.own_step(closure)


class UnhookedLookahead(Lookahead):
    """As timm's: it has tables of hooks, but torch has never wrapped its step."""

    def _patch_step_function(self):
        if hasattr(self, "count"):
            super()._patch_step_function()

    def step(self, closure=None):
        return self.own_step(closure)


class TRAC(Wrapper):
    """Scales the inner optimizer's update: what the weights are after the inner step is lost."""

    @torch.no_grad()
    def step(self, closure=None):
        before = [p.clone() for p in self.parameters()]
        loss = self.optimizer.step(closure)
        for p, old in zip(self.parameters(), before, strict=True):
            p.copy_(old + 0.01 * (p - old))
        return loss


class OrthoGrad(Wrapper):
    """Changes the gradients, then steps."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.parameters():
            if p.grad is not None:
                p.grad -= p * (p.grad * p).sum() / (p.square().sum() + 1e-30)
        return self.optimizer.step(closure)


class SAM(Optimizer):
    """As the best known implementation: the saved weight becomes the weight's memory."""

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.parameters():
            self.state[p]["old_p"] = p.data.clone()
            p.add_(0.05 * p.grad / p.grad.norm())

    @torch.no_grad()
    def second_step(self):
        for p in self.parameters():
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()

    def parameters(self):
        return [p for g in self.param_groups for p in g["params"] if p.grad is not None]


def imitating(optimizer):
    """As Fabric's and Lightning's wrappers: of the wrapped class by type, without hooks."""

    class Imitation:
        def __init__(self, optimizer):
            self._optimizer = optimizer
            self.__class__ = type("Imitation", (Imitation, type(optimizer)), {})

        def step(self, closure=None):
            return self._optimizer.step(closure)

        def __getattr__(self, name):
            return getattr(self._optimizer, name)

    return Imitation(optimizer)


class Accelerated(Delegating):
    """As accelerate's: an optimizer by type that was never initialized as one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)


class Chained:
    """A user's own: several optimizers behind one step."""

    def __init__(self, *optimizers):
        self.optimizers = list(optimizers)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class ScheduleFreeSGD(Optimizer):
    """Trains at y, evaluates at x; the weights are one or the other, z is kept in the state."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.steps, self.at_y = 0, True

    def _move(self, weight):
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight)

    @torch.no_grad()
    def eval(self):
        if self.at_y:
            self._move(1 - 1 / 0.9)
        self.at_y = False

    @torch.no_grad()
    def train(self):
        if not self.at_y:
            self._move(0.1)
        self.at_y = True

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / self.steps)
                p.sub_(p.grad, alpha=group["lr"] * (1 - 0.9 * (1 - 1 / self.steps)))
                z.sub_(p.grad, alpha=group["lr"])
