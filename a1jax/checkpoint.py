"""Checkpoints: the whole training state to go on with, or the parameters alone to start from or to distill from.

A checkpoint directory holds ``<step>/{params,state,extra}``: parameters in an item of their own, so that a teacher is read
without its optimizer. A step directory appears complete or not at all; a process killed while saving leaves the step before.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from a1jax.config import ConfigError
from a1jax.types import Params, TrainState

PathLike = str | os.PathLike[str]


def open_manager(directory: PathLike, keep: int, save_every: int) -> ocp.CheckpointManager:
    """A manager of the checkpoints in ``directory`` (created). keep: how many of the newest stay. save_every: steps between saves.

    Saving goes on in the background: ``check`` says when it has failed, ``manager.close()`` waits for it and must be called before the
    process ends.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        save_interval_steps=save_every,
        cleanup_tmp_directories=True,  # what a killed process had begun
        enable_async_checkpointing=True,  # two thirds of a small save are waiting for the file system
    )
    handlers = {"params": ocp.StandardCheckpointHandler(), "state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(_absolute(directory), options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, step: int, state: TrainState, extra: dict[str, Any], force: bool = False) -> bool:
    """Begins to save; true where it did. The first call saves, then steps that are multiples of ``save_every``, and any with ``force``;
    a step that is saved already is passed over.

    The state may be donated as soon as this returns. extra: what JSON can hold (the position of the loader, ...).
    Raises ConfigError where a save, this or the one before, failed.
    """
    check(manager)
    if step in manager.all_steps():
        return False
    rest = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(_without_keys(state.params)),
        state=ocp.args.StandardSave(_without_keys(rest)),
        extra=ocp.args.JsonSave(extra),
    )
    with _told_in_one_line(manager, step):
        return bool(manager.save(step, args=items, force=force))


def check(manager: ocp.CheckpointManager) -> None:
    """Raises ConfigError where the last save, which goes on in the background, has failed. Does not wait for one that is under way."""
    if not manager.is_saving_in_progress():
        wait(manager)


def wait(manager: ocp.CheckpointManager) -> None:
    """Returns when the last save is complete. Raises as ``check``."""
    with _told_in_one_line(manager):
        manager.wait_until_finished()


def latest(directory: PathLike) -> int | None:
    """Step of the newest complete checkpoint in ``directory``, None where there is none. Reads names only."""
    steps = ocp.utils.checkpoint_steps(_absolute(directory))
    return max(steps, default=None)


@contextlib.contextmanager
def _told_in_one_line(manager: ocp.CheckpointManager, step: int | None = None) -> Iterator[None]:
    """What goes wrong with writing as a ConfigError: what, where, from which step the run can go on."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        have = latest(manager.directory)
        which = "the checkpoint" if step is None else f"step {step}"
        raise ConfigError(
            f"{manager.directory}: {which} could not be saved ({reason[:300]}); make room or mend the file system, then the same command "
            f"goes on from {'the beginning' if have is None else f'step {have}'}"
        ) from error


def restore(manager: ocp.CheckpointManager, template: TrainState) -> tuple[TrainState, dict[str, Any], int] | None:
    """(state, extra, step) of the newest complete checkpoint, bitwise as saved; None where there is none.

    template: a state of the same shapes and dtypes (arrays or ShapeDtypeStructs), whose shardings the result gets.
    Raises ConfigError listing the arrays that are missing, unknown or of another shape or dtype.
    """
    wait(manager)
    step = manager.latest_step()
    if step is None:
        return None
    rest = {"step": template.step, "opt_state": template.opt_state, "key": template.key}
    wanted = {"params": _abstract(template.params), "state": _abstract(rest)}
    found = manager.item_metadata(step)
    for item, tree in wanted.items():
        _compare(tree, found[item], f"{manager.directory}/{step}", exact_dtype=True)
    items = {item: ocp.args.StandardRestore(tree) for item, tree in wanted.items()}
    got = manager.restore(step, args=ocp.args.Composite(**items, extra=ocp.args.JsonRestore()))
    rest = _with_keys(got["state"], rest)
    state = TrainState(step=rest["step"], params=_with_keys(got["params"], template.params), opt_state=rest["opt_state"], key=rest["key"])
    return state, got["extra"], step


def save_params(directory: PathLike, params: Params) -> None:
    """Writes parameters alone into ``directory``, to be read by ``load_params``, replacing what was there; returns when complete."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(os.path.join(_absolute(directory), "params"), args=ocp.args.StandardSave(params), force=True)


def load_params(directory: PathLike, abstract_params: Params, step: int | None = None) -> Params:
    """Parameters alone, out of what ``save_params`` wrote or out of the checkpoint of ``step`` (None: the newest) of a training run.

    abstract_params: ShapeDtypeStructs (or arrays) giving shapes, the dtypes to cast to and the shardings to place on.
    Raises ConfigError where there is nothing to read or a file is damaged, or listing the arrays that are missing, unknown or of another
    shape.
    """
    path = _params_path(directory, step)
    wanted = _abstract(abstract_params)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        _compare(wanted, _metadata(reader, path), path, exact_dtype=False)
        return _intact(path, lambda: reader.restore(path, args=ocp.args.StandardRestore(wanted)), _tells_of_damage)


def stored_params(directory: PathLike, step: int | None = None) -> Any:
    """Shapes and dtypes (ShapeDtypeStructs) as stored of the parameters that ``load_params`` finds in ``directory``; raises as it does."""
    path = _params_path(directory, step)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        found = _metadata(reader, path)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype), found.tree)


def _metadata(reader: ocp.Checkpointer, path: str) -> Any:
    """What orbax knows of the arrays in ``path``. Raises ConfigError where its files are damaged."""
    stumbles = AttributeError, KeyError, TypeError, ValueError, OSError  # of its parsers; nothing of ours takes part
    return _intact(path, lambda: reader.metadata(path).item_metadata, lambda error: isinstance(error, stumbles))


def _intact(path: str, read: Callable[[], Any], damaged: Callable[[Exception], bool]) -> Any:
    """What ``read`` returns. Raises ConfigError where it is None, which is how orbax says that it failed, or raises what is ``damaged``.

    Orbax reads arrays side by side and waits for the first that fails; of each of the others Python prints a page when it is collected.
    These pages say nothing new, so they are collected here, with the printing off.
    """
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    before = log.disabled
    log.disabled, sys.unraisablehook = True, lambda _: None
    try:
        found = None
        try:
            found = read()
        except Exception as error:
            if not damaged(error):
                raise
        if found is None:
            time.sleep(0.3)  # for reads still under way in threads, whose complaints would come after ours
            gc.collect()
            raise ConfigError(f"{path}: no readable parameters, a file in it is missing or damaged; make it again or take it from a copy")
        return found
    finally:
        log.disabled, sys.unraisablehook = before, hook


def _tells_of_damage(error: Exception) -> bool:
    """Whether a failed restore is the files' fault: their JSON, or an array, for which orbax raises a plain Exception from the reason."""
    array = type(error) is Exception and isinstance(error.__cause__, ValueError | OSError)
    return array or isinstance(error, json.JSONDecodeError | UnicodeDecodeError)


def _params_path(directory: PathLike, step: int | None) -> str:
    directory = _absolute(directory)
    alone = os.path.join(directory, "params")
    if step is None and os.path.isdir(alone):
        return alone
    if not os.path.isdir(directory):
        raise ConfigError(f"{directory}: no such checkpoint folder")
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        steps = sorted(manager.all_steps())
    if not steps or (step is not None and step not in steps):
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "it has no complete checkpoint"
        raise ConfigError(f"{directory}: no parameters{'' if step is None else f' of step {step}'} to load; {have}")
    return os.path.join(directory, str(steps[-1] if step is None else step), "params")


def _absolute(path: PathLike) -> str:
    return os.fspath(path) if "://" in os.fspath(path) else os.path.abspath(path)  # orbax refuses relative paths; gs:// is one already


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: Any) -> Any:
    """Typed PRNG keys as the integers they hold: what a file can store."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _with_keys(tree: Any, template: Any) -> Any:
    """The reverse of ``_without_keys``: which leaves are keys, and of which kind, is said by the template."""
    return jax.tree.map(lambda leaf, like: jax.random.wrap_key_data(leaf, impl=_key_impl(like)) if _is_key(like) else leaf, tree, template)


def _key_impl(key: Any) -> Any:
    """The generator of a key, also of an abstract one (only a traced key tells)."""
    told: list[Any] = []
    jax.eval_shape(lambda traced: told.append(jax.random.key_impl(traced)), key)
    return told[0]


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of what is stored for ``tree``; what has no sharding goes on the first device."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None)
        if _is_key(x):
            x = jax.random.key_data(x) if isinstance(x, jax.Array) else jax.eval_shape(jax.random.key_data, x)
            sharding = getattr(x, "sharding", None) or sharding
        elif not hasattr(x, "dtype"):
            x = np.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]))

    return jax.tree.map(leaf, tree)


def _compare(wanted: Any, found: Any, where: str, exact_dtype: bool) -> None:
    """Raises ConfigError where the arrays of a checkpoint are not those asked for."""
    want, have = ({".".join(path): leaf for path, leaf in ocp.tree.to_flat_dict(tree).items()} for tree in (wanted, found.tree))
    wrong = [f"{name} is missing" for name in want if name not in have] + [f"{name} is unknown" for name in have if name not in want]
    for name in want:
        if name not in have:
            continue
        if tuple(want[name].shape) != tuple(have[name].shape):
            wrong.append(f"{name} is {list(have[name].shape)}, wanted {list(want[name].shape)}")
        elif exact_dtype and want[name].dtype != have[name].dtype:
            wrong.append(f"{name} is {have[name].dtype}, wanted {want[name].dtype}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ConfigError(f"{where} does not fit: {'; '.join(wrong[:8])}{more}; was it written with another config?")


def _speaks(record: logging.LogRecord) -> bool:
    """Orbax reports every directory it makes; only its errors are worth a line on the reader's screen. Those with a traceback are raised
    as well, and would be told by two pages before our line."""
    ours = "orbax" not in pathlib.PurePath(record.pathname).parts
    return ours or (record.levelno >= logging.ERROR and not record.exc_info)


logging.getLogger("absl").addFilter(_speaks)
