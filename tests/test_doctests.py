"""Every `>>>` example in the package runs and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

import mdu_trainer

PACKAGE = Path(mdu_trainer.__file__).parent
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_in_docstrings(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed
