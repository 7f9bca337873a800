"""The door to the checkout's ``kernels/`` folder: ``import a1jax.kernels.<op>`` works installed or not. Path only.

A wheel carries the ops inside this package. A checkout keeps them in the top-level folder, which has no __init__.py of
its own (the name would collide with the PyPI package ``kernels``, which is why such a folder is not taken for ours).
"""

import pathlib

_folder = pathlib.Path(__file__).resolve().parents[2] / "kernels"
if _folder.is_dir() and not (_folder / "__init__.py").exists():
    __path__.append(str(_folder))
