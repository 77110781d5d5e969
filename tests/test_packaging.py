"""What is written twice because packaging wants it so, and must agree."""

import re
from pathlib import Path

import pytest

from smol import rearc

ROOT = Path(__file__).parent.parent


def pins(name):
    """{package and environment marker: version} of a requirements file."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if match := re.match(r"([\w-]+)([=><~].*?)(?:;\s*(.*?))?\s*(?:#.*)?$", line):
            found[match[1], match[3]] = match[2].strip()
    return found


def test_kaggle_has_the_same_versions_but_for_pytorch():
    usual, kaggle = pins("requirements.txt"), pins("requirements-kaggle.txt")
    differ = {package for package, marker in usual.keys() ^ kaggle.keys()}
    differ |= {
        package for (package, at), version in usual.items() if kaggle.get((package, at), version) != version
    }
    assert differ == {"torch", "triton", "numpy"}
    assert kaggle["torch", None] == "==2.6.0" and kaggle["numpy", None] in usual.values()


def test_make_installs_the_generators_that_the_code_asks_for():
    package = rearc.INSTALL.removeprefix("pip install --no-deps ")
    assert f"REARC := {package}#" in (ROOT / "Makefile").read_text()
    assert "reasoning" not in (ROOT / "requirements.txt").read_text()  # there, its own pins would count


def test_what_is_required_is_pinned():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {package.lower().replace("-", "_") for package, _ in pins("requirements.txt")}
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_")
        assert name in pinned, f"{name} is in pyproject.toml and not in requirements.txt"
