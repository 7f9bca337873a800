"""Eight CPU devices for every test, strict broadcasting, and where the shared data lies."""

import atexit
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# Tests compile much and run little: the compiler's cheapest level halves their time, and the emitters of fusions that XLA had before
# compile a model three times as fast as the present ones. A later jaxlib, which has no others, refuses that flag, and so does libtpu.
CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
OLD_FUSIONS = "--xla_cpu_use_fusion_emitters=false"
# All of this has to be set before jax is imported. With libtpu installed, for compiling only, jax would look for a TPU first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have it from the process that starts them
    flags = [os.environ.get("XLA_FLAGS", ""), CHEAP, OLD_FUSIONS if importlib.metadata.version("jaxlib").startswith("0.10.") else ""]
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))
# Runs that are cut and go on, commands in processes of their own and other workers compile the same programs again: what took long is kept
# for all of them until the tests end. jax writes these files in place: who meets one half written compiles it himself.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.mkdtemp(prefix="a1jax-tests-")
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Before anything touches a device: afterwards the number of devices is fixed.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes and types in the signatures of the numerical rooms are checked at every call in the tests.
jaxtyping.install_import_hook(["a1jax.models", "a1jax.losses", "a1jax.kernels"], "beartype.beartype")

ROOT = pathlib.Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"

# Files are handed to the workers in this order, then the rest: one that takes long must not be the last to start.
LONGEST = """
stages/test_processes.py kernels/test_tpu_compiles.py stages/test_elastic.py stages/test_scoring.py stages/test_distill.py
stages/test_pipeline.py test_interruption.py test_notebooks.py stages/test_mesh.py stages/test_sft.py models/test_parallel.py
analysis/test_35b_compiles.py test_lost_process.py models/test_attention_compiles.py kernels/test_aligned.py models/test_parity.py
stages/test_where_arrays_lie.py stages/test_real_runs.py analysis/test_compile.py stages/test_full.py align/test_whole.py
stages/test_grpo.py stages/test_scoring_dense.py align/test_batch_targets.py stages/test_folders.py models/test_transformer.py
models/test_prefill.py stages/test_generate.py domains/test_engineering.py domains/test_sandbox.py rollout/test_agent.py
test_checkpoint.py test_main.py test_packaging.py
""".split()

# What `pytest -m quick` runs: a part of every room, files or single tests, without the packages that only the parity tests need.
QUICK = """
test_config.py test_params.py test_sharding.py test_train.py test_checkpoint.py test_metrics.py test_main.py
models/test_layers.py
losses/test_masked.py losses/test_sampled.py losses/test_cross_entropy.py losses/test_token_logp.py losses/test_advantages.py
losses/test_grpo.py align/test_spans.py align/test_positions.py align/test_vocab_map.py align/test_target.py
data/test_packing.py data/test_batches.py data/test_trajectories.py domains/test_domains.py domains/test_general.py domains/test_stopping.py
rollout/test_turns.py rollout/test_rewards.py rollout/test_agent.py kernels/test_layout.py kernels/test_vocab_align.py
stages/test_recipes.py analysis/test_drawing.py
""".split()
# ... but for these, which take longest there.
NOT_QUICK = """
data/test_packing.py::test_real_runs_fill_rows align/test_positions.py::test_a_long_batch_is_quick
rollout/test_agent.py::test_recorded_routes_are_those_of_the_training_forward
test_checkpoint.py::test_a_kill_at_any_moment_leaves_a_checkpoint
""".split()


def pytest_ignore_collect(collection_path, config):
    """Of the quick tests nothing else is imported."""
    if config.option.markexpr == "quick" and collection_path.name.startswith("test_"):
        file = collection_path.relative_to(TESTS).as_posix()
        return None if any(name.partition("::")[0] == file for name in QUICK) else True


def pytest_collection_modifyitems(items):
    places = {file: place for place, file in enumerate(LONGEST)}
    files = {item: item.path.relative_to(TESTS).as_posix() for item in items}
    for item, file in files.items():
        names = {file, f"{file}::{item.originalname}"}
        if item.get_closest_marker("slow") is None and names & set(QUICK) and not names & set(NOT_QUICK):
            item.add_marker("quick")
    items.sort(key=lambda item: places.get(files[item], len(places)))


@pytest.fixture(scope="session")
def flags_for_tpu() -> str:
    """XLA_FLAGS of a process that loads libtpu."""
    return os.environ["XLA_FLAGS"].replace(OLD_FUSIONS, "")


@pytest.fixture(scope="session")
def compile_for_tpu(flags_for_tpu):
    """compile_for_tpu(script, *programs) -> the lines of JSON that a script below tests/ prints, one a program (words), in a process that
    sees no device but the CPU. Skips where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: pip install libtpu")

    def run(script, *programs):
        words = [str(word) for program in programs for word in program]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": flags_for_tpu}
        command = [sys.executable, str(ROOT / "tests" / script), *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
        assert result.returncode == 0, result.stderr[-4000:]
        lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == len(programs)
        return lines

    return run


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data; the test is skipped where it does not exist."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}")
    return folder


@pytest.fixture(scope="session")
def domain_tokenizer(tmp_path_factory):
    """The small SentencePiece model that the embedded domains train for themselves."""
    from a1jax.data.tokenizer import train_sentencepiece
    from a1jax.domains import QUICKSTART
    from a1jax.stages import experts

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    families = tuple(QUICKSTART.values())
    return train_sentencepiece(experts.tokenizer_texts(families, 0), path, vocab_size=640, symbols=experts.symbols(families, 24))


@pytest.fixture(scope="session")
def small_model():
    """A model config over that tokenizer, as small as the real shape allows."""
    from a1jax.models import config as models

    width = {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "expert_width": 8, "shared_expert_width": 8}
    return models.tiny(vocab_size=640, d_model=16, num_experts=2, **width)


def largest_array(jaxpr) -> int:
    """Elements of the largest array that any equation makes, in loops, branches and custom gradients too."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes.append(largest_array(inner))
    return max(sizes)


@pytest.fixture(scope="session")
def largest():
    """largest(jaxpr): see ``largest_array``."""
    return largest_array


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible endpoint on this machine, see tests/rollout/judge_endpoint.py."""
    from tests.rollout.judge_endpoint import serving

    with serving(monkeypatch) as found:
        yield found
