"""Images in and out: MATLAB's bicubic, files, pairs, training batches and sample photographs."""

from issp.sr.data.cache import LRCache
from issp.sr.data.datasets import EvalDataset, ImageFolder, TrainDataset
from issp.sr.data.images import (
    Picture,
    image_size,
    list_images,
    luma,
    mod_crop,
    read_image,
    read_picture,
    to_image,
    to_tensor,
    write_image,
)
from issp.sr.data.layouts import same_files
from issp.sr.data.loader import TrainLoader
from issp.sr.data.pairs import PairedArrays, PairedFolder
from issp.sr.data.prepare import PrepareResult, prepare
from issp.sr.data.resize import imresize
from issp.sr.data.sampler import Draw, EnlargedSampler
from issp.sr.data.samples import sample_photographs
from issp.utils.files import cache_folder as default_cache_dir

__all__ = ["EvalDataset", "ImageFolder", "PairedArrays", "PairedFolder", "TrainDataset"]
__all__ += ["Draw", "EnlargedSampler", "LRCache", "PrepareResult", "TrainLoader", "prepare"]
__all__ += ["image_size", "imresize", "list_images", "mod_crop", "read_image", "write_image"]
__all__ += ["Picture", "luma", "read_picture", "same_files"]
__all__ += ["default_cache_dir", "sample_photographs", "to_image", "to_tensor"]
