"""SegNet: an encoder-decoder opened into features -> 1x1 classifier, and how weights get in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pooch
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from safetensors.torch import load_file
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .choices import choose
from .data.base import local
from .heads import DPT, SeparableASPP, ViT

# Encoder, decoder, channels of the decoder's output.
Parts = tuple[Any, nn.Module, int]


def _deeplab(encoder: str, depth: int, channels: int, dropout: float, classes: int) -> Parts:
    net = smp.DeepLabV3Plus(
        encoder, depth, encoder_weights=None, encoder_output_stride=16, classes=classes,
        decoder_atrous_rates=(6, 12, 18), decoder_channels=channels, decoder_aspp_dropout=dropout,
    )  # fmt: skip
    return net.encoder, net.decoder, channels


def _pspnet(encoder: str, depth: int, channels: int, dropout: float, classes: int) -> Parts:
    net = smp.PSPNet(
        encoder, encoder_weights=None, encoder_depth=depth, psp_out_channels=2 * channels,
        psp_dropout=dropout, classes=classes,
    )  # fmt: skip
    # Dilated, and five stages deep: with smp's defaults the last two never run.
    dilated = smp.encoders.get_encoder(encoder, in_channels=3, depth=depth, weights=None, output_stride=8)
    return dilated, net.decoder, 2 * channels


def _mmseg(encoder: str, depth: int, channels: int, dropout: float, classes: int) -> Parts:
    net = smp.encoders.get_encoder(encoder, in_channels=3, depth=depth, weights=None, output_stride=16)
    return net, SeparableASPP(net.out_channels[2], net.out_channels[-1], channels, dropout), channels


def _dpt(encoder: str, depth: int, channels: int, dropout: float, classes: int) -> Parts:
    if depth != 5:
        raise ValueError(f"arch 'dpt' needs encoder_depth 5; got {depth}")
    net = ViT(encoder)
    return net, DPT(net.out_channels[-1], channels, dropout), channels


_MAKE = {"deeplabv3plus": _deeplab, "pspnet": _pspnet, "deeplabv3plus_mmseg": _mmseg, "dpt": _dpt}
ARCHITECTURES = tuple(_MAKE)


class SegNet(nn.Module):
    """Encoder and decoder with a 1x1 classifier of our own, so that FDA sees the classifier's input.

    features(x)    (B, 3, H, W) -> (B, D, h, w), the decoder's output: h = H/4 for DeepLabV3+, H/8 for PSPNet,
                   8 H/patch for DPT
    classifier     Conv2d D -> C, 1x1; its weight is FDA's W
    forward(x)     (B, C, H, W) logits, bilinear from (h, w), align_corners False

    arch           "deeplabv3plus": smp's, output stride 16, ASPP rates (6, 12, 18), separable convolutions;
                   "deeplabv3plus_mmseg": the decoder of the released code (heads.py);
                   "pspnet": output stride 8, the other half of Table 6;
                   "dpt": on vision transformers of timm (DINOv2, DINOv3 ...)
    encoder        any of smp; "tu-<name>" is timm's. The paper's ResNet-v1c is "tu-resnet50c" and
                   "tu-resnet101c", Xception-65 "tu-xception65", DINOv2-S "tu-vit_small_patch14_dinov2",
                   DINOv3-S "tu-vit_small_patch16_dinov3"
    encoder_depth  stages of the encoder that run, 3 to 5 (4: a ResNet ends after layer3); the others are
                   left out, and so may be in its file
    channels       of the decoder, 256 in the paper; UniMatch V2's DPT: small 64, base 128, large 256
    norm           "batch" or "group" (GroupNorm in place of every BatchNorm: small networks from scratch)
    Deviations: PSPNet's classifier is 1x1 here, 3x3 in smp. smp's DeepLabV3+ decoder has one fusion
    convolution and upsamples with aligned corners; the released one has two, without. DPT's logits are
    upsampled without aligned corners (UniMatch V2: with); of DINOv2-L it takes layer 6, not 5. Files of
    tu-xception65 were trained on inputs of mean and standard deviation 0.5; every encoder here sees
    ImageNet's, as in UniMatch's code.
    """

    def __init__(
        self, num_classes: int, *, arch: str = "deeplabv3plus", encoder: str = "resnet50",
        encoder_depth: int = 5, channels: int = 256, dropout: float = 0.0, norm: str = "batch", bn_momentum: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        make = _MAKE[choose("arch", arch, _MAKE)]
        self.encoder, self.decoder, width = make(encoder, encoder_depth, channels, dropout, num_classes)
        if encoder_depth < 5:
            _drop_idle(self.encoder)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        if norm == "group":
            _replace_batchnorm(self)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum

    def features(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        return resize(self.classifier(self.features(x)), x.shape[-2:])


@cache
def stride(arch: str, encoder: str) -> int:
    """Return what a crop's sides must be multiples of: 16; DPT: the patch; MMSegmentation's decoder: 1."""
    with torch.device("meta"):
        return ViT(encoder).patch if arch == "dpt" else 1 if arch == "deeplabv3plus_mmseg" else 16


def resize(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear, align_corners False; nothing where the size is right already."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def nearest(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize labels (B, H, W) or maps (B, C, H, W) of any dtype: row i comes from row floor(i H / h)."""
    if maps.shape[-2:] == tuple(size):
        return maps
    height, width = maps.shape[-2:]
    rows = torch.arange(size[0], device=maps.device) * height // size[0]
    return maps[..., rows[:, None], torch.arange(size[1], device=maps.device) * width // size[1]]


@torch.no_grad()
def _drop_idle(encoder: nn.Module) -> None:
    """Leave out the modules that a forward does not call: their parameters would never have a gradient."""
    called: set[nn.Module] = {encoder}
    hooks = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in encoder.modules()]
    encoder.eval()(torch.zeros(1, 3, 64, 64))
    encoder.train()
    for hook in hooks:
        hook.remove()
    for module in [m for m in encoder.modules() if m in called or called & set(m.modules())]:
        for name, child in module.named_children():
            if not called & set(child.modules()):
                setattr(module, name, nn.Identity())


def _replace_batchnorm(module: nn.Module, groups: int = 8) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            # The largest group count that divides the channels; timm's layers with an activation keep it.
            count = next(g for g in range(groups, 0, -1) if child.num_features % g == 0)
            norm: nn.Module = nn.GroupNorm(count, child.num_features)
            act = getattr(child, "act", None)
            setattr(module, name, nn.Sequential(norm, act) if isinstance(act, nn.Module) else norm)
        else:
            _replace_batchnorm(child, groups)


def checkpoint_activations(net: SegNet) -> None:
    """Let a block of the encoder keep its input alone, and compute the rest again in the backward.

    A block: what a Sequential or ModuleList holds, with more than one convolution or linear layer.
    Losses, gradients and BatchNorm's averages stay what they are; so do copies, which are teachers.
    """
    held = [m for of in net.encoder.modules() if isinstance(of, nn.Sequential | nn.ModuleList) for m in of]
    for block in held:
        layers = [m for m in block.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        if len(layers) > 1 and not isinstance(block, nn.Sequential):
            block.forward = partial(_recomputed, block)


def _recomputed(block: nn.Module, *args: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args)
    norms = [(m, m.weight, m.bias, 0.0, None) for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _seen(norms)))


@contextmanager
def _seen(norms: list[Any]) -> Iterator[None]:
    """Give BatchNorm the weights of the forward (SimpleBaseline has two); its averages hold this batch already."""
    kept = [(norm, norm.weight, norm.bias, norm.momentum, norm.num_batches_tracked) for norm, *_ in norms]
    try:
        for norm, *of in norms:
            norm.weight, norm.bias, norm.momentum, norm.num_batches_tracked = of
        yield
    finally:
        for norm, *of in kept:
            norm.weight, norm.bias, norm.momentum, norm.num_batches_tracked = of


def load_encoder(net: SegNet, weights: str) -> None:
    """Load the encoder from a .pth or .safetensors file: torchvision's, timm's, OpenMMLab's, Meta's.

    Nothing is unpickled. ValueError where the file is missing or does not fit.
    """
    path = weights_file(weights)
    read = load_file if path.suffix == ".safetensors" else partial(torch.load, weights_only=True)
    try:
        state = read(path, "cpu")
    except Exception as error:  # torch and safetensors raise half a dozen types here
        how = f"weights_only=True: {type(error).__name__}; nothing is unpickled"
        raise ValueError(f"{weights} cannot be read with {how}") from error
    try:
        if isinstance(net.encoder, ViT):
            state = net.encoder.translate(state)
        elif isinstance(net.encoder, TimmUniversalEncoder):
            state = _from_timm(list(net.encoder.state_dict()), _from_openmmlab(state))
        idle = tuple(f"{n}." for n, module in net.encoder.named_modules() if isinstance(module, nn.Identity))
        net.encoder.load_state_dict({k: v for k, v in state.items() if not k.startswith(idle)})
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        why = " ".join(str(error).split())[:400]
        hint = " ...; for a file without the last stage: encoder_depth=4" * ("Missing key" in why)
        raise ValueError(f"{weights} does not fit the encoder: {why}{hint}") from error
    if bad := [name for name, tensor in net.encoder.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{weights} holds values that are not finite, first in {bad[0]}")


def _from_timm(own: list[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's keys to smp's: behind "model.", and nested stages in one ("blocks.0" is "blocks_0").

    What is left over once all are there is the classification head.
    """

    def plain(key: str) -> str:
        return key.removeprefix("model.").replace(".", "_")

    names = {plain(key): key for key in own}
    state = {names.get(plain(key), key): tensor for key, tensor in state.items()}
    needed = {key for key in own if not key.endswith("num_batches_tracked")}  # which old files lack
    return {key: state[key] for key in own if key in state} if state.keys() >= needed else state


def _from_openmmlab(state: dict[str, Any]) -> dict[str, Tensor]:
    """Rename OpenMMLab's keys of a ResNet-v1c to timm's: its stem is one sequence, the last BatchNorm included."""
    state = state.get("state_dict", state)
    state = {key.removeprefix("backbone."): tensor for key, tensor in state.items()}
    if "stem.0.weight" not in state:
        return state
    stem = re.compile(r"^stem\.(7\.)?")
    return {stem.sub(lambda m: "bn1." if m[1] else "conv1.", key): t for key, t in state.items()}


def imagenet_file(encoder: str) -> str:
    """The place in the cache of an encoder's ImageNet weights, which `weights_file` fetches.

    Their address is the one that smp, or timm for "tu-...", names. ValueError where they name none.
    """
    _address(encoder)
    return str(Path(pooch.os_cache("mkd")) / f"{encoder}_imagenet.safetensors")


def _address(encoder: str) -> str:
    if encoder.startswith("tu-"):
        about: Any = timm.get_pretrained_cfg(encoder[3:])
        place = {"repo_id": about.hf_hub_id} if about and about.hf_hub_id else None
    else:
        place = smp.encoders.encoders[encoder]["pretrained_settings"].get("imagenet")
    if not place:
        what = f"neither smp nor timm names ImageNet weights of {encoder}"
        raise ValueError(f"{what}; give a file, or '' for random")
    return hf_hub_url(filename="model.safetensors", **place)


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file; ValueError where there is none."""
    found = weights_file(path)
    about = found.stat()
    return _sha256(found, about.st_mtime_ns, about.st_size)


@cache
def _sha256(path: Path, changed: int, size: int) -> str:
    """Read a file once as long as it stays as it is: a grid asks for every run."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_file(path: str | Path) -> Path:
    """The path, if there is such a file; one of `imagenet_file` is fetched, once, and verified."""
    if (found := local(path)).is_file():
        return found
    state = "is no file" if found.exists() else "does not exist"
    how = "give imagenet, a local .pth or .safetensors file of the encoder, or '' for random weights"
    if found.parent == Path(pooch.os_cache("mkd")):
        url = _address(found.name.removesuffix("_imagenet.safetensors"))
        with suppress(Exception):  # a dozen types without a network
            about = get_hf_file_metadata(url, timeout=10)  # the tag of a large file is its sha256
            pooch.retrieve(url, f"sha256:{about.etag}", fname=found.name, path=found.parent)
            return found
        how = f"it could not be fetched. Put {url} there, or {how.replace('imagenet, ', '')}"
    raise ValueError(f"weights file {path} {state}; {how}")
