import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mdu_trainer

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ("unlearned_model.md", "report.html", "certificate.html")
HEAVY_EXTRAS = {"matplotlib", "lm_eval"}  # bitsandbytes is not listed: peft imports it wherever it is installed


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded in a fresh interpreter after `code`."""
    code += "\nimport json, sys\nprint(json.dumps([name for name in sys.modules if '.' not in name]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The package built from a copy of its sources, so that nothing is left behind among them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in ROOT.iterdir():
        if file.suffix in {".py", ".toml", ".md"} or file.name == "LICENSE":
            shutil.copy(file, source)
    for folder in ("mdu_trainer", "model_cards", "examples"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        source,
    ]
    subprocess.run(command, capture_output=True, check=True)
    with zipfile.ZipFile(next(out.glob("mdu_trainer-*.whl"))) as archive:
        yield archive


def test_public_names_resolve():
    for name in mdu_trainer.__all__:
        assert getattr(mdu_trainer, name) is not None
    assert set(mdu_trainer.__all__) <= set(dir(mdu_trainer))
    with pytest.raises(AttributeError, match="no_such_name"):
        mdu_trainer.no_such_name  # noqa: B018


def test_public_names_metrics_and_testing_need_no_heavy_extra():
    code = "from mdu_trainer import *\nimport mdu_trainer.evaluation, mdu_trainer.testing"
    loaded = modules_after(code)
    assert {"torch", "transformers"} <= loaded
    assert not loaded & HEAVY_EXTRAS


def test_wheel_holds_every_module_the_type_marker_and_the_templates(wheel):
    files = {name for name in wheel.namelist() if name.startswith("mdu_trainer/")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mdu_trainer").rglob("*.py")}
    templates = {f"mdu_trainer/model_cards/{name}.jinja" for name in TEMPLATES}
    scripts = {f"mdu_trainer/examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    configs = {f"mdu_trainer/{path.relative_to(ROOT)}" for path in (ROOT / "examples").glob("*/*.yaml")}
    assert files == modules | templates | scripts | configs | {"mdu_trainer/py.typed", "mdu_trainer/__init__.pyi"}
    assert "mdu.py" in wheel.namelist()


def test_command_of_a_wheel(wheel, tmp_path):
    """Without a clone: the console script, and the examples with the files they read."""
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")
    assert "mdu = mdu:main" in wheel.read(info + "entry_points.txt").decode()
    wheel.extractall(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for arguments, words in (
        (["compare", "--help"], "usage: mdu compare"),
        (["sweep", "--select", "retain>0.9"], "mdu sweep: error: --select: 'retain>0.9' is no condition"),
    ):
        command = [sys.executable, "-m", "mdu", *arguments]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert words in run.stdout + run.stderr and "Traceback" not in run.stderr


def test_wheel_metadata(wheel):
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")
    metadata = wheel.read(info + "METADATA").decode().splitlines()
    assert f"Version: {mdu_trainer.__version__}" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: MIT" in metadata
    assert {f"Provides-Extra: {extra}" for extra in ("eval", "plot", "quality", "test")} <= set(metadata)
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in wheel.namelist())


def test_constraints_pin_every_requirement(wheel):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    info = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    required = [line[15:] for line in wheel.read(info).decode().splitlines() if line.startswith("Requires-Dist: ")]
    for requirement in map(Requirement, required):
        installed = [{"extra": extra} for extra in ("", "plot", "quality", "test")]
        if requirement.marker and not any(map(requirement.marker.evaluate, installed)):
            continue
        name = canonicalize_name(requirement.name)
        versions = [next(iter(pin.specifier)).version for pin in pins if canonicalize_name(pin.name) == name]
        assert versions, f"{name} is not pinned"
        assert all(version in requirement.specifier for version in versions)
