"""Models on disk: our own, and those that torchvision and detectron2 publish. Nothing in a file is executed."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.config import model_config
from models.network.mask_rcnn import MaskRCNN
from models.structures import Category
from models.weights import detectron2 as weights_detectron2
from models.weights import safe_pickle
from models.weights import torchvision as weights_torchvision
from models.weights.architecture import Weights

# Fields of `ModelConfig` that weights get used to in training and that no shape shows
_BACKBONE_SETTINGS = (
    *("input.channels", "input.pixel_mean", "input.pixel_std"),
    *("backbone.stride_in_1x1", "backbone.norm_eps"),
)
_DETECTOR_SETTINGS = (
    *_BACKBONE_SETTINGS,
    *("rpn.anchors.sizes", "rpn.anchors.aspect_ratios", "rpn.anchors.rounded"),
    *("pooling.sampling_ratio", "pooling.aligned", "pooling.level_rounding"),
    *("box.resolution", "box.res5_stride", "box.delta_weights"),
)
_BRANCHES = ("mask_head.", "keypoint_head.")
_PREDICTORS = ("box_head.class_logits.", "box_head.deltas.", "mask_head.mask_logits.", "keypoint_head.deconv.")


@dataclass(frozen=True)
class Differences:
    """Between a model and a file of weights; shapes and settings are (in the model, in the file)."""

    missing: Sequence[str] = ()  # in the model alone
    unexpected: Sequence[str] = ()  # in the file alone
    shapes: Mapping[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # fields of `ModelConfig`

    def __str__(self) -> str:
        lines = [f"missing from the file: {name}" for name in self.missing]
        lines += [f"unexpected in the file: {name}" for name in self.unexpected]
        for kind, pairs in (("of another shape", self.shapes), ("trained with another", self.settings)):
            lines += [f"{kind}: {name}: {pair[0]} in the model, {pair[1]} in the file" for name, pair in pairs.items()]
        return "\n".join(lines)


def save(path: str | Path, model: MaskRCNN, categories: Sequence[Category], **training: Any) -> None:
    """Write a model so that the file is whole at any moment: the old one, or the new one.

    Args:
        path: ends in `.pth`, or in `.safetensors`, which holds no training state.
        model: its weights and its config are written.
        categories: of the labels 1, 2, ...
        training: tensors, numbers, text and plain containers (the optimiser's state, the iteration, ...), so that
            `torch.load(path, weights_only=True)` returns them beside "model", "config" and "categories".
    """
    path = Path(path)
    about = {"config": asdict(model.config), "categories": [asdict(category) for category in categories]}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            if path.suffix == ".pth":
                torch.save(dict(model=model.state_dict(), **about, **training), file)
            elif path.suffix == ".safetensors" and not training:
                tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
                file.write(safetensors.torch.save(tensors, {key: json.dumps(value) for key, value in about.items()}))
            else:
                raise ValueError(f"path: expected .pth, or .safetensors without a training state, got {path}")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_model(
    path: str | Path, device: str | torch.device | None = None, *, norm_eps: float | None = None
) -> tuple[MaskRCNN, tuple[Category, ...]]:
    """A detector ready to detect, and the categories of its labels 1, 2, ...

    Args:
        path: one of ours; torchvision's Faster, Mask or Keypoint R-CNN with a ResNet-FPN (a state dict, by itself or
            as "model" in a dictionary); or one of detectron2's, with an FPN or on a C4 (`.pkl` or `.pth`).
        device: the GPU where there is one, otherwise the CPU, unless given.
        norm_eps: of the backbone's batch norms, where the file does not say and the guess is wrong: see
            `models.weights.torchvision.convert_detector`.

    Raises:
        ValueError: the file is none of these, is damaged, or holds something else than data; or its tensors are not
            those of the network that they imply, in which case all differences are listed.
    """
    weights = _read(Path(path))
    if weights.categories is None:
        raise ValueError(f"{path}: expected a detector, got a backbone")
    config = weights.config
    if norm_eps is not None:
        config = replace(config, backbone=replace(config.backbone, norm_eps=norm_eps))
    model = MaskRCNN(config)
    differences = _compare(model, weights.tensors)
    if str(differences):
        raise ValueError(f"{path}: expected the weights of {config}, got\n{differences}")
    model.load_state_dict(weights.tensors, strict=False)  # compared above; batch counts may be missing
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), weights.categories


def load_weights(model: MaskRCNN, path: str | Path) -> Differences:
    """Start a model from a file's weights: any that `load_model` reads, or torchvision's ImageNet ResNets.

    What may stay as it is: with a backbone, all the rest; the layers that predict, for other classes or keypoints
    than the file's; a branch for masks or keypoints that the file or the model lacks.

    Returns:
        What was left as it is, and the settings with which the file's weights were trained that the model does not
        share (these are not changed); it prints as one line for each, and as nothing if there are none.

    Raises:
        ValueError: as `load_model`, but for what is listed above.
    """
    return _fill(model, _read(Path(path)), path)


def load_training(model: MaskRCNN, path: str | Path) -> dict[str, Any]:
    """Go on with what `save` wrote, the model and all; returns its `training`.

    Raises:
        ValueError: as `load_weights`, or the file's model is another one in anything that `load_weights` tolerates.
    """
    content = _read_torch(Path(path))
    differences = _fill(model, _recognise(content, Path(path)), path)
    if str(differences):
        raise ValueError(f"{path}: expected the model that it was trained with, got\n{differences}")
    return content


def _fill(model: MaskRCNN, weights: Weights, path: str | Path) -> Differences:
    tensors, settings = weights.tensors, _DETECTOR_SETTINGS
    absent = [branch for branch in _BRANCHES if not any(name.startswith(branch) for name in tensors)]
    if weights.categories is None:
        settings = _BACKBONE_SETTINGS
        absent += ["fpn.", "rpn.", "box_head."]
        if model.config.fpn is None:  # a C4's last stage belongs to the heads
            tensors = {name.replace("backbone.layer4.", "res5."): tensor for name, tensor in tensors.items()}
    state = model.state_dict()
    unused = [branch for branch in _BRANCHES if not any(name.startswith(branch) for name in state)]

    found = _compare(model, tensors)
    errors = Differences(
        [name for name in found.missing if not name.startswith(tuple(absent))],
        [name for name in found.unexpected if not name.startswith(tuple(unused))],
        {name: shapes for name, shapes in found.shapes.items() if not name.startswith(_PREDICTORS)},
    )
    if str(errors):
        raise ValueError(f"{path}: expected weights that fit the model, got\n{errors}")
    model.load_state_dict({name: tensors[name] for name in tensors if name not in found.shapes}, strict=False)
    values = {name: tuple(map(attrgetter(name), (model.config, weights.config))) for name in settings}
    return replace(found, settings={name: pair for name, pair in values.items() if pair[0] != pair[1]})


def _compare(model: MaskRCNN, tensors: Mapping[str, Tensor]) -> Differences:
    """Counts of batches are left out: old files do not have them, and nothing reads them."""
    ours, theirs = (
        {name: list(tensor.shape) for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}
        for state in (model.state_dict(), tensors)
    )
    return Differences(
        [name for name in ours if name not in theirs],
        [name for name in theirs if name not in ours],
        {name: (ours[name], theirs[name]) for name in ours if name in theirs and ours[name] != theirs[name]},
    )


def _read(path: Path) -> Weights:
    read = {".safetensors": _read_safetensors, ".pkl": safe_pickle.load}.get(path.suffix, _read_torch)
    return _recognise(read(path), path)


def _recognise(content: Any, path: Path) -> Weights:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary, got {type(content).__name__}")
    state = content.get("model", content)
    if "config" in content and "categories" in content:
        return Weights(state, model_config(content["config"]), tuple(map(_category, content["categories"])))
    if "roi_heads.box_predictor.cls_score.weight" in state:
        if "rpn.head.cls_logits.weight" in state:
            return weights_torchvision.convert_detector(state)
        if "proposal_generator.rpn_head.objectness_logits.weight" in state:
            return weights_detectron2.convert(state)
    if "layer1.0.conv1.weight" in state:
        return weights_torchvision.convert_backbone(state)
    names = ", ".join(map(str, list(state)[:5]))
    raise ValueError(f"{path}: expected weights of fastmask, torchvision or detectron2, got {names or 'none'}, ...")


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, struct.error) as error:  # or it is damaged
        raise ValueError(f"{path}: expected tensors and plain values, got what torch.load refuses") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        tensors = safetensors.torch.load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    return {"model": tensors} | {key: json.loads(metadata[key]) for key in ("config", "categories") if key in metadata}


def _category(values: Mapping[str, Any]) -> Category:
    skeleton = tuple((first, second) for first, second in values["skeleton"])
    return Category(values["id"], values["name"], tuple(values["keypoints"]), skeleton)
