"""The package as users get it: built, installed into an empty environment, and run outside the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import sapo
from sapo.commands.recipes import FOLDER
from tests.tiny import save_tiny, tiny_rows, tiny_tokenizer, write_rows

ROOT = Path(__file__).parents[2]
SOURCES = ("src", "tests", "docs", "benchmarks")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution of this checkout, made from a copy: the checkout stays as it is."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77: make test")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in ROOT.iterdir():
        if path.name in SOURCES:
            shutil.copytree(path, source / path.name, ignore=LEFT_OUT)
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    build = "from setuptools import build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})".format(str(out))
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths if ".egg-info" not in str(path)}


def test_the_wheel_holds_every_file_of_the_package_and_no_other(built):
    names = {name for name in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in name}
    assert names == {name.removeprefix("src/") for name in files(ROOT / "src")}
    expected = {"sapo/py.typed", "sapo/recipes/guarded-dpo.yaml", "sapo/recipes/presets/spin.yaml"}
    assert expected | {"sapo/report/assets/page.html", "sapo/demo/model/model.safetensors"} <= names


def test_the_source_distribution_holds_tests_docs_and_what_they_need(built):
    with tarfile.open(built[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder in SOURCES:
        assert files(ROOT / folder) <= names
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt", "mkdocs.yml"} <= names


def test_the_metadata_say_who_and_what(built):
    with zipfile.ZipFile(built[0]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    assert f"\nVersion: {sapo.__version__}\n" in metadata
    for field in ("Author: The SAPO developers", "License-Expression: Apache-2.0", "Classifier: Typing :: Typed"):
        assert f"\n{field}" in metadata
    for needed in ("numpy", "pyarrow", "jinja2", "tokenizers", "torch", "transformers", "trl"):
        assert re.search(rf"^Requires-Dist: {needed}\S*>=", metadata, re.MULTILINE), needed


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A function that runs `sapo` of the wheel in an environment where nothing else of this checkout can be found."""
    pytest.importorskip("pip", reason="needs pip")
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True, timeout=120)
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # Its dependencies are those of the running environment. An editable install there is a .pth file, which is not read
    # in a folder that a .pth file names: the checkout stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", str(built[0])], check=True, timeout=120, cwd=folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(*command):
        done = subprocess.run(
            [str(folder / "env" / "bin" / command[0]), *command[1:]],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = run("python", "-c", "import sapo; print(sapo.__file__)")
    assert Path(where.strip()) == site / "sapo" / "__init__.py"
    return folder, run


def test_the_installed_command_knows_its_version_and_its_recipes(installed):
    _, run = installed
    assert run("sapo", "--version") == f"sapo {sapo.__version__}\n"
    listed = [line.split()[0] for line in run("sapo", "recipes").splitlines()]
    assert sorted(listed) == sorted(
        f.relative_to(FOLDER).with_suffix("").as_posix() for f in FOLDER.rglob("*.yaml") if f.parent.name != "cluster"
    )
    assert run("sapo", "recipes", "guarded-dpo") == (FOLDER / "guarded-dpo.yaml").read_text()


def test_the_installed_demo_has_help(installed):
    assert "--output_dir" in installed[1]("sapo", "demo", "--help")


def test_the_installed_command_trains_by_a_shipped_recipe(installed):
    folder, run = installed
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save_tiny(folder / "model", tokenizer=tokenizer)
    write_rows(folder / "rows.jsonl", tiny_rows(8))
    small = ["--max_steps", "2", "--max_length", "32", "--segment_length", "4", "--logging_steps", "1"]
    out = run(
        "sapo", "train", "--config", "tiny-cpu-orpo", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl",
        "--output_dir", "run", *small,
    )  # fmt: skip
    assert "Done after step 2 of 2." in out
    for name in ("model.safetensors", "opponent/model.safetensors", "report.html", "recipe.yaml"):
        assert (folder / "run" / name).is_file()
