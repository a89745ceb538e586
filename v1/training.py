"""How train_b.py --v1 trains: v1's Stage B generates the VQGAN's tokens, v2's its latents.

  image -VQGAN-> tokens x_0 (B,h,w) -some replaced at random-> x_t (B,h,w) -[B]-> logits (B,K,h,w) -> cross-entropy

train_b.py calls the functions of the first part under the same names as its own for v2, so that one loop trains both.
The second part is for v1 only: a loss that shows attention where each semantic vector belongs.
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
LEVELS_AT_ONCE = 1           # noise levels of a validation per forward pass, since logits take much memory


def defaults(small: bool) -> dict:
    """Options whose defaults differ from v2's."""
    more = {} if small else dict(resolution=[512])
    return dict(blind=0, guide_attention=0.3 if small else 0, high_noise=1.0, loss="ce", loss_weight="none") | more


def match_vqgan(decoder: StageBV1, vqgan, new: bool) -> None:
    """A new decoder starts from Stage A's codes. Raises ValueError if it is for another number of tokens."""
    codes = vqgan.codebook.codes
    if len(codes) != decoder.codebook_size:
        raise ValueError(f"the VQGAN has {len(codes)} tokens, Stage B is for {decoder.codebook_size}: "
                         f"give it another --config, or another --vqgan")
    if new:
        decoder.init_tokens(codes)


def semantic_scale(decoder: StageBV1) -> tuple:
    """-> scale and unscale of the semantic latents for Stage C. Only the released v1, which has CLIP-H's texts of width
    1024, works on raw ones."""
    raw = decoder.config["c_text"] == 1024
    return (lambda x: x,) * 2 if raw else (scale_semantic, unscale_semantic)


def pipeline(vqgan, small: bool, device) -> WuerstchenV1:
    """For samples. Stage B is added by its bind_b."""
    return WuerstchenV1(dict(stage_a=vqgan), device=device)


def cache_settings(vqgan) -> dict:
    """Tokens are kept exactly, not in float16: the neighbour of a number means something else."""
    return dict(kind="tokens", dtype="int16" if vqgan.config["codebook_size"] <= 2 ** 15 else "int32")


def encode(vqgan, images: Tensor) -> Tensor:
    """(B,3,H,W) in [0, 1] -> tokens (B,h,w) int64."""
    return vqgan.encode_indices(images)


def decode(vqgan, x_0: Tensor) -> Tensor:
    return vqgan.decode_indices(x_0)


def draw_noise(rng: np.random.Generator, h: int, w: int, config: dict) -> dict[str, Tensor]:
    """For one sample: random_tokens (h,w), any of the codes, and u (h,w), uniform, which says where they go."""
    return dict(random_tokens=torch.from_numpy(rng.integers(config["codebook_size"], size=(h, w))),
                u=torch.from_numpy(rng.random((h, w), dtype=np.float32)))


def noise_levels(chance: Tensor, blind: bool, args) -> Tensor:
    """chance (B,) in [0, 1) -> t (B,). 7 % train at t = 1, where sampling starts; in blind steps all: random tokens."""
    t = training_levels(chance)
    return torch.ones_like(t) if blind else 1 - (1 - t) ** args.high_noise


def corrupt(batch: dict, x_0: Tensor, t: Tensor, blind: bool) -> tuple[Tensor, Tensor]:
    """Each token is replaced by a random one with probability t -> x_t (B,h,w), mask (B,h,w) of those that were."""
    return add_noise(x_0, t, batch["random_tokens"], batch["u"])


def forward(decoder: StageBV1, x_t: Tensor, t: Tensor, semantic: Tensor, text: Tensor) -> Tensor:
    """-> logits (B,K,h,w)."""
    return decoder(x_t, t, semantic, text)


def prediction(logits: Tensor, x_t: Tensor) -> Tensor:
    """What sampling needs of the output."""
    return logits.float()


def raw_losses(logits: Tensor, x_0: Tensor, x_t: Tensor, mask: Tensor, t: Tensor, args) -> Tensor:
    """Cross-entropy of each image, (B,)."""
    return training_errors(logits, x_0, t, mask)


def accuracy(logits: Tensor, x_0: Tensor, mask: Tensor) -> Tensor:
    """Share of the replaced tokens that are found again, (B,)."""
    return ((logits.argmax(1) == x_0) & mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def compile_decoder(decoder: StageBV1) -> None:
    decoder.compile()


# ----- attention is shown where semantic vectors belong ---------------------------------------------------

def share_over(n: int, m: int, device=None) -> Tensor:
    """(m,n): the share of each of n coarse places in each of m finer ones, linear between centers; rows sum to 1."""
    centers = ((torch.arange(m, device=device) + 0.5) * n / m - 0.5).clamp(0, n - 1)     # (m,)
    return (1 - (centers[:, None] - torch.arange(n, device=device)).abs()).clamp(min=0)


class AttentionGuide:
    """In training only, shows the attention of Stage B which semantic vector lies over which place.

    To the network, semantic vectors are words without positions. It has to learn from a vector where it belongs, and
    from the zeros at the borders where a place is, and learns neither as long as it does not know the other. A small
    network then makes only the background of them. So half of the heads are taught it: cross-entropy between their
    attention and the vectors over each place, in proportion. It must stay on: without it, attention wanders off again
    within a few thousand steps. Measurements: docs/TRAINING.md.
    """
    def __init__(self, decoder: StageBV1):
        self.size, self.errors = (0, 0), []
        decoder.register_forward_pre_hook(self.begin)
        for module in decoder.modules():
            if isinstance(module, AttentionBlock):
                module.register_forward_pre_hook(self.add)

    def begin(self, decoder: StageBV1, inputs: tuple) -> None:
        """A forward pass begins, with semantic latents (B,16,h',w')."""
        if torch.is_grad_enabled():
            self.size, self.errors = tuple(inputs[2].shape[2:]), []

    def add(self, block: AttentionBlock, inputs: tuple) -> None:
        """The error of one block, from its x (B,H,W,C) and the condition (B,h'*w' + N,c_cond)."""
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
        """Of the last forward pass: the mean over its attention blocks."""
        return torch.stack(self.errors).mean()
