"""CutMix. A mask is True where an image keeps its own pixel and False where its partner's is pasted.

Boxes are drawn from torch's global generator on the host.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import parallel

Size = Sequence[int]
Device = torch.device | str


def partner(tensor: Tensor) -> Tensor:
    """Shift the batch: sample i's partner is sample i + 1, the last one's is the first (released MKD)."""
    return parallel.following(tensor)


def mix(tensor: Tensor, mask: Tensor) -> Tensor:
    """Keep the own value where mask (B, H, W) holds and take the partner's elsewhere.

    tensor: (B, H, W) or (B, C, H, W), of images, logits, labels, validity.
    """
    return torch.where(mask if tensor.ndim == 3 else mask[:, None], tensor, partner(tensor))


def xor_boxes(
    batch: int, size: Size, device: Device = "cpu", boxes: int = 3, area: tuple[float, float] = (0.25, 0.5)
) -> Tensor:
    """CutMix mask (batch, H, W) bool of CPS and MKD ("BOX-3"): True inside an odd number of `boxes` boxes.

    Each box draws an area fraction p ~ U(area), a log-uniform aspect y = p ** U(0, 1), x = p / y, both
    sides times sqrt(1 / boxes), and a place inside. 0 boxes: all True, no mixing. French et al.: 1, area 0.5.
    M * own + (1 - M) * partner as in released MKD: own pixels are the smaller part (mean 0.252). The paper
    and CPS print it the other way round, which is the same law: partners are exchangeable.
    """
    if boxes == 0:
        return torch.ones(batch, *size, dtype=torch.bool, device=device)
    p = torch.empty(batch * parallel.world(), boxes).uniform_(*area)
    y, sides = p ** torch.rand_like(p), torch.tensor(size)
    extent = (torch.stack((y, p / y), -1) * math.sqrt(1 / boxes) * sides).round()  # (batch, boxes, 2)
    start = ((sides - extent) * torch.rand_like(extent)).round()
    return _inside(start, start + extent, size, device).sum(1) % 2 == 1


def ratio_box(batch: int, size: Size, device: Device = "cpu", probability: float = 0.5) -> Tensor:
    """CutMix mask (batch, H, W) bool of FixMatch, UniMatch ("BOX-UM") and ST++: False inside one box.

    With `probability` (else all True) a sample draws an area fraction ~ U(0.02, 0.4), height / width
    ~ U(0.3, 1 / 0.3) and a place inside. Released: ratio and place are drawn again until the box lies
    inside. That favours ratios with much room; here the ratio comes at once from 128 equal steps
    weighted by that room, which is the same law.
    """
    batch, sides = batch * parallel.world(), torch.tensor(size)
    pixels = torch.empty(batch, 1).uniform_(0.02, 0.4) * size[0] * size[1]
    ratio = 0.3 + (1 / 0.3 - 0.3) * (torch.arange(128) + torch.rand(batch, 128)) / 128
    # (batch, 128, 2): height, width
    extents = torch.stack(((pixels * ratio).sqrt(), (pixels / ratio).sqrt()), -1).floor()
    # A box of that area has no place in a long crop: it is cut off.
    none_fits = ~(extents <= sides).all(-1).any(1)[:, None, None]
    extents = torch.where(none_fits, torch.minimum(extents, sides), extents)
    room = (sides - extents + 1).clamp_min(0)
    chosen = torch.multinomial(room.prod(-1), 1)[..., None].expand(-1, -1, 2)
    start = (torch.rand(batch, 1, 2) * room.gather(1, chosen)).floor()
    extent = extents.gather(1, chosen) * (torch.rand(batch, 1, 1) < probability)
    return ~_inside(start, start + extent, size, device)[:, 0]


def beta_box(batch: int, size: Size, device: Device = "cpu") -> Tensor:
    """CutMix mask (batch, H, W) bool of PS-MT on VOC ("BOX-B"): False inside one box.

    The batch draws one p ~ Beta(4, 4); both sides are sqrt(1 - p) of the image's. The centre of each
    sample lies anywhere but in the first eighth; what reaches over the border is cut off (mean area 0.36).
    """
    p, sides = torch.distributions.Beta(4.0, 4.0, validate_args=False).sample(), torch.tensor(size)
    half, first = ((1 - p).sqrt() * sides).floor() // 2, sides // 8
    centre = (first + torch.rand(batch * parallel.world(), 1, 2) * (sides - first)).floor()
    return ~_inside(centre - half, centre + half, size, device)[:, 0]


def half_box(batch: int, size: Size, device: Device = "cpu", probability: float = 0.5) -> Tensor:
    """CutMix mask (batch, H, W) bool of U2PL ("BOX-U2"): False inside one box of half the area.

    Width ~ U{floor(W / 2) + 1, ..., W - 1}, height = round(H W / 2 / width), any place inside.
    One coin for the whole batch: with `probability` it is mixed, else all True.
    """
    (height, width), batch = size, batch * parallel.world()
    mixed = torch.rand(()) < probability
    wide = torch.randint(width // 2 + 1, width, (batch, 1))
    extent = torch.stack(((height * width / 2 / wide).round(), wide), -1)
    start = ((torch.tensor(size) - extent + 1) * torch.rand(batch, 1, 2)).floor()
    return ~_inside(start, start + extent * mixed, size, device)[:, 0]


def square(batch: int, size: Size, device: Device = "cpu", share: float = 100 / 513) -> Tensor:
    """CutOut mask (batch, H, W) bool of PseudoSeg: False inside one square anywhere in the image.

    Its side is `share` of the shorter side; released are 100 pixels of a crop of 513.
    """
    side = round(share * min(size))
    start = torch.rand(batch * parallel.world(), 1, 2) * (torch.tensor(size) - side + 1)
    return ~_inside(start.floor(), start.floor() + side, size, device)[:, 0]


def _inside(start: Tensor, end: Tensor, size: Size, device: Device) -> Tensor:
    """Fill boxes: corners (batch, boxes, 2), row and column, on the host -> (batch, boxes, H, W) bool.

    Only the corners are sent to the device, of the samples of this process.
    """
    first, last = send(torch.stack((parallel.share(start), parallel.share(end))), device)[..., None]
    places = [torch.arange(side, device=device) for side in size]
    rows, columns = ((first[..., k, :] <= at) & (at < last[..., k, :]) for k, at in enumerate(places))
    return rows[..., :, None] & columns[..., None, :]


def send(tensor: Tensor, device: Device) -> Tensor:
    """To the device without waiting for it: pageable memory would."""
    cuda = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if cuda else tensor.to(device)
