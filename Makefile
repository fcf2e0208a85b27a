# make demo: the main job. make test: every test. Both set everything up first. make help lists the rest.
PY = .venv/bin/python
MKD = .venv/bin/mkd
.PHONY: help demo test bench gpu lab viewer lint tidy lock

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/'

.venv/.ok: requirements.lock pyproject.toml setup.sh
	bash setup.sh && touch $@

demo: .venv/.ok  ## SupOnly, co-training and MKD on the embedded data set, on this CPU; results in runs/demo
	$(MKD) run notebooks/00_quickstart.ipynb -f parameters/demo/00_quickstart.yaml --out runs/demo --html

test: .venv/.ok  ## all tests, notebooks included, a file at a time on each core
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: .venv/.ok  ## speed and memory of the parts, as ratios
	$(PY) tests/bench.py

gpu: .venv/.ok  ## checks, speed and training on a GPU in eight minutes, into runs/gpu; ARGS="--data ROOT --runs FILE", "--dry" ...
	$(PY) tests/gpu.py --out runs/gpu $(ARGS)

lab: .venv/.ok  ## JupyterLab on the notebooks: the demo's, where it is finished; its Run All makes no run again
	.venv/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=. $(firstword $(wildcard runs/demo/00_quickstart.ipynb) notebooks/00_quickstart.ipynb)

viewer: .venv/.ok  ## the explorer alone on the newest runs, or RUN="id id": this machine only, with a token; Ctrl-C stops it
	MKD_EXPLORE="$(RUN)" .venv/bin/voila notebooks/50_explorer.ipynb --Voila.ip=127.0.0.1 --Voila.auto_token=True

lint: .venv/.ok  ## ruff, mypy, import order of the modules
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy mkd_core && .venv/bin/lint-imports

tidy: .venv/.ok  ## bring notebooks into canonical form
	$(PY) tests/tidy.py

lock: .venv/.ok  ## renew requirements.lock and requirements.txt from pyproject.toml
	UV_PYTHON_DOWNLOADS=never .venv/bin/uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -o requirements.lock
	sed -E '/--hash/d; s/ \\$$//' requirements.lock > requirements.txt
