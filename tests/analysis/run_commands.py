"""Run as a script, not a test: several a1jax commands in one process, so that jax and the compiler are loaded once.

python tests/analysis/run_commands.py '[["compile", "FILE", ...], ...]'      prints [[exit code, stdout, stderr], ...] as JSON
"""

import contextlib
import io
import json
import sys

from a1jax import main

if __name__ == "__main__":
    done = []
    for words in json.loads(sys.argv[1]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.main(words)
        done.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(done))
