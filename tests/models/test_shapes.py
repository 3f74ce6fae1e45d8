"""The synthetic data set, read with pycocotools."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models.data.coco import PIXEL_CENTRE
from models.data.synthetic import shapes
from models.data.synthetic.scenes import MIN_PIXELS
from models.data.synthetic.shapes import CATEGORY_IDS, SETTINGS, ShapesConfig, ensure, generate, scene

pytestmark = pytest.mark.reference_only

KEYPOINTS = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = ShapesConfig(tmp_path_factory.mktemp("data") / "shapes", train=1, val=60)
    generate(config)
    return config


@pytest.fixture(scope="module")
def coco(config):
    return {
        task: COCO(config.output / f"annotations/{task}_val2017.json") for task in ("instances", "person_keypoints")
    }


@pytest.fixture(scope="module")
def drawn(config):
    return [scene(config, "val2017", index) for index in range(30)]


@pytest.fixture
def small(tmp_path):
    return ShapesConfig(tmp_path / "shapes", train=2, val=1, sides=(64, 96), objects=(1, 2))


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edge(mask):
    """Pixels whose 3 x 3 neighbours are not all the same."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1, mode="edge"), (3, 3))
    return windows.any((2, 3)) & ~windows.all((2, 3))


def test_layout_is_that_of_coco(config, coco):
    names = [f"{task}_{split}.json" for task in coco for split in ("train2017", "val2017")]
    assert sorted(path.name for path in (config.output / "annotations").iterdir()) == sorted(names)
    assert len(list((config.output / "train2017").iterdir())) == config.train
    for data in coco.values():
        assert len(data.imgs) == config.val
    shapes_seen = set()
    for image in coco["instances"].imgs.values():
        with Image.open(config.output / "val2017" / image["file_name"]) as file:
            assert (file.size, file.mode, file.format) == ((image["width"], image["height"]), "RGB", "JPEG")
        shapes_seen.add(np.sign(image["width"] - image["height"]))
    assert shapes_seen >= {-1, 1}


def test_categories(coco):
    instances, people = (coco[task].dataset["categories"] for task in ("instances", "person_keypoints"))
    assert {category["name"]: category["id"] for category in instances} == CATEGORY_IDS
    assert sorted(CATEGORY_IDS.values()) != list(range(1, len(CATEGORY_IDS) + 1))
    assert [category["name"] for category in people] == ["person"]
    assert people[0]["keypoints"] == KEYPOINTS.split()
    joints = np.array(people[0]["skeleton"])
    assert joints.shape == (19, 2)
    assert set(joints.ravel()) == set(range(1, 18))


def test_area_and_bbox_are_those_of_the_mask(coco):
    data = coco["instances"]
    for entry in data.anns.values():
        image, mask = data.imgs[entry["image_id"]], data.annToMask(entry)
        assert mask.shape == (image["height"], image["width"])
        assert mask.sum() == entry["area"] >= MIN_PIXELS
        x, y, width, height = entry["bbox"]
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert (x, y, x + width, y + height) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_every_kind_of_object_and_segmentation_occurs(coco):
    entries = coco["instances"].dataset["annotations"]
    single = [entry for entry in entries if not entry["iscrowd"]]
    assert {entry["category_id"] for entry in single} == set(CATEGORY_IDS.values())
    codes = [entry["segmentation"] for entry in single if isinstance(entry["segmentation"], dict)]
    assert 0.2 < len(codes) / len(single) < 0.8
    assert all(isinstance(code["counts"], str) for code in codes)
    assert all(
        isinstance(entry["segmentation"]["counts"], str)
        for entry in single
        if entry["area"] and not isinstance(entry["segmentation"], list)
    )
    crowds = [entry for entry in entries if entry["iscrowd"]]
    assert len(crowds) >= 3
    assert all(isinstance(entry["segmentation"]["counts"], list) for entry in crowds)
    areas = np.array([entry["area"] for entry in single])
    small, large = np.mean(areas < 32**2), np.mean(areas >= 96**2)
    assert 0.1 < small < 0.35
    assert 0.01 < large < 0.2


def test_segmentations_are_those_of_the_scene(coco, drawn):
    """RLE is exact; polygons may differ at edges, but on average have the same area and the same centre."""
    data, ratios, offsets = coco["instances"], [], []
    for image, (_, instances) in enumerate(drawn, 1):
        for entry, instance in zip(data.loadAnns(data.getAnnIds(image)), instances, strict=True):
            mask = data.annToMask(entry).astype(bool)
            wrong = mask != instance.mask
            if isinstance(entry["segmentation"], list):
                wrong &= ~(edge(mask) | edge(instance.mask))
                ratios.append(mask.sum() / instance.mask.sum())
                offsets.append(np.argwhere(mask).mean(0) - np.argwhere(instance.mask).mean(0))
            assert not wrong.any()
    assert np.mean(ratios) == pytest.approx(1, abs=0.004)
    assert np.mean(offsets, axis=0) == pytest.approx(0, abs=0.06)


def test_masks_of_overlapping_objects_are_disjoint(drawn):
    hidden = 0
    for _, instances in drawn:
        masks = np.array([instance.mask for instance in instances])
        assert masks.sum(0).max() == 1
        hidden += sum(not instance.outline for instance in instances if instance.category != "ring")
    assert hidden > len(drawn)


def test_objects_of_the_same_category_overlap(coco):
    overlaps = 0
    for image in coco["instances"].imgs:
        entries = coco["instances"].loadAnns(coco["instances"].getAnnIds(image, iscrowd=False))
        for i, one in enumerate(entries):
            for other in entries[:i]:
                (x, y, w, h), (u, v, r, s) = one["bbox"], other["bbox"]
                apart = x + w <= u or u + r <= x or y + h <= v or v + s <= y
                overlaps += one["category_id"] == other["category_id"] and not apart
    assert overlaps > len(coco["instances"].imgs) / 4


def test_outlines_stand_out():
    """Pixels inside and outside the edge of an object have different colours."""
    config = ShapesConfig(Path(), objects=(1, 1))
    contrasts = []
    for index in range(20):
        drawing, (*_, instance) = scene(config, "train2017", index)
        pixels, mask = np.asarray(drawing, np.float64), instance.mask
        edge = mask[:, :-4] & ~mask[:, 4:]
        contrasts.append(np.median(np.linalg.norm(pixels[:, :-4] - pixels[:, 4:], axis=-1)[edge]))
    assert min(contrasts) > 60


def test_keypoints(coco, drawn):
    data = coco["person_keypoints"]
    beneath_others = behind_itself = outside = 0
    for image_id, (drawing, instances) in enumerate(drawn, 1):
        entries = data.loadAnns(data.getAnnIds(image_id))
        people = [instance for instance in instances if instance.category == "person"]
        for entry, person in zip(entries, people, strict=True):
            keypoints = np.array(entry["keypoints"]).reshape(17, 3)
            assert entry["num_keypoints"] == np.count_nonzero(keypoints[:, 2])
            if entry["iscrowd"]:
                assert not keypoints.any()
                continue
            x, y, visibility = (keypoints[keypoints[:, 2] > 0] + (PIXEL_CENTRE, PIXEL_CENTRE, 0)).T
            assert ((x < drawing.width) & (y < drawing.height)).all()
            on_mask = person.mask[y.astype(int), x.astype(int)]
            assert on_mask[visibility == 2].all()
            beneath_others += np.sum(~on_mask[visibility == 1])
            behind_itself += np.sum(on_mask[visibility == 1])
            assert not keypoints[keypoints[:, 2] == 0].any()
            outside += np.sum(keypoints[:, 2] == 0)
    assert min(beneath_others, behind_itself, outside) >= 4


def test_people_face_the_viewer(coco):
    for entry in coco["person_keypoints"].anns.values():
        keypoints = np.array(entry["keypoints"]).reshape(17, 3)
        if keypoints[5:7, 2].all():
            assert keypoints[5, 0] > keypoints[6, 0]


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_the_ground_truth_as_detections_has_an_ap_of_one(coco, kind):
    truth = coco["person_keypoints" if kind == "keypoints" else "instances"]
    field = {"segm": "segmentation"}.get(kind, kind)
    results = []
    for entry in truth.dataset["annotations"]:
        if not entry["iscrowd"]:
            value = truth.annToRLE(entry) if kind == "segm" else entry[field]
            results.append({key: entry[key] for key in ("image_id", "category_id")} | {field: value, "score": 1.0})
    evaluation = COCOeval(truth, truth.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    # AP, AP50, AP75, then by size. Keypoints of people smaller than 32 x 32 pixels are not scored.
    assert evaluation.stats[: 5 if kind == "keypoints" else 6] == pytest.approx(1)


def test_same_seed_same_bytes(small, tmp_path):
    generate(small)
    again = replace(small, output=tmp_path / "again")
    generate(again)
    assert files(small.output) == files(again.output)


def test_an_image_depends_on_seed_split_and_index_alone(small):
    first, _ = scene(small, "train2017", 0)
    assert first == scene(replace(small, train=9, val=9), "train2017", 0)[0]
    others = [scene(small, "train2017", 1), scene(small, "val2017", 0), scene(replace(small, seed=1), "train2017", 0)]
    assert all(first != other for other, _ in others)


def test_ensure_generates_what_is_missing_or_different(small, monkeypatch):
    ensure(small)
    before = {path: path.stat().st_mtime_ns for path in small.output.rglob("*")}
    ensure(small)
    assert before == {path: path.stat().st_mtime_ns for path in small.output.rglob("*")}

    ensure(replace(small, val=2))
    assert len(list((small.output / "val2017").iterdir())) == 2
    assert [path.name for path in small.output.parent.iterdir()] == ["shapes"]

    monkeypatch.setattr(shapes, "SOURCES", ("scenes.py",))  # another version of the code
    ensure(replace(small, val=2))
    assert before.keys() < set(small.output.rglob("*"))
    assert "scenes" not in (small.output / SETTINGS).read_text()


def test_an_interruption_keeps_the_earlier_data_set(small, monkeypatch):
    generate(small)
    before = files(small.output)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "annotation", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(replace(small, seed=1))
    assert files(small.output) == before
    assert [path.name for path in small.output.parent.iterdir()] == ["shapes"]


def test_a_folder_with_other_files_is_not_replaced(small):
    small.output.mkdir()
    (small.output / "thesis.tex").write_text("draft")
    with pytest.raises(ValueError, match=r"output: expected a new folder .* got .*shapes"):
        generate(small)
    assert (small.output / "thesis.tex").read_text() == "draft"


@pytest.mark.parametrize("wrong", [{"sides": (320, 240)}, {"sides": (0, 9)}, {"objects": (0, 3)}])
def test_wrong_ranges_are_named(wrong, small):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected 0 < least <= most, got"):
        replace(small, **wrong)


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "models.data.synthetic.shapes",
        "--output",
        str(tmp_path / "new" / "shapes"),
        "--seed",
        "5",
    ]
    subprocess.run([*command, "--train", "1", "--val", "1", "--sides", "80", "90"], check=True, capture_output=True)
    settings = json.loads((tmp_path / "new" / "shapes" / SETTINGS).read_text())
    assert (settings["seed"], settings["sides"]) == (5, [80, 90])
