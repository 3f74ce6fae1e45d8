"""Region proposal network (Ren et al. 2015) over one map or the levels of a pyramid (Lin et al. 2017).

B images, A anchors at each position, N anchors over all positions and levels, P proposals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import box_ops as box_ops
from fastmask import nms_padded
from models.config import AnchorConfig, RPNConfig
from models.distributed import mean_count
from models.network.layers import Convs, initialise
from models.network.matching import POSITIVE, match, matched_rows, sample
from models.structures import Target


def base_anchors(config: AnchorConfig, levels: int) -> Tensor:
    """Anchors around the origin, `[levels, A, 4]`: sizes, then aspect ratios.

    Each level of a pyramid has one of `config.sizes`; a single level has them all.
    """
    if levels > 1 and len(config.sizes) != levels:
        raise ValueError(f"anchors.sizes: expected one for each of {levels} levels, got {config.sizes}")
    sizes = torch.tensor(config.sizes).reshape(levels, -1, 1)
    ratios = torch.tensor(config.aspect_ratios).sqrt()
    half = torch.stack([sizes / ratios, sizes * ratios], -1).flatten(1, 2) / 2
    cells = torch.cat([-half, half], -1)
    return cells.round() if config.rounded else cells


class RPN(nn.Module):
    """Scores and refines anchors at every position.

    Args:
        config: see `RPNConfig`.
        channels: of the maps.
        strides: image pixels per pixel of each map.
    """

    def __init__(self, config: RPNConfig, channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.strides = strides
        self.register_buffer("cells", base_anchors(config.anchors, len(strides)), persistent=False)
        anchors = self.cells.shape[1]
        self.convs = Convs(channels, channels, config.convs)
        self.objectness = nn.Conv2d(channels, anchors, 1)
        self.deltas = nn.Conv2d(channels, anchors * 4, 1)
        initialise(self, partial(nn.init.normal_, std=0.01))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each level, logits `[B, H * W * A]` and deltas `[B, H * W * A, 4]`, float32."""
        logits, deltas = [], []
        for x in maps:
            x = self.convs(x)
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float())
        return logits, deltas

    def anchors(self, maps: Sequence[Tensor], image_size: Sequence[int]) -> list[Tensor]:
        """Anchors of each map over a padded image of (height, width), `[H * W * A, 4]`: rows, columns, then cells."""
        levels = []
        for feature, cells, exact in zip(maps, self.cells, self.strides, strict=True):
            axes = []
            for length, whole in zip(feature.shape[2:], image_size, strict=True):
                stride = whole // length if self.config.anchors.rounded else exact
                axes.append(torch.arange(length, device=cells.device) * stride)
            y, x = torch.meshgrid(*axes, indexing="ij")
            levels.append((torch.stack([x, y, x, y], -1)[:, :, None] + cells).flatten(0, 2))
        return levels

    @torch.no_grad()
    def propose(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor], sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best boxes, after NMS on each level by itself.

        Args:
            logits, deltas: from `forward`.
            anchors: of each level.
            sizes: `[B, 2]`, (height, width) of the images before padding.

        Returns:
            Boxes `[B, P, 4]` by falling score, zeros after each image's own; and how many there are, `[B]`.
        """
        config = self.config
        per_level = config.pre_nms_top_k_train if self.training else config.pre_nms_top_k
        proposals = config.proposals_train if self.training else config.proposals
        longest = min(per_level, max(len(level) for level in anchors))
        scores, boxes = [], []
        for logit, delta, anchor in zip(logits, deltas, anchors, strict=True):
            best, index = logit.topk(min(per_level, len(anchor)))  # decode only what takes part
            box = box_ops.decode(delta.take_along_dim(index[..., None], 1), anchor[index])
            padding = longest - best.shape[1]
            scores.append(F.pad(best, (0, padding), value=-math.inf))
            boxes.append(F.pad(box, (0, 0, 0, padding)))
        score, box = torch.stack(scores, 1), torch.stack(boxes, 1)  # [B, levels, longest]
        box = box_ops.clip(box, sizes[:, None, None])
        thin = (box[..., 2:] - box[..., :2]).amin(-1) < config.min_box_size
        score = score.masked_fill(thin, -math.inf)

        index, _ = nms_padded(
            box.flatten(0, 1),
            score.flatten(0, 1),
            config.nms_iou,
            min(longest, proposals),
            score_threshold=-math.inf,
        )
        index = index.unflatten(0, score.shape[:2])
        score = score.gather(2, index.clamp(min=0)).masked_fill(index < 0, -math.inf).flatten(1)
        box = box.take_along_dim(index.clamp(min=0)[..., None], 2).flatten(1, 2)
        score, index = score.topk(min(proposals, score.shape[1]))
        box = box.take_along_dim(index[..., None], 1)
        real = score > -math.inf
        return box.masked_fill(~real[..., None], 0.0), real.sum(1)

    def losses(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        targets: Sequence[Target],
        crowd_overlap: float,
    ) -> dict[str, Tensor]:
        """Mean cross entropy over sampled anchors, and smooth L1 of the positive ones over the same number."""
        config = self.config
        logit, delta, anchor = torch.cat(list(logits), 1), torch.cat(list(deltas), 1), torch.cat(list(anchors))
        labels, matched = [], []
        for target in targets:
            index, label = match(
                anchor,
                target,
                config.positive_iou,
                config.negative_iou,
                crowd_overlap=crowd_overlap,
                best_for_each=True,
            )
            labels.append(label)
            matched.append(matched_rows(target.boxes, index))
        label = torch.stack(labels)
        index, valid = sample(label, config.samples_per_image, config.positive_fraction)
        number = mean_count(valid.sum())
        positive = valid & (label.gather(1, index) == POSITIVE)
        chosen = logit.gather(1, index)
        objectness = F.binary_cross_entropy_with_logits(chosen, positive.to(chosen), reduction="none")

        anchor = anchor[index]
        wanted = torch.stack(matched).take_along_dim(index[..., None], 1)
        goal = box_ops.encode(torch.where(positive[..., None], wanted, anchor), anchor)
        distance = F.smooth_l1_loss(
            delta.take_along_dim(index[..., None], 1), goal, beta=config.smooth_l1_beta, reduction="none"
        )
        return {
            "rpn_objectness": (objectness * valid).sum() / number,
            "rpn_box": (distance * positive[..., None]).sum() / number,
        }
