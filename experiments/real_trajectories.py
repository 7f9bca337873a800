"""SFT on real agent trajectories of four sources, packed to 32,768 tokens.

a1jax run experiments/real_trajectories.py --set data.paths='["../shared/data/trajectories"]'
"""

from a1jax import optim
from a1jax.config import ConfigError, bind
from a1jax.models import config as models
from a1jax.stages import real_runs
from a1jax.stages.real_runs import DataConfig, RealRuns
from a1jax.stages.sft import SftConfig


def get_config(arg: str = "") -> RealRuns:
    if arg:
        raise ConfigError(f"real_trajectories has no argument '{arg}'")
    return RealRuns(
        name="real_trajectories",
        main=bind(real_runs.run),
        data=DataConfig(paths=("../shared/data/trajectories",), tokenizer="../shared/data/tokenizers/qwen3"),
        model=models.tiny(vocab_size=151_680, num_heads=1, num_kv_heads=1, head_dim=16, attention_chunk=512, delta_chunk=64),
        sft=SftConfig(
            steps=20,
            rows=1,
            max_length=32_768,
            policy="split",
            vocab_block=4096,
            loss_tile=256,
            save_every=8,
            log_every=1,
            optimizer=bind(optim.muon, learning_rate=0.01, table_learning_rate=0.03, warmup=0.1),
        ),
        probe_every=5,
    )
