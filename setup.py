"""For tools that look for a setup.py: all of the packaging is in pyproject.toml."""

from setuptools import setup

setup()
