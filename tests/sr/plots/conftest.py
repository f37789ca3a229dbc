"""Folders of runs with the logs that pictures read, made without a training."""

import pytest

from issp.sr import logging
from issp.sr.plots import drawing

GRADIENTS = ("iteration", "stage", "layer", "norm", "variance", "mean", "std")
MASKS = ("iteration", "layer", "flips", "swaps", "threshold", "zeros")
EDSR = "{type: EDSR, num_feat: 8, num_block: 2}"
SWINIR = (
    "{type: SwinIR, img_size: 8, window_size: 4, depths: [1, 1], embed_dim: 8, num_heads: [2, 2], "
    "upsampler: pixelshuffledirect}"
)


def make_run(folder, network=EDSR, freeze=20, sparsity="ratio: 0.5, "):
    """A run of 40 iterations; without logs."""
    section = f"sparsity: {{{sparsity}freeze_iter: {freeze}}}\n" if freeze else ""
    (folder / "log").mkdir(parents=True)
    (folder / "config.yml").write_text(
        f"name: run\nscale: 2\nnetwork_g: {network}\ntrain: {{total_iter: 40}}\n"
        f"datasets: {{train: {{type: SamplePhotographs}}}}\n{section}"
    )
    return folder


def write_log(path, columns, rows):
    """A log of these rows: tuples in the order of the columns."""
    logging.CsvLog(path, columns).add(*(dict(zip(columns, row, strict=True)) for row in rows))
    return path


def gradients(layers, iterations, value=lambda layer, i: 1.0):
    """Rows of gradients.csv; the variance is the square of the norm."""
    for i in iterations:
        for layer in layers:
            norm = value(layer, i)
            yield i, "pruning" if i <= 20 else "fine-tuning", layer, norm, norm**2, norm, norm


def masks(layers, iterations, flips):
    """Rows of masks.csv."""
    for i in iterations:
        for layer in layers:
            count = flips(layer, i)
            yield i, layer, count, count / 2, 0.1, 0


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written, laid out."""
    figures = []

    def keep(figure, path):
        figure.canvas.draw()
        figures.append(figure)

    monkeypatch.setattr(drawing, "write", keep)
    return figures
