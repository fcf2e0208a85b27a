"""What several test files share."""

import os
import tempfile
from pathlib import Path

import pytest

# Runs of the tests, and of the notebooks' kernels, begin from nothing and leave nothing in the project.
os.environ.setdefault("MKD_RUNS", tempfile.mkdtemp(prefix="mkd-runs-"))
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and published lists: MKD_SHARED, or `shared` beside the project; the test is skipped without it."""
    path = Path(os.environ.get("MKD_SHARED") or Path(__file__).parents[2] / "shared")
    if not (path / "data").is_dir():
        pytest.skip(f"needs the shared data folder: {path} is absent, MKD_SHARED may name it")
    return path


@pytest.fixture
def mirror(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published lists, read from the shared folder; whoever asks for a network fails."""
    monkeypatch.setenv("MKD_SPLITS", str(shared / "splits"))
    monkeypatch.setattr(
        "pooch.retrieve", lambda *args, **kwargs: pytest.fail(f"a test asked for the network: {args}")
    )
    return shared / "splits"
