"""What train_b.py --v1 does in its own way: v1's Stage B makes the VQGAN's tokens, v2's its latents.

  picture -VQGAN-> tokens x_0 (B,h,w) -some replaced at random-> x_t (B,h,w) -[B]-> logits (B,K,h,w) -> cross-entropy with x_0

One step stands in train_b.py's loop, the model in stage_b.py, its loss in losses.py. Here is what surrounds them, under the names that
the same things for v2 have in train_b.py: what a sample draws, the validation, pictures through the whole chain.
Needs: torch, numpy; stage_b.py, v1/, training/order.py, wuerstchen.py.
"""
import math

import numpy as np
import torch
from torch import Tensor

from training.order import sample_rng
from wuerstchen import Noise
from stage_b import AttentionBlock, layer_norm
from v1.losses import training_errors
from v1.sampling import add_noise, sample


def draw(rng: np.random.Generator, codes: int, h: int, w: int) -> dict:
    """What noise is made of: random_tokens (h,w), each any of the codes, and u (h,w), uniform, which says where they go."""
    return dict(random_tokens=torch.from_numpy(rng.integers(codes, size=(h, w))),
                u=torch.from_numpy(rng.random((h, w), dtype=np.float32)))


def cache_dtype(codes: int) -> str:
    """Tokens are whole numbers, and a neighbour's number means another thing: they are kept exactly, never in float16."""
    return "int16" if codes <= 2 ** 15 else "int32"


def share_over(n: int, m: int, device=None) -> Tensor:
    """(m,n): how much of each of n places in a row lies over each of m finer ones, linear between the middles of two; rows add up to 1."""
    middles = ((torch.arange(m, device=device) + 0.5) * n / m - 0.5).clamp(0, n - 1)     # (m,)
    return (1 - (middles[:, None] - torch.arange(n, device=device)).abs()).clamp(min=0)


class AttentionGuide:
    """In training alone, shows the attention of Stage B which semantic vector lies over which place.

    To the network semantic vectors are words without positions: it has to tell from a vector where it belongs, and from the
    borders' zeros where a place is, and learns neither as long as it does not know the other. A small one then makes nothing but the
    background of them. So half of the heads are taught it: cross-entropy between their attention and the vectors over each place, in proportion.
    Measured with the small Stage B, cross-entropy of the tokens of objects at t = 1, with and without conditions: 5.75 and 7.07
    after 1000 steps of 16 (its weight falling from 1 to 0), without guide 6.57 and 6.84 after 4500; 3.32 and 7.24 after 27,500. It stays: taken away after 4000 steps, attention wandered off
    within 4000 more (the guide's loss rose from 1.5 to 11; put back, it was 1.2 after 1800).
    """
    def __init__(self, decoder):
        self.size, self.errors = (0, 0), []
        decoder.register_forward_pre_hook(self.begin)
        for module in decoder.modules():
            if isinstance(module, AttentionBlock):
                module.register_forward_pre_hook(self.add)

    def begin(self, decoder, inputs: tuple) -> None:
        """A forward begins, with semantic latents (B,16,h',w')."""
        if torch.is_grad_enabled():
            self.size, self.errors = tuple(inputs[2].shape[2:]), []

    def add(self, block: AttentionBlock, inputs: tuple) -> None:
        """One block's error, from its x (B,H,W,C) and the sequence (B,h'*w' + N,c_cond)."""
        if not torch.is_grad_enabled():
            return
        (x, told), (h, w), heads = inputs, self.size, (block.heads + 1) // 2
        rows, columns = (share_over(n, m, x.device) for n, m in zip((h, w), x.shape[1:3]))
        share = torch.einsum("Hh,Ww->HWhw", rows, columns).flatten(2).flatten(0, 1)     # (H*W, h'*w')
        tokens = layer_norm(x).flatten(1, 2)                                             # (B, H*W, C)
        k = torch.cat([block.text_kv(told)[0], block.key(tokens)], dim=1)                   # (B, h'*w' + N + H*W, C)
        # (B, heads / 2, ..., C / heads)
        q, k = (y.unflatten(-1, (block.heads, -1))[:, :, :heads].transpose(1, 2) for y in (block.query(tokens), k))
        said = (q @ k.mT / math.sqrt(q.shape[-1])).float().log_softmax(-1)[..., :h * w]  # (B, heads / 2, H*W, h'*w')
        self.errors.append(-(said * share).sum(-1).mean())

    def loss(self) -> Tensor:
        """Of the last forward: the mean over its attention blocks."""
        return torch.stack(self.errors).mean()


@torch.no_grad()
def validate(model, fixed, embed, t_grid: list[float], autocast, args, processes) -> dict[str, float]:
    """Cross-entropy at each of these noise levels, their mean, and how many of the replaced tokens are found again, with pictures
    and random tokens that never change. Nothing is dropped here, and no noise put on the semantic latent."""
    levels = torch.tensor(t_grid, device=processes.device)                               # (10,)
    sums = torch.zeros(3, len(t_grid), device=processes.device)                          # error, tokens found, pictures
    for i, caption in enumerate(fixed.captions):
        if not args.fsdp and i % processes.world != processes.rank:      # under FSDP all must compute together
            continue
        x_0, rng = fixed.x_0[i:i + 1], sample_rng(args.seed, i, "validation")            # (1, h, w)
        with autocast:
            semantic, text = model(fixed.source[i:i + 1]), embed([caption])
        # one by one: logits are many, and it is the same on any machine
        for k in range(len(t_grid)):
            t, drawn = levels[k:k + 1], draw(rng, model.decoder.codebook_size, *x_0.shape[1:])
            x_t, mask = add_noise(x_0, t, *(drawn[name][None].to(x_0.device) for name in ("random_tokens", "u")))
            with autocast:
                logits = model(semantic, x_t, t, text)                                   # (1, K, h, w)
            found = (logits.argmax(1) == x_0)[mask]                                      # (tokens replaced,)
            sums[:, k] += torch.stack([training_errors(logits, x_0, t, mask)[0], found.sum() / max(len(found), 1),
                                       torch.ones_like(t[0])])
    error, found = ((sums if args.fsdp else processes.sum(sums))[:2] / sums[2]).tolist()
    return dict(val_loss=float(np.mean(error))) | {f"val_loss_t_{t:.2f}": value for t, value in zip(t_grid, error)} \
        | {f"val_accuracy_t_{t:.2f}": value for t, value in zip(t_grid, found)}


@torch.no_grad()
def reconstruct(model, vqgan, fixed, embed, scale: float, steps: int, autocast, args):
    """The fixed pictures through encoder, B and A, from random tokens that are always the same: (N,3,r,r) in [0, 1]."""
    painted, codes = [], model.decoder.codebook_size
    for i in range(0, len(fixed.captions), args.batch):
        x_0, captions = fixed.x_0[i:i + args.batch], fixed.captions[i:i + args.batch]    # (B, h, w)
        noise, text = Noise([args.seed + i + k for k in range(len(captions))]), embed(captions)
        with autocast:
            semantic = model(fixed.source[i:i + args.batch])

        def uniform():
            return torch.special.ndtr(noise(1, *x_0.shape[1:]))[:, 0].to(x_0.device)     # (B, h, w)

        def predict(x_t, t, both):
            if both:                         # and without condition: zeros, and the empty caption
                x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
            with autocast:
                return model(torch.cat([semantic, 0 * semantic]) if both else semantic, x_t, t,
                             torch.cat([text, embed([""] * len(text))]) if both else text).float()
        start = (uniform() * codes).long().clamp(max=codes - 1)
        tokens = sample(predict, start, uniform, torch.linspace(1, 0, steps + 1), guidance=scale)
        painted.append(vqgan.decode_indices(tokens).clamp(0, 1))
    return torch.cat(painted)                                                            # (N, 3, r, r)
