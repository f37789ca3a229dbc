"""Images in and out: MATLAB's bicubic, files, pairs, training batches and sample photographs."""

from .cache import LRCache, default_cache_dir
from .datasets import EvalDataset, ImageFolder, TrainDataset
from .images import image_size, list_images, mod_crop, read_image, to_image, to_tensor, write_image
from .loader import TrainLoader
from .pairs import PairedArrays, PairedFolder
from .prepare import PrepareResult, prepare
from .resize import imresize
from .sampler import Draw, EnlargedSampler
from .samples import sample_photographs

__all__ = [
    "Draw",
    "EnlargedSampler",
    "EvalDataset",
    "ImageFolder",
    "LRCache",
    "PairedArrays",
    "PairedFolder",
    "PrepareResult",
    "TrainDataset",
    "TrainLoader",
    "default_cache_dir",
    "image_size",
    "imresize",
    "list_images",
    "mod_crop",
    "prepare",
    "read_image",
    "sample_photographs",
    "to_image",
    "to_tensor",
    "write_image",
]
