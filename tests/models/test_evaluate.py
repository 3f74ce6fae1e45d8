"""Average precision of detectors with known detections, against pycocotools and in several processes."""

import json
import multiprocessing
import os
import socket
from dataclasses import replace

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.multiprocessing.spawn import start_processes

from models import evaluate as command
from models.coco_eval import coco_results, evaluate, table
from models.config import DataConfig, KeypointHeadConfig, ModelConfig
from models.data.coco import CocoDataset
from models.data.problems import DataError
from models.distributed import process_group
from models.evaluate import EvaluateConfig, main
from models.structures import Category, Detections

pytestmark = pytest.mark.reference_only

POINTS = tuple(f"point {i}" for i in range(17))
PERSON, PLATE = Category(2, "person", POINTS), Category(7, "plate")
CATEGORIES = (PERSON, PLATE)

# x, y, width, height and category of the objects in images 1..5: small, medium and large ones, and none in image 4.
OBJECTS = {
    1: [(10, 8, 20, 16, PLATE), (40, 20, 60, 70, PERSON)],
    2: [(5, 5, 110, 120, PERSON), (60, 60, 110, 100, PLATE)],
    3: [(30, 30, 50, 40, PLATE), (90, 30, 25, 25, PERSON)],
    4: [],
    5: [(0, 0, 120, 130, PLATE), (100, 80, 80, 90, PERSON)],
}
CROWD = (130, 10, 60, 60)  # of plates, in image 3
SIZE = (180, 200)  # height, width
MODEL = ModelConfig(classes=2, keypoint=KeypointHeadConfig())


def keypoints(x, y, w, h):
    """In COCO's format, as pixel indices."""
    return [(x + (i * 5 % 17) / 17 * w, y + i / 17 * h, 2) for i in range(17)]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    images, annotations = [], []
    for image_id, objects in OBJECTS.items():
        name = f"{image_id}.png"
        Image.new("RGB", SIZE[::-1], (image_id, 0, 0)).save(tmp_path / "val2017" / name)
        images.append({"id": image_id, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        for x, y, w, h, category in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category.id,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
            if category is PERSON:
                points = [value for point in keypoints(x, y, w, h) for value in point]
                annotations[-1] |= {"keypoints": points, "num_keypoints": 17}
    region = torch.zeros(SIZE[::-1], dtype=torch.int64)  # columns first
    region[CROWD[0] : CROWD[0] + CROWD[2], CROWD[1] : CROWD[1] + CROWD[3]] = 1
    _, counts = region.flatten().unique_consecutive(return_counts=True)
    annotations.append(
        {
            "id": len(annotations) + 1,
            "image_id": 3,
            "category_id": PLATE.id,
            "bbox": list(CROWD),
            "area": CROWD[2] * CROWD[3],
            "iscrowd": 1,
            "segmentation": {"size": list(SIZE), "counts": counts.tolist()},
        }
    )
    categories = [{"id": c.id, "name": c.name, "keypoints": list(c.keypoints), "skeleton": []} for c in CATEGORIES]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return tmp_path


class Detector:
    """Detects every object, and a plate in the crowd; `noise` moves boxes and adds wrong ones."""

    config = MODEL

    def __init__(self, categories=CATEGORIES, noise=0.0):
        self.labels = {category.id: label for label, category in enumerate(categories, start=1)}
        self.noise = noise

    def detect(self, images):
        return [self.find(int(image[0, 0, 0]), tuple(image.shape[1:])) for image in images]

    def find(self, image_id, size):
        objects = [*([(140, 20, 30, 30, PLATE)] if image_id == 3 else []), *OBJECTS[image_id]]
        generator = torch.Generator().manual_seed(image_id)
        if self.noise:
            objects += [(x / 2, y / 2, w, h, category) for x, y, w, h, category in objects]
        masks = torch.ones(len(objects), 28, 28)
        if self.noise:
            masks[len(masks) // 2 :, 14:] = 0  # smaller than the box
        boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h, _ in objects], dtype=torch.float32).reshape(-1, 4)
        points = torch.tensor([keypoints(x, y, w, h) for x, y, w, h, _ in objects]).reshape(-1, 17, 3)
        points[..., :2] += 0.5  # from pixel indices to continuous coordinates
        points[..., :2] += self.noise * torch.randn(*points.shape[:2], 2, generator=generator)
        points[..., 2] = 1
        return Detections(
            boxes=boxes + self.noise * torch.randn(boxes.shape, generator=generator),
            scores=torch.rand(len(objects), generator=generator).sort(descending=True).values,
            labels=torch.tensor([self.labels[category.id] for *_, category in objects], dtype=torch.int64),
            image_size=size,
            mask_probabilities=masks,
            keypoints=points,
        )


class Blind(Detector):
    def find(self, image_id, size):
        return super().find(image_id, size)[:0]


def dataset_of(root, on_error="raise"):
    return CocoDataset(root, "val2017", keypoints=True, on_error=on_error)


def data_of(root, workers=0):
    return DataConfig(root=root, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_detecting_the_ground_truth_is_perfect(root, workers):
    metrics = evaluate(Detector(), CATEGORIES, dataset_of(root), data_of(root, workers))
    names = ["AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"]
    perfect = pytest.approx(dict.fromkeys(names, 1.0))
    assert metrics["bbox"] == perfect
    assert metrics["segm"] == perfect
    assert metrics["keypoints"] == pytest.approx(dict.fromkeys([name for name in names if name != "AP_S"], 1.0))


def test_crowd_is_not_an_object(root):
    """Without the crowd region, the plate in it is a false positive."""
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [annotation for annotation in content["annotations"] if not annotation["iscrowd"]]
    path.write_text(json.dumps(content))
    metrics = evaluate(Detector(), CATEGORIES, dataset_of(root), data_of(root))
    assert metrics["bbox"]["AP"] < 1
    assert metrics["segm"]["AP"] < 1


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_metrics_are_those_of_the_written_files(root, tmp_path, task):
    metrics = evaluate(Detector(noise=4), CATEGORIES, dataset_of(root), data_of(root), tmp_path / "out")
    assert 0 < metrics[task]["AP"] < 1
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written == {"images": 5, "skipped": 0, **metrics}

    truth = COCO(str(root / "annotations" / "instances_val2017.json"))
    for annotation in truth.anns.values():
        annotation.setdefault("num_keypoints", 0)
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    if task == "segm":  # as in COCO's results of masks; given a box, pycocotools takes the area from it
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    if task == "keypoints":
        results = [result for result in results if result["category_id"] == PERSON.id]
    official = COCOeval(truth, truth.loadRes(results), task)
    if task == "keypoints":
        official.params.catIds = [PERSON.id]
    official.evaluate()
    official.accumulate()
    official.summarize()
    assert list(metrics[task].values()) == official.stats[: len(metrics[task])].tolist()


def test_results_are_in_submission_format(root, tmp_path):
    evaluate(Detector(), CATEGORIES, dataset_of(root), data_of(root), tmp_path / "out")
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(results) == 9
    for result in results:
        x, y, w, h = result["bbox"]
        assert coco_mask.toBbox(result["segmentation"]).tolist() == [x, y, w, h]
        assert ("keypoints" in result) == (result["category_id"] == PERSON.id)
        if "keypoints" in result:
            expected = [value for px, py, _ in keypoints(x, y, w, h) for value in (px, py, 1)]
            assert result["keypoints"] == pytest.approx(expected, abs=1e-4)


def test_no_detections(root, tmp_path):
    metrics = evaluate(Blind(), CATEGORIES, dataset_of(root), data_of(root), tmp_path)
    assert {value for values in metrics.values() for value in values.values()} == {0.0}
    assert json.loads((tmp_path / "detections.json").read_text()) == []


@pytest.mark.parametrize("branch", ["mask", "keypoint"])
def test_absent_branch_is_not_scored(root, branch):
    detector = Detector()
    detector.config = replace(MODEL, **{branch: None})
    expected = {"mask": {"bbox", "keypoints"}, "keypoint": {"bbox", "segm"}}[branch]
    assert evaluate(detector, CATEGORIES, dataset_of(root), data_of(root)).keys() == expected


def test_categories_are_matched_by_id(root):
    """The model has more categories than the data set, in another order."""
    categories = (Category(9, "cup"), PLATE, PERSON)
    metrics = evaluate(Detector(categories), categories, dataset_of(root), data_of(root))
    assert metrics["segm"]["AP"] == pytest.approx(1)


@pytest.mark.parametrize("categories", [(PERSON,), (PERSON, Category(7, "bowl")), (PERSON, Category(8, "plate"))])
def test_other_categories_raise(root, categories):
    with pytest.raises(ValueError, match=r"^categories: expected .*2: 'person', 7: 'plate'.*, got .*person") as error:
        evaluate(Detector(), categories, dataset_of(root), data_of(root))
    assert str({category.id: category.name for category in categories}) in str(error.value)


def test_other_keypoints_raise(root):
    categories = (replace(PERSON, keypoints=POINTS[:4]), PLATE)
    with pytest.raises(ValueError, match=r"^categories: expected .*keypoints .*point 16.*, got .*'point 3'\)"):
        evaluate(Detector(), categories, dataset_of(root), data_of(root))


def test_bad_image(root, tmp_path):
    """Image 1 is missing. When it is skipped, its plate and its person do not count as missed."""
    (root / "val2017" / "1.png").unlink()
    with pytest.raises(DataError, match=r"image 1.*1\.png"):
        evaluate(Detector(), CATEGORIES, dataset_of(root), data_of(root))

    dataset = dataset_of(root, "skip")
    metrics = evaluate(Detector(), CATEGORIES, dataset, data_of(root), tmp_path / "out")
    assert [metrics[task]["AP"] for task in ("bbox", "segm", "keypoints")] == pytest.approx([1, 1, 1])
    assert "1.png" in dataset.summary()
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (written["images"], written["skipped"]) == (4, 1)
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {result["image_id"] for result in results} == {2, 3, 5}


def test_other_numbers_of_keypoints(root):
    """pycocotools has constants for COCO's 17 only."""
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for entry in (*content["annotations"], *content["categories"]):
        if entry.get("keypoints"):
            entry["keypoints"] = entry["keypoints"][: 12 if "bbox" in entry else 4]
            entry["num_keypoints"] = 4
    path.write_text(json.dumps(content))

    class Fewer(Detector):
        def find(self, image_id, size):
            detections = super().find(image_id, size)
            return replace(detections, keypoints=detections.keypoints[:, :4])

    categories = (replace(PERSON, keypoints=POINTS[:4]), PLATE)
    assert evaluate(Fewer(), categories, dataset_of(root), data_of(root))["keypoints"]["AP"] == pytest.approx(1)


def test_masks_are_encoded_as_pycocotools_encodes_the_pasted_ones():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(23, 2, generator=generator) * 60 - 10
    detections = Detections(
        boxes=torch.cat([corners, corners + 1 + 40 * torch.rand(23, 2, generator=generator)], 1),
        scores=torch.ones(23),
        labels=torch.ones(23, dtype=torch.int64),
        image_size=(47, 61),
        mask_probabilities=torch.rand(23, 28, 28, generator=generator),
    )
    expected = [coco_mask.encode(mask.byte().numpy().copy(order="F")) for mask in detections.masks()]
    encoded = detections.rle()
    assert [rle["counts"].encode() for rle in encoded] == [rle["counts"] for rle in expected]
    assert [rle["size"] for rle in encoded] == [[47, 61]] * 23
    with pytest.raises(ValueError, match="got None: the model has no mask branch"):
        replace(detections, mask_probabilities=None).rle()


def test_results_without_branches():
    detections = Detections(torch.tensor([[1.0, 2, 4, 8]]), torch.tensor([0.5]), torch.tensor([2]), (10, 10))
    assert coco_results(detections, CATEGORIES) == [{"category_id": 7, "bbox": [1, 2, 3, 6], "score": 0.5}]


def share(rank, port, root, output):
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
    }
    torch.set_num_threads(1)
    with process_group():
        dataset = dataset_of(root, "skip")
        metrics = evaluate(Detector(noise=4), CATEGORIES, dataset, data_of(root), output / "two")
    (output / f"{rank}.json").write_text(json.dumps([metrics, dataset.summary()]))


def test_two_processes_give_the_result_of_one(root, tmp_path):
    (root / "val2017" / "4.png").unlink()  # the second process has it, and image 2
    dataset = dataset_of(root, "skip")
    metrics = evaluate(Detector(noise=4), CATEGORIES, dataset, data_of(root), tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["models.coco_eval"])  # imported once, for both processes
    start_processes(share, (port, root, tmp_path), nprocs=2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == [metrics, dataset.summary()]
    assert second[0] == metrics
    for name in ("detections.json", "metrics.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_command(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", {tmp_path / "model.pth": (Detector(), CATEGORIES)}.get)
    config = EvaluateConfig(tmp_path / "model.pth", data_of(root), tmp_path / "out")
    main(config)
    printed = capsys.readouterr().out
    assert "5 images" in printed
    assert [line.split() for line in printed.splitlines() if line.strip().startswith(("AP", "bbox", "keypoints"))] == [
        ["AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"],
        ["bbox", *["100.0"] * 6],
        ["keypoints", *["100.0"] * 3, "-", *["100.0"] * 2],
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"detections.json", "metrics.json"}


def test_table_marks_missing_values():
    values = {"AP": 0.5, "AP50": 0.25, "AP75": 0.0, "AP_S": -1.0, "AP_M": 0.1234, "AP_L": 1.0}
    assert table({"bbox": values}).splitlines()[1].split() == ["bbox", "50.0", "25.0", "0.0", "-", "12.3", "100.0"]
