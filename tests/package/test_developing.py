"""The developers' page names what exists, and the files around the package agree with one another."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
import yaml

import sapo
from tests.package.test_wheel import ROOT

PAGE = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")


def test_every_file_that_the_page_names_exists():
    paths = set(re.findall(r"`((?:\w+/)+[\w.-]+\.(?:py|yaml))`", PAGE))
    for name in ("flow-of-a-row", "flow-of-an-option"):
        picture = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
        modules = re.findall(r'class="where"[^>]*>([\w.]+)</text>', picture)
        paths |= {f"{module.replace('.', '/')}.py" for module in modules}
    assert len(paths) > 30
    missing = [path for path in paths if not any((ROOT / at / path).exists() for at in ("", "src/sapo"))]
    assert missing == []


def test_every_room_is_in_the_table():
    rooms = {path.parent.name for path in (ROOT / "src" / "sapo").glob("*/__init__.py")}
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))))
    assert rooms <= named


def arrows():
    """Imports between the rooms of src/sapo, those for type checking and inside functions included: room -> rooms."""
    source = ROOT / "src"
    modules = {
        ".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (source / "sapo").rglob("*.py")
    }
    drawn = {module.split(".")[1] if "." in module else "sapo": set() for module in modules}
    for module, file in modules.items():
        room = module.split(".")[1] if "." in module else "sapo"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: relative import"
                names = [f"{node.module}.{one.name}" for one in node.names] + [str(node.module)]
            elif isinstance(node, ast.Import):
                names = [one.name for one in node.names]
            known = [name for name in names if name in modules]
            drawn[room] |= {name.split(".")[1] if "." in name else "sapo" for name in known[:1]} - {room}
    return drawn


def test_rooms_have_few_imports_among_them_and_no_cycle():
    drawn = arrows()
    assert len(drawn) > 15
    assert "preference" in drawn["training"]
    list(TopologicalSorter(drawn).static_order())
    assert sum(map(len, drawn.values())) < 100


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == sapo.__version__
    assert "2405.20830" in citation["preferred-citation"]["url"]


def test_ci_runs_every_python_that_the_package_says_it_supports():
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.is_file():
        pytest.skip("not in a source distribution")
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    said = re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    assert jobs["test"]["strategy"]["matrix"]["python"] == said
    targets = [one["target"] for one in jobs["versions"]["strategy"]["matrix"]["include"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_site_lists_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = re.findall(r"[\w/]+\.md", str(nav))
    assert len(pages) == len(set(pages))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert there - set(pages) == set()
