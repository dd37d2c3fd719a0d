"""What TOML cannot say: the operator folders in ``kernels/`` install as ``longctx.kernels.*``.

``kernels`` is also the import name of a package that transformers imports, so a top-level ``kernels`` of ours must
never reach a wheel, nor be importable from the checkout. All the rest is in pyproject.toml.
"""

from setuptools import find_packages, setup

operators = find_packages("kernels")
setup(
    packages=find_packages(include=["longctx", "longctx.*"]) + [f"longctx.kernels.{op}" for op in operators],
    package_dir={f"longctx.kernels.{op}": f"kernels/{op.replace('.', '/')}" for op in operators},
)
