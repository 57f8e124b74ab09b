"""Writes the fixtures of this folder with the `gguf` package, so that the reader is tested against another writer.

    pip install gguf xxhash && python tests/data/gguf/make.py

`tiny-*.gguf` hold every kind of metadata value; `parts-*.gguf` is one model in three files, the first without tensors;
`demo.tensors.tsv` lists the tensors of the bundled model: name, dimensions, type, offset in the file, bytes.
"""

from pathlib import Path

import numpy as np
import xxhash
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType as T, GGUFWriter

here = Path(__file__).parent
demo = here / "../../../profiles/demo/demo.gguf"


def tiny(path, endianess):
    w = GGUFWriter(path, "tiny", endianess=endianess)
    w.add_name("A tiny model")
    w.add_custom_alignment(64)
    w.add_key_value("v.u8", 200, T.UINT8)
    w.add_key_value("v.i8", -100, T.INT8)
    w.add_key_value("v.u16", 60000, T.UINT16)
    w.add_key_value("v.i16", -30000, T.INT16)
    w.add_key_value("v.u32", 4000000000, T.UINT32)
    w.add_key_value("v.i32", -2000000000, T.INT32)
    w.add_key_value("v.u64", 18000000000000000000, T.UINT64)
    w.add_key_value("v.i64", -9000000000000000000, T.INT64)
    w.add_key_value("v.f32", 0.5, T.FLOAT32)
    w.add_key_value("v.f64", 0.25, T.FLOAT64)
    w.add_key_value("v.bool", True, T.BOOL)
    w.add_key_value("v.str", "Grüße", T.STRING)
    w.add_key_value("a.str", ["a", "", "ß"], T.ARRAY)
    w.add_key_value("a.i32", [1, -2, 3], T.ARRAY)
    w.add_key_value("a.f32", [0.5, -1.5], T.ARRAY)
    w.add_key_value("a.bool", [True, False], T.ARRAY)
    w.add_tensor("f32", np.arange(15, dtype=np.float32).reshape(3, 5))
    w.add_tensor("q8", (np.arange(4 * 2 * 68) % 251).astype(np.uint8).reshape(4, 2, 68), raw_dtype=GGMLQuantizationType.Q8_0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def parts(path):
    w = GGUFWriter(path, "tiny", split_max_tensors=2, small_first_shard=True)
    w.add_name("In parts")
    for i in range(4):
        w.add_tensor(f"t{i}", np.full((2, 8), i, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


tiny(here / "tiny-v3.gguf", GGUFEndian.LITTLE)
tiny(here / "tiny-big-endian.gguf", GGUFEndian.BIG)
v2 = bytearray((here / "tiny-v3.gguf").read_bytes())
v2[4] = 2
(here / "tiny-v2.gguf").write_bytes(v2)
parts(here / "parts.gguf")
with open(here / "demo.tensors.tsv", "w") as out:
    for t in GGUFReader(demo).tensors:
        dims = "x".join(str(int(d)) for d in t.shape)
        print(t.name, dims, t.tensor_type.name, int(t.data_offset), int(t.n_bytes), sep="\t", file=out)

# The hash that names a model: header bytes, then the length of the file as u64.
data = demo.read_bytes()
r = GGUFReader(demo)
last = r.tensors[-1].field
header = last.offset + sum(int(p.nbytes) for p in last.parts)
print("demo.gguf:", xxhash.xxh3_128_hexdigest(data[:header] + len(data).to_bytes(8, "little")))
