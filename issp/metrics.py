"""Public name of `issp.sr.metrics`."""

from issp.sr.metrics import psnr, rgb_to_y, ssim

__all__ = ["psnr", "rgb_to_y", "ssim"]
