"""SFT from trajectory files: read, prepared, packed, trained, measured on runs that were held out."""

import gzip

import numpy as np
import pytest

from a1jax import config, metrics, optim
from a1jax.config import ConfigError, bind
from a1jax.data import trajectories
from a1jax.data.errors import DataError
from a1jax.domains import QUICKSTART, solve
from a1jax.stages import experts, real_runs
from a1jax.stages.real_runs import DataConfig, RealRuns, Subset
from a1jax.stages.sft import SftConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two sources of our own form, one packed, one with a broken line."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("search", "tool_calling"):
        (folder / name).mkdir()
        runs = [solve(t) for t in experts.tasks(QUICKSTART[name], {2: 20, 4: 20}, "sft", 0)]
        trajectories.write(folder / name / "runs.jsonl.gz", runs)
    path = folder / "search/runs.jsonl.gz"
    path.write_bytes(path.read_bytes() + gzip.compress(b'{"messages": [\n'))
    return folder


def settings(files, tokenizer, model, **data):
    sft = SftConfig(
        steps=6, rows=2, max_length=512, policy="split", optimizer=bind(optim.muon, learning_rate=0.02), save_every=3, log_every=1
    )
    return RealRuns(
        "real", bind(real_runs.run), DataConfig((str(files),), tokenizer.path, heldout=0.1, heldout_rows=1, **data), model, sft, 3
    )


def test_held_out_loss_falls_and_everything_is_counted(files, tokenizer, small_model, tmp_path, capsys):
    cfg = settings(files, tokenizer, small_model)
    out = real_runs.run(cfg, tmp_path / "run")
    text = capsys.readouterr().out
    assert out["last"] < 0.95 * out["first"] and out["efficiency"] > 0.8
    assert [line["step"] for line in metrics.read(tmp_path / "run") if line["stage"] == "sft/probe"] == [0, 3, 6]
    search = next(line for line in text.splitlines() if line.startswith("search"))
    assert " 40 " in search and "1 (1 " in search  # 40 runs, one record skipped with its reason
    assert real_runs.run(cfg, tmp_path / "run") == out  # finished: the same numbers again


def test_strict_stops_at_the_broken_line_and_leaves_nothing(files, tokenizer, small_model, tmp_path):
    with pytest.raises(DataError, match=r"runs\.jsonl\.gz:41"):
        real_runs.run(settings(files, tokenizer, small_model, strict=True), tmp_path / "run")
    assert not (tmp_path / "run/prepared").exists()


def test_split_holds_out_whole_runs_once():
    class Numbers:
        lengths = np.arange(1, 41)

        def __len__(self):
            return 40

        def __getitem__(self, i):
            return i

    train, heldout = real_runs.split(Numbers(), 0.2, seed=1)
    assert sorted([*train, *heldout]) == list(range(40)) and len(heldout) == 8
    assert [int(n) for n in train.lengths] == [i + 1 for i in train]
    assert isinstance(heldout, Subset) and list(real_runs.split(Numbers(), 0.2, seed=2)[1]) != list(heldout)


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(files, tokenizer, small_model, tmp_path):
    cfg = config.override(settings(files, tokenizer, small_model), ["model.vocab_size=300"])
    with pytest.raises(ConfigError, match="the tokenizer has 640 ids but model.vocab_size is 300"):
        real_runs.run(cfg, tmp_path / "run")


def test_real_runs_of_a_coding_agent(shared_data, small_model, tmp_path):
    data = DataConfig((str(shared_data / "trajectories/swe-agent"),), str(shared_data / "tokenizers/mistral"), heldout=0.2, heldout_rows=1)
    model = config.override(small_model, ["vocab_size=32768", "attention_chunk=256"])
    sft = SftConfig(
        steps=1, rows=1, max_length=8192, policy="split", optimizer=bind(optim.muon, learning_rate=0.02), loss_tile=256, vocab_block=4096
    )
    out = real_runs.run(RealRuns("swe", bind(real_runs.run), data, model, sft), tmp_path)
    assert out["last"] < out["first"] and out["efficiency"] > 0.75
