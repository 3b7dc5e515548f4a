"""The sister packages, imported on first use and checked to be ours.

Hugging Face also publishes a package called ``datasets``. Where the working directory is not the root of the clone, its
package would be imported instead of ours and fail in strange ways; this says so clearly.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
"""The root of the clone: the folder in which ``runs``, ``datasets``, ``models``, ``methods`` and ``certify`` lie."""


class ForeignPackage(ImportError):
    """A package of the same name from elsewhere was imported in place of ours."""


def ours(name: str) -> ModuleType:
    """Import one of the sister packages.

    Raises:
        ForeignPackage: Python found another package of this name first.
    """
    module = importlib.import_module(name)
    origin = getattr(module, "__file__", None)
    found = Path(origin).resolve().parent if origin else None
    if found != ROOT / name:
        where = found if found is not None else "a namespace package without a file"
        hint = " (Hugging Face's package has the same name)" if name == "datasets" else ""
        raise ForeignPackage(
            f"imported {name!r} from {where}, expected {ROOT / name}{hint}. Run from the root of the clone: "
            f"cd {ROOT} && python -m runs.compare"
        )
    return module
