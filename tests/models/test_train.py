"""Training: its files, resuming a killed run, several processes, stages, and losses that are not finite."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import stages, train
from models.config import SolverConfig
from models.data.synthetic.shapes import ShapesConfig, generate
from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS
from models.weights import checkpoint
from tests.oracles import coco_photographs

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]

ROOT = Path(__file__).parents[2]
OPTIONS = (
    *("--model.input.min-size", "64", "--model.input.max-size", "96", "--data.train-min-sizes", "64"),
    *("--solver.lr", "0.08", "--solver.images-per-gpu", "2", "--solver.iterations", "6"),
    *("--solver.checkpoint-every", "2", "--solver.evaluate-every", "6", "--solver.log-every", "1"),
    *("--data.workers", "1"),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    generate(ShapesConfig(folder, train=12, val=3, sides=(64, 96), objects=(1, 3)))
    return folder


def command(shapes, output, *options, processes=1):
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [
        *(sys.executable, "-W", "error::UserWarning", *start, "-m", "models.train", "demo"),
        *("--data.root", str(shapes), "--output", str(output), *OPTIONS, *options),
    ]


def run(*args, **kwargs):
    done = subprocess.run(
        command(*args, **kwargs),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def uninterrupted(shapes, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "whole"
    code, text = run(shapes, output)
    assert code == 0, text
    return output, text


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def log_of(output):
    """The lines of a run's log that are about training."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["group"] == "train"]


def losses_of(line):
    """The names of the losses in a line of the log."""
    return [name for name in line if name not in ("iteration", "group", "loss", "lr", "images_per_second")]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_run_writes_log_metrics_and_model(uninterrupted, shapes):
    output, text = uninterrupted
    assert "learning rate 0.08 for 16 images: 0.01 for 2, on 1 x cpu" in text
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["group"] == "train"]
    assert [line["iteration"] for line in trained] == [1, 2, 3, 4, 5, 6]
    for line in trained:
        parts = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
        assert line["loss"] == pytest.approx(sum(line[part] for part in parts))
        assert line["images_per_second"] > 0
    assert [line["group"] for line in lines[6:]] == ["bbox", "segm"]
    assert list(output.glob("events.out.tfevents.*"))
    assert json.loads((output / "metrics.json").read_text())["bbox"].keys() >= {"AP", "AP50"}
    model, categories = checkpoint.load_model(output / "model.pth", "cpu")
    assert [category.name for category in categories][:2] == ["person", "disc"]
    assert model.config.classes == 5
    assert json.loads((output / "config.json").read_text())["data"]["root"] == str(shapes)


def test_a_killed_run_resumes_bit_for_bit(uninterrupted, shapes, tmp_path):
    output = tmp_path / "killed"
    process = subprocess.Popen(
        command(shapes, output), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while not (output / train.LAST).exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = torch.load(output / train.LAST, weights_only=True)
    assert state["iteration"] in (2, 4)
    assert state["stage"] == 0
    assert not (output / train.FINAL).exists()

    code, text = run(shapes, output, "--resume")
    assert code == 0, text
    assert_same(weights(uninterrupted[0] / train.FINAL), weights(output / train.FINAL))
    logged = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in logged if line["group"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_another_run_is_not_resumed(uninterrupted):
    path = uninterrupted[0] / train.LAST
    config = checkpoint.load_model(path, "cpu")[0].config
    with pytest.raises(ValueError, match=r"resume: expected \{'seed': 0, .*\} as before, got \{'seed': 1\}"):
        train.resume(MaskRCNN(config), path, {"seed": 1})
    with pytest.raises(
        ValueError, match="expected the model that it was trained with, got\nof another shape: box_head"
    ):
        train.resume(MaskRCNN(replace(config, classes=3)), path, {"seed": 0})


def test_a_finished_run_is_not_overwritten(uninterrupted, shapes):
    code, text = run(shapes, uninterrupted[0])
    assert code != 0
    assert "output: expected a new folder, or --resume" in text


def test_two_processes_train(shapes, tmp_path):
    code, text = run(shapes, tmp_path / "two", "--solver.iterations", "2", processes=2)
    assert code == 0, text
    assert "0.02 for 4, on 2 x cpu" in text
    assert weights(tmp_path / "two" / train.FINAL)


def test_a_loss_that_is_not_finite_stops_all_processes_and_keeps_the_checkpoint(shapes, tmp_path):
    output = tmp_path / "nan"
    code, text = run(
        *(shapes, output, "--solver.clip-norm", "None", "--solver.warmup", "0", "--solver.iterations", "40"),
        *("--solver.lr", "1e3", "--solver.checkpoint-every", "1"),
        processes=2,
    )
    assert code != 0
    assert "NonFiniteLossError: iteration " in text
    assert "loss_objectness" in text
    assert " of images [" in text
    if (output / train.LAST).exists():
        for name, value in weights(output / train.LAST).items():
            assert value.isfinite().all(), name


def demo(shapes, output):
    preset = PRESETS["demo"]
    return replace(
        preset,
        model=replace(preset.model, input=replace(preset.model.input, min_size=64, max_size=96)),
        data=replace(preset.data, root=shapes, train_min_sizes=(64,), workers=0),
        solver=replace(preset.solver, images_per_gpu=2, evaluate_every=4, checkpoint_every=1, log_every=1),
        output=output,
    )


def test_stages_follow_each_other_and_resume(uninterrupted, shapes, tmp_path, monkeypatch):
    rpn_losses = tuple(losses_of(log_of(uninterrupted[0])[0])[:2])

    def two_stages(solver):
        """The RPN with its losses, then everything."""
        schedule = replace(stages.end_to_end(solver)[0].schedule, iterations=2)
        rpn = stages.Stage("rpn", schedule, trainable=("rpn.",), losses=rpn_losses)
        return rpn, stages.Stage("all", schedule)

    monkeypatch.setattr(train, "end_to_end", two_stages)
    states = {}

    def record(path, model, categories, **training):
        checkpoint_save(path, model, categories, **training)
        if training:
            states[training["stage"], training["iteration"]] = torch.load(path, weights_only=True)

    checkpoint_save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", record)
    config = demo(shapes, tmp_path / "whole")
    train.train(config)
    assert list(states) == [(0, 1), (0, 2), (1, 1), (1, 2)]

    parameters = [name for name, _ in MaskRCNN(replace(config.model, classes=5)).named_parameters()]
    first, second, last = (states[key]["model"] for key in ((0, 1), (0, 2), (1, 2)))
    changed = {name for name in parameters if not torch.equal(first[name], second[name])}
    assert changed == {name for name in parameters if name.startswith("rpn.")}
    assert not torch.equal(second["backbone.conv1.weight"], last["backbone.conv1.weight"])

    logged = log_of(tmp_path / "whole")
    assert [line["iteration"] for line in logged] == [1, 2, 3, 4]
    assert [len(losses_of(line)) for line in logged] == [2, 2, 5, 5]
    assert [line["lr"] for line in logged[:2]] == [line["lr"] for line in logged[2:]]  # the schedule starts again

    for stage, iteration in ((0, 2), (1, 1)):
        output = tmp_path / f"resumed {stage}"
        output.mkdir()
        torch.save(states[stage, iteration], output / train.LAST)
        train.train(replace(config, output=output, resume=True))
        assert_same(weights(output / train.FINAL), last)


def test_schedule():
    solver = SolverConfig(iterations=100, steps=(50, 80), gamma=0.1, warmup=10, warmup_factor=0.2)
    (stage,) = stages.end_to_end(solver)
    factors = [stage.schedule.factor(iteration) for iteration in (0, 5, 10, 49, 50, 79, 80)]
    assert factors == pytest.approx([0.2, 0.6, 1, 1, 0.1, 0.1, 0.01])
    assert replace(stage.schedule, warmup=0).factor(0) == 1
    assert stages.total_iterations([stage, stage]) == 200


def test_prefixes_of_a_stage_are_checked():
    stage = stages.Stage("some", stages.end_to_end(SolverConfig())[0].schedule, trainable=("rpm.",), losses=("x",))
    with pytest.raises(ValueError, match=r"^trainable: expected prefixes of a, b, got 'rpm\.'"):
        stage.set_trainable({"a": torch.nn.Parameter(torch.zeros(1)), "b": torch.nn.Parameter(torch.zeros(1))})
    with pytest.raises(ValueError, match=r"^losses: expected prefixes of a, got 'x'"):
        stage.select_losses({"a": torch.zeros(())})


def test_a_large_image_with_many_polygons_needs_little_memory(tmp_path):
    """One dense mask of this image has 32 MB, and all of them 16 GB."""
    coco_photographs.write(tmp_path / "data", "train2017", (4000, 8000), images=1, objects=500, largest=1500)
    coco_photographs.write(tmp_path / "data", "val2017", (64, 96), images=1, objects=1, largest=60)
    options = ("--data.workers", "0", "--solver.images-per-gpu", "1", "--solver.iterations", "2")
    arguments = command(tmp_path / "data", tmp_path / "run", *options)
    script = (
        "import resource, sys; from models.train import main; sys.argv = sys.argv[1:]; main();"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    module = arguments.index("models.train")
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments[module:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(log_of(tmp_path / "run")) == 2
    assert int(done.stdout.split()[-1]) < 2000  # MiB
