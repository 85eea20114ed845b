"""Puts this repository first on ``sys.path``: others, too, have modules named ``settings``, ``dataset``, ``evaluate``.

Every module that a notebook may import first imports this one.
"""

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def _is_ours(module: object) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
    return any(place and ROOT in Path(place).resolve().parents for place in places)


sys.path.insert(0, str(ROOT))
_NAMES = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
_foreign = {name for name, module in sys.modules.items() if name.split(".")[0] in _NAMES and not _is_ours(module)}
for _name in _foreign:
    del sys.modules[_name]
if _foreign:
    warnings.warn(f"{', '.join(sorted(_foreign))}: from now on these names import what is in {ROOT}", stacklevel=2)
