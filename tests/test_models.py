"""SegNet's contract: features -> classifier -> logits, both architectures, both norms; weights that fit and weights that do not."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import CLASSES, build
from torch import nn

from mkd_core.models import SegNet, file_sha256, load_encoder, nearest, resize

ARCHS = ("deeplabv3plus", "pspnet")


@pytest.fixture(scope="module", params=ARCHS)
def net(request):
    torch.manual_seed(0)
    return build(request.param).eval()


def test_features_classifier_logits(net):
    x = torch.randn(2, 3, 64, 48)
    features = net.features(x)
    stride = 8 if hasattr(net.decoder, "psp") else 4
    assert features.shape == (2, net.classifier.in_channels, 64 // stride, 48 // stride)
    assert net.classifier.weight.shape == (CLASSES, features.shape[1], 1, 1)
    # The classifier is a matrix product per pixel, the W of FDA; the logits are its bilinear enlargement.
    small = (
        torch.einsum("ca,bahw->bchw", net.classifier.weight[:, :, 0, 0], features)
        + net.classifier.bias[:, None, None]
    )
    expected = F.interpolate(small, (64, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_of_every_stage_is_used(net):
    """smp's PSPNet leaves its last stages out by default: the gradient must reach all of them."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_(1)  # residual branches start at zero
    net.train()
    net(torch.randn(2, 3, 64, 64)).square().mean().backward()
    names = {n.split(".")[0] for n, _ in net.named_parameters()}
    assert names == {"encoder", "decoder", "classifier"}
    unused = [n for n, p in net.named_parameters() if p.grad is None]
    assert not unused
    assert sum(p.grad.abs().sum() > 0 for p in net.parameters()) > 0.9 * len([*net.parameters()])
    net.zero_grad()
    net.eval()


@pytest.mark.parametrize("arch", ["deeplabv3plus", "pspnet"])
def test_a_shallower_encoder_leaves_its_last_stage_out(arch, tmp_path):
    """What does not run has no parameters, is not asked for in a file, and the rest is the deep network's."""
    torch.manual_seed(0)
    net = SegNet(CLASSES, arch=arch, encoder="resnet18", channels=8, encoder_depth=4)
    assert not any("layer4" in name for name, _ in net.named_parameters())
    net(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    deep = SegNet(CLASSES, arch=arch, encoder="resnet18", channels=8).encoder.state_dict()
    torch.save(
        {name: tensor for name, tensor in deep.items() if not name.startswith("layer4")}, tmp_path / "cut.pth"
    )
    load_encoder(net, str(tmp_path / "cut.pth"))
    assert torch.equal(net.encoder.layer3[1].conv2.weight, deep["layer3.1.conv2.weight"])


def test_pspnet_reaches_layer4_of_a_resnet_at_stride_8():
    torch.manual_seed(0)
    net = SegNet(CLASSES, arch="pspnet", encoder="resnet18", channels=8)
    shapes = []
    net.encoder.layer4.register_forward_hook(lambda m, i, o: shapes.append(o.shape))
    net(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert shapes == [(2, 512, 8, 8)]  # stride 8, as dilated ResNets of PSPNet have
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.encoder.layer4.parameters())


def test_deeplab_has_stride_16_and_the_rates_of_the_paper():
    net = SegNet(CLASSES, encoder="resnet18", channels=8)
    assert net.encoder(torch.randn(1, 3, 64, 64).expand(2, -1, -1, -1))[-1].shape[-2:] == (4, 4)
    dilations = {m.dilation[0] for m in net.decoder.modules() if isinstance(m, nn.Conv2d)}
    assert dilations == {1, 6, 12, 18}


@pytest.mark.parametrize("arch", ARCHS)
def test_group_norm_leaves_no_batch_norm(arch):
    torch.manual_seed(0)
    net = build(arch, norm="group")
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    groups = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    reference = [m for m in build(arch).modules() if isinstance(m, nn.BatchNorm2d)]
    assert [g.num_channels for g in groups] == [b.num_features for b in reference] and len(groups) > 5
    # Independent of the rest of the batch, in training too; and a single image can be trained on.
    x = torch.randn(3, 3, 32, 32)
    net.train()
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-4, atol=1e-5)
    assert net(x[:1]).isfinite().all()


def test_group_norm_keeps_the_activations_of_the_encoder():
    """timm's norm-and-activation layers must not lose their activation: the same layer, group statistics by hand, is what runs."""
    torch.manual_seed(0)
    batch, group = build(), build(norm="group")

    def activations(net: nn.Module) -> int:
        return len(
            [
                m
                for m in net.encoder.modules()
                if isinstance(m, nn.ReLU | nn.ReLU6 | nn.SiLU | nn.GELU | nn.Hardswish)
            ]
        )

    assert activations(batch) == activations(group) > 0


def test_batch_norm_momentum():
    net = build(bn_momentum=0.001)
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.001}


def test_unknown_architecture_lists_what_there_is():
    with pytest.raises(ValueError, match="deeplabv3plus, pspnet"):
        SegNet(CLASSES, arch="unet", encoder="tu-test_resnet")


def test_pspnet_with_a_timm_encoder():
    """Xception-65 and the deep stems are timm's (tu-...): PSPNet takes them, or says that it cannot."""
    try:
        net = SegNet(CLASSES, arch="pspnet", encoder="tu-test_resnet", channels=8)
    except ValueError as error:
        assert "tu-test_resnet" in str(error)
    else:
        assert net.features(torch.randn(2, 3, 64, 64)).shape[-1] == 8


def test_resize_and_nearest():
    maps = torch.randn(2, 3, 4, 6)
    assert resize(maps, (4, 6)) is maps and nearest(maps, (4, 6)) is maps
    torch.testing.assert_close(
        resize(maps, (8, 3)), F.interpolate(maps, (8, 3), mode="bilinear", align_corners=False)
    )
    for size in ((8, 12), (2, 3), (3, 5), (7, 6)):
        assert torch.equal(nearest(maps, size), F.interpolate(maps, size, mode="nearest"))
        label = torch.randint(0, 255, (2, 4, 6))
        assert torch.equal(
            nearest(label, size), F.interpolate(label[:, None].double(), size, mode="nearest")[:, 0].long()
        )
        assert nearest(label > 9, size).dtype == torch.bool


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_encoder_weights_go_in(tmp_path, suffix):
    torch.manual_seed(0)
    source, target = build(), build()
    path = tmp_path / f"encoder{suffix}"
    if suffix == ".pth":
        torch.save(source.encoder.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(source.encoder.state_dict(), path)
    load_encoder(target, str(path))
    for key, value in source.encoder.state_dict().items():
        assert torch.equal(value, target.encoder.state_dict()[key])
    assert not torch.equal(source.classifier.weight, target.classifier.weight)
    assert len(file_sha256(path)) == 64


@pytest.mark.parametrize("name", ["test_resnet", "xception65"])
def test_files_of_timm_go_in(tmp_path, name):
    """Saved by timm itself, classifier head included: every tensor of the encoder is the file's, and the features are timm's own."""
    torch.manual_seed(0)
    source = timm.create_model(name).eval()
    for tensor in source.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(
                0.5, 1
            )  # fresh statistics are 0 and 1 everywhere: they could not tell what was loaded
    net, path = SegNet(CLASSES, encoder=f"tu-{name}", channels=16).eval(), tmp_path / "timm.pth"
    torch.save(source.state_dict(), path)
    load_encoder(net, str(path))
    file = sorted(
        t.double().sum().item()
        for key, t in source.state_dict().items()
        if not key.startswith(("fc.", "head.fc."))
    )
    assert sorted(t.double().sum().item() for t in net.encoder.state_dict().values()) == file
    if name == "test_resnet":  # up to stride 8, where dilation has not begun
        x = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(
            net.encoder(x)[3], source.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
        )

    state = source.state_dict()
    state.pop(next(iter(state)))
    torch.save(state, path)
    with pytest.raises(ValueError, match="does not fit the encoder: .*Missing key"):
        load_encoder(net, str(path))


class Danger:
    def __reduce__(self):
        return print, ("unpickled",)


def test_weights_that_need_unpickling_are_refused(tmp_path, capsys):
    path = tmp_path / "net.pth"
    for write in (
        lambda: torch.save({"a": Danger()}, path),
        lambda: path.write_bytes(pickle.dumps(Danger())),
    ):
        write()
        with pytest.raises(ValueError, match=r"net\.pth.*weights_only=True"):
            load_encoder(build(), str(path))
    assert "unpickled" not in capsys.readouterr().out


def test_weights_that_do_not_fit_are_refused(tmp_path):
    net, path = build(), tmp_path / "net.pth"
    good = net.encoder.state_dict()
    before = {k: v.clone() for k, v in good.items()}
    first = next(iter(good))
    for wrong, word in (
        ({f"module.{k}": v for k, v in good.items()}, first),
        ({k: v for k, v in good.items() if k != first}, first),
        (good | {first: torch.zeros(1)}, first),
        ([1, 2], "net.pth"),
        (torch.zeros(3), "net.pth"),
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="does not fit the encoder") as error:
            load_encoder(net, str(path))
        assert word in str(error.value) and "net.pth" in str(error.value)
    assert sum(torch.equal(before[k], v) for k, v in net.encoder.state_dict().items()) >= len(before) - 1


def test_weights_without_names_or_a_folder_are_refused(tmp_path):
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    for encoder, path, word in (("tu-test_resnet", tmp_path / "numbers.pth", "does not fit the encoder"), ("resnet18", tmp_path, "is no file"),
                                ("resnet18", "~nosuchuser/w.pth", "~nosuchuser/w.pth does not exist")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            load_encoder(SegNet(CLASSES, encoder=encoder, channels=16), str(path))


def test_weights_file_missing_or_cut_short(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_encoder(build(), str(tmp_path / "no.pth"))
    path = tmp_path / "short.pth"
    torch.save(build().encoder.state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"short\.pth"):
        load_encoder(build(), str(path))


def test_imagenet_mobilenet_fits(shared):
    net = SegNet(CLASSES, encoder="mobilenet_v2", channels=16)
    load_encoder(net, str(shared / "weights/mobilenet_v2_imagenet/mobilenet_v2_imagenet_features.pth"))
