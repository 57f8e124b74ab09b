"""Writes profile.v1.profile, profile.v2.profile and profile.v3.profile from docs/FORMAT.md alone, so that the Rust codec is tested against a second opinion.

    pip install xxhash && python3 make_profile.py
"""

import json
import struct
from pathlib import Path

import xxhash

N_EXPERT, N_USED, LAYERS = 40, 3, [1, 2, 5]
PROMPTS = [("code", "a.txt", "train", 3, 2), ("scripture", "heldout-1.txt", "held-out", 2, 0), ("code", "empty", "train", 0, 0)]


def choice(prompt, token, layer, rank):
    """Any rule will do that gives different experts for different ranks; the test repeats it."""
    return (7 * prompt + 5 * token + 11 * layer + 13 * rank) % N_EXPERT, 255 - 60 * rank - token


payload, prompts = b"", []
for p, (domain, name, split, n_prompt, n_decode) in enumerate(PROMPTS):
    flat = [choice(p, t, l, r) for t in range(n_prompt + n_decode) for l in range(len(LAYERS)) for r in range(N_USED)]
    prompts.append(dict(domain=domain, name=name, split=split, prompt_tokens=n_prompt, decode_tokens=n_decode, offset=len(payload)))
    bits = (N_EXPERT - 1).bit_length()
    packed = sum(expert << (bits * i) for i, (expert, _) in enumerate(flat))
    payload += packed.to_bytes((bits * len(flat) + 7) // 8, "little") + bytes(w for _, w in flat)

header = json.dumps(
    dict(
        model=dict(name="fixture", hash="000102030405060708090a0b0c0d0e0f"),
        made="by hand, \u00e0 la main",
        n_expert=N_EXPERT,
        n_used=N_USED,
        layers=LAYERS,
        prompts=prompts,
    ),
    separators=(",", ":"),
    ensure_ascii=False,
).encode()
body = b"tierprof" + struct.pack("<II", 1, len(header)) + header + payload
data = body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
Path(__file__).with_name("profile.v1.profile").write_bytes(data)
print(len(data), xxhash.xxh3_128_hexdigest(data))

counts = [[1000 * (l + 1) + e * e for e in range(N_EXPERT)] for l in range(len(LAYERS))]
header = json.dumps(
    dict(
        model=dict(name="fixture", hash=""),
        made="counted by hand",
        n_expert=N_EXPERT,
        n_used=N_USED,
        layers=LAYERS,
        prompts=[],
        counts="prompt",
    ),
    separators=(",", ":"),
).encode()
body = b"tierprof" + struct.pack("<II", 2, len(header)) + header + struct.pack("<120Q", *sum(counts, []))
data = body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
Path(__file__).with_name("profile.v2.profile").write_bytes(data)
print(len(data), xxhash.xxh3_128_hexdigest(data))

header = json.dumps(
    dict(
        model=dict(name="fixture", hash="000102030405060708090a0b0c0d0e0f"),
        made="by hand, \u00e0 la main",
        n_expert=N_EXPERT,
        n_used=N_USED,
        layers=LAYERS,
        prompts=prompts,
        guesses=[[0, 0], [6, 5], [6, 3]],
    ),
    separators=(",", ":"),
    ensure_ascii=False,
).encode()
body = b"tierprof" + struct.pack("<II", 3, len(header)) + header + payload
data = body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
Path(__file__).with_name("profile.v3.profile").write_bytes(data)
print(len(data), xxhash.xxh3_128_hexdigest(data))
