"""Modules of tutorials, which are no package: several tutorials have modules of the same names."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

TUTORIALS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tutorials")


def load_siblings(tutorial: str, *names: str) -> list[ModuleType]:
    """
    Load modules of a tutorial, which import each other by their plain names.

    :param str tutorial: the folder.
    :param names: of the modules.
    :returns: the modules, which are forgotten under their plain names.
    """
    folder = os.path.join(TUTORIALS, tutorial)
    own = {file.removesuffix(".py") for file in os.listdir(folder) if file.endswith(".py")}
    before = {name: sys.modules.pop(name) for name in own if name in sys.modules}
    paths = [folder, TUTORIALS]  # the second one for what tutorials share
    sys.path[:0] = paths
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(before)
