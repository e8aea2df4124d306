"""Image <-> latent.  (KL autoencoder to come above this.)"""
import numpy as np
import torch
import torch.nn as nn


# ---- 1. pixels, moments, latents ----

def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Float (B, 3, H, W) in [-1, 1], clamped -> uint8, rounded to the nearest."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def sample_latent(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """mean + std * noise: moments (B, 2C, h, w) are mean and log-variance, noise (B, C, h, w) is standard normal [LDM]."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise


# ---- 2. linear autoencoder ----

class LinearAutoencoder(nn.Module):
    """The shapes dataset's stand-in for the KL autoencoder: principal components of 4x4 RGB patches, in closed form.

    It has the same `encode` and `decode`; a latent (B, 16, H/4, W/4) holds each patch's 16 leading components.
    """
    PATCH, CHANNELS = 4, 16

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3 * self.PATCH ** 2))
        self.register_buffer("components", torch.zeros(self.CHANNELS, 3 * self.PATCH ** 2))    # orthonormal rows

    def fit(self, x: torch.Tensor):
        """Principal components of the patches of x (M, 3, H, W) in [-1, 1]."""
        patches = self.cut(x).reshape(-1, len(self.mean)).double()
        self.mean.copy_(patches.mean(0))
        _, vectors = torch.linalg.eigh((patches - patches.mean(0)).T.cov())                     # ascending
        components = vectors.T.flip(0)[:self.CHANNELS]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.components.copy_(components * largest.sign())          # an eigenvector's sign is arbitrary: fix it
        return self

    def cut(self, x):
        """(B, 3, H, W) -> patches (B, H/4, W/4, 48)."""
        P = self.PATCH
        return x.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 1, 4, 5).flatten(3)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> moments (B, 32, H/4, W/4), whose log-variance is the smallest: nothing to sample."""
        mean = ((self.cut(x) - self.mean) @ self.components.T).permute(0, 3, 1, 2)
        return torch.cat([mean, torch.full_like(mean, -30)], dim=1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(B, 16, h, w) -> (B, 3, 4h, 4w), about [-1, 1]."""
        patches = z.permute(0, 2, 3, 1) @ self.components + self.mean                           # (B, h, w, 48)
        x = patches.unflatten(3, (3, self.PATCH, self.PATCH)).permute(0, 3, 1, 4, 2, 5)         # (B, 3, h, P, w, P)
        return x.flatten(2, 3).flatten(3, 4)
