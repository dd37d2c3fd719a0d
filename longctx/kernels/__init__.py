"""Facade over the operators, whose sources live in the checkout's ``kernels/`` folder.

Installed, they are packages below this one (see setup.py). In a checkout that folder is added to the search path; the
guard matters because in an installed package ``parents[2]`` is site-packages.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "setup.py").is_file():
    __path__.append(str(_checkout / "kernels"))
