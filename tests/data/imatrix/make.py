"""Writes demo.imatrix.gguf: an importance matrix as llama-imatrix writes it, for the bundled model (6 layers of 32
experts, 4 of them used). Its counts are made up: what expert has rank r of layer l is used about 1 / (r + 2) as often.

    pip install gguf && python3 make.py
"""

from pathlib import Path

import gguf
import numpy as np

LAYERS, EXPERTS, USED, TOKENS, HIDDEN = 6, 32, 4, 4096, 256


def counts(layer):
    """Whole numbers that sum to USED * TOKENS, none above TOKENS, for experts in an order of the layer's own."""
    wanted = USED * TOKENS / (np.arange(EXPERTS) + 2) / sum(1 / (r + 2) for r in range(EXPERTS))
    by_rank = np.minimum(np.floor(wanted), TOKENS).astype(np.int64)
    by_rank[-1] += USED * TOKENS - by_rank.sum()
    out = np.zeros(EXPERTS, np.float32)
    for rank, count in enumerate(by_rank):
        out[(7 * rank + 5 * layer) % EXPERTS] = count
    assert out.sum() == USED * TOKENS and out.max() <= TOKENS
    return out


writer = gguf.GGUFWriter(Path(__file__).with_name("demo.imatrix.gguf"), "")
# The writer's own architecture key is not in such files.
writer.kv_data[0].clear()
writer.add_type("imatrix")
writer.add_array("imatrix.datasets", ["/somewhere/else/calibration.txt"])
writer.add_uint32("imatrix.chunk_count", 8)
writer.add_uint32("imatrix.chunk_size", 512)
for layer in range(LAYERS):
    for name in ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]:
        writer.add_tensor(f"blk.{layer}.{name}.weight.counts", counts(layer).reshape(EXPERTS, 1))
    for name in ["ffn_gate_inp", "attn_output"]:
        writer.add_tensor(f"blk.{layer}.{name}.weight.counts", np.full((1, 1), TOKENS, np.float32))
writer.add_tensor("blk.0.attn_output.weight.in_sum2", np.full((1, HIDDEN), 0.5, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
