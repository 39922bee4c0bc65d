"""Packages the experiments of `configs/` as `rear_jax/configs`; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["rear_jax*"]), "rear_jax.configs"],
    package_dir={"rear_jax.configs": "configs"},
)
