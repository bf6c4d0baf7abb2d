"""Muon for matrices inside the layers, AdamW for the embedding and the norms (Jordan et al. 2024)."""

import torch


class Muon(torch.optim.Optimizer):
    """Step along the nearest orthogonal matrix to the momentum; matrices of one shape are done together."""

    def __init__(self, matrices, lr=0.02, momentum=0.95, decay=0.0):
        groups = {}
        for m in matrices:
            groups.setdefault(tuple(m.shape), []).append(m)
        super().__init__(
            [{"params": g} for g in groups.values()], {"lr": lr, "momentum": momentum, "decay": decay}
        )

    @torch.no_grad()
    def step(self):
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in params]))
            scale = max(1.0, updates.shape[-2] / updates.shape[-1]) ** 0.5
            for p, update in zip(params, updates, strict=True):
                p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, p, beta):
        state = self.state[p]
        if "m" not in state:
            state["m"] = torch.zeros_like(p)
        state["m"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(state["m"], beta)


def orthogonal(matrices, steps=4):
    """Return U V^T of each matrix [n, rows, columns], nearly: a quintic Newton-Schulz iteration."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if tall else x


def optimizers(model, lr, decay):
    """Return [Muon, AdamW] for `model`; AdamW's rate is a fixed part of Muon's `lr`."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "token_embd"]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": [model.token_embd], "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        Muon(matrices, lr, decay=decay),
        torch.optim.AdamW(groups, lr=lr * 0.15, betas=(0.9, 0.95), fused=True),
    ]
