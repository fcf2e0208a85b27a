"""One batch over several processes: each holds its rows, and means, partners, draws and statistics are of the whole.

So n processes give the losses and weights of one, to rounding; with one process these functions change nothing. Every
process knows the loss of the whole batch; its backward is that of its own rows, times n, by which
DistributedDataParallel divides. What a module draws itself follows the same law with other numbers: dropout where
labeled and unlabeled images share a forward; DropPath, whose draws are the same on each process.
"""

import os
import signal
import threading
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; 0 does what is done once: it writes and reports."""
    return dist.get_rank() if world() > 1 else 0


def free_cores() -> int:
    """Cores for each process that are idle at this moment, at least one: threads beyond them wait for each other."""
    import psutil  # where the number of threads is given, it may be missing

    idle = sum(100 - busy for busy in psutil.cpu_percent(0.3, percpu=True)) / 100
    return max(1, min(round(idle), len(os.sched_getaffinity(0))) // on_this_host())


def on_this_host() -> int:
    """Return the number of processes on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world() > 1 else 1


def share(whole: Tensor) -> Tensor:
    """Take this process's rows of what is there, or drawn, for the whole batch."""
    return whole.chunk(world())[rank()] if world() > 1 else whole


def like(rows: Tensor) -> Tensor:
    """Return an empty tensor as large as the whole batch, to draw for it."""
    return torch.empty_like(rows) if world() == 1 else rows.new_empty(len(rows) * world(), *rows.shape[1:])


def gather(rows: Tensor) -> Tensor:
    """Return the whole batch from the rows (B / n, ...) of each process; gradients go to the own rows."""
    if world() == 1:
        return rows
    sent = rows.detach().contiguous()
    sent = sent.view(torch.uint8) if sent.dtype == torch.bool else sent
    found = [torch.empty_like(sent) for _ in range(world())]
    dist.all_gather(found, sent)
    found = [part.view(rows.dtype) for part in found]
    if rows.requires_grad:
        found[rank()] = rows + (world() - 1) * (rows - rows.detach())
    return torch.cat(found)


def following(rows: Tensor) -> Tensor:
    """Return the next row of the whole batch for each row, the first for the last."""
    if world() == 1:
        return rows.roll(-1, 0)
    assert not rows.requires_grad, "no gradient goes to the row of another process"
    first = gather(rows[:1])[(rank() + 1) % world()]
    return torch.cat((rows[1:], first[None]))


def total(value: Tensor) -> Tensor:
    """Add up a value of each process, without gradient."""
    if world() > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
    return value


class _Whole(torch.autograd.Function):
    """Mean and variance of the whole batch from those (C) of each process's rows; all meet once a direction."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        means, variances = gather(torch.stack((mean, var))[None]).unbind(1)
        ctx.save_for_backward(mean - means.mean(0))
        return means.mean(0), variances.mean(0) + means.var(0, correction=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        to_mean, to_variance = total(torch.stack(gradients)) / world()
        return to_mean + 2 * ctx.saved_tensors[0] * to_variance, to_variance


def meet() -> None:
    """Wait, for days if need be, until all processes are here."""
    if world() > 1:
        dist.barrier(_patient)


def broadcast(method: nn.Module) -> None:
    """Give every process the weights and buffers of the first one, for which all wait."""
    meet()
    for tensor in method.state_dict().values() if world() > 1 else ():
        dist.broadcast(tensor, 0)


def mean(summed: Tensor, count: Tensor) -> Tensor:
    """Divide the sum of what each process summed by the sum of its counts, at least 1."""
    if world() == 1:
        return summed / count.clamp_min(1)
    both = total(torch.stack((summed.double(), count.double())))
    whole, count = (both[0] / both[1].clamp_min(1)).to(summed.dtype), both[1].clamp_min(1).to(summed.dtype)
    own = summed * world() / count
    return own + (whole - own).detach()


def average(value: Tensor) -> Tensor:
    """Average a mean of each process, where all have equally many rows."""
    return mean(value, torch.ones_like(value)) if world() > 1 else value


def launch(function: Callable[..., Any], processes: int, *args: Any) -> Any:
    """Call function(*args) in so many new processes of this machine, joined; return what the first returned.

    function: of a module, not of a notebook's cell. Where one fails all end, and RuntimeError names its error; DataError and
    ValueError come as ValueError, OSError as itself.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # with it, starts now and then hang
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or it warns where every parameter has a gradient
    main = threading.current_thread() is threading.main_thread()  # there torch sets handlers and leaves them
    handlers = {number: signal.getsignal(number) for number in STOPS if main}
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, start_method="spawn",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    try:
        return elastic_launch(config, _joined)(function, args)[0]
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        kind = {"DataError": ValueError, "ValueError": ValueError, "OSError": OSError}.get(said.split(":")[0])
        raise (kind or RuntimeError)(f"process {number} of {processes} failed: {said}") from None
    except SignalException as error:
        raise (KeyboardInterrupt if error.sigval == signal.SIGINT else SystemExit(143)) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_patient: Any = None  # the group in which processes wait for days


def _joined(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the end of the parent sends
    join()
    result = function(*args)
    dist.destroy_process_group()  # not after an error: it would wait for the others
    return result if int(os.environ["RANK"]) == 0 else None


def wrap(method: nn.Module) -> Callable[..., Any]:
    """Return what to call in the method's place in training: gradients are averaged while the backward goes on."""
    if world() == 1:
        return method
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the name in torch 2.6
        return DistributedDataParallel(method, broadcast_buffers=False, find_unused_parameters=True)


def join() -> None:
    """Join the processes that `launch` or torchrun started, on the GPU of this one's number where there are GPUs.

    Here torch's BatchNorm and dropout act on the whole batch from now on, whichever module calls them.
    """
    global _patient
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group()
    _patient = dist.new_group(timeout=timedelta(days=7), backend="gloo")
    F.batch_norm, F.dropout, F.dropout2d = _batch_norm, _dropout, _dropout2d  # type: ignore[assignment]


_torch = F.batch_norm, F.dropout, F.dropout2d


def _batch_norm(
    x: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not training or world() == 1:
        return _torch[0](x, running_mean, running_var, weight, bias, training, momentum, eps)
    # nn.SyncBatchNorm has no kernels for a CPU, and on a GPU the host waits for each of its layers.
    count, shape = x.numel() // x.shape[1] * world(), (1, -1, 1, 1)
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    centre, variance = _Whole.apply(mean, var)
    with torch.no_grad():
        running_mean.lerp_(centre.to(running_mean), momentum)
        running_var.lerp_((variance * count / (count - 1)).to(running_var), momentum)
    scale = weight * (variance + eps).rsqrt()
    return (x * scale.view(shape) + (bias - centre * scale).view(shape)).to(x.dtype)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return x * share(_torch[1](torch.ones_like(like(x)), p)) if training and p else x


def _dropout2d(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return x * share(_torch[2](torch.ones_like(like(x[..., :1, :1])), p)) if training and p else x
