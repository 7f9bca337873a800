"""The base model, Qwen3.5-35B-A3B's text part (HF `qwen3_5_moe`), as pure functions over nested dicts of arrays.

Axis letters, used in comments, docstrings and einsums of this package (einsums use them in lower case):

    B batch             T query length       S key length          D width of the residual stream
    H (value) heads     K key/value heads    R heads per K         F feature width of one head or one expert
    E experts           A experts active     V vocabulary          G rollouts per prompt
    L layers            N blocks of layers   C chunk of the delta rule   W taps of the convolution
"""
