"""VGG16's view of an image, for a loss that compares images as a classifier sees them.

Needs: torch; torchvision.
"""
import torch
from torch import Tensor, nn

from loading.errors import UserError


class VGGFeatures(nn.Module):
    """The activations of VGG16 (arXiv:1409.1556) before each halving of the image: five feature maps."""
    LAYERS = (3, 8, 15, 22, 29)      # relu1_2, 2_2, 3_3, 4_3, 5_3, as in LPIPS

    def __init__(self, weights: str):
        """weights: a file of torchvision's VGG16 weights, or "vgg16", which downloads it. Raises UserError."""
        super().__init__()
        try:
            from torchvision.models import vgg16
        except ImportError:
            raise UserError("--perceptual needs a package: pip install torchvision") from None
        try:
            tensors = read_vgg16(weights)
            with torch.device("meta"):               # the classifier, 90 % of its weights, is never allocated
                self.layers = vgg16().features[:self.LAYERS[-1] + 1]
            names = self.layers.state_dict().keys()
            self.layers.load_state_dict({name: tensors[f"features.{name}"].float() for name in names}, assign=True)
        except Exception as error:                   # each library raises its own kinds
            reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
            raise UserError(f"--perceptual {weights}: {reason}; expected vgg16, or a file of torchvision's VGG16 "
                            f"weights (vgg16-397923af.pth); remove the option to train without it") from error
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))      # ImageNet's
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B,3,H,W) in [0, 1] -> [(B,64,H,W), (B,128,H/2,W/2), ... (B,512,H/16,W/16)]."""
        x, features = (images - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.LAYERS:
                features.append(x)
        return features


def read_vgg16(weights: str) -> dict[str, Tensor]:
    """torchvision's tensors of VGG16, see VGGFeatures."""
    if weights == "vgg16":
        from torchvision.models import VGG16_Weights
        return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True)
    if weights.endswith(".safetensors"):
        from safetensors.torch import load_file
        return load_file(weights)
    return torch.load(weights, map_location="cpu", weights_only=True)
