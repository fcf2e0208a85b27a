"""One run on the GPUs of several hosts, started by torchrun on each; all see the project, the data and runs/ at the same paths.

torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
    -m mkd_core.suite.joined parameters/recipes/paper.yaml dataset=voc root=VOC split=cps/1_16
"""

import os
import sys
from pathlib import Path

from .. import parallel
from ..config import RunConfig
from ..records import ROOT
from ..runner import run
from .notebook import read_all, read_cell


def main() -> None:
    """Train the run of a parameters file and key=value words, those of notebooks/10_run.ipynb."""
    if "LOCAL_RANK" not in os.environ or len(sys.argv) < 2:
        raise SystemExit(f"{__doc__}\nOn one machine no torchrun is needed: devices=N.")
    known = read_cell(ROOT / "notebooks/10_run.ipynb")
    given = read_all(known, Path(sys.argv[1]), sys.argv[2:]).parameters
    parallel.join()
    values = {name: about.default for name, about in known.items()} | given | {"devices": parallel.world()}
    run(RunConfig(**{key: values[key] for key in RunConfig.model_fields}))


if __name__ == "__main__":
    main()
