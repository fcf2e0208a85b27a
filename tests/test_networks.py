"""The released code's network, vision transformers, their files, and two unlike networks in one run."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from tiny import CLASSES, config
from torch import Tensor

from mkd_core.evaluate import PROTOCOLS
from mkd_core.models import SegNet, load_encoder, stride
from mkd_core.runner import run
from mkd_core.train import build_method

DINOV2, DINOV3 = "tu-vit_small_patch14_dinov2", "tu-vit_small_patch16_dinov3"


def bn(name: str, width: int) -> dict[str, tuple[int, ...]]:
    four = {f"{name}.{key}": (width,) for key in ("weight", "bias", "running_mean", "running_var")}
    return four | {f"{name}.num_batches_tracked": ()}


def released_head(inputs: int, c1: int, width: int) -> dict[str, tuple[int, ...]]:
    """DepthwiseSeparableASPPHead(inputs, c1, c1_channels=48, width, dilations=(1, 6, 12, 18))."""
    convs = {"image_pool.1": (width, inputs, 1, 1), "aspp_modules.0": (width, inputs, 1, 1)}
    convs |= {"bottleneck": (width, 5 * width, 3, 3), "c1_bottleneck": (48, c1, 1, 1)}
    separable = {f"aspp_modules.{i}": inputs for i in (1, 2, 3)}
    for name, before in (separable | {"sep_bottleneck.0": width + 48, "sep_bottleneck.1": width}).items():
        convs[f"{name}.depthwise_conv"] = (before, 1, 3, 3)
        convs[f"{name}.pointwise_conv"] = (width, before, 1, 1)
    shapes = {f"{name}.conv.weight": weight for name, weight in convs.items()}
    for name, weight in convs.items():
        shapes |= bn(f"{name}.bn", weight[0])
    return shapes


def v1c(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of ResNetV1c without its classifier, by OpenMMLab's names: torchvision's, but for the stem."""
    with torch.device("meta"):
        standard = getattr(torchvision.models, f"resnet{layers}")().state_dict()
    shapes = {name: tuple(t.shape) for name, t in standard.items() if name.startswith("layer")}
    for i, (inputs, outputs) in enumerate(((3, 32), (32, 32), (32, 64))):
        shapes |= {f"stem.{3 * i}.weight": (outputs, inputs, 3, 3)} | bn(f"stem.{3 * i + 1}", outputs)
    return shapes


def renamed(name: str) -> str:
    """OpenMMLab's name of a tensor of the stem as timm has it."""
    for old, new in (("stem.7.", "bn1."), ("stem.", "conv1.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@pytest.mark.parametrize("layers", [50, 101])
def test_the_network_of_the_released_code(layers):
    """Every tensor of ResNetV1c, DepthwiseSeparableASPPHead and classifier by name and shape; no other."""
    with torch.device("meta"):
        net = SegNet(21, arch="deeplabv3plus_mmseg", encoder=f"tu-resnet{layers}c")
    expected = {"classifier.weight": (21, 256, 1, 1), "classifier.bias": (21,)}
    expected |= {f"decoder.{name}": shape for name, shape in released_head(2048, 256, 256).items()}
    expected |= {f"encoder.model.{renamed(name)}": shape for name, shape in v1c(layers).items()}
    assert {name: tuple(t.shape) for name, t in net.state_dict().items()} == expected
    # Strides 1, 2, 2, 1 and dilations 1, 1, 1, 2, contracted: the first block of the dilated stage has half.
    convs = {name: m for name, m in net.encoder.named_modules() if name.endswith("conv2")}
    for stage, (step, dilation, first) in enumerate(((1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 2, 1)), 1):
        found = [(m.stride[0], m.dilation[0]) for n, m in convs.items() if f"layer{stage}." in n]
        assert found == [(step, first)] + [(1, dilation)] * (len(found) - 1)
    rates = [m.dilation[0] for n, m in net.decoder.named_modules() if n.endswith("depthwise_conv.conv")]
    assert rates == [6, 12, 18, 1, 1]


@pytest.mark.parametrize("size", [(64, 48), (70, 42)])
def test_its_grid_and_its_head_by_hand(size):
    """1/4 of the image; concatenation in the head's order, bilinear without aligned corners."""
    torch.manual_seed(0)
    net = SegNet(CLASSES, arch="deeplabv3plus_mmseg", encoder="tu-resnet50c", channels=8).eval()
    x = torch.randn(2, 3, *size)
    maps, d = net.encoder(x), net.decoder
    low, deep = maps[2], maps[-1]
    pooled = F.interpolate(d.image_pool(deep), deep.shape[-2:], mode="bilinear", align_corners=False)
    context = d.bottleneck(torch.cat([pooled, *[m(deep) for m in d.aspp_modules]], 1))
    up = F.interpolate(context, low.shape[-2:], mode="bilinear", align_corners=False)
    expected = d.sep_bottleneck(torch.cat([up, d.c1_bottleneck(low)], 1))
    found = net.features(x)
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, 8, *[-(-side // 4) for side in size]) and net(x).shape[-2:] == size
    net.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_files_of_openmmlab_and_of_torchvision_s_style_are_told_apart(tmp_path):
    """The same numbers under both names give the same features; a standard stem is refused."""
    torch.manual_seed(0)
    shapes = v1c(50)
    file = {n: 0.05 * torch.randn(s) for n, s in shapes.items() if not n.endswith("tracked")}
    file = {n: t.abs() + 0.5 if n.endswith("var") else t for n, t in file.items()}
    classifier = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    style = {renamed(name): tensor for name, tensor in (file | classifier).items()}
    assert "conv1.6.weight" in style and "bn1.weight" in style
    x, features = torch.randn(1, 3, 64, 64), []
    for i, state in enumerate((
        file, {"meta": {"epoch": 1}, "state_dict": file | classifier}, {f"backbone.{n}": t for n, t in file.items()},
        style,
    )):  # fmt: skip
        torch.save(state, tmp_path / f"{i}.pth")
        torch.manual_seed(1)
        net = SegNet(CLASSES, arch="deeplabv3plus_mmseg", encoder="tu-resnet50c", channels=8).eval()
        load_encoder(net, str(tmp_path / f"{i}.pth"))
        features.append(net.features(x))
    assert torch.equal(net.encoder.model.bn1.running_var, file["stem.7.running_var"])
    assert all(torch.equal(features[0], other) for other in features[1:]) and features[0].std() > 0

    standard = style | {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    standard = {n: t for n, t in standard.items() if not n.startswith(("conv1.0", "conv1.3", "conv1.6"))}
    torch.save(standard, tmp_path / "standard.pth")
    with pytest.raises(ValueError, match=r"does not fit the encoder: .*Missing key.*conv1\.0\.weight"):
        load_encoder(net, str(tmp_path / "standard.pth"))


@pytest.mark.parametrize("encoder, patch", [("tu-test_vit", 16), (DINOV2, 14), (DINOV3, 16)])
def test_vit_features_classifier_logits(encoder, patch):
    torch.manual_seed(0)
    net = SegNet(CLASSES, arch="dpt", encoder=encoder, channels=8)
    x = torch.randn(2, 3, 4 * patch, 3 * patch)
    features = net.features(x)
    assert stride("dpt", encoder) == patch and features.shape == (2, 8, 32, 24)
    expected = F.interpolate(net.classifier(features), x.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(x), expected)
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        near = net.eval()(x).float()
    torch.testing.assert_close(near, net(x).detach(), rtol=0.1, atol=0.1 * net(x).std().item())
    odd = torch.randn(1, 3, 75, 50)
    assert net(odd).shape == (1, CLASSES, 75, 50)  # any size
    torch.testing.assert_close(PROTOCOLS["whole"](net, odd, (32, 32)), net(odd).softmax(1))


def test_its_maps_are_timm_s_at_every_quarter_and_position_embeddings_interpolated():
    torch.manual_seed(0)
    net = SegNet(CLASSES, arch="dpt", encoder=DINOV2, channels=8).eval()
    model, x = net.encoder.model, torch.randn(1, 3, 56, 42)
    tokens, expected = model.patch_embed(x), []
    tokens = model._pos_embed(tokens)
    for i, block in enumerate(model.blocks):
        tokens = block(tokens)
        if i in (2, 5, 8, 11):
            expected.append(model.norm(tokens)[:, 1:].transpose(1, 2).reshape(1, 384, 4, 3))
    _, _, *maps = net.encoder(x)
    assert len(maps) == 4
    for a, b in zip(maps, expected, strict=True):
        torch.testing.assert_close(a, b)
    x = torch.randn(1, 3, 61, 71)  # another size is resized to the nearest patches
    resized = F.interpolate(x, (56, 70), mode="bilinear", align_corners=False)
    torch.testing.assert_close(net.features(x), net.features(resized))
    grid = net.encoder.model.pos_embed[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    assert grid.shape[-1] == 37  # of crop 518
    small = F.interpolate(grid, (5, 4), mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad():
        net.encoder.model.patch_embed.proj.weight.zero_()
        net.encoder.model.patch_embed.proj.bias.zero_()
    found = net.encoder.model._pos_embed(net.encoder.model.patch_embed(torch.zeros(1, 3, 70, 56)))[:, 1:]
    torch.testing.assert_close(found, small.flatten(2).transpose(1, 2))


def meta_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's file has a mask token beside the same names."""
    return state | {"mask_token": torch.zeros(1, state["pos_embed"].shape[-1])}


def meta_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    for new, old in names.items():
        state = {key.replace(new, old): tensor for key, tensor in state.items()}
    return state | {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.zeros(16)}


@pytest.mark.parametrize("encoder, metas", [(DINOV2, meta_dinov2), (DINOV3, meta_dinov3)])
def test_files_of_timm_and_of_meta_go_in(encoder, metas, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(encoder.removeprefix("tu-"), num_classes=0).eval()
    for p in model.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    state, x = model.state_dict(), torch.randn(1, 3, 4 * 112, 112)
    for name, file in {"timm": state, "meta": metas(dict(state))}.items():
        torch.save(file, tmp_path / f"{name}.pth")
        net = SegNet(CLASSES, arch="dpt", encoder=encoder, channels=8).eval()
        load_encoder(net, str(tmp_path / f"{name}.pth"))
        for key, tensor in net.encoder.model.state_dict().items():
            assert torch.equal(tensor, state[key]), key
        assert net.features(x).isfinite().all()
    for bad, word in (
        ({key: t for key, t in state.items() if key != "blocks.3.norm1.weight"}, "blocks.3.norm1.weight"),
        (state | {"patch_embed.proj.weight": torch.zeros(384, 3, 8, 8)}, "patch_embed.proj.weight is"),
        ({"conv1.weight": torch.zeros(1)}, "patch_embed.proj.weight"),
    ):
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=f"does not fit the encoder: .*{word}"):
            load_encoder(net, str(tmp_path / "bad.pth"))


def test_dpt_is_for_vision_transformers():
    for encoder in ("resnet18", "tu-resnet50c", "tu-levit_128", "mit_b0"):
        for keys in ({"arch": "dpt", "encoder": encoder}, {"arch2": "dpt", "encoder2": encoder}):
            with pytest.raises(ValueError, match=f"needs a vision transformer of timm, .*; got {encoder}"):
                config(**keys)
    with pytest.raises(ValueError, match="'dpt' needs encoder_depth 5; got 4"):
        build_method(config(**DPT, encoder_depth=4), CLASSES)


DPT = {"arch": "dpt", "encoder": "tu-test_vit", "channels": 8}
UNLIKE = DPT | {"encoder2": "tu-test_resnet", "arch2": "deeplabv3plus_mmseg"}


@pytest.mark.parametrize("keys", [
    {"arch": "deeplabv3plus_mmseg"}, DPT, DPT | {"precision": "bfloat16"}, DPT | {"options": {"fda": 1.0, "threshold": 0.3}},
    UNLIKE | {"options": {"fda": 1.0}},
    DPT | {"method": "cps", "encoder2": "tu-test_resnet", "arch2": "deeplabv3plus"},
    DPT | {"method": "supervised", "supervised_loss": "ohem", "ohem_keep": 50},
], ids=str)  # fmt: skip
def test_a_few_steps_on_the_embedded_data(keys, tmp_path):
    keys = {"method": "mkd"} | keys
    record = run(config(**keys), tmp_path, quiet=True)
    assert 0 <= record.miou <= 100 and record.config["arch"] == keys["arch"]


def test_two_unlike_networks(tmp_path):
    first, second = build_method(config("mkd", **UNLIKE), CLASSES).students
    assert "patch_embed" in str(first.encoder) and "patch_embed" not in str(second.encoder)
    file = tmp_path / "w.pth"
    torch.save({name: tensor + 1 for name, tensor in second.encoder.state_dict().items()}, file)
    keys = ({"weights2": str(file)}, {})
    one, two = (build_method(config("cps", **UNLIKE, **w), CLASSES).students[1] for w in keys)
    name, tensor = next(iter(second.encoder.state_dict().items()))
    assert torch.equal(one.encoder.state_dict()[name], tensor + 1)
    assert not torch.equal(two.encoder.state_dict()[name], tensor + 1)
    assert "tu-test_resnet" in config("mkd", **UNLIKE, weights2="imagenet").weights2
    for method in ("supervised", "fixmatch"):
        with pytest.raises(ValueError, match=f"encoder2 and arch2 are of a second network; {method} has one"):
            build_method(config(method, **UNLIKE), CLASSES)


@pytest.mark.parametrize("keys, least", [
    (DPT | {"crop": (32, 40)}, 16), ({"arch": "dpt", "encoder": DINOV2, "crop": (32, 28)}, 14),
    ({"arch2": "dpt", "encoder2": DINOV2}, 14), (UNLIKE | {"encoder": DINOV2, "arch2": "pspnet", "crop": (42, 42)}, 16)], ids=str)  # fmt: skip
def test_a_crop_is_of_whole_patches_of_both_networks(keys, least):
    with pytest.raises(ValueError, match=f"'crop': sides must be multiples of {least}; got"):
        config("mkd", **keys)
    assert config("mkd", **UNLIKE | {"encoder": DINOV2, "crop": (42, 28)}).crop == (42, 28)
