import numpy as np
import pytest

from a1jax.data import trajectories
from a1jax.data.errors import DataError
from a1jax.stages import kept_runs
from a1jax.types import FAILED, FINISHED, Rollout, Trajectory


def run_of(task="t", domain="search", status=FINISHED, trajectory=None):
    sampled = np.asarray([0, 1, 1, 0, 1], np.float32)
    logp = np.asarray([0, -0.5, -1.25, 0, -3.00004], np.float32)
    return Rollout(task, domain, np.asarray([5, 6, 7, 8, 9], np.int32), sampled, logp, status, 1.0, 2, trajectory)


def test_spans_by_hand():
    assert kept_runs.spans(np.asarray([0, 1, 1, 0, 1])) == [(1, 3), (4, 5)]
    assert kept_runs.spans(np.asarray([1, 1])) == [(0, 2)] and kept_runs.spans(np.zeros(3)) == [] and kept_runs.spans(np.zeros(0)) == []


def test_a_run_comes_back_as_it_was(tmp_path):
    trajectory = Trajectory("search", "t", ({"role": "user", "content": "</script>\x1b"},), metadata={"rubrics": [True]})
    run = run_of(trajectory=trajectory)
    kept_runs.write(tmp_path / "a.runs.jsonl.gz", [kept_runs.to_trajectory(run, model="m"), kept_runs.to_trajectory(run_of())])
    first, second = kept_runs.read(tmp_path / "a.runs.jsonl.gz")
    back = kept_runs.to_rollout(first)
    assert first.messages == trajectory.messages and first.metadata["model"] == "m" and first.metadata["rubrics"] == [True]
    assert first.metadata["rollout"]["sampled"] == [[1, 3], [4, 5]] and first.metadata["rollout"]["logp"] == [-0.5, -1.25, -3.0]
    np.testing.assert_array_equal(back.tokens, run.tokens)
    np.testing.assert_array_equal(back.sampled, run.sampled)
    np.testing.assert_allclose(back.logp, run.logp, atol=5e-5)
    assert (back.status, back.reward, back.turns, back.task_id) == (FINISHED, 1.0, 2, "t") and second.messages == ()
    assert [p.name for p in tmp_path.iterdir()] == ["a.runs.jsonl.gz"]


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "a.runs.jsonl.gz"
    kept_runs.write(path, [kept_runs.to_trajectory(run_of())])
    path.write_bytes(path.read_bytes()[:-12])
    for reader in (kept_runs.read, lambda path: list(kept_runs.scan(path))):
        with pytest.raises(DataError, match="a.runs.jsonl.gz.*unreadable file"):
            reader(path)


def test_chosen_takes_of_every_kind_in_turn():
    runs = [
        run_of(str(i), domain, status) for i, (domain, status) in enumerate([("a", FINISHED)] * 5 + [("a", FAILED)] + [("b", FAILED)] * 2)
    ]
    assert kept_runs.chosen(runs, 5) == [5, 0, 6, 1, 7]
    assert len(kept_runs.chosen(runs, 100)) == len(runs) and kept_runs.chosen([], 3) == []


def test_what_is_kept_is_bounded_and_the_old_thins_out(tmp_path):
    held = []
    for step in (*range(1, 15), *range(11, 22)):  # killed at 14, resumed at 10
        kept_runs.keep(tmp_path, [run_of(str(i)) for i in range(6)], step, most=2, files=4)
        held.append(list(kept_runs.steps_of(tmp_path)))
    assert held[3] == [1, 2, 3, 4] and held[4] == [2, 4, 5] and held[-1] == [8, 16, 20, 21]
    assert max(map(len, held)) <= 5 and all(steps[-1] >= 14 for steps in held[13:])
    parts = [{"reward_parts": {"format": i / 10}} for i in range(6)]
    kept_runs.keep(tmp_path / "facts", [run_of(str(i), status=FAILED if i == 4 else FINISHED) for i in range(6)], 1, most=2, facts=parts)
    facts = kept_runs.read(kept_runs.steps_of(tmp_path / "facts")[1])
    assert [(r.task_id, r.metadata["reward_parts"]) for r in facts] == [("4", {"format": 0.4}), ("0", {"format": 0.0})]
    runs = kept_runs.read(kept_runs.steps_of(tmp_path)[16])
    assert [(r.task_id, r.metadata["step"]) for r in runs] == [("0", 16), ("1", 16)]


def test_scan_finds_task_ids_without_reading_the_rest(tmp_path):
    odd = Trajectory("search", 'a "b" \\ \n', ({"role": "user", "content": '"task_id": "not this"'},))
    kept_runs.write(tmp_path / "a.runs.jsonl.gz", [odd, kept_runs.to_trajectory(run_of("t2"))])
    found = list(kept_runs.scan(tmp_path / "a.runs.jsonl.gz"))
    assert [name for name, _ in found] == [odd.task_id, "t2"] and trajectories.from_json(found[0][1]) == odd
