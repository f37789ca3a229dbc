"""A stand-in for BasicSR's SRModel: its methods in its order, for the recipe in the documents."""

from __future__ import annotations

import copy
import types

import torch


class SRModel:
    """Trains `net_g` and its average `net_g_ema`; `build` makes the network."""

    build = None

    def __init__(self, opt):
        self.opt = opt
        torch.manual_seed(0)
        self.net_g = type(self).build()
        self.init_training_settings()

    def init_training_settings(self):
        self.net_g.train()
        self.net_g_ema = copy.deepcopy(self.net_g).eval()
        self.optimizers, self.schedulers = [], []
        self.setup_optimizers()
        self.setup_schedulers()

    def setup_optimizers(self):
        self.optimizer_g = torch.optim.Adam(self.net_g.parameters(), lr=1e-3)
        self.optimizers.append(self.optimizer_g)

    def setup_schedulers(self):
        self.schedulers.append(torch.optim.lr_scheduler.StepLR(self.optimizer_g, 3))

    def optimize_parameters(self, current_iter):
        self.optimizer_g.zero_grad()
        (self.net_g(self.lq) - self.gt).abs().mean().backward()
        self.optimizer_g.step()
        averages = dict(self.net_g_ema.named_parameters())
        for name, x in self.net_g.named_parameters():
            averages[name].data.lerp_(x.data, 0.1)

    def save(self, epoch, current_iter):
        label = "latest" if current_iter == -1 else current_iter
        nets = {"params": self.net_g.state_dict(), "params_ema": self.net_g_ema.state_dict()}
        torch.save(nets, f"{self.opt['path']['models']}/net_g_{label}.pth")
        self.save_training_state(epoch, current_iter)

    def save_training_state(self, epoch, current_iter):
        if current_iter != -1:
            state = {"epoch": epoch, "iter": current_iter}
            state["optimizers"] = [x.state_dict() for x in self.optimizers]
            state["schedulers"] = [x.state_dict() for x in self.schedulers]
            torch.save(state, f"{self.opt['path']['training_states']}/{current_iter}.state")

    def resume_training(self, resume_state):
        for one, saved in zip(self.optimizers, resume_state["optimizers"], strict=True):
            one.load_state_dict(saved)
        for one, saved in zip(self.schedulers, resume_state["schedulers"], strict=True):
            one.load_state_dict(saved)


class Registry:
    """Keeps nothing."""

    def register(self):
        return lambda cls: cls


def modules(build):
    """Names of BasicSR's modules -> stand-ins; `build` makes the network."""
    names = ["basicsr", "basicsr.models", "basicsr.models.sr_model"]
    names += ["basicsr.utils", "basicsr.utils.registry"]
    found = {name: types.ModuleType(name) for name in names}
    found["basicsr.models.sr_model"].SRModel = type(
        "SRModel", (SRModel,), {"build": staticmethod(build)}
    )
    found["basicsr.utils.registry"].MODEL_REGISTRY = Registry()
    return found
