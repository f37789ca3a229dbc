"""Figures 3 to 12: which pixels are shown, and which scores stand below them."""

import math

import numpy as np
import pytest

from issp import data, metrics
from issp.sr.plots import crops

matplotlib = pytest.importorskip("matplotlib", reason="plots are matplotlib's")
BOX = (20, 8, 44, 24)


@pytest.fixture
def images():
    """An original and two results: [60, 80, 3] uint8."""
    generator = np.random.default_rng(0)
    hr = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    blurred = data.imresize(data.imresize(hr, 1 / 2), 2)
    return hr, {"bicubic": blurred, "exact": hr}


def test_the_box_of_original_and_results_with_both_scores(images, drawn):
    hr, results = images
    found = [crops.score_crop(name, sr, hr, BOX, 2) for name, sr in results.items()]
    window = np.s_[8:24, 20:44]
    blurred = results["bicubic"]
    assert found[0].box_psnr == metrics.psnr(blurred[window], hr[window], 0)
    assert found[0].psnr == metrics.psnr(blurred, hr, 2) != found[0].box_psnr
    assert found[1].psnr == found[1].box_psnr == math.inf
    rgb = crops.score_crop("a", blurred, hr, BOX, 2, y_channel=False)
    assert rgb.psnr == metrics.psnr(blurred, hr, 2, y_channel=False) != found[0].psnr

    crops.draw_crops("img_1", hr, BOX, found, "x.png", "x2; PSNR on Y")
    whole, *panels = drawn[0].axes
    assert np.array_equal(whole.images[0].get_array(), hr) and whole.get_title() == "img_1"
    assert {(p.get_xy(), p.get_width(), p.get_height()) for p in whole.patches} == {
        ((19.5, 7.5), 24, 16)
    }
    titles = [axis.get_title() for axis in panels]
    assert titles == ["original (HR)", "bicubic", "exact"]
    for axis, image in zip(panels, (hr, blurred, hr), strict=True):
        assert np.array_equal(axis.images[0].get_array(), image[window])
    assert panels[1].get_xlabel() == f"{found[0].box_psnr:.2f} / {found[0].psnr:.2f} dB"
    assert panels[2].get_xlabel() == "inf / inf dB"
    assert drawn[0].get_supxlabel() == "x2; PSNR on Y"


@pytest.mark.full
@pytest.mark.parametrize("count", [0, 1, 4, 13])
@pytest.mark.parametrize("box", [(0, 0, 80, 8), (0, 0, 8, 60), BOX], ids=["wide", "high", "mixed"])
def test_no_text_covers_another_panel(images, drawn, count, box):
    hr, results = images
    names = ["a model of a name of forty characters ..."[:40] + str(i % 10) for i in range(count)]
    found = [crops.score_crop(name, results["bicubic"], hr, box, 2) for name in names]
    crops.draw_crops("the image", hr, box, found, "x.png", "note")
    (figure,) = drawn
    renderer = figure.canvas.get_renderer()
    frames = [axis.get_window_extent(renderer) for axis in figure.axes]
    assert len(frames) == 2 + count
    texts = [text for axis in figure.axes for text in (axis.title, axis.xaxis.label)]
    extents = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    for extent in extents:
        assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= extent.y0 and extent.y1 <= figure.bbox.y1
        assert not any(extent.overlaps(frame.padded(-1)) for frame in frames)
    for i, extent in enumerate(extents):
        assert not any(extent.overlaps(other) for other in extents[i + 1 :])


@pytest.mark.parametrize(
    "box, said",
    [
        ((0, 0, 81, 10), "the box 0,0,81,10 does not lie in a, which is 80 x 60 pixels"),
        ((-1, 0, 20, 20), "does not lie"),
        ((20, 20, 20, 40), "does not lie"),
        ((40, 20, 20, 40), "does not lie"),
        ((0, 50, 20, 61), "does not lie"),
        ((0, 0, 7, 60), "is smaller than 8 x 8 pixels"),
    ],
)
def test_boxes_outside_of_the_image(images, box, said):
    with pytest.raises(ValueError, match=said):
        crops.check_box(box, images[0], "a")
    crops.check_box((0, 0, 80, 60), images[0], "a")


def test_boxes_as_text():
    assert crops.parse_box("387,204, 503,264") == (387, 204, 503, 264)
    for text in ("1,2,3", "1,2,3,4,5", "a,b,c,d", "1.5,2,3,4", ""):
        with pytest.raises(ValueError, match="must be four whole numbers: x1,y1,x2,y2"):
            crops.parse_box(text)


def test_the_papers_boxes():
    """docs/method.md, section 7, in width and height."""
    sizes = {name: (box[2] - box[0], box[3] - box[1]) for name, box in crops.PAPER_BOXES.items()}
    assert sizes == {
        "img_072": (116, 60), "img_055": (241, 121), "img_061": (160, 80), "img_012": (93, 143),
        "img_012b": (110, 55), "img_032": (140, 68), "img_044": (140, 68), "img_010": (144, 73),
        "img_023": (164, 82),
    }  # fmt: skip


def test_the_image_of_a_figure():
    for form in ("{}", "{}_SRF_4", "{}_SRF_4_HR"):
        names = [form.format(name) for name in ("img_001", "img_0122", "img_012", "img_072")]
        assert crops.paper_image("img_072", names) == 3
        assert crops.paper_image("img_012b", names) == 2
    with pytest.raises(ValueError, match="img_055 needs one image img_055 of Urban100; .* none"):
        crops.paper_image("img_055", ["img_072"])
    with pytest.raises(ValueError, match="img_012_a and img_012_b"):
        crops.paper_image("img_012", ["img_012_a", "img_012_b"])
