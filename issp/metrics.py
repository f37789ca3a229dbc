"""Public names of `issp.sr.metrics`: PSNR, SSIM and luma."""

from issp.sr.metrics import psnr, rgb_to_y, ssim

__all__ = ["psnr", "rgb_to_y", "ssim"]
