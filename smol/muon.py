"""
The optimizer of both routes: Muon for the blocks' matrices, AdamW for everything else.

AdamW scales each entry of a gradient by itself, so where entries agree a whole matrix moves far in one
direction. Muon moves it as far in all directions (Jordan et al., kellerjordan.github.io/posts/muon): an
update is the momentum with its singular values made alike. What that brings is in LOG.md.

torch.optim.Muon does it from PyTorch 2.9 on, in bfloat16. Kaggle's T4s want PyTorch 2.6
(requirements-kaggle.txt) and have no bfloat16, nor have most CPUs, where it is emulated and takes longer than
the rest of a step (LOG.md): for them the same optimizer is here, with the same state.
"""

import torch

from smol import runtime


def split_parameters(model, weight_decay):
    """
    Two groups for an optimizer: the blocks' large matrices are decayed. Embeddings, norms, short
    convolutions, biases, A_log, and what makes gates (forgetting, beta, output, halting) are not: a gate near
    zero does not do less, it does something else.
    """
    decayed, kept = [], []
    for name, p in model.named_parameters():
        gate = any(part in name for part in ("f_proj", "g_proj", "b_proj", "q_head"))
        matrix = p.ndim == 2 and not gate and not name.startswith("wte")
        (decayed if matrix else kept).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def muon_and_adamw(model, weight_decay, learning_rate, betas):
    """
    [Muon for the matrices that are decayed, AdamW for the rest]. Muon's updates, scaled by 0.2 * sqrt(larger
    side) (Liu et al., arXiv 2502.16982), are as large as AdamW's: one learning rate serves both.
    """
    matrices, rest = split_parameters(model, weight_decay)
    settings = {"lr": learning_rate, "weight_decay": weight_decay}
    if hasattr(torch.optim, "Muon") and fast_dtype(matrices["params"][0].device) == torch.bfloat16:
        muon = torch.optim.Muon(matrices["params"], **settings, adjust_lr_fn="match_rms_adamw")
    else:
        muon = Muon(matrices["params"], **settings)
    adamw = torch.optim.AdamW(rest["params"], lr=learning_rate, betas=betas, weight_decay=0.0, fused=True)
    return [muon, adamw]


class Muon(torch.optim.Optimizer):
    """For matrices alone, with Nesterov's momentum and decoupled weight decay."""

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(ahead), alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def fast_dtype(device):
    """The shortest dtype in which `device` multiplies matrices fast: float16 on a GPU without bfloat16."""
    return getattr(torch, runtime.pick_dtype("auto", str(device), training=True))


def orthogonal(m):
    """
    m (R, C) -> about U V^T of its decomposition U S V^T, in fast_dtype: five times X <- a X + (b A + c
    A^2) X with A = X X^T. This odd polynomial (Jordan et al.) is steepest at 0, so even small singular values
    arrive, somewhere between 0.7 and 1.2: near enough.
    """
    wide = m if m.shape[0] <= m.shape[1] else m.T
    x = (wide / wide.norm().clamp(min=1e-7)).to(fast_dtype(m.device))
    for _ in range(5):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide is m else x.T
