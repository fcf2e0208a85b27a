"""Methods with a critic or a contrastive term: AdvSemSeg, GCT, U2PL, PC2Seg. References are loops written from the specification."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, batch, config, gradients, make
from torch import Tensor, nn

from mkd_core.engine import build_method, make_optimizers, run
from mkd_core.methods import METHODS, Method
from mkd_core.methods.base import frozen

IGNORE = 255


def same_steps_as_supervised(name: str, options: dict, network: str = "net") -> None:
    """After three steps the network has the weights of the supervised run, exactly."""
    results = []
    for method, net in ((m := make(name, **options), m.get_submodule(network)), (m := make("supervised"), m.net)):
        judged = {id(p) for p in method.critic[0].parameters()} if method.critic else set()
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad and id(p) not in judged], 0.05, momentum=0.9)
        for step in range(3):
            torch.manual_seed(step)
            terms, _ = method(batch(step), step / 3)
            optimizer.zero_grad()
            torch.stack([*terms.values()]).sum().backward()
            optimizer.step()
            method.update(step + 1)
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# The contract of critics.


def test_frozen_lets_gradients_through_and_keeps_them_from_the_parameters():
    net, x = nn.Linear(3, 1), torch.randn(2, 3, requires_grad=True)
    net.bias.requires_grad_(False)
    with frozen(net):
        out = net(x).sum()
    assert net.weight.requires_grad and not net.bias.requires_grad  # as it was
    out.backward()
    assert x.grad.abs().sum() > 0 and net.weight.grad is None
    with pytest.raises(ZeroDivisionError), frozen(net):
        raise ZeroDivisionError
    assert net.weight.requires_grad


CRITICS = {"advsemseg": {"threshold": 0.3, "start": 0.0}}


@pytest.mark.parametrize("name", CRITICS)
def test_the_critic_has_an_optimiser_of_its_own(name):
    method = build_method(config(name, options=CRITICS[name] | {"critic_lr": 3e-4}), CLASSES)
    nets, judge = make_optimizers(config(name), method)
    ours, theirs = ({id(p) for g in o.param_groups for p in g["params"]} for o in (nets, judge))
    assert theirs == {id(p) for p in method.critic[0].parameters()} and not ours & theirs
    assert ours | theirs == {id(p) for p in method.parameters() if p.requires_grad}
    assert isinstance(judge, torch.optim.Adam) and judge.defaults["betas"] == (0.9, 0.99) and judge.defaults["lr"] == 3e-4


@pytest.mark.parametrize("name", CRITICS)
def test_a_run_with_a_critic_that_was_interrupted_ends_alike(name, tmp_path, monkeypatch):
    c = config(name, options=CRITICS[name], steps=6, checkpoint_every=2)
    whole = run(c, tmp_path / "whole", quiet=True)
    forward, calls = METHODS[name].forward, []

    def dies(self, batch, progress):
        calls.append(progress)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, batch, progress)

    with monkeypatch.context() as m:
        m.setattr(METHODS[name], "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            run(c, tmp_path / "cut", quiet=True)
    resumed = run(c, tmp_path / "cut", quiet=True)
    assert resumed.miou == whole.miou
    a, b = (torch.load(tmp_path / d / c.id / "checkpoint.pt", weights_only=True) for d in ("whole", "cut"))
    assert len(a["optimizers"]) == 2 and a["method"].keys() == b["method"].keys()
    assert all(torch.equal(v, b["method"][k]) for k, v in a["method"].items())
    fresh = build_method(c, 5).state_dict()
    critic = [k for k in fresh if k.startswith(("discriminator", "detector")) and k.endswith("weight")]
    assert critic and all(not torch.equal(fresh[k], a["method"][k]) for k in critic)  # the critic was trained


# AdvSemSeg.


def adversary(**options) -> Method:
    """One whose discriminator sees differences."""
    method = make("advsemseg", **{"start": 0.0} | options)
    for m in method.discriminator:
        if isinstance(m, nn.Conv2d):
            m.weight.data.mul_(2)
    return method


def test_advsemseg_is_the_reference():
    """methods.md 17, pixel by pixel."""
    method, b = adversary(), batch(size=64)
    net, judge = copy.deepcopy(method.net), copy.deepcopy(method.discriminator)
    prob, prob_u = net(b.x).softmax(1), net(b.weak).softmax(1)

    def score(p: Tensor) -> Tensor:  # D's probability of "real" at full size
        for layer in judge:
            p = layer(p)
        return F.interpolate(p, b.y.shape[-2:], mode="bilinear", align_corners=False)[:, 0].sigmoid()

    real_x, real_u = score(prob), score(prob_u)
    method.threshold = real_u.median().item()  # a part of the pixels is trusted
    truth = torch.zeros_like(prob)
    sums = {k: [] for k in ("adversarial", "adversarial_unlabeled", "self_training", "fake", "real")}
    for i in range(len(b.y)):
        for r in range(64):
            for c in range(64):
                if b.y[i, r, c] != IGNORE:
                    truth[i, b.y[i, r, c], r, c] = 1
    real_y = score(truth)
    for i in range(len(b.y)):
        for r in range(64):
            for c in range(64):
                if b.y[i, r, c] != IGNORE:
                    sums["adversarial"].append(-real_x[i, r, c].log())
                    sums["fake"].append(-(1 - real_x[i, r, c]).log())
                    sums["real"].append(-real_y[i, r, c].log())
                if b.valid[i, r, c]:
                    sums["adversarial_unlabeled"].append(-real_u[i, r, c].log())
                    sums["fake"].append(-(1 - real_u[i, r, c]).log())
                    if real_u[i, r, c] >= method.threshold:
                        sums["self_training"].append(-prob_u[i, :, r, c].max().log())
    share = len(sums["self_training"]) / len(sums["adversarial_unlabeled"])
    assert 0.05 < share < 0.95
    mean = {k: torch.stack(v).mean() for k, v in sums.items()}
    terms, stats = method(b, 0.5)
    torch.testing.assert_close(terms["adversarial"], 0.01 * mean["adversarial"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(terms["adversarial_unlabeled"], 0.001 * mean["adversarial_unlabeled"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(terms["self_training"], 0.1 * mean["self_training"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(terms["critic"], (mean["fake"] + mean["real"]) / 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(stats["trusted"], torch.tensor(share))


def test_advsemseg_trains_itself_from_its_start_and_on_trusted_pixels_only():
    b = batch()
    assert adversary(start=0.25)(b, 0.249)[0]["self_training"] == 0 < adversary(start=0.25)(b, 0.25)[0]["self_training"]
    terms, stats = adversary(threshold=1.0)(b, 0.5)  # nothing is selected
    assert terms["self_training"] == 0 and stats["trusted"] == 0
    assert adversary(threshold=0.0)(b, 0.5)[1]["trusted"] == 1


def test_advsemseg_without_its_weights_is_supervised():
    off = {"adversarial": 0.0, "adversarial_unlabeled": 0.0, "weight": 0.0}
    terms, _ = adversary(**off)(batch(), 0.5)
    assert all(terms[k] == 0 for k in ("adversarial", "adversarial_unlabeled", "self_training"))
    same_steps_as_supervised("advsemseg", off)


def test_a_discriminator_that_learns_tells_labels_from_predictions():
    """One critic alone, on one batch: its loss falls from log 2, and then the network's adversarial term is large."""
    method, b = make("advsemseg"), batch()
    optimizer = torch.optim.Adam(method.discriminator.parameters(), 1e-3)
    before = method(b, 0.0)[0]
    for _ in range(15):
        optimizer.zero_grad()
        critic = method(b, 0.0)[0]["critic"]
        critic.backward()
        optimizer.step()
    after = method(b, 0.0)[0]
    assert abs(before["critic"].item() - math.log(2)) < 0.05 and after["critic"] < 0.3
    assert after["adversarial"] > 2 * before["adversarial"]
