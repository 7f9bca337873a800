import dataclasses

import pytest

from a1jax.domains import DOMAINS, QUICKSTART, Call, LongContext, Observation, Outcome, solve, stopping
from a1jax.domains.base import Task, Turn
from a1jax.types import ABORTED, FAILED, FINISHED, TRUNCATED, Record, Trajectory


@dataclasses.dataclass(frozen=True)
class Reading(Task):
    """Its expert reads a, then b, then notes the result: surplus 1 of 3 actions."""

    def reset(self):
        return None

    def step(self, state, call):

        return state, Observation("text", refs=tuple(call.arguments.values()))

    def expert(self):

        yield Turn("", Call("read", {"name": "a"}))
        yield Turn("", Call("read", {"name": "b"}))
        yield Turn("", Call("note", {}))
        yield Turn("", answer="yes")

    def verify(self, trajectory):

        return Outcome(True, 1.0, "accepted")


TASK = Reading("search", "t", 2, "q", "yes", ("a", "b"), ())


def run(refs, status=FINISHED, answered=True):
    records = [Record(tuple(r), {"name": "read", "arguments": {}}, "text") for r in refs]
    last = {"role": "assistant", "content": "yes"} if answered else {"role": "tool", "content": "text"}
    return Trajectory("search", "t", ({"role": "user", "content": "q"}, last), records=(*records, Record(("a", "b"), None)), status=status)


@pytest.mark.parametrize(
    ("refs", "status", "wanted"),
    [
        (["a", "b", ""], FINISHED, "in_time"),  # as the expert
        (["a", "b"], FINISHED, "in_time"),  # shorter, and accepted
        (["a", "b"], FAILED, "early"),  # shorter, and refused
        (["a"], FINISHED, "early"),  # b was never seen: known by luck only
        ([], FAILED, "early"),
        (["a", "b", "", ""], FINISHED, "late"),  # one action more than the expert after b
        (["a", "b", "", "a"], FAILED, "late"),
        (["a", "a", "", "b", ""], FINISHED, "in_time"),  # slow in finding out, then prompt
        (["ab", "", ""], FINISHED, "in_time"),  # two after it knew, but no more in all than the expert
        (["ab", "", "", ""], FINISHED, "late"),
        (["a", "b", ""], TRUNCATED, "never"),
        (["a", "b", ""], ABORTED, "never"),
    ],
)
def test_stops_by_hand(refs, status, wanted):
    assert stopping.expert(TASK) == (1, 3)
    assert stopping.stop(TASK, run(refs, status)) == wanted


def test_a_run_without_an_answer_never_stopped_and_without_evidence_nothing_tells_when_to():
    assert stopping.stop(TASK, run(["a", "b", ""], None, answered=False)) == "never"
    bare = dataclasses.replace(TASK, evidence=())
    assert [stopping.stop(bare, run(["x"] * n, status)) for n, status in ((9, FAILED), (0, FINISHED))] == ["untold"] * 2
    assert stopping.stop(bare, run([], TRUNCATED)) == "never"


def test_the_verdict_at_the_end_is_no_sight_of_the_evidence():
    assert stopping.known_after(("a", "b"), stopping.actions(run(["a"]))) is None
    assert stopping.known_after(("a", "b"), stopping.actions(run(["b", "", "a", ""]))) == 3
    assert stopping.known_after((), []) == 0


@pytest.mark.parametrize("name", [n for n in DOMAINS if n != "engineering"])
def test_every_expert_stops_in_time_and_too_early_without_its_last_sight_of_the_evidence(name):
    for seed in range(3):
        task = DOMAINS[name].propose(seed, 3)
        done = solve(task)
        assert stopping.stop(task, done) == ("in_time" if task.evidence else "untold")
        did = stopping.actions(done)
        if task.evidence:
            known = stopping.known_after(task.evidence, did)
            short = dataclasses.replace(done, records=tuple(did[: known - 1]), status=FAILED)
            long = dataclasses.replace(done, records=(*did, did[-1]))
            assert (stopping.stop(task, short), stopping.stop(task, long)) == ("early", "late")


def test_an_unhashable_task_is_solved_anew():
    task = dataclasses.replace(QUICKSTART["search"].propose(1, 2), chain=[["a", "b"]])
    with pytest.raises(TypeError):
        hash(task)
    assert stopping.expert(task) == stopping.expert(QUICKSTART["search"].propose(1, 2))


def test_families_without_evidence_are_untold():
    families = (DOMAINS["instruction_following"], LongContext(tokens=1000), dataclasses.replace(DOMAINS["science"], tools=False))
    tasks = [family.propose(1, 2) for family in families]
    assert [stopping.stop(task, solve(task)) for task in tasks] == ["untold"] * 3


def test_counts_name_all_five():
    assert stopping.counts(["late", "late", "never"]) == {"early": 0, "in_time": 0, "late": 2, "never": 1, "untold": 0}
