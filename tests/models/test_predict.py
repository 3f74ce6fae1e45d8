"""The files that `predict` writes for images of all kinds, and how detections are drawn."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from models import predict as command
from models.config import KeypointHeadConfig, ModelConfig
from models.data.problems import DataError
from models.marks import mark
from models.predict import PredictConfig, find_images, main, predict
from models.structures import Category, Detections
from models.visualize import draw

pytestmark = pytest.mark.reference_only

CATEGORIES = (Category(4, "cup"), Category(9, "person", ("head", "left_foot", "right_foot"), ((0, 1), (0, 2))))

# The light rectangle in every image of 40 x 24 pixels: x1, y1, x2, y2.
LIGHT = (6, 4, 30, 12)


class Detector:
    """Detects the light rectangle as a person, and with a low score the whole image as a cup."""

    config = ModelConfig(classes=2, keypoint=KeypointHeadConfig(keypoints=3))

    def detect(self, images):
        return [self.find(image) for image in images]

    def find(self, image):
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        height, width = image.shape[1:]
        y, x = (image.float().mean(0) > 128).nonzero(as_tuple=True)
        box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        boxes = torch.tensor([box, [0, 0, width, height]], dtype=torch.float32)
        points = torch.stack([boxes[:, [0, 1]], boxes[:, [0, 3]], boxes[:, [2, 3]]], 1)
        return Detections(
            boxes=boxes,
            scores=torch.tensor([0.9, 0.2]),
            labels=torch.tensor([2, 1]),
            image_size=(height, width),
            mask_probabilities=torch.ones(2, 28, 28),
            keypoints=torch.cat([points, torch.ones(2, 3, 1)], 2),
        )


def pixels():
    values = np.full((24, 40, 3), (10, 20, 60), np.uint8)
    values[LIGHT[1] : LIGHT[3], LIGHT[0] : LIGHT[2]] = (250, 240, 230)
    return Image.fromarray(values)


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["rgb.jpg", "RGB.JPEG", "rgb.png", "gray.png", "gray.jpg", "alpha.png"])
def test_writes_beside_each_image(tmp_path, name):
    image = pixels()
    if "gray" in name:
        image = image.convert("L")
    if "alpha" in name:
        image.putalpha(255)
    path = tmp_path / name
    image.save(path, quality=95)
    assert predict(Detector(), CATEGORIES, [path]) == []
    drawn = ".detections.png" if name.endswith(".png") else ".detections.jpg"
    assert {file.name for file in tmp_path.iterdir()} == {name, path.stem + drawn, path.stem + ".detections.json"}

    written = read(tmp_path / (path.stem + ".detections.json"))
    assert (written["image"], written["width"], written["height"]) == (name, 40, 24)
    (detection,) = written["detections"]
    assert (detection["category"], detection["category_id"]) == ("person", 9)
    assert detection["score"] == pytest.approx(0.9)
    assert detection["bbox"] == [6, 4, 24, 8]
    assert detection["keypoints"] == [5.5, 3.5, 1, 5.5, 11.5, 1, 29.5, 11.5, 1]  # COCO's pixel indices
    mask = coco_mask.decode(detection["segmentation"])
    assert mask.shape == (24, 40)
    assert mask.sum() == 24 * 8 == mask[4:12, 6:30].sum()

    with Image.open(tmp_path / (path.stem + drawn)) as drawing:
        assert drawing.mode == "RGB"
        assert drawing.width / drawing.height == 40 / 24


def test_coordinates_are_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise
    pixels().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    predict(Detector(), CATEGORIES, [tmp_path / "turned.jpg"])
    written = read(tmp_path / "turned.detections.json")
    assert (written["width"], written["height"]) == (24, 40)
    assert written["detections"][0]["bbox"] == [24 - 12, 6, 8, 24]
    assert written["detections"][0]["segmentation"]["size"] == [40, 24]
    with Image.open(tmp_path / "turned.detections.jpg") as image:
        assert image.width / image.height == 24 / 40
        assert image.getexif().get(0x0112, 1) == 1


def test_score_threshold(tmp_path):
    pixels().save(tmp_path / "a.png")
    for threshold, names in ((0.1, ["person", "cup"]), (0.5, ["person"]), (0.95, [])):
        predict(Detector(), CATEGORIES, [tmp_path / "a.png"], score_threshold=threshold)
        assert [detection["category"] for detection in read(tmp_path / "a.detections.json")["detections"]] == names


def test_folder_twice(tmp_path):
    """The second run ignores the files that the first one wrote; both ignore other files and subfolders."""
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    pixels().save(folder / "b.jpg")
    pixels().save(folder / "a.PNG")
    pixels().save(folder / "inner" / "c.png")
    (folder / "notes.txt").write_text("not an image")
    assert find_images([folder]) == [folder / "a.PNG", folder / "b.jpg"]
    predict(Detector(), CATEGORIES, find_images([folder]))
    files = {path.name for path in folder.iterdir()}
    assert files >= {"a.detections.png", "a.detections.json", "b.detections.jpg", "b.detections.json"}
    assert find_images([folder]) == [folder / "a.PNG", folder / "b.jpg"]
    assert find_images([*folder.glob("*.jpg"), folder / "b.jpg"]) == [folder / "b.jpg"]
    predict(Detector(), CATEGORIES, find_images([folder]))
    assert {path.name for path in folder.iterdir()} == files


def test_output_folder(tmp_path):
    pixels().save(tmp_path / "a.png")
    output = tmp_path / "new" / "folder"
    predict(Detector(), CATEGORIES, [tmp_path / "a.png"], output)
    assert {path.name for path in output.iterdir()} == {"a.detections.png", "a.detections.json"}


def test_two_images_with_one_output_file_raise(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "a.jpg"]
    with pytest.raises(ValueError, match=r"^images: expected one for .*a\.detections, got .*a\.png and .*a\.jpg"):
        predict(Detector(), CATEGORIES, paths)


def test_unreadable_images(tmp_path):
    pixels().save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:200])
    paths = [tmp_path / "cut.jpg", tmp_path / "absent.png", tmp_path / "good.jpg"]
    with pytest.raises(DataError, match=r"cut\.jpg"):
        predict(Detector(), CATEGORIES, paths)
    errors = predict(Detector(), CATEGORIES, paths, on_error="skip")
    assert ["cut.jpg" in str(error) for error in errors] == [True, False]
    assert "absent.png" in str(errors[1])
    assert (tmp_path / "good.detections.json").exists()


def test_command(tmp_path, monkeypatch):
    checkpoint = tmp_path / "model.pth"
    monkeypatch.setattr(command, "load_model", {checkpoint: (Detector(), CATEGORIES)}.get)
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(SystemExit, match=r"^images: expected images .*, got none in .*images'\]$"):
        main(PredictConfig((folder,), checkpoint))
    pixels().save(folder / "good.png")
    main(PredictConfig((folder,), checkpoint))
    assert (folder / "good.detections.png").exists()

    shutil.copy(__file__, folder / "bad.png")
    with pytest.raises(SystemExit, match=r"^error: .*bad\.png"):
        main(PredictConfig((folder,), checkpoint))
    with pytest.raises(SystemExit, match=r"^1 of 2 images left out:\n.*bad\.png"):
        main(PredictConfig((folder,), checkpoint, on_error="skip"))


def test_benchmark(tmp_path, monkeypatch, capsys):
    """A slow stage is in the times, nothing is written, and bad arguments are named."""

    class Slow(Detector):
        calls = 0

        def detect(self, images):
            self.calls += 1
            with mark("backbone"):
                time.sleep(0.1)
            return super().detect(images)

    model, path, checkpoint = Slow(), tmp_path / "photo.png", tmp_path / "model.pth"
    pixels().save(path)
    monkeypatch.setattr(command, "load_model", {checkpoint: (model, CATEGORIES)}.get)
    clock = iter([0, 0.1, 1, 1.2, 2, 2.15])  # before and after each timed call
    monkeypatch.setattr(command, "time", SimpleNamespace(perf_counter=clock.__next__))
    main(PredictConfig((path,), checkpoint, benchmark=3))
    assert next(clock, None) is None
    assert model.calls == command.UNTIMED_CALLS + 3 + 1  # the last one by stages
    assert [file.name for file in tmp_path.iterdir()] == ["photo.png"]
    first, times, paper, *stages = capsys.readouterr().out.splitlines()
    assert first == f"{path}: 24 x 40 pixels on cpu, 2 detections"
    assert times == "  150.0 ms, from 100.0 to 200.0; 6.67 images/s"
    assert paper == "  the paper's 195 + 15 ms are 1.40 times as long"
    by_stage = {line.split()[0]: float(line.split()[1]) for line in stages}
    assert by_stage["backbone"] >= 100 > by_stage["other"]

    with pytest.raises(SystemExit, match=r"^benchmark: expected 0 or more calls, got -1$"):
        main(PredictConfig((path,), checkpoint, benchmark=-1))
    with pytest.raises(ValueError, match=r"^calls: expected at least 1, got 0$"):
        command.benchmark(model, path, 0)


def test_no_detections_leave_the_image_unchanged():
    image = torch.randint(256, (3, 500, 520), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), (500, 520))
    assert torch.equal(draw(image, empty, CATEGORIES), image)


def test_drawing_stays_near_the_detection():
    """Only the mask, the box and the label are drawn, and the given image is not modified."""
    image = torch.full((3, 600, 800), 100, dtype=torch.uint8)
    detections = Detections(
        boxes=torch.tensor([[200.0, 200, 400, 300]]),
        scores=torch.tensor([0.5]),
        labels=torch.tensor([1]),
        image_size=(600, 800),
        mask_probabilities=torch.ones(1, 28, 28),
    )
    drawn = draw(image, detections, CATEGORIES)
    assert (image == 100).all()
    changed = (drawn != 100).any(0)
    assert changed[200:300, 200:400].all()
    inside = drawn[:, 220:280, 220:380].flatten(1)
    assert (inside == inside[:, :1]).all()  # one tint
    y, x = changed.nonzero(as_tuple=True)
    assert (x.min(), x.max() + 1, y.max() + 1) == (200, 400, 300)
    assert 160 < y.min() < 200  # the label's plate


def test_mask_is_tinted_and_has_a_contour():
    """A mask of the left half of its box, whose upper edge is outside the image."""
    masks = torch.ones(1, 28, 28)
    masks[..., 14:] = 0
    detections = Detections(
        boxes=torch.tensor([[200.0, -50, 400, 300]]),
        scores=torch.tensor([0.5]),
        labels=torch.tensor([1]),
        image_size=(600, 800),
        mask_probabilities=masks,
    )
    drawn = draw(torch.full((3, 600, 800), 100, dtype=torch.uint8), detections, CATEGORIES)
    colour = drawn[:, 299, 350]  # the box's
    edge = int(detections.masks()[0, 250].nonzero().max())  # last column of the mask
    assert abs(edge - 300) <= 4
    assert torch.equal(drawn[:, 250, edge], colour)
    assert torch.equal(drawn[:, 250, edge - 8], (0.55 * 100 + 0.45 * colour).to(torch.uint8))
    assert (drawn[:, 250, edge + 1] == 100).all()
    tint = drawn[:, 3, 280]  # at the image's border, which is no contour
    assert torch.equal(tint, drawn[:, 250, edge - 8])


@pytest.mark.parametrize(("size", "zoom"), [((480, 480), 1), ((192, 256), 3), ((3, 2), 196), ((240, 960), 1)])
def test_small_images_are_enlarged(size, zoom):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    detections = Detector().find(image.clone().fill_(255))
    assert draw(image, detections, CATEGORIES).shape == (3, zoom * size[0], zoom * size[1])


def test_draw_checks_its_arguments():
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), (5, 6))
    with pytest.raises(ValueError, match=r"^image: expected uint8 \[3, H, W\], got torch.float32 \[3, 5, 6\]"):
        draw(torch.zeros(3, 5, 6), empty, CATEGORIES)
    with pytest.raises(ValueError, match=r"^detections: expected image_size \(6, 5\), got \(5, 6\)"):
        draw(torch.zeros(3, 6, 5, dtype=torch.uint8), empty, CATEGORIES)
