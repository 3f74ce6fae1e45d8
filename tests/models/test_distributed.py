"""Two processes compute the same gradients as one process with all the images."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fastmask import Masks
from models import preprocess
from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS
from models.structures import Target, pad_targets

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]


def detector():
    """A detector that takes all samples, so none is drawn at random, and whose norms do not depend on the batch."""
    config = PRESETS["demo"].model
    config = replace(
        config,
        classes=3,
        backbone=replace(config.backbone, norm="frozen"),
        features=replace(config.features, norm="none"),
        box=replace(config.box, norm="none"),
        mask=replace(config.mask, norm="none"),
        rpn=replace(config.rpn, samples_per_image=10**6, pre_nms_top_k_train=50),
        sampling=replace(config.sampling, rois_per_image=10**6),
    )
    torch.manual_seed(0)
    return MaskRCNN(config).train()


def batch(part):
    """Two of four images, with different numbers of objects, so the sums of losses have unequal weights."""
    g = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, 64, 96), generator=g, dtype=torch.uint8) for _ in range(4)]
    targets = []
    for num_objects in (1, 0, 3, 2):
        low = torch.rand(num_objects, 2, generator=g) * 30
        boxes = torch.cat([low, low + 10 + 20 * torch.rand(num_objects, 2, generator=g)], 1)
        masks = torch.randint(0, 2, (num_objects, 64, 96), generator=g, dtype=torch.uint8)
        targets.append(Target(boxes, torch.arange(num_objects) % 3 + 1, torch.zeros(0, 4), Masks.from_bitmaps(masks)))
    return *preprocess.batch(images[part], PRESETS["demo"].model.input), pad_targets(targets[part])


def gradients(network, part):
    sum(network(*batch(part)).values()).backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in network.named_parameters()}


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = gradients(DistributedDataParallel(detector()), slice(0, 2) if rank == 0 else slice(2, 4))
    if rank == 0:
        torch.save(result, folder / "gradients.pth")
    dist.destroy_process_group()


def test_gradients_of_two_processes_equal_those_of_one(tmp_path):
    mp.set_forkserver_preload(["models.network.mask_rcnn"])  # torch is imported once
    mp.start_processes(process, (tmp_path,), 2, start_method="forkserver")
    result = torch.load(tmp_path / "gradients.pth", weights_only=True)
    expected = gradients(detector(), slice(0, 4))
    for name, gradient in expected.items():
        error = (result[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-4, name
