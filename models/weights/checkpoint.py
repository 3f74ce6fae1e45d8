"""Reads and writes weights: checkpoints of fastmask, torchvision and detectron2. No code in a file is executed."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.config import C4, ModelConfig, config_values, model_config
from models.network.mask_rcnn import MaskRCNN
from models.structures import Category
from models.weights import detectron2 as weights_detectron2
from models.weights import safe_pickle
from models.weights import torchvision as weights_torchvision
from models.weights.architecture import Weights

# The format of checkpoints: names of tensors and fields of the config. Every change of these increases the number. The
# first format did not store it.
FORMAT = 2

# Fields of `ModelConfig` that trained weights depend on and that the shapes of tensors do not show. Some belong to one
# member of a union only.
_BACKBONE_SETTINGS = (
    *("input.channels", "input.pixel_mean", "input.pixel_std"),
    *("backbone.stride_in_1x1", "backbone.norm_eps"),
)
_DETECTOR_SETTINGS = (
    *_BACKBONE_SETTINGS,
    *("features.level_rounding", "features.res5_stride"),
    *("rpn.anchors.sizes", "rpn.anchors.aspect_ratios", "rpn.anchors.rounded"),
    *("pooling.sampling_ratio", "pooling.aligned"),
    *("box.resolution", "box.delta_weights"),
)
_BRANCHES = ("mask_head.", "keypoint_head.")
_PREDICTORS = ("box_head.class_logits.", "box_head.deltas.", "mask_head.mask_logits.", "keypoint_head.deconv.")


@dataclass(frozen=True)
class Differences:
    """Differences between a model and a file of weights. The values of the mappings are (in the model, in the file)."""

    missing: Sequence[str] = ()  # names of tensors in the model only
    unexpected: Sequence[str] = ()  # names of tensors in the file only
    shapes: Mapping[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # fields of `ModelConfig`

    def __str__(self) -> str:
        lines = [f"missing from the file: {name}" for name in self.missing]
        lines += [f"unexpected in the file: {name}" for name in self.unexpected]
        for kind, pairs in (("of another shape", self.shapes), ("trained with another", self.settings)):
            lines += [f"{kind}: {name}: {pair[0]} in the model, {pair[1]} in the file" for name, pair in pairs.items()]
        return "\n".join(lines)


def save(path: str | Path, model: MaskRCNN, categories: Sequence[Category], **training: Any) -> None:
    """Write a checkpoint atomically: if the process is killed, `path` is the complete old or the complete new file.

    Args:
        path: ends in `.pth`, or in `.safetensors`, which cannot hold a training state.
        model: its weights and its config are written.
        categories: of the model's labels 1, 2, ...
        training: the training state (optimiser, iteration, ...) as tensors, numbers, text and plain containers.
            `torch.load(path, weights_only=True)` returns it beside "model", "format", "config" and "categories".

    Raises:
        ValueError: `path` has another suffix, or is `.safetensors` and there is a training state.
    """
    path = Path(path)
    metadata = {
        "format": FORMAT,
        "config": config_values(model.config),
        "categories": [asdict(category) for category in categories],
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            if path.suffix == ".pth":
                torch.save(dict(model=model.state_dict(), **metadata, **training), file)
            elif path.suffix == ".safetensors" and not training:
                tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
                text = {key: json.dumps(value) for key, value in metadata.items()}
                file.write(safetensors.torch.save(tensors, text))
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
    """Load a detector for inference.

    Args:
        path: a checkpoint of fastmask; torchvision's Faster, Mask or Keypoint R-CNN with a ResNet-FPN (a state dict,
            by itself or as "model" in a dictionary); or one of detectron2's with an FPN or a C4 (`.pkl` or `.pth`).
        device: of the model; None for the GPU if there is one, otherwise the CPU.
        norm_eps: replaces the epsilon of the backbone's batch norms, which files of torchvision do not hold and
            `models.weights.torchvision.convert_detector` assumes.

    Returns:
        The model in evaluation mode, and the categories of its labels 1, 2, ...

    Raises:
        ValueError: the file is none of these, is a checkpoint of another format, is damaged, or holds something other
            than data; or its tensors are not those of the network that they imply. The error lists all differences.
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
    model.load_state_dict(weights.tensors, strict=False)  # batch norms' numbers of batches may be missing
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), weights.categories


def load_weights(model: MaskRCNN, path: str | Path) -> Differences:
    """Initialise a model from a file: any that `load_model` reads, or one of torchvision's ImageNet ResNets.

    Some parts of the model may keep their initial weights: everything but the backbone, if the file is a ResNet; the
    layers that predict, if the numbers of classes or keypoints differ; a mask or keypoint branch that the file lacks.
    A branch that the model lacks is ignored.

    Args:
        model: its weights are replaced.
        path: of the file.

    Returns:
        The tensors that were not loaded, and the settings in which the model's config, which is not changed, differs
        from that of the file. `str` of it has one line for each, and is empty if there are none.

    Raises:
        ValueError: the file cannot be read (as for `load_model`), or there are differences other than the above.
    """
    return _fill(model, _read(Path(path)), path)


def load_training(model: MaskRCNN, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint to continue its training.

    Args:
        model: its weights are replaced.
        path: of the checkpoint.

    Returns:
        The content of the file, with the `training` given to `save`.

    Raises:
        ValueError: the file cannot be read (as for `load_model`), or differs from the model in a tensor or a setting.
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
        absent += ["backbone.fpn.", "rpn.", "box_head."]
        if isinstance(model.config.features, C4):  # a C4 applies res5 to regions
            tensors = {n.replace("backbone.layer4.", "roi_features.res5."): tensor for n, tensor in tensors.items()}
    state = model.state_dict()
    unused = [branch for branch in _BRANCHES if not any(name.startswith(branch) for name in state)]

    differences = _compare(model, tensors)
    errors = Differences(
        [name for name in differences.missing if not name.startswith(tuple(absent))],
        [name for name in differences.unexpected if not name.startswith(tuple(unused))],
        {name: shapes for name, shapes in differences.shapes.items() if not name.startswith(_PREDICTORS)},
    )
    if str(errors):
        raise ValueError(f"{path}: expected weights that fit the model, got\n{errors}")
    model.load_state_dict({name: tensors[name] for name in tensors if name not in differences.shapes}, strict=False)
    values = {name: (_setting(model.config, name), _setting(weights.config, name)) for name in settings}
    return replace(differences, settings={name: pair for name, pair in values.items() if pair[0] != pair[1]})


def _setting(config: ModelConfig, name: str) -> Any:
    """A field of a config by its path, or None if another member of a union is configured there."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _compare(model: MaskRCNN, tensors: Mapping[str, Tensor]) -> Differences:
    """Differences of names and shapes, except for the batch norms' numbers of batches, which old files lack."""
    expected, got = (
        {name: list(tensor.shape) for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}
        for state in (model.state_dict(), tensors)
    )
    return Differences(
        [name for name in expected if name not in got],
        [name for name in got if name not in expected],
        {name: (expected[name], got[name]) for name in expected if name in got and expected[name] != got[name]},
    )


def _read(path: Path) -> Weights:
    read = {".safetensors": _read_safetensors, ".pkl": safe_pickle.load}.get(path.suffix, _read_torch)
    return _recognise(read(path), path)


def _recognise(content: Any, path: Path) -> Weights:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary, got {type(content).__name__}")
    state = content.get("model", content)
    if "config" in content and "categories" in content:
        if (number := content.get("format")) != FORMAT:
            raise ValueError(
                f"{path}: expected a checkpoint of format {FORMAT}, got {number or 'an older one without a number'};"
                " another version of fastmask has written it, and only that version reads it"
            )
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
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, struct.error) as error:
        # A damaged file may raise any of these
        raise ValueError(f"{path}: expected tensors and plain values, got a file that torch.load refuses") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        tensors = safetensors.torch.load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    if not metadata.keys() >= {"config", "categories"}:
        return {"model": tensors}
    keys = ("format", "config", "categories")
    return {"model": tensors} | {key: json.loads(metadata[key]) for key in keys if key in metadata}


def _category(values: Mapping[str, Any]) -> Category:
    skeleton = tuple((first, second) for first, second in values["skeleton"])
    return Category(values["id"], values["name"], tuple(values["keypoints"]), skeleton)
