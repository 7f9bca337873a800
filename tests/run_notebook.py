"""Runs a notebook top to bottom with the kernel of this interpreter and writes it back with its outputs: a process of its own for
tests/test_notebooks.py, whose rules on warnings are not for the sockets between a client and a kernel.

    python tests/run_notebook.py NOTEBOOK       # in its folder; prints the seconds it took
"""

import pathlib
import sys
import time

import jupyter_client
import nbclient
import nbformat


def main(path):
    manager = jupyter_client.AsyncKernelManager(kernel_name="python3")
    # This interpreter's, whatever kernels are installed.
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager._kernel_spec = jupyter_client.kernelspec.KernelSpec(argv=argv, language="python", display_name="this")
    book, began = nbformat.read(path, as_version=4), time.perf_counter()
    nbclient.NotebookClient(book, timeout=600, km=manager, resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(book, path)
    print(f"{path.stem}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
