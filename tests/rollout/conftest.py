"""A model that writes what it is told, for tests of the loop around it."""

import dataclasses

import numpy as np
import pytest


def write_scripts(engine, *scripts):
    """The engine with a model that writes what it is told, whatever it is fed: the loop itself is what is tested. scripts: per slot the
    sequences it is fed one after the other, ids each."""
    rows = len(scripts)
    runs, script, position = [iter(s) for s in scripts], [None] * rows, [0] * rows

    def advance(params, slots, tokens, reset, active, uniforms):
        for row in range(rows):
            if reset[row]:
                script[row], position[row] = next(runs[row]), 0
            position[row] += int(active[row])
        ids = [s[min(p, len(s) - 1)] if s is not None else 0 for s, p in zip(script, position, strict=True)]
        return np.array([*ids, *[0] * (len(tokens) - rows)], np.int32), np.full(len(tokens), -0.5, np.float32), slots

    engine.advance = advance
    engine.limits = dataclasses.replace(engine.limits, feed_tokens=0)
    return engine


@pytest.fixture(scope="session")
def scripted():
    """scripted(engine, *scripts): see ``write_scripts``."""
    return write_scripts
