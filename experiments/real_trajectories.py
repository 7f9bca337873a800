"""SFT on real agent trajectories of four sources with the Qwen3 tokenizer, packed to 32,768 tokens.

    a1jax run experiments/real_trajectories.py --set data.paths='["../shared/data/trajectories"]'

Measured: 7 min 20 s on 2 CPU cores (Intel Xeon, shared), jax 0.10.2, seed 0, on the tree then committed as dce9c8c
(run.json: 3e9fe513d6 with uncommitted changes), with data.heldout_rows=1, since then the default (39 runs held out in all):

    source     runs   mean  median     p95     max     tokens  supervised  skipped
    ---------  ----  -----  ------  ------  ------  ---------  ----------  -------
    nemo-gym    355  2,862     881  12,248  40,376  1,015,998       41.4%  25 (10 call without result; 5 no known trajectory format;
                                                                               5 no model turn; 5 no response output)
    swe-agent    19  7,709   8,092  11,617  13,808    146,469       13.7%  0
    tau-bench   200  4,023   3,768   8,018  11,677    804,536       21.8%  91 (91 no known trajectory format)
    webdancer   200  4,291   4,198   5,698   9,685    858,131       26.5%  0
    all         774  3,650   3,398   8,859  40,376  2,825,134       29.9%  116

    packed to 32,768: 735 examples in 82 rows, 2662445 of 2686976 slots used (99.09%); split 2 (77574 tokens), dropped 0

    step     0  held-out loss 12.437 nats per model token
    step     5  held-out loss 10.214 nats per model token
    step    10  held-out loss 7.965 nats per model token
    step    15  held-out loss 7.197 nats per model token
    step    20  held-out loss 6.865 nats per model token
    held-out loss fell by 44.8 % from its first value

The 91 of tau-bench are its few-shot displays and data bases, which are no runs. The model is tiny (one gated delta net, one attention
layer, 8 experts) over 151,680 ids: it shows that the road carries real data, and is no result of its own.
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
        data=DataConfig(paths=("../shared/data/trajectories",), tokenizer="../shared/data/tokenizers/qwen3", heldout_rows=1),
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
