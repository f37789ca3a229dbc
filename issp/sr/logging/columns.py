"""The columns of train.csv."""

COLUMNS = (
    "iteration",
    "stage",  # pruning | fine-tuning | dense
    "lr",
    "loss",  # mean since the previous row
    "psnr",  # first validation set, at iterations that validated; of the model as it is
    "psnr_masked",  # while pruning: of the model with the mask of the moment applied
    "flips",  # mask bits that this iteration's selection changed
    "threshold",  # mean over layers
    "selected",  # share of prunable weights the masks mark
    "zeros",  # share of prunable weights that are exactly 0
    "seconds",  # per iteration, validation and saving excluded
    "update_share",  # share of `seconds` spent in the optimizer's step, pruning included
)
