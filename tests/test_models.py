"""SegNet's contract: features -> classifier -> logits, both architectures, both norms; weights that fit and weights that do not."""

from __future__ import annotations

import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import CLASSES, build
from torch import nn

from mkd_core.models import SegNet, load_encoder, nearest, resize

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
    small = torch.einsum("ca,bahw->bchw", net.classifier.weight[:, :, 0, 0], features)
    small = small + net.classifier.bias[:, None, None]
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
    for state in (deep, {name: t for name, t in deep.items() if not name.startswith("layer4")}):
        torch.save(state, tmp_path / "w.pth")
        net.encoder.layer3[1].conv2.weight.data.zero_()
        load_encoder(net, str(tmp_path / "w.pth"))
        assert torch.equal(net.encoder.layer3[1].conv2.weight, deep["layer3.1.conv2.weight"])


def test_strides_and_rates_are_those_of_the_papers():
    torch.manual_seed(0)
    net = SegNet(CLASSES, arch="pspnet", encoder="resnet18", channels=8)
    shapes = []
    net.encoder.layer4.register_forward_hook(lambda m, i, o: shapes.append(o.shape))
    net(torch.randn(2, 3, 64, 64))
    assert shapes == [(2, 512, 8, 8)]  # stride 8, as dilated ResNets of PSPNet have
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


def test_group_norm_keeps_the_activations_of_the_encoder_and_batch_norm_its_momentum():
    """timm's norm-and-activation layers must not lose their activation."""
    kinds = nn.ReLU | nn.ReLU6 | nn.SiLU | nn.GELU | nn.Hardswish
    batch, group = (
        sum(isinstance(m, kinds) for m in build(norm=n).encoder.modules()) for n in ("batch", "group")
    )
    assert batch == group > 0
    net = build(bn_momentum=0.001)
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.001}


def test_unknown_architecture_lists_what_there_is():
    with pytest.raises(ValueError, match="deeplabv3plus, pspnet"):
        SegNet(CLASSES, arch="unet", encoder="tu-test_resnet")


def test_resize_and_nearest():
    maps = torch.randn(2, 3, 4, 6)
    assert resize(maps, (4, 6)) is maps and nearest(maps, (4, 6)) is maps
    smooth = F.interpolate(maps, (8, 3), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize(maps, (8, 3)), smooth)
    for size in ((8, 12), (2, 3), (3, 5), (7, 6)):
        assert torch.equal(nearest(maps, size), F.interpolate(maps, size, mode="nearest"))
        label = torch.randint(0, 255, (2, 4, 6))
        theirs = F.interpolate(label[:, None].double(), size, mode="nearest")[:, 0].long()
        assert torch.equal(nearest(label, size), theirs)
        assert nearest(label > 9, size).dtype == torch.bool


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
    file = [t for key, t in source.state_dict().items() if not key.startswith(("fc.", "head.fc."))]
    ours, theirs = (
        sorted(t.double().sum().item() for t in of) for of in (net.encoder.state_dict().values(), file)
    )
    assert ours == theirs
    if name == "test_resnet":  # up to stride 8, where dilation has not begun
        x = torch.rand(1, 3, 64, 64)
        (theirs,) = source.forward_intermediates(x, indices=[2], intermediates_only=True)
        torch.testing.assert_close(net.encoder(x)[3], theirs)


class Danger:
    def __reduce__(self):
        return print, ("unpickled",)


def test_weights_that_cannot_be_used_are_refused(tmp_path, capsys):
    net, path = build(), tmp_path / "net.pth"
    good = net.encoder.state_dict()
    before, first = {k: v.clone() for k, v in good.items()}, next(iter(good))
    others = {k: v for k, v in good.items() if k != first}
    fit = f"does not fit the encoder.*{re.escape(first)}"
    for wrong, word in (({f"module.{k}": v for k, v in good.items()}, fit), (others, fit), (good | {first: torch.zeros(1)}, fit), ([1, 2], "does not fit the encoder"),
                        (torch.zeros(3), "does not fit the encoder"), ({0: torch.zeros(1)}, "does not fit the encoder"),
                        ({"a": Danger()}, "weights_only=True"), (pickle.dumps(Danger()), "weights_only=True"), (None, "net.pth")):  # fmt: skip
        if isinstance(wrong, bytes):
            path.write_bytes(wrong)
        elif wrong is None:  # cut short
            torch.save(good, path)
            path.write_bytes(path.read_bytes()[:5000])
        else:
            torch.save(wrong, path)
        with pytest.raises(ValueError, match=f"(?s){word}") as error:
            load_encoder(net, str(path))
        assert "net.pth" in str(error.value)
    assert sum(torch.equal(before[k], v) for k, v in net.encoder.state_dict().items()) >= len(before) - 1
    assert "unpickled" not in capsys.readouterr().out
    for place, word in (
        (tmp_path, "is no file"),
        (tmp_path / "no.pth", "does not exist"),
        ("~nosuchuser/w.pth", "~nosuchuser/w.pth does not exist"),
    ):
        with pytest.raises(ValueError, match=word):
            load_encoder(net, str(place))


def test_imagenet_mobilenet_fits(shared):
    net = SegNet(CLASSES, encoder="mobilenet_v2", channels=16)
    load_encoder(net, str(shared / "weights/mobilenet_v2_imagenet/mobilenet_v2_imagenet_features.pth"))
