"""Trains v1's Stage B in train_b.py --v1. v1's Stage B generates the VQGAN's tokens, v2's generates the latents.

  image -VQGAN-> tokens x_0 (B,h,w) -some replaced at random-> x_t (B,h,w) -[B]-> logits (B,K,h,w) -> cross-entropy

train_b.py calls the functions of the first part under the same names as its own for v2, so that one loop trains both.
The second part is only for v1: a loss that teaches attention to which image position each semantic vector belongs.
Needs: torch, numpy; stage_b.py, v1/, wuerstchen.py.
"""
import math

import numpy as np
import torch
from torch import Tensor

from stage_b import AttentionBlock, layer_norm
from v1.pipeline import WuerstchenV1
from v1.losses import training_errors, training_levels
from v1.sampling import add_noise
from v1.stage_b import StageBV1
from wuerstchen import scale_semantic, unscale_semantic

NETWORK = StageBV1
LEVELS_AT_ONCE = 1           # noise levels per forward pass of validation; only 1, because logits take much memory


def defaults(small: bool) -> dict:
    """Returns {option of train_b.py: default with --v1} where this is not v2's. small: for models of emoji scenes."""
    more = {} if small else dict(resolution=[512])
    return dict(blind=0, guide_attention=0.3 if small else 0, high_noise=1.0, loss="ce", loss_weight="none") | more


def match_vqgan(decoder: StageBV1, vqgan, new: bool) -> None:
    """Raises ValueError if Stages A and B differ in number of tokens. If new, initializes B's tokens from A's codes."""
    codes = vqgan.codebook.codes
    if len(codes) != decoder.codebook_size:
        raise ValueError(f"the VQGAN has {len(codes)} tokens, Stage B is for {decoder.codebook_size}: "
                         f"give it another --config, or another --vqgan")
    if new:
        decoder.init_tokens(codes)


def semantic_scale(decoder: StageBV1) -> tuple:
    """Returns two functions, which scale and unscale semantic latents for Stage C. For the released v1, recognized by
    its text width of 1024 (CLIP-H), both change nothing, because its Stage C works on raw semantic latents."""
    raw = decoder.config["c_text"] == 1024
    return (lambda x: x,) * 2 if raw else (scale_semantic, unscale_semantic)


def pipeline(vqgan, small: bool, device) -> WuerstchenV1:
    """Returns a pipeline for sample sheets, without Stage B: training/sheets.py sets bind_b to the one in training."""
    return WuerstchenV1(dict(stage_a=vqgan), device=device)


def cache_settings(vqgan) -> dict:
    """Returns the settings of the tokens' cache. Tokens are stored as integers, because float16 would round them."""
    return dict(kind="tokens", dtype="int16" if vqgan.config["codebook_size"] <= 2 ** 15 else "int32")


def encode(vqgan, images: Tensor) -> Tensor:
    """Encodes images (B,3,H,W) in [0, 1] as tokens (B,h,w) int64."""
    return vqgan.encode_indices(images)


def decode(vqgan, x_0: Tensor) -> Tensor:
    return vqgan.decode_indices(x_0)


def draw_noise(rng: np.random.Generator, h: int, w: int, config: dict) -> dict[str, Tensor]:
    """Draws one image's arguments of add_noise: random_tokens (h,w), and u (h,w), uniform. config: Stage B's."""
    return dict(random_tokens=torch.from_numpy(rng.integers(config["codebook_size"], size=(h, w))),
                u=torch.from_numpy(rng.random((h, w), dtype=np.float32)))


def noise_levels(chance: Tensor, blind: bool, args) -> Tensor:
    """Converts chance (B,), uniform in [0, 1], to noise levels t (B,): if blind, all are 1, else 7.5 % of them."""
    t = training_levels(chance)
    return torch.ones_like(t) if blind else 1 - (1 - t) ** args.high_noise


def corrupt(batch: dict, x_0: Tensor, t: Tensor, blind: bool) -> tuple[Tensor, Tensor]:
    """Replaces tokens of x_0 at random, with probability t. Returns x_t and the mask of replaced ones, each (B,h,w)."""
    return add_noise(x_0, t, batch["random_tokens"], batch["u"])


def forward(decoder: StageBV1, x_t: Tensor, t: Tensor, semantic: Tensor, text: Tensor) -> Tensor:
    """Runs Stage B. Returns logits (B,K,h,w) of the clean tokens."""
    return decoder(x_t, t, semantic, text)


def prediction(logits: Tensor, x_t: Tensor) -> Tensor:
    """Returns the logits of `forward` in float32, which sampling needs."""
    return logits.float()


def raw_losses(logits: Tensor, x_0: Tensor, x_t: Tensor, mask: Tensor, t: Tensor, args) -> Tensor:
    """Returns the losses (B,), one per image: cross-entropies, weighted as v1/losses.py describes."""
    return training_errors(logits, x_0, t, mask)


def accuracy(logits: Tensor, x_0: Tensor, mask: Tensor) -> Tensor:
    """Returns, for each image, the share of replaced tokens (mask) whose clean token has the highest logit: (B,)."""
    return ((logits.argmax(1) == x_0) & mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


# ----- teaching attention the positions of semantic vectors -----------------------------------------------

def share_over(n: int, m: int, device=None) -> Tensor:
    """Returns weights (m,n) that interpolate linearly from n coarse positions to m fine positions. Rows sum to 1."""
    centers = ((torch.arange(m, device=device) + 0.5) * n / m - 0.5).clamp(0, n - 1)     # (m,)
    return (1 - (centers[:, None] - torch.arange(n, device=device)).abs()).clamp(min=0)


class AttentionGuide:
    """Computes a training loss that teaches Stage B's attention which semantic vector belongs to which image position.

    To the network, semantic vectors are a sequence without positions. It must learn the position of a vector from the
    vector itself, and the position of an image token from the zero padding at the borders. Neither position helps until
    the other is learned, so a small network uses the vectors only for the background. This loss teaches half of the
    heads. It is the cross-entropy between their attention and the interpolation weights of the vectors at each image
    position. Train with it to the end: without it, attention soon forgets the positions, see docs/TRAINING.md.
    """
    def __init__(self, decoder: StageBV1):
        self.size, self.errors = (0, 0), []
        decoder.register_forward_pre_hook(self.begin)
        for module in decoder.modules():
            if isinstance(module, AttentionBlock):
                module.register_forward_pre_hook(self.add)

    def begin(self, decoder: StageBV1, inputs: tuple) -> None:
        """Hook before a forward pass: clears the losses, and stores the size (h', w') of the semantic latents."""
        if torch.is_grad_enabled():
            self.size, self.errors = tuple(inputs[2].shape[2:]), []

    def add(self, block: AttentionBlock, inputs: tuple) -> None:
        """Hook before a block: stores the block's loss. inputs: (x (B,H,W,C), condition (B,h'*w' + N,c_cond))."""
        if not torch.is_grad_enabled():
            return
        (x, condition), (h, w), heads = inputs, self.size, (block.heads + 1) // 2
        rows, columns = (share_over(n, m, x.device) for n, m in zip((h, w), x.shape[1:3]))
        share = torch.einsum("Hh,Ww->HWhw", rows, columns).flatten(2).flatten(0, 1)      # (H*W, h'*w')
        tokens = layer_norm(x).flatten(1, 2)                                             # (B, H*W, C)
        k = torch.cat([block.text_kv(condition)[0], block.key(tokens)], dim=1)              # (B, h'*w' + N + H*W, C)
        # (B, heads / 2, ..., C / heads)
        q, k = (y.unflatten(-1, (block.heads, -1))[:, :, :heads].transpose(1, 2) for y in (block.query(tokens), k))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).float()
        log_attention = scores.log_softmax(-1)[..., :h * w]                              # (B, heads / 2, H*W, h'*w')
        self.errors.append(-(log_attention * share).sum(-1).mean())

    def loss(self) -> Tensor:
        """Returns the loss of the last forward pass, a scalar: the mean of the attention blocks' losses."""
        return torch.stack(self.errors).mean()
