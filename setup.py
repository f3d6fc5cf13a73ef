"""Maps the top-level folders into one package: datasets/spec.py is selfflow.datasets.spec."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("worldmodel", "policies", "envs", "datasets", "configs", "eval")

found = find_namespace_packages(include=[pattern for f in FOLDERS for pattern in (f, f"{f}.*")])
setup(
    packages=[f"selfflow.{name}" for name in found],
    package_dir={f"selfflow.{f}": f for f in FOLDERS},
    package_data={"": ["*.yaml", "*.xml", "*.json", "*.safetensors", "py.typed"]},
)
