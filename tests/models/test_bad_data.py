"""Every kind of bad data is named in an error, or counted and left out."""

import pytest
from PIL import Image

from models.data.coco import CocoDataset
from models.data.problems import DataError, Problems
from tests.oracles.coco_files import HEIGHT, REGION, SQUARE, WIDTH, content, open_changed, person, rle, write

pytestmark = pytest.mark.reference_only


@pytest.fixture
def root(tmp_path):
    write(tmp_path, content())
    return tmp_path


def polygons(*values):
    return person(segmentation=list(values))


def counts(value, size=(HEIGHT, WIDTH)):
    return person(segmentation={"size": list(size), "counts": value})


BAD_ANNOTATIONS = {
    "no box": (person(bbox=None), "malformed bbox", "bbox: expected 4 numbers, got None"),
    "three numbers": (person(bbox=[1, 2, 3]), "malformed bbox", "got [1, 2, 3]"),
    "text among the numbers": (person(bbox=[1, 2, "3", 4]), "malformed bbox", "got [1, 2, '3', 4]"),
    "NaN": (person(bbox=[1, 2, float("nan"), 4]), "malformed bbox", "got [1, 2, nan, 4]"),
    "no area": (person(bbox=[4, 4, 0, 8]), "zero-area box", "expected a positive width and height, got [4, 4, 0, 8]"),
    "negative height": (person(bbox=[4, 4, 2, -8]), "zero-area box", "got [4, 4, 2, -8]"),
    "beyond the right": (person(bbox=[4, 4, 31, 8]), "outside the image", "in 32 x 24 pixels, got [4, 4, 31, 8]"),
    "beyond the top": (person(bbox=[4, -3, 8, 8]), "outside the image", "got [4, -3, 8, 8]"),
    "beyond all": (person(bbox=[400, 300, 8, 8]), "outside the image", "got [400, 300, 8, 8]"),
    "at the edge": (person(bbox=[32, 4, 1, 8]), "outside the image", "got [32, 4, 1, 8]"),
    "no segmentation": (person(segmentation=None), "no segmentation", "expected polygons or RLE, got None"),
    "no polygon": (polygons(), "empty polygon", "segmentation: expected polygons, got none"),
    "empty polygon": (polygons(SQUARE, []), "empty polygon", "3 points or more, got []"),
    "two points": (polygons([1, 1, 5, 5]), "empty polygon", "3 points or more, got [1, 1, 5, 5]"),
    "odd polygon": (polygons([1, 1, 5, 5, 1, 5, 7]), "empty polygon", "got [1, 1, 5, 5, 1, 5, 7]"),
    "polygon of text": (polygons([1, 1, 5, 5, 1, "5"]), "malformed segmentation", "'5'"),
    "flat polygon": (person(segmentation=SQUARE), "malformed segmentation", "expected numbers, got 4"),
    "far polygon": (polygons([4, 4, 1e9, 4, 12, 14]), "outside the image", "32 x 24 pixels, got [4, 4, 1000000000.0"),
    "RLE of another size": (counts([480, 288], (32, 24)), "malformed RLE", "fill [24, 32], got size [32, 24]"),
    "RLE too short": (counts([500, 200]), "malformed RLE", "counts [500, 200]"),
    "RLE too long": (counts([500, 2000]), "malformed RLE", "counts [500, 2000]"),
    "RLE with a negative run": (counts([800, -32]), "malformed RLE", "counts [800, -32]"),
    "RLE of fractions": (counts([767.5, 0.5]), "malformed RLE", "counts [767.5, 0.5]"),
    "RLE without counts": (counts(None), "malformed RLE", "counts None"),
    "compressed, empty": (counts(""), "malformed RLE", "counts ''"),
    "compressed, cut": (counts(rle(REGION)["counts"][:-1]), "malformed RLE", "counts '"),
    "compressed, longer": (counts(rle(REGION)["counts"] + "1"), "malformed RLE", "counts '"),
    "compressed, no code": (counts("\x01\x02"), "malformed RLE", "counts '"),
    "compressed, never ends": (counts("~~~~~~~~~~"), "malformed RLE", "counts '"),
    "compressed, huge": (counts("o" * 12 + "0"), "malformed RLE", "counts '"),
    "compressed, 800 and -32": (counts("Pi0PO"), "malformed RLE", "counts 'Pi0PO'"),
    "compressed, 768 in 15 codes": (counts("Ph" + "P" * 12 + "0"), "malformed RLE", "counts 'PhPP"),
    "few keypoints": (person(keypoints=[1, 2, 2]), "malformed keypoints", "expected 9 numbers, got [1, 2, 2]"),
    "odd visibility": (person(keypoints=[1, 2, 3] * 3), "malformed keypoints", "of 0, 1, 2, got [3, 3, 3]"),
    "far keypoint": (person(keypoints=[99, 2, 2] * 3), "outside the image", "keypoints: expected 32 x 24 pixels"),
    "area of text": (person(area="80"), "malformed area", "area: expected numbers, got ['80']"),
    "unknown category": (
        person(category_id=5),
        "unknown category",
        "category_id: expected a category of this file, got 5",
    ),
    "no category": (person(category_id=None), "malformed category_id", "category_id: expected int, got None"),
    "unknown image": (person(image_id=99), "unknown image", "image_id: expected the id of a usable image"),
    "no image": (person(image_id=None), "malformed image_id", "image_id: expected int, got None"),
    "no id": (person(id=None), "malformed id", "id: expected int, got None"),
    "id of a bool": (person(id=True), "malformed id", "id: expected int, got True"),
    "id twice": (person(id=4), "duplicate id", "id: expected unique ones, got 4 twice"),
}


@pytest.mark.parametrize("name", BAD_ANNOTATIONS)
def test_bad_annotations(tmp_path, name):
    annotation, kind, message = BAD_ANNOTATIONS[name]
    # If two annotations have the same id, the second one is bad.
    bad = 4 if name == "id twice" else annotation.get("id")
    image = 7 if name == "id twice" else annotation.get("image_id")
    (tmp_path / "raise").mkdir()
    with pytest.raises(DataError) as caught:
        open_changed(tmp_path / "raise", annotation, keypoints=True)
    assert caught.value.kind == kind
    assert f"instances_val.json: annotation {bad} of image {image}: " in str(caught.value)
    assert message in str(caught.value)
    assert "on_error=skip" in str(caught.value)

    (tmp_path / "skip").mkdir()
    dataset = open_changed(tmp_path / "skip", annotation, keypoints=True, on_error="skip")
    assert dataset.problems.counts == {kind: 1}
    assert message in dataset.problems.summary()
    used = [annotation["id"] for annotation in dataset.ground_truth().dataset["annotations"]]
    assert used == ([4, 2, 3] if name == "id twice" else [2, 3, 4])
    assert len(dataset[0][1].labels) == (2 if name == "id twice" else 1)


def test_a_crowd_is_checked_too(tmp_path):
    with pytest.raises(DataError, match=r"annotation 1 of image 10: .*runs that fill"):
        open_changed(tmp_path, counts([5]) | {"iscrowd": 1})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"id": None}, "malformed id", "images[1], id None: id: expected int, got None"),
        ({"id": "7"}, "malformed id", "images[1], id '7': id: expected int, got '7'"),
        ({"id": 10}, "duplicate id", "images[1], id 10: id: expected unique ones, got 10 twice"),
        ({"width": 0}, "malformed image entry", "images[1], id 7: width, height: expected positive"),
        ({"height": 24.0}, "malformed height", "images[1], id 7: height: expected int, got 24.0"),
        ({"file_name": None}, "malformed file_name", "images[1], id 7: file_name: expected str, got None"),
    ],
)
def test_bad_image_entries(tmp_path, change, kind, message):
    def spoil(coco):
        coco["images"][1] = {k: v for k, v in (coco["images"][1] | change).items() if v is not None}

    for mode in ("raise", "skip"):
        (tmp_path / mode).mkdir()
    with pytest.raises(DataError) as caught:
        open_changed(tmp_path / "raise", spoil)
    assert caught.value.kind == kind
    assert message in str(caught.value)
    dataset = open_changed(tmp_path / "skip", spoil, on_error="skip")
    assert dataset.image_ids == [10, 12]
    assert dataset.problems.counts == {kind: 1, "unknown image": 1}  # and its annotation


@pytest.mark.parametrize("on_error", ["raise", "skip"])  # without a usable file, skipping is impossible
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[1, 2]", "expected an object, got list"),
        ('{"images": [], "annotations": []}', "categories: expected a list of objects, got None"),
        (
            '{"images": {"a": 1}, "annotations": [], "categories": []}',
            "images: expected a list of objects, got {'a': 1}",
        ),
        ('{"images": [], "annotations": [3], "categories": []}', "annotations: expected a list of objects, got [3]"),
        (
            '{"images": [], "annotations": [], "categories": [{"name": "a"}]}',
            "categories[0]: id: expected int, got None",
        ),
        ('{"images": [], "annotations": [], "categories": []}', "expected an image, got none"),
    ],
)
def test_files_that_are_not_coco(root, text, message, on_error):
    path = root / "annotations" / "instances_val.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        CocoDataset(root, "val", on_error=on_error)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff\xd8\xff\xe0 an image", b""])
def test_a_file_that_is_not_text(root, data):
    (root / "annotations" / "instances_val.json").write_bytes(data)
    with pytest.raises(DataError, match=r"instances_val.json: expected JSON"):
        CocoDataset(root, "val")


def test_no_file(root):
    with pytest.raises(DataError, match=r"instances_train.json: expected COCO's annotations, got no such file"):
        CocoDataset(root, "train", on_error="skip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 90}, "id: expected unique ones, got 90 twice"),
        ({"name": None}, "name: expected str, got None"),
        ({"keypoints": [1]}, "keypoints: expected a list of names"),
        ({"skeleton": [[1, 4]]}, "skeleton: expected pairs of 1..3"),
        ({"skeleton": 5}, "skeleton: expected pairs of 1..3"),
    ],
)
def test_bad_categories(tmp_path, change, message):
    with pytest.raises(DataError) as caught:
        open_changed(tmp_path, lambda coco: coco["categories"][1].update(change), on_error="skip")
    assert f"categories[1]: {message}" in str(caught.value)


def test_keypoints_of_no_or_of_two_kinds(tmp_path):
    for name, keypoints in (("none", []), ("two", ["tail"])):
        (tmp_path / name).mkdir()

        def change(coco, keypoints=keypoints):
            coco["categories"][0]["keypoints"] = keypoints
            if not keypoints:
                del coco["categories"][1]["keypoints"], coco["categories"][1]["skeleton"]

        with pytest.raises(DataError, match="expected one list of keypoints, got"):
            open_changed(tmp_path / name, change, keypoints=True)


def test_bad_images(root):
    (root / "val" / "10.png").unlink()
    (root / "val" / "7.png").write_bytes((root / "val" / "7.png").read_bytes()[:60])
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "val" / "12.png")
    dataset = CocoDataset(root, "val")
    for index, (kind, message) in enumerate(
        [
            ("missing image", f"image 10: {root / 'val' / '10.png'}: expected an image, got no such file"),
            ("unreadable image", f"image 7: {root / 'val' / '7.png'}: expected a whole image, got one with an error"),
            ("image of another size", f"{root / 'val' / '12.png'}: expected 32 x 24 pixels as annotated, got 24 x 32"),
        ]
    ):
        with pytest.raises(DataError) as caught:
            dataset[index]
        assert caught.value.kind == kind
        assert message in str(caught.value)


def test_no_image_left_to_train_on(tmp_path):
    with pytest.raises(DataError, match=r"instances_val.json: expected an image with an annotation, got none"):
        open_changed(tmp_path, lambda coco: coco["annotations"].clear(), training=True)


def test_summary():
    problems, others = Problems("skip"), Problems("skip")
    assert problems.summary() == "bad data: none"
    for number in (1, 2, 3, 1):  # one of them twice
        problems.add(DataError("odd", f"file: annotation {number}"))
    others.add(DataError("odd", "file: annotation 3"))
    others.add(DataError("missing", "file: image 9"))
    problems.merge(others)
    assert len(problems) == 4
    assert problems.summary(examples=2).splitlines() == [
        "bad data: 4 left out",
        "  odd: 3",
        "    file: annotation 1",
        "    file: annotation 2",
        "    and 1 more",
        "  missing: 1",
        "    file: image 9",
    ]
