"""Configs survive JSON exactly, their unions included, and the command line changes each member of a union."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from models.config import (
    C4,
    FPN,
    AverageBox,
    FCBox,
    FCNMask,
    KeypointHeadConfig,
    ModelConfig,
    config_values,
    model_config,
)
from models.presets import PRESETS

pytestmark = pytest.mark.reference_only

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_of_a_preset(preset):
    config = PRESETS[preset].model
    assert model_config(json.loads(json.dumps(config_values(config)))) == config


@pytest.mark.parametrize("features", [FPN(channels=8), C4(res5_stride=2)])
@pytest.mark.parametrize("box", [FCBox(fcs=1, delta_weights=(1.0, 2.0, 3.0, 4.0)), AverageBox(resolution=14)])
@pytest.mark.parametrize("mask", [FCNMask(convs=1), None])
@pytest.mark.parametrize("keypoint", [KeypointHeadConfig(keypoints=3), None])
def test_round_trip_of_unions(features, box, mask, keypoint):
    config = ModelConfig(features=features, box=box, mask=mask, keypoint=keypoint)
    rebuilt = model_config(json.loads(json.dumps(config_values(config))))
    assert rebuilt == config
    assert type(rebuilt.features) is type(features)
    assert type(rebuilt.box) is type(box)


def test_unions_name_their_kind():
    values = config_values(replace(ModelConfig(), features=C4()))
    assert values["features"] == {"kind": "C4", "res5_stride": 1}
    assert values["box"]["kind"] == "FCBox"
    assert "kind" not in values["rpn"]


@pytest.mark.parametrize("kind", [{}, {"kind": "C6"}, {"kind": "RPNConfig"}])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match=r"features: expected a kind of \['C4', 'FPN'\], got (None|'C6'|'RPNConfig')"):
        model_config({"features": kind})


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"FPN: expected fields .*, got \['colour'\]"):
        model_config({"features": {"kind": "FPN", "colour": "red"}})


PARSE = """
import sys, tyro
from models.presets import PRESETS
presets = {name: ("", preset) for name, preset in PRESETS.items()}
print(tyro.extras.overridable_config_cli(presets, config=(tyro.conf.AvoidSubcommands,)).model)
"""


def parse(*arguments):
    command = [sys.executable, "-c", PARSE, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("R-50-FPN", "--model.rpn.nms-iou", "0.5"), "nms_iou=0.5"),
        (("R-50-FPN", "--model.features.channels", "64"), "features=FPN(channels=64"),
        (("R-50-FPN", "--model.box.fc-channels", "8"), "fc_channels=8"),
        (("R-50-FPN", "--model.mask.convs", "2"), "mask=FCNMask(resolution=14, convs=2"),
        (("R-50-C4", "--model.features.res5-stride", "2"), "features=C4(res5_stride=2)"),
        (("R-50-C4", "--model.box.detections", "7"), "detections=7"),
        (("R-50-FPN-keypoint", "--model.keypoint.convs", "2"), "keypoint=KeypointHeadConfig(keypoints=17,"),
    ],
)
def test_command_line(arguments, expected):
    done = parse(*arguments)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_help_lists_the_fields_of_the_preset():
    assert "--model.features.level-rounding" in parse("R-50-FPN", "--help").stdout
    text = parse("R-50-C4", "--help").stdout
    assert "--model.features.res5-stride" in text
    assert "--model.box.fcs" not in text
