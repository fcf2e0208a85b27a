"""CutMix. A mask is True where an image keeps its own pixel and False where its partner's is pasted.

Boxes are drawn from torch's global generator on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import parallel


def partner(tensor: Tensor) -> Tensor:
    """Shift the batch: sample i's partner is sample i + 1, the last one's is the first (released MKD)."""
    return parallel.following(tensor)


def mix(tensor: Tensor, mask: Tensor) -> Tensor:
    """Keep the own value where mask (B, H, W) holds and take the partner's elsewhere.

    tensor: (B, H, W) or (B, C, H, W), of images, logits, labels, validity.
    """
    return torch.where(mask if tensor.ndim == 3 else mask[:, None], tensor, partner(tensor))


def xor_boxes(
    batch: int,
    size: Sequence[int],
    device: torch.device | str = "cpu",
    boxes: int = 3,
    area: tuple[float, float] = (0.25, 0.5),
) -> Tensor:
    """CutMix mask (batch, H, W) bool of CPS and MKD ("BOX-3"): True inside an odd number of `boxes` boxes.

    Each box draws an area fraction p ~ U(area), a log-uniform aspect y = p ** U(0, 1), x = p / y, both
    sides times sqrt(1 / boxes), and a place inside the image. 0 boxes: all True, no mixing.
    French et al. use one box of area 0.5: boxes=1, area=(0.5, 0.5).
    Released MKD mixes M * own + (1 - M) * partner with this M: own pixels are the smaller part (mean 0.252).
    """
    height, width = size
    if boxes == 0:
        return torch.ones(batch, height, width, dtype=torch.bool, device=device)
    batch *= parallel.world()
    p = torch.empty(batch, boxes).uniform_(*area)
    y = p ** torch.rand(batch, boxes)
    sides = torch.stack((y, p / y), -1) * math.sqrt(1 / boxes)
    extent = (sides * torch.tensor([height, width])).round()  # (batch, boxes, 2)
    start = ((torch.tensor([height, width]) - extent) * torch.rand(batch, boxes, 2)).round()
    return _inside(start, start + extent, size, device).sum(1) % 2 == 1


def ratio_box(
    batch: int,
    size: Sequence[int],
    device: torch.device | str = "cpu",
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
) -> Tensor:
    """CutMix mask (batch, H, W) bool of FixMatch, UniMatch ("BOX-UM") and ST++: False inside one box.

    With `probability` (else all True) a sample draws an area fraction ~ U(area), height / width
    ~ U(0.3, 1 / 0.3) and a place inside. Released: ratio and place are drawn again until the box lies
    inside. That favours ratios with much room; here the ratio comes at once from 128 equal steps
    weighted by that room, which is the same law.
    """
    height, width = size
    batch *= parallel.world()
    pixels = torch.empty(batch, 1).uniform_(*area) * height * width
    ratio = 0.3 + (1 / 0.3 - 0.3) * (torch.arange(128) + torch.rand(batch, 128)) / 128
    extents = torch.stack(
        ((pixels * ratio).sqrt(), (pixels / ratio).sqrt()), -1
    ).floor()  # (batch, 128, 2): height, width
    sides = torch.tensor(size)
    none_fits = (
        ~(extents <= sides).all(-1).any(1)[:, None, None]
    )  # a box of that area has no place in a long crop: it is cut off
    extents = torch.where(none_fits, torch.minimum(extents, sides), extents)
    room = (sides - extents + 1).clamp_min(0)
    chosen = torch.multinomial(room.prod(-1), 1)[..., None].expand(-1, -1, 2)
    start = (torch.rand(batch, 1, 2) * room.gather(1, chosen)).floor()
    extent = extents.gather(1, chosen) * (torch.rand(batch, 1, 1) < probability)
    return ~_inside(start, start + extent, size, device)[:, 0]


def beta_box(batch: int, size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """CutMix mask (batch, H, W) bool of PS-MT on VOC ("BOX-B"): False inside one box.

    The batch draws one p ~ Beta(4, 4); both sides are sqrt(1 - p) of the image's. The centre of each
    sample lies anywhere but in the first eighth; what reaches over the border is cut off (mean area 0.36).
    """
    sides = torch.tensor(size)
    half = (
        (1 - torch.distributions.Beta(4.0, 4.0, validate_args=False).sample()).sqrt() * sides
    ).floor() // 2
    first = sides // 8
    centre = (first + torch.rand(batch * parallel.world(), 1, 2) * (sides - first)).floor()
    return ~_inside(centre - half, centre + half, size, device)[:, 0]


def half_box(
    batch: int, size: Sequence[int], device: torch.device | str = "cpu", probability: float = 0.5
) -> Tensor:
    """CutMix mask (batch, H, W) bool of U2PL ("BOX-U2"): False inside one box of half the area.

    Width ~ U{floor(W / 2) + 1, ..., W - 1}, height = round(H W / 2 / width), any place inside.
    One coin for the whole batch: with `probability` it is mixed, else all True.
    """
    height, width = size
    batch *= parallel.world()
    mixed = torch.rand(()) < probability
    wide = torch.randint(width // 2 + 1, width, (batch, 1))
    extent = torch.stack(((height * width / 2 / wide).round(), wide), -1)
    start = ((torch.tensor([height, width]) - extent + 1) * torch.rand(batch, 1, 2)).floor()
    return ~_inside(start, start + extent * mixed, size, device)[:, 0]


def square(
    batch: int, size: Sequence[int], device: torch.device | str = "cpu", share: float = 100 / 513
) -> Tensor:
    """CutOut mask (batch, H, W) bool of PseudoSeg: False inside one square anywhere in the image.

    Its side is `share` of the shorter side; released are 100 pixels of a crop of 513.
    """
    side = round(share * min(size))
    whole = batch * parallel.world()
    start = (torch.rand(whole, 1, 2) * (torch.tensor(size) - side + 1)).floor()
    return ~_inside(start, start + side, size, device)[:, 0]


def _inside(start: Tensor, end: Tensor, size: Sequence[int], device: torch.device | str) -> Tensor:
    """Fill boxes: corners (batch, boxes, 2), row and column, on the host -> (batch, boxes, H, W) bool.

    Only the corners are sent to the device, of the samples of this process.
    """
    corners = send(torch.stack((parallel.share(start), parallel.share(end))), device)
    inside = []
    for axis, side in enumerate(size):
        place = torch.arange(side, device=device)
        inside.append((place >= corners[0, ..., axis, None]) & (place < corners[1, ..., axis, None]))
    return inside[0][..., :, None] & inside[1][..., None, :]


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """To the device without waiting for it: pageable memory would."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if torch.device(device).type == "cuda"
        else tensor.to(device)
    )
