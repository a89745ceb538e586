"""Computes losses of Stage A that need another network: a perceptual loss, and the losses of a discriminator.

  images, output -VGGFeatures-> 5 feature maps each -perceptual_loss-> scalar
  output -PatchDiscriminator-> logits -generator_loss x adaptive_weight-> scalar, added to the reconstruction loss
train_a.py combines the losses.
Papers: VQGAN: arXiv:2012.09841; LPIPS: arXiv:1801.03924.  Needs: torch; torchvision for VGGFeatures.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from loading.errors import UserError
from loading.files import read_tensors, reason_of


class VGGFeatures(nn.Module):
    """The first layers of VGG16 (arXiv:1409.1556). Computes five feature maps, one before each halving of the image."""
    LAYERS = (3, 8, 15, 22, 29)      # indices of the same layers as in LPIPS: relu1_2, 2_2, 3_3, 4_3, 5_3

    def __init__(self, weights: str):
        """weights: a file of torchvision's VGG16 weights, or "vgg16" to download it. Raises UserError if this fails."""
        super().__init__()
        try:
            from torchvision.models import vgg16
        except ImportError:
            raise UserError("--perceptual needs a package: pip install torchvision") from None
        try:
            tensors = read_vgg16(weights)
            with torch.device("meta"):               # the classifier, 90 % of VGG16's weights, is never allocated
                self.layers = vgg16().features[:self.LAYERS[-1] + 1]
            names = self.layers.state_dict().keys()
            self.layers.load_state_dict({name: tensors[name].float() for name in names}, assign=True)
        except Exception as error:                   # each library raises its own kinds of errors
            raise UserError(f"--perceptual {weights}: {reason_of(error)}; expected vgg16, or a file of torchvision's "
                            f"VGG16 weights (vgg16-397923af.pth); remove the option to train without it") from error
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))      # mean of ImageNet's pixels
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Returns features of images (B,3,H,W) in [0, 1]: [(B,64,H,W), (B,128,H/2,W/2), ... (B,512,H/16,W/16)]."""
        x, features = (images - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.LAYERS:
                features.append(x)
        return features


def read_vgg16(weights: str) -> dict[str, Tensor]:
    """Returns VGG16's convolutions, {name without "features.": tensor}. weights: a file, or "vgg16" to download it."""
    if weights == "vgg16":
        from torchvision.models import VGG16_Weights
        tensors = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True)
        return {name.removeprefix("features."): tensor for name, tensor in tensors.items()}
    return read_tensors(weights, "features.")


def perceptual_loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Returns the distance of two batches of images, a scalar. features, targets: their maps (B,C,h,w), one per layer.

    Each position's vector is scaled to length 1, so that large activations do not dominate. Squared distances are
    summed over channels, averaged over positions and images, and summed over layers. This is LPIPS (arXiv:1801.03924)
    with weight 1 for every channel instead of its learned weights.
    """
    def unit(x: Tensor) -> Tensor:
        return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
    return sum((unit(a.float()) - unit(b.float())).square().sum(1).mean()
               for a, b in zip(features, targets, strict=True))


class PatchDiscriminator(nn.Module):
    """Predicts for every patch of 18 x 18 pixels how real it looks. It is used only for training.

    A mean error is smallest for a blurred average of all plausible details; a discriminator rejects blur, because no
    real patch looks like it (PatchGAN, arXiv:1611.07004).
    """
    def __init__(self, c: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2),                  # (B, c, H/2, W/2)
            nn.Conv2d(c, 2 * c, 4, stride=2, padding=1), nn.LeakyReLU(0.2),              # (B, 2c, H/4, W/4)
            nn.Conv2d(2 * c, 4 * c, 3, padding=1), nn.LeakyReLU(0.2),                    # (B, 4c, H/4, W/4)
            nn.Conv2d(4 * c, 1, 1))                                                      # (B, 1, H/4, W/4)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B,1,H/4,W/4), one per patch, of images (B,3,H,W) in [0, 1]. Positive logits mean real."""
        return self.layers(images * 2 - 1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Returns the hinge loss, a scalar: it pushes logits of real patches above +1, of generated patches below -1.

    Source: Geometric GAN, arXiv:1705.02894. The VQGAN paper states the logarithmic loss; its code uses the hinge loss.
    """
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Returns the generator's loss, a scalar: minus the mean logit of generated patches, lower if they look real."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: Tensor,
                    mean=lambda gradient: gradient) -> Tensor:
    """Returns a factor that gives the generator loss the same gradient norm at last_layer as the reconstruction loss.

    So the generator loss cannot dominate, even if the discriminator becomes certain. reconstruction, generator: the two
    losses, scalars with a graph. last_layer: the weight of the layer that outputs the pixels. mean: a function that
    averages a gradient over processes, so that all use the same factor. Source: arXiv:2012.09841 and its code.
    """
    lengths = [mean(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm()
               for loss in (reconstruction, generator)]
    # In float16, a gradient may be infinite if the loss scale is too high. Then GradScaler skips the step anyway.
    return (lengths[0] / (lengths[1] + 1e-6)).nan_to_num(0.0).clamp(0, 1e4).detach()
