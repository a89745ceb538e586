"""Stage A, the VQGAN: compresses images four times per side, and decodes them again.

  caption -CLIP-> (B,77,1280) -[C]-> (B,16,24,24) -[B]-> (B,4,256,256) -[A]-> (B,3,1024,1024)

Stage A is trained first, without text or diffusion. It is an autoencoder whose latents can be
quantised to a codebook of 8192 vectors of 4 numbers ("tokens"). Würstchen v1 generates the tokens;
v2, the default, generates unquantised latents, so it samples without the codebook.
In   images (B,3,H,W) in [0, 1] (not [-1, 1]), H and W multiples of `downscale` (4)
Out  latents (B,4,H/4,W/4) of variance about 1; decoded images (B,3,H,W), not clamped to [0, 1]
Note: `encode` divides latents by `scale_factor` (0.3764, fixed by the released weights) and
     `decode` multiplies by it. `decode_indices` does not, because the vectors of the codebook are
     not divided by it.

Inside, activations are channels-last, (B,H,W,C): a Linear or a norm then reads C contiguously, and
a convolution gets its (B,C,H,W) as a view with channels-last strides, which costs nothing.
Training: train_a.py, training/vqgan_losses.py, training/codebook.py.
Weights: python -m tools.weights convert IN OUT --to ours; StageA(**config).load_state_dict(...)
Paper: arXiv:2306.00637 (Stage A); VQGAN: arXiv:2012.09841; codebook: arXiv:1711.00937.
Needs: torch only. This file works when copied alone.
"""
if __name__ == "__main__":
    raise SystemExit("stage_a.py defines StageA. To generate images: python sample.py --help")

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def channels_first(x: Tensor) -> Tensor:
    """Returns x (B,H,W,C) as a view (B,C,H,W), the order of dimensions that convolutions expect."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """Returns x (B,C,H,W) as a view (B,H,W,C), the order that Linear layers and norms expect."""
    return x.permute(0, 2, 3, 1)


class VQResBlock(nn.Module):
    """Two residual branches: a depthwise 3x3 convolution mixes positions, an MLP mixes channels.

    `gammas` are six learned numbers: for each branch, the scale and shift of its norm and a factor
    (gate) for its output. They start at zero, so an untrained block returns its input."""
    def __init__(self, c: int):
        super().__init__()
        # Replicate padding, because zero padding would make the rim of decoded images dark.
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c, padding_mode="replicate")
        self.expand = nn.Linear(c, 4 * c)
        self.contract = nn.Linear(4 * c, c)
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        """Applies both branches to x (B,H,W,C). Keeps the shape."""
        x = self.mix(x)                                                              # (B, H, W, C)
        scale, shift, gate = self.gammas[3:]
        h = F.gelu(self.expand(self.norm(x, scale, shift)))                         # (B, H, W, 4C)
        return torch.addcmul(x, self.contract(h), gate)         # x + gate * contract: (B, H, W, C)

    def mix(self, x: Tensor) -> Tensor:
        """Applies the first branch, which mixes positions, to x (B,H,W,C). Keeps the shape."""
        scale, shift, gate = self.gammas[:3]
        h = self.depthwise(channels_first(self.norm(x, scale, shift)))               # (B, C, H, W)
        return torch.addcmul(x, channels_last(h), gate)                              # (B, H, W, C)

    def norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Normalises x (...,C) to mean 0 and variance 1 over C, then applies scale and shift."""
        c = x.shape[-1:]
        return F.layer_norm(x, c, (1 + scale).expand(c), shift.expand(c), eps=1e-6)


class Codebook(nn.Module):
    """Vector quantisation: replaces each latent vector by the nearest of `size` learned vectors."""
    def __init__(self, size: int, c: int):
        super().__init__()
        # Codes start with variance 1, like latents after BatchNorm. If they were closer together,
        # the outermost few would be the nearest to all latents, and the others would stay unused.
        self.codes = nn.Parameter(torch.randn(size, c))                                     # (K, C)

    def nearest(self, z: Tensor) -> Tensor:
        """Returns indices (B,H,W) of the codes with the smallest Euclidean distance to z (B,H,W,C).

        |z - c|^2 = |z|^2 - 2 z.c + |c|^2, and |z|^2 is the same for every c, so it is omitted.
        Computed in float32, because two of 8192 codes in 4 dimensions are often so close that half
        precision cannot tell which of them is nearer."""
        z, codes = z.float(), self.codes.float()
        return (codes.square().sum(1) - 2 * z @ codes.T).argmin(-1)                      # (B, H, W)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the codes (B,H,W,C) nearest to z (B,H,W,C), their indices (B,H,W) and two losses.

        The codebook loss moves codes to the latents. The commitment loss moves latents to their
        codes (arXiv:1711.00937). argmin has no gradient, so z + (q - z).detach() passes the
        decoder's gradient straight through to z."""
        indices = self.nearest(z)                                                        # (B, H, W)
        q = F.embedding(indices, self.codes)                                          # (B, H, W, C)
        codebook_loss, commitment_loss = F.mse_loss(q, z.detach()), F.mse_loss(z, q.detach())
        return z + (q - z).detach(), indices, codebook_loss, commitment_loss


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies one layer of the encoder or decoder, a block or a convolution, to x (B,H,W,C)."""
    return layer(x) if isinstance(layer, VQResBlock) else channels_last(layer(channels_first(x)))


class StageA(nn.Module):
    """The VQGAN. Defaults are the official sizes (18.4 M parameters)."""
    def __init__(self, levels: int = 2, bottleneck_blocks: int = 12, c_hidden: int = 384,
                 c_latent: int = 4, codebook_size: int = 8192, scale_factor: float = 0.3764):
        super().__init__()
        self.config = dict(levels=levels, bottleneck_blocks=bottleneck_blocks, c_hidden=c_hidden,
                           c_latent=c_latent, codebook_size=codebook_size,
                           scale_factor=scale_factor)
        self.downscale = 2 ** levels            # px per latent position, per side
        self.scale_factor = scale_factor
        widths = [c_hidden // 2 ** i for i in reversed(range(levels))]          # official: 192, 384

        self.embed = nn.Linear(3 * 4, widths[0])                       # input: 2 x 2 px, 3 colours
        self.encoder = nn.ModuleList([VQResBlock(widths[0])])
        for c_in, c in zip(widths, widths[1:]):
            self.encoder += [nn.Conv2d(c_in, c, 4, stride=2, padding=1), VQResBlock(c)]
        self.to_latent = nn.Linear(widths[-1], c_latent, bias=False)
        self.norm_latent = nn.BatchNorm2d(c_latent)              # mean 0 and variance 1 for latents
        self.codebook = Codebook(codebook_size, c_latent)
        self.from_latent = nn.Linear(c_latent, widths[-1])
        # Most of the decoder's blocks are at the coarsest level, where activations are smallest.
        self.decoder = nn.ModuleList(VQResBlock(widths[-1]) for _ in range(bottleneck_blocks))
        for c_in, c in zip(widths[::-1], widths[-2::-1]):
            self.decoder += [nn.ConvTranspose2d(c_in, c, 4, stride=2, padding=1), VQResBlock(c)]
        self.to_pixels = nn.Linear(widths[0], 3 * 4)                   # output: 2 x 2 px, 3 colours

    def encode_raw(self, images: Tensor) -> Tensor:
        """Encodes images (B,3,H,W) in [0, 1] to latents (B,h,w,4), not divided by scale_factor."""
        _, channels, h, w = images.shape
        if channels != 3 or h % self.downscale or w % self.downscale:
            raise ValueError(
                f"Stage A got images of shape {tuple(images.shape)}, expected (B, 3, H, W) with H "
                f"and W multiples of {self.downscale}: crop or resize them first.")
        x = self.embed(channels_last(F.pixel_unshuffle(images, 2)))             # (B, H/2, W/2, C0)
        for layer in self.encoder:
            x = run(layer, x)
        return channels_last(self.norm_latent(channels_first(self.to_latent(x))))     # (B, h, w, 4)

    def decode_raw(self, z: Tensor) -> Tensor:
        """Decodes z (B,h,w,4), not divided by scale_factor, to images (B,3,H,W), not clamped."""
        x = self.from_latent(z)                                                       # (B, h, w, C)
        for layer in self.decoder:
            x = run(layer, x)
        return F.pixel_shuffle(channels_first(self.to_pixels(x)), 2)                  # (B, 3, H, W)

    def encode(self, images: Tensor, quantise: bool = False) -> Tensor:
        """Encodes images (B,3,H,W) in [0, 1] to latents (B,4,H/4,W/4) for Stage B.

        quantise=True replaces latents by the nearest codes. Raises ValueError for wrong shapes."""
        z = self.encode_raw(images)                                                   # (B, h, w, 4)
        if quantise:
            z = F.embedding(self.codebook.nearest(z), self.codebook.codes)
        return channels_first(z) / self.scale_factor                                  # (B, 4, h, w)

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (B,4,h,w) from Stage B or `encode` to images (B,3,4h,4w).

        Clamp images to [0, 1] before saving. Raises ValueError for a wrong number of channels."""
        if latents.shape[1] != self.config["c_latent"]:
            raise ValueError(
                f"Stage A got latents of shape {tuple(latents.shape)}, expected "
                f"{self.config['c_latent']} channels: 16 channels are Stage C latents, decode them "
                f"with Stage B.")
        return self.decode_raw(channels_last(latents * self.scale_factor))

    def encode_indices(self, images: Tensor) -> Tensor:
        """Encodes images (B,3,H,W) in [0, 1] to codebook indices (B,H/4,W/4), int64."""
        return self.codebook.nearest(self.encode_raw(images))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Decodes codebook indices (B,h,w) to images (B,3,4h,4w), which are not clamped."""
        return self.decode_raw(F.embedding(indices, self.codebook.codes))

    def forward(self, images: Tensor, quantise: bool | Tensor = True) -> dict[str, Tensor]:
        """Returns, for training, a dict of decoded images, latents, indices and losses.

        images (B,3,H,W). quantise: whether to decode quantised latents, a bool or one for each
        image. v2 decodes unquantised latents, v1 codes, so train_a.py trains the decoder on both.
        Losses are not weighted: reconstruction (mean absolute error), codebook, commitment. The
        returned latents (B,h,w,4) are not quantised."""
        z = self.encode_raw(images)                                                   # (B, h, w, 4)
        q, indices, codebook_loss, commitment_loss = self.codebook(z)
        rows = torch.as_tensor(quantise, device=z.device).reshape(-1, 1, 1, 1)   # (1 or B, 1, 1, 1)
        reconstruction = self.decode_raw(torch.where(rows, q, z))                     # (B, 3, H, W)
        return dict(images=reconstruction, latents=z, indices=indices,
                    reconstruction=(reconstruction - images).abs().mean(),
                    codebook=codebook_loss, commitment=commitment_loss)
