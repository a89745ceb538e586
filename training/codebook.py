"""Training of Stage A's codebook outside the loss: running means, usage counts, restarts of unused codes.

A code moves towards the latents to which it is the nearest code, by a gradient or as their running mean. A code that is
nearest to no latent would never move. So every --revive-every steps, such codes are replaced by latents.
Needs: torch; order.py.
"""
import torch
from torch import Tensor, nn

from training.order import sample_rng


class CodebookAverages(nn.Module):
    """Trains a codebook without gradients (--codebook ema): each code is the running mean of the latents nearest to it.

    For each code, N is a running mean of the number of its latents, m is a running mean of their sum, and the code is
    m / N. So codes follow their latents independently of the learning rate. Source: arXiv:1711.00937.
    """
    def __init__(self, codes: Tensor, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("sizes", torch.ones(len(codes)))   # N (K,): running mean of each code's number of latents
        self.register_buffer("sums", codes.detach().clone())    # m (K, C): running mean of the sum of these latents

    @torch.no_grad()
    def update(self, codes: Tensor, counts: Tensor, sums: Tensor, skip: Tensor | bool = False) -> None:
        """Updates the running means, and codes (K,C) in place. counts (K,), sums (K,C): number and sum of a step's
        latents that are nearest to each code, see `count`. If the scalar skip is true, nothing changes."""
        skip = torch.as_tensor(skip)
        for mean, new in ((self.sizes, counts), (self.sums, sums)):
            mean.copy_(torch.where(skip, mean, mean.lerp(new, 1 - self.decay)))
        # Laplace smoothing adds 1e-5 latents to each code, so that a code without latents does not cause 0 / 0.
        total = self.sizes.sum()
        sizes = (self.sizes + 1e-5) * total / (total + len(codes) * 1e-5)                # (K,)
        codes.copy_(torch.where(skip, codes, self.sums / sizes[:, None]))

    @torch.no_grad()
    def restart(self, dead: Tensor, latents: Tensor) -> None:
        """Sets N to 1 and m to the latents (n,C) for the n codes marked in dead (K,) bool, so their means restart."""
        self.sizes[dead], self.sums[dead] = 1.0, latents


@torch.no_grad()
def count(z: Tensor, indices: Tensor, size: int) -> Tensor:
    """Returns (size,1 + C): number and sum of each code's latents. z (...,C): latents. indices (...): their codes."""
    z = torch.cat([torch.ones_like(z[..., :1]), z], dim=-1).float().flatten(0, -2)       # (N, 1 + C)
    return z.new_zeros(size, z.shape[1]).index_add_(0, indices.flatten(), z)


def perplexity(counts: Tensor) -> Tensor:
    """Returns the perplexity exp(entropy) of counts (K,), each code's uses. It is n if n codes are used equally."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()


class CodebookUpdates:
    """Updates the codebook of a StageA after each optimizer step: counts how often codes are used, with --codebook ema
    sets codes to running means, and every --revive-every steps moves unused codes. --freeze-encoder: only counts.

    averages: a CodebookAverages or None. ema: the EMA of the model's weights. usage (2,K): how often each code was used
    since unused codes were last moved (row 0), and since the last line of the log (row 1).
    """
    def __init__(self, model, ema, args, processes):
        self.model, self.ema, self.args, self.processes, self.averages = model, ema, args, processes, None
        codes = model.codebook.codes
        if args.codebook == "ema" and not args.freeze_encoder:
            self.averages = CodebookAverages(codes, args.codebook_decay).to(codes.device)
        self.usage, self.latents = torch.zeros(2, len(codes), device=codes.device), []
        self.counts = 0

    def add(self, latents: Tensor, indices: Tensor) -> None:
        """Stores the latents (B,h,w,C) of a micro-step and counts their nearest codes, given by indices (B,h,w)."""
        self.latents.append(latents.detach())
        self.counts = self.counts + count(self.latents[-1], indices, self.usage.shape[1])

    def update(self, step: int, skip: Tensor) -> None:
        """Updates the codebook after a step. All processes must call it. skip: scalar, whether the step was skipped.
        The CPU waits for the GPU only when unused codes are moved."""
        counts, codes = self.processes.sum(self.counts), self.model.codebook.codes           # (K, 1 + C)
        self.usage += counts[:, 0] * ~torch.as_tensor(skip)
        if self.averages is not None:
            self.averages.update(codes, counts[:, 0], counts[:, 1:], skip)
        if (step + 1) % self.args.revive_every == 0 and not skip:
            if not self.args.freeze_encoder:
                self.revive(step, self.usage[0] == 0)
            self.usage[0] = 0
        self.latents, self.counts = [], 0

    @torch.no_grad()
    def revive(self, step: int, dead: Tensor) -> None:
        """Replaces the codes marked in dead (K,) bool by latents drawn from this step's latents of all processes.
        Source: the "random restarts" of Jukebox, arXiv:2005.00341.

        The draw does not depend on how processes and micro-steps share the step. In the sum over processes, each
        process contributes the drawn latents that it has computed, and zeros for the others.
        """
        world, n = self.processes.world, self.latents[0].shape[:3].numel()
        z = torch.cat([part.float().flatten(0, 2) for part in self.latents])                 # (micro-steps * n, C)
        chosen = sample_rng(self.args.seed, step, "revive").integers(len(z) * world, size=int(dead.sum()))
        chosen = torch.from_numpy(chosen).to(z.device)
        micro, rank, place = chosen // (n * world), chosen // n % world, chosen % n     # origin of each drawn latent
        latents = self.processes.sum(z[micro * n + place] * (rank == self.processes.rank)[:, None])      # (dead, C)
        self.model.codebook.codes[dead] = latents
        if self.averages is not None:
            self.averages.restart(dead, latents)
        if "codebook.codes" in self.ema.mean:        # restart the EMA: a mean of unrelated codes would match no latent
            self.ema.mean["codebook.codes"][dead] = latents

    def used(self) -> dict[str, float]:
        """Returns entries for the log: how many codes were used since the last call, and the perplexity of this use."""
        counts = self.usage[1].clone()
        self.usage[1] = 0
        return dict(codes_used=int((counts > 0).sum()), perplexity=perplexity(counts).item())
