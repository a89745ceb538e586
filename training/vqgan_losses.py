"""What Stage A is trained with, in addition to its own reconstruction and codebook losses.

CodebookAverages is another way to train the codebook; count and perplexity say how it is used. perceptual_loss and the
discriminator with its losses make images sharp. See train_a.py for how they are combined.
Papers: VQGAN: arXiv:2012.09841; codebook: arXiv:1711.00937; LPIPS: arXiv:1801.03924.  Needs: torch.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class CodebookAverages(nn.Module):
    """The other way to train a codebook: each code is the running mean of the latents nearest to it, without gradients.

    Per code a running number of latents N and their running sum m; the code is m / N. A code then follows its latents
    at its own speed, whatever the learning rate. arXiv:1711.00937, appendix A.1, eq. 6 to 8.
    """
    def __init__(self, codes: Tensor, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("sizes", torch.ones(len(codes)))                            # (K,)    N
        self.register_buffer("sums", codes.detach().clone())                             # (K, C)  m

    @torch.no_grad()
    def update(self, codes: Tensor, counts: Tensor, sums: Tensor) -> None:
        """codes (K,C), changed in place; counts (K,) and sums (K,C) of the latents of a step, see `count`."""
        self.sizes.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        # Laplace smoothing, as if each code had 1e-5 latents more: otherwise a code without latents divides by 0.
        total = self.sizes.sum()
        sizes = (self.sizes + 1e-5) * total / (total + len(codes) * 1e-5)                # (K,)
        codes.copy_(self.sums / sizes[:, None])

    @torch.no_grad()
    def restart(self, dead: Tensor, latents: Tensor) -> None:
        """Codes that were moved, dead (K,) bool, restart with the one latent they were moved to, latents (dead,C)."""
        self.sizes[dead], self.sums[dead] = 1.0, latents


@torch.no_grad()
def count(z: Tensor, indices: Tensor, size: int) -> Tensor:
    """Latents z (..., C) and their nearest codes (...) -> (K, 1 + C): for each code, their number and their sum."""
    z = torch.cat([torch.ones_like(z[..., :1]), z], dim=-1).float().flatten(0, -2)       # (N, 1 + C)
    return z.new_zeros(size, z.shape[1]).index_add_(0, indices.flatten(), z)


def perplexity(counts: Tensor) -> Tensor:
    """How often each code was used, (K,) -> the number of codes, used equally often, that this amounts to: 1 to K.

    It is exp of the entropy.
    """
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()


def perceptual_loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Distance of two batches of images as a classifier sees them: its activations per layer, each (B,C,h,w) -> scalar.

    Every position's vector is scaled to length 1, so that loud layers and positions do not drown the others; squared
    distances are summed over channels, averaged over positions, summed over layers. That is LPIPS (arXiv:1801.03924,
    eq. 1) with all weights 1; its learned weights are not used.
    """
    def unit(x: Tensor) -> Tensor:
        return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
    return sum((unit(a.float()) - unit(b.float())).square().sum(1).mean()
               for a, b in zip(features, targets, strict=True))


class PatchDiscriminator(nn.Module):
    """Judges for every patch of 18 x 18 pixels how real it looks. Used in training only.

    A mean error is smallest for a blurred average of all plausible details; a discriminator rejects blur, because no
    real patch looks like it (arXiv:1611.07004, sec. 3.2).
    """
    def __init__(self, c: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2),                  # (B, c, H/2, W/2)
            nn.Conv2d(c, 2 * c, 4, stride=2, padding=1), nn.LeakyReLU(0.2),              # (B, 2c, H/4, W/4)
            nn.Conv2d(2 * c, 4 * c, 3, padding=1), nn.LeakyReLU(0.2),                    # (B, 4c, H/4, W/4)
            nn.Conv2d(4 * c, 1, 1))                                                      # (B, 1, H/4, W/4)

    def forward(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0, 1] -> logits (B,1,H/4,W/4), positive = real."""
        return self.layers(images * 2 - 1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss: real patches above +1, generated ones below -1. Logits of any shape -> scalar.

    arXiv:2012.09841, sec. 3.1.
    """
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Generated patches should look real. Logits of any shape -> scalar."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: Tensor,
                    mean=lambda gradient: gradient) -> Tensor:
    """The factor with which the generator's loss pulls at the last layer as strongly as the reconstruction does.

    Both losses are scalars with a graph, last_layer is the weight that makes the pixels -> scalar without one. Neither
    a fixed weight nor a discriminator that becomes certain can then push reconstruction aside. arXiv:2012.09841, eq. 7,
    clamped. mean: averages a gradient over processes, so that all use the same weight.
    """
    lengths = [mean(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm()
               for loss in (reconstruction, generator)]
    # Under float16 a gradient may be infinite until the loss scale has come down; the step is then skipped anyway.
    return (lengths[0] / (lengths[1] + 1e-6)).nan_to_num(0.0).clamp(0, 1e4).detach()
