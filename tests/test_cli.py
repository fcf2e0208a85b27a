"""The mkd command: parameters, refusals before anything runs, notebooks that appear whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import tiny
from filelock import FileLock

from mkd_core import records
from mkd_core.config import RunConfig
from mkd_core.parameters import merge, parse_values, read_parameters
from mkd_core.suite import notebook as notebooks
from mkd_core.suite.cli import main

ROOT = Path(__file__).parents[1]
RUN = notebooks.read_cell(ROOT / "notebooks/10_run.ipynb")
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def write(path, parameters, code):
    path.parent.mkdir(parents=True, exist_ok=True)
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [first, nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)
    return path


@pytest.fixture
def notebook(tmp_path):
    """A notebook that divides 1 by its parameter and looks for a file of the user's folder."""
    code = (
        "from pathlib import Path\nimport sys, mkd_core\n"
        "print('result', 1 / divisor)\nprint('found', Path(name).exists(), repr(name))\nprint(sys.executable, mkd_core.__file__)"
    )
    return write(tmp_path / "notebooks/divide.ipynb", "divisor: int = 2  # of one\nname: str = ''", code)


def printed(path):
    return "".join(o.text for c in nbformat.read(path, 4).cells for o in c.get("outputs", []))


TYPED = ["1_16", "2024-01-05", "on", "1e3", "null", "007", "data #2", "a: b", "[x", "12:30", ""]


@pytest.mark.parametrize("typed", TYPED)
def test_a_parameter_declared_as_text_is_taken_as_typed(tmp_path, typed):
    parsed = parse_values([f"split={typed}", f"common.split={typed}"], ["split"])
    assert parsed == {"split": typed, "common.split": typed}
    assert notebooks.read_all(RUN, None, [f"root={typed}"]).parameters["root"] == typed
    for quoted in (f"'{typed}'", f'"{typed}"'):  # as YAML would have it
        assert parse_values([f"split={quoted}"], ["split"]) == {"split": typed}
    if "#" not in typed and ":" not in typed and "[" not in typed:
        (tmp_path / "p.yaml").write_text(f"root: {typed}\ncommon: {{split: {typed}, steps: 3}}\n")
        read = read_parameters(tmp_path / "p.yaml", ["root", "split"])
        assert read == {"root": typed, "common": {"split": typed, "steps": 3}}


def test_files_and_words_are_yaml_1_2(tmp_path):
    text = "1_16: 1_16\non: [no, yes, off, 2024-01-05, 12:30, 1e-3, -.5, 010, 0x10, 0o17, true, False, ~, .inf]\n"
    (tmp_path / "p.yaml").write_text(text + "1e3: 1\n")
    values = [
        "no", "yes", "off", "2024-01-05", "12:30", 0.001, -0.5, 10, 16, 15, True, False, None, float("inf"),
    ]  # fmt: skip
    assert read_parameters(tmp_path / "p.yaml") == {"1_16": "1_16", "on": values, "1e3": 1}
    words = ["lr=1e-3", "crop=[64, 32]", "options={boxes: 3}", "name=a=b", "root=data #2", "weights="]
    assert parse_values(words) == {
        "lr": 0.001, "crop": [64, 32], "options": {"boxes": 3}, "name": "a=b", "root": "data #2", "weights": "",
    }  # fmt: skip


@pytest.mark.parametrize("pairs, word", [
    (["lr"], "key=value"), (["a=1", "a=2"], "twice"), (["a=[1"], "not YAML"),
    (["a={b: 1, b: 2}"], "twice")])  # fmt: skip
def test_pairs_that_are_wrong(pairs, word):
    with pytest.raises(ValueError, match=word):
        parse_values(pairs)


def test_dotted_keys_reach_into_the_files_mappings_and_merged_keys_may_be_given_anew(tmp_path):
    file = {"common": {"root": "a", "steps": 3}, "out": "x"}
    merged = merge(file, {"common.root": "b", "out": "y"}, file)
    assert merged == {"common": {"root": "b", "steps": 3}, "out": "y"}
    assert file["common"]["root"] == "a"
    with pytest.raises(ValueError, match="no mapping 'comon'"):
        merge(file, {"comon.root": "b"}, file)
    # a mapping of the file below it
    based = merge({"base": "x.yaml"}, {"common.root": "b"}, {"common": {"steps": 3}})
    assert based == {"base": "x.yaml", "common": {"root": "b"}}
    (tmp_path / "p.yaml").write_text("c: {d: {<<: &b {<<: &a {x: 1, y: 1}, x: 2}, y: 3}}\ne: *b\n")
    assert read_parameters(tmp_path / "p.yaml") == {"c": {"d": {"x": 2, "y": 3}}, "e": {"x": 2, "y": 1}}


@pytest.mark.parametrize(
    ("text", "word"),
    [("- a\n- b\n", "list"), ("a: [1\n", "not YAML"), ("rows:\n  A: 1\n  B: 2\n  A: 3\n", "(?s)p.yaml.*'A' stands twice.*line 4"),
     ("a: \xe9", "p.yaml is not YAML: unacceptable character")],
)  # fmt: skip
def test_parameter_files_that_are_wrong(tmp_path, text, word):
    (tmp_path / "p.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=word):
        read_parameters(tmp_path / "p.yaml")


def test_what_check_takes_run_takes_and_options_of_another_method_or_data_set_are_dropped(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    words = ["dataset=folder", f"root={tmp_path}", "val=test.txt", "method=supervised"]
    ready = notebooks.read_all(RUN, ROOT / "parameters/recipes/released.yaml", words)
    assert ready.parameters["dataset_options"] == {"val": "test.txt"} and ready.parameters["options"] == {}
    assert notebooks.read_all(RUN, None, ["out=5=6"]).parameters["out"] == "5=6"
    with pytest.raises(ValueError, match="no option 'alpha'"):
        notebooks.read_all(RUN, None, ["method=supervised", "options={alpha: 1}"])
    for word, said in {
        "valid=1": "parameter 'valid'", "steps=many": "integer", "crop=[30,30]": "multiples of 16",
        "method=mdk": "mean 'mkd'", "options.alpha=2": "no mapping 'options'",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=said):
            notebooks.read_all(RUN, None, [word])


def test_the_configuration_of_a_run_executes_it_again(tmp_path):
    config = tiny.config("mkd")
    (tmp_path / "config.json").write_text(config.model_dump_json(indent=1))
    ready = notebooks.read_all(RUN, tmp_path / "config.json", [])
    assert ready.results == [records.RUNS / config.id]
    assert RunConfig(**{k: v for k, v in ready.parameters.items() if k in RunConfig.model_fields}) == config


def test_the_kernel_is_this_interpreter_whatever_is_named_python3(notebook, tmp_path, monkeypatch, capsys):
    """A kernel python3 of another environment comes first on Jupyter's path, another mkd_core lies where the user is."""
    other = tmp_path / "kernels/python3"
    other.mkdir(parents=True)
    about = {"argv": ["/bin/false"], "display_name": "x", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(about))
    (tmp_path / "mkd_core").mkdir()
    (tmp_path / "mkd_core/__init__.py").write_text("raise SystemExit('another clone')")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    (tmp_path / "mine.txt").touch()
    (tmp_path / "p.yaml").write_text("divisor: 8\nname: nowhere.txt\n")
    (tmp_path / "a/{b}").mkdir(parents=True)  # braces are no template
    notebook = notebook.rename(tmp_path / "a/{b}" / notebook.name)
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(notebook), "-f", "p.yaml", "name=mine.txt", "--out", "{out}"]) == 0
    text = printed(tmp_path / "{out}/divide.ipynb")
    assert f"{sys.executable} {ROOT / 'mkd_core/__init__.py'}" in text
    assert "result 0.125" in text and "found True 'mine.txt'" in text
    assert "{out}/divide.ipynb" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "{out}").iterdir()] == ["divide.ipynb"]


def test_a_notebook_that_fails_is_kept_apart_and_named(notebook, tmp_path, capsys):
    assert main(["run", str(notebook), "divisor=0", "-o", str(tmp_path / "out")]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["divide.failed.ipynb"]


def test_an_interrupt_ends_with_one_line_and_no_kernel(tmp_path):
    code = "import os, time\nprint('at work', os.getpid(), flush=True)\ntime.sleep(600)"
    notebook = write(tmp_path / "notebooks/long.ipynb", "x: int = 1", code)
    command = [sys.executable, "-m", "mkd_core.suite.cli", "run", str(notebook), "-o", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        kernel = int(process.stdout.readline().split()[-1])
        process.send_signal(signal.SIGINT)
        said = "".join(process.communicate(timeout=120)).strip()
    assert process.returncode == 130
    assert said == "mkd run: interrupted; the same command goes on from the last checkpoint"
    end = time.monotonic() + 30
    while Path(f"/proc/{kernel}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{kernel}").exists() and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name, words, said", [
    ("divide", ["divisr=2"], "did you mean 'divisor'"),
    ("divide", ["divisor=true"], "parameter divisor is a int; got True"),
    ("divide", ["-f", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
    ("divide", ["-o", "notebooks"], "would be overwritten"),
    ("divid", [], "divide.ipynb"), ("divide", [], "is of another copy of the project")])  # fmt: skip
def test_refused_before_anything_runs(notebook, tmp_path, monkeypatch, capsys, name, words, said):
    monkeypatch.chdir(tmp_path)
    if "another copy" in said:
        (tmp_path / "mkd_core").mkdir()
    assert main(["run", str(notebook.with_name(f"{name}.ipynb")), *words]) == 2
    assert said in capsys.readouterr().err


def test_check_reports_and_help_does_not_wait_for_torch(capsys):
    assert main(["check", "shapes", "train_size=16", "--split", "random/8"]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["check", "shape"]) == 2
    assert "did you mean 'shapes'" in capsys.readouterr().err
    assert main(["check", "shapes", "train_size=many"]) == 2
    assert "train_size" in capsys.readouterr().err
    code = "import sys; from mkd_core.suite.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'pydantic', 'papermill', 'yaml', 'numpy') if m in sys.modules])"
    text = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert "batch" in text and text.splitlines()[-1] == "[]"


def test_lists_of_parameters_methods_and_runs(tmp_path, monkeypatch, capsys):
    assert main(["run", str(ROOT / "notebooks/10_run.ipynb"), "--list"]) == 0
    text = capsys.readouterr().out
    assert "workers = 0    loader processes" in text and all("    " in line for line in text.splitlines())
    assert main(["methods"]) == 0
    assert "fixmatch" in capsys.readouterr().out
    assert main(["methods", "fixmatch"]) == 0
    text = capsys.readouterr().out
    assert "probability of a box" in text and "\nthreshold = 0.95\n" in text
    monkeypatch.setattr(records, "RUNS", tmp_path)
    config = tiny.config()
    (tmp_path / config.id).mkdir()
    (tmp_path / config.id / "config.json").write_text(config.model_dump_json())
    records.save(tiny.record(id=config.id), tmp_path / config.id)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text("{")  # hides no other
    assert main(["runs"]) == 0
    text = capsys.readouterr().out
    assert f"{config.id}  supervised  shapes random/6  step 0  mIoU 50.0  0 MB" in text
    assert "a  config.json, history.jsonl or record.json is damaged" in text
    assert main(["runs", "--remove", "nothing"]) == 2 and (tmp_path / config.id).is_dir()
    with FileLock(tmp_path / config.id / "lock"):
        assert main(["runs", "--remove", config.id]) == 2
    assert "at work just now" in capsys.readouterr().err
    monkeypatch.setattr(records, "RUNS", tmp_path / "runs")  # elsewhere a config.json may be anyone's
    assert main(["runs", "--remove", str(tmp_path / config.id)]) == 2
    gone = records.folder(records.RUNS) / config.id
    (tmp_path / config.id).rename(gone)
    assert main(["runs", "--remove", config.id]) == 0 and not gone.exists()
    assert f"Removed: {gone}" in capsys.readouterr().out


def test_results_of_other_settings_are_not_overwritten(tmp_path):
    """What is typed beside a file needs a folder of its own where the file's table lies; more seeds do not."""
    text = "common: {dataset: shapes, steps: 9}\nrows: {A: {method: cps}}\nseeds: [3]\n"
    (tmp_path / "t.yaml").write_text(f"out: {tmp_path / 'o'}\n{text}")
    known = notebooks.PLAIN | {"out": notebooks.Parameter("")}

    def read(*words):
        return notebooks.read_all(known, tmp_path / "t.yaml", words)

    (config,) = read().grid.runs["A"]
    (tmp_path / "o").mkdir()
    records.dump({"A": [tiny.record(id=config.id)]}, tmp_path / "o/records.jsonl")
    with pytest.raises(ValueError, match="holds the results of other settings; .*out=FOLDER"):
        read("common.steps=3")
    for words in ((), ("seeds=[3, 4]",), ("common.steps=3", f"out={tmp_path / 'p'}"), ("common.threads=1",)):
        assert read(*words).grid


def test_a_base_lies_beside_the_file_or_in_parameters(tmp_path):
    (tmp_path / "below.yaml").write_text("common: {steps: 7, split: 1_16}\n")
    text = "base: below.yaml\nrows: {A: {method: cps}}\nseeds: [3]\n"
    (tmp_path / "table.yaml").write_text(text)
    ready = notebooks.read_all(notebooks.PLAIN, tmp_path / "table.yaml", ["common.batch=5"])
    (config,) = ready.grid.runs["A"]
    assert (config.steps, config.batch, config.split, config.seed) == (7, 5, "1_16", 3)
    assert ready.parameters["base"] == [str(tmp_path / "below.yaml")]
    assert ready.parameters["common"] == {"batch": 5}
    (tmp_path / "table.yaml").write_text(text + "common: {}\n")
    table4 = notebooks.read_cell(ROOT / "notebooks/30_table4_components.ipynb")
    with pytest.raises(ValueError, match="the notebook's own columns would lie over the file's base"):
        notebooks.read_all(table4, tmp_path / "table.yaml", [])
