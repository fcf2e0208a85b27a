"""Mean Teacher: the student matches the soft prediction of a slow copy of itself.

Tarvainen & Valpola 2017, arXiv:1703.01780.   L = CE(s(x), y) + w r(t) mean (softmax s(u) - softmax t(u))^2
"""

from ..ema import EMA
from ..losses import masked_mean, ramp, squared_distance
from .base import Batch, Build, EMABuffers, Method, Share, TeacherMode, Terms, Weight, both


class MeanTeacher(Method):
    """Defaults: the re-implementation behind MKD's Table 2 (CPS authors' released code): weight 100 on a mean
    over classes and pixels, EMA 0.99 without warm start, no ramp, student and teacher see the same weak view,
    the student is evaluated.

    Deviations: consistency on unlabeled pixels inside the image only (theirs: labeled and padded ones too).
    """

    label, colour, passes, terms = "MT", "#009e73", (2, 1), ("sup", "consistency")
    evaluated = ("student", "teacher")

    def __init__(
        self, build: Build, *, weight: Weight = 100.0, decay: Share = 0.99, rampup: Share = 0.0,
        ema_buffers: EMABuffers = "none", teacher_mode: TeacherMode = "train", warmup: bool = False,
        joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.teacher = EMA(self.net, decay, buffers=ema_buffers, mode=teacher_mode, warmup=warmup)
        self.weight, self.rampup, self.joint = weight, rampup, joint

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        target = self.teacher(batch.weak).softmax(1)
        labeled, unlabeled = both(self.net, batch.x, batch.weak, self.joint)
        distance = masked_mean(squared_distance(unlabeled.softmax(1), target), batch.valid)
        consistency = self.weight * ramp(progress, self.rampup) * distance
        return {"sup": self.supervised(labeled, batch.y), "consistency": consistency}, {}
