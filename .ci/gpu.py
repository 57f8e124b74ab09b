"""What .ci/gpu does besides running the program: writes a model, calls the driver, reads what steps printed. Needs no
packages."""

import array
import ctypes
import fcntl
import glob
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

GIB = 1 << 30


# Runs of the program


def watched(*command):
    """Runs a command with a terminal for standard error, and copies each new line of its progress with the seconds
    since the start. So a kernel that never ends is known by name."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    # A signal to the group ends the command, whose last words are still read. It does not inherit a handler.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    start, last, rest = time.monotonic(), "", ""
    process = subprocess.Popen(command, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        *lines, rest = re.split(r"[\r\n]+|\x1b\[\d*[A-G]", rest + piece.decode(errors="replace"))
        for line in lines:
            # Without control sequences, the spinner, and the time at the end, all of which change by themselves.
            line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)
            line = re.sub(r"^[⠀-⣿]\s|\s\d+(s|m|\.\d+s)$", "", line.strip()).strip()
            if line and line != last:
                print(f"{time.monotonic() - start:7.1f} s  {line}", file=sys.stderr, flush=True)
                last = line
    code = process.wait()
    return 128 - code if code < 0 else code


def facts(doctor, group, check):
    """Returns the facts of one check of `doctor --json`."""
    checks = json.loads(Path(doctor).read_text())["checks"]
    return next((c["facts"] for c in checks if (c["group"], c["check"]) == (group, check)), {})


def nvrtc(doctor):
    """Prints the path of a kernel compiler that came with a Python package, where the program finds none by itself."""
    if facts(doctor, "gpu", "compiler").get("version"):
        return
    found = [p for f in sys.path if f for p in sorted(glob.glob(f"{f}/nvidia/*/lib/libnvrtc.so.1[0-9]"))]
    if found:
        print(found[-1])


def slow_memory(machine, out):
    """Writes a machine file with the tiers of another and made-up rates, by which everything belongs on the GPU, and
    what has no place there is streamed to it. Predictions by such a file say nothing; the placement of a small model
    does not depend on how fast its launches are."""
    rates = {
        "vram": {"read_gbps": 500, "latency_us": 5, "prompt_gflops": 900, "layer_us": 1, "resident_layer_us": 1},
        "dram": {"read_gbps": 0.5, "latency_us": 900, "prompt_gflops": 0.01, "few_gflops": 0.01},
    }
    head, *tiers = Path(machine).read_text().split("[[tier]]")
    changed = []
    for tier in tiers:
        kind = re.search(r'^kind = "(\w+)"', tier, re.MULTILINE)[1]
        for key, value in rates.get(kind, {"read_gbps": 0.1, "latency_us": 2000}).items():
            tier = re.sub(rf"^{key} = .*$", f"{key} = {value}", tier, flags=re.MULTILINE)
        for key in ("contended_gbps", "dram_contended_gbps"):
            tier = re.sub(rf"\b{key} = [\d.]+", f"{key} = 0.45", tier)
        changed.append(({"vram": 0, "dram": 1}.get(kind, 2), "[[tier]]" + tier.rstrip() + "\n\n"))
    # Files list tiers from fast to slow.
    Path(out).write_text(head + "".join(text for _, text in sorted(changed, key=lambda pair: pair[0])))


# A model that is large enough to be timed


Q4_K, Q6_K, F32 = 12, 14, 0
BLOCK_BYTES = {Q4_K: 144, Q6_K: 210}
# As runtime/selftest/src/synth.rs: places of scales in a block, and factors that make random bits values of spread 1.
SCALES = {Q4_K: [(0, 1 / 250), (2, 7.5 / 250)], Q6_K: [(208, 1 / 1370)]}
REAL = {"experts": 128, "used": 8, "hidden": 2048, "ffn": 768, "heads": 32, "kv_heads": 4, "head": 128, "vocab": 32768}
TINY = {"experts": 8, "used": 2, "hidden": 256, "ffn": 256, "heads": 4, "kv_heads": 2, "head": 64, "vocab": 512}


def tensors(shape, layers):
    """Yields name, type, and dimensions of every tensor."""
    hidden, ffn, experts, vocab, head = (shape[k] for k in ("hidden", "ffn", "experts", "vocab", "head"))
    q, kv = shape["heads"] * head, shape["kv_heads"] * head
    yield "token_embd.weight", Q4_K, (hidden, vocab)
    yield "output_norm.weight", F32, (hidden,)
    yield "output.weight", Q6_K, (hidden, vocab)
    for layer in range(layers):
        for name, kind, dims in [
            ("attn_norm", F32, (hidden,)),
            ("attn_q", Q4_K, (hidden, q)),
            ("attn_k", Q4_K, (hidden, kv)),
            ("attn_v", Q6_K, (hidden, kv)),
            ("attn_output", Q4_K, (q, hidden)),
            ("attn_q_norm", F32, (head,)),
            ("attn_k_norm", F32, (head,)),
            ("ffn_norm", F32, (hidden,)),
            ("ffn_gate_inp", F32, (hidden, experts)),
            ("ffn_gate_exps", Q4_K, (hidden, ffn, experts)),
            ("ffn_up_exps", Q4_K, (hidden, ffn, experts)),
            ("ffn_down_exps", Q6_K if layer % 2 else Q4_K, (ffn, hidden, experts)),
        ]:
            yield f"blk.{layer}.{name}.weight", kind, dims


def n_bytes(kind, dims):
    values = 1
    for n in dims:
        values *= n
    return values * 4 if kind == F32 else values // 256 * BLOCK_BYTES[kind]


def padded(n):
    return -(-n // 32) * 32


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def header(shape, layers):
    """Returns the bytes of a GGUF file before its tensors."""
    name = "qwen3moe."
    keys = {"general.architecture": "qwen3moe", "general.name": f"synthetic, {layers} layers"}
    keys["tokenizer.ggml.model"] = "none"
    keys |= {name + "attention.layer_norm_rms_epsilon": 1e-6, name + "rope.freq_base": 1e6}
    for key, value in {
        "block_count": layers,
        "context_length": 8192,
        "embedding_length": shape["hidden"],
        "feed_forward_length": shape["ffn"],
        "expert_feed_forward_length": shape["ffn"],
        "attention.head_count": shape["heads"],
        "attention.head_count_kv": shape["kv_heads"],
        "attention.key_length": shape["head"],
        "attention.value_length": shape["head"],
        "expert_count": shape["experts"],
        "expert_used_count": shape["used"],
        "vocab_size": shape["vocab"],
    }.items():
        keys[name + key] = value
    written = b""
    for key, value in keys.items():
        written += string(key)
        if isinstance(value, str):
            written += struct.pack("<I", 8) + string(value)
        else:
            written += struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
    infos, at = b"", 0
    everything = list(tensors(shape, layers))
    for name, kind, dims in everything:
        infos += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at)
        at += padded(n_bytes(kind, dims))
    text = b"GGUF" + struct.pack("<IQQ", 3, len(everything), len(keys)) + written + infos
    return text.ljust(padded(len(text)), b"\0")


def model(path, doctor, most_layers):
    """Writes a model of Qwen3-30B-A3B's shapes with random weights, whose text is noise: as deep as half of that one,
    or as fits. Where not even two layers fit, it is tiny, and its speed says nothing."""
    start = time.monotonic()
    disk = os.statvfs(Path(path).parent)
    gpu = next(iter(facts(doctor, "gpu", "devices").get("devices", [])), {"free_bytes": 0})
    memory = facts(doctor, "memory", "capacity").get("limit_bytes") or 8 * GIB
    room = min(gpu["free_bytes"] - GIB, memory // 5 * 2, disk.f_bavail * disk.f_frsize // 10 * 9)

    def size(shape, layers):
        return len(header(shape, layers)) + sum(padded(n_bytes(kind, dims)) for _, kind, dims in tensors(shape, layers))

    fitting = (n for n in range(int(most_layers), 1, -1) if size(REAL, n) <= room)
    layers = next(fitting, 0)
    shape, layers = (REAL, layers) if layers else (TINY, 2)
    draw = random.Random(1)
    normal = array.array("f", (draw.gauss(0, 1) for _ in range(1 << 16)))
    pools = {}

    def pool(kind, spread):
        """Returns random blocks of a spread, and the same again."""
        if (kind, spread) not in pools:
            size = BLOCK_BYTES[kind]
            n = (4 << 20) // size
            blocks = bytearray(draw.randbytes(n * size))
            for at, factor in SCALES[kind]:
                low, high = struct.pack("<e", spread * factor)
                blocks[at::size] = bytes([low]) * n
                blocks[at + 1 :: size] = bytes([high]) * n
            pools[kind, spread] = memoryview(bytes(blocks + blocks))
        return pools[kind, spread]

    with open(path, "wb", buffering=0) as file:
        file.write(header(shape, layers))
        for name, kind, dims in tensors(shape, layers):
            left = n_bytes(kind, dims)
            padding = padded(left) - left
            if kind == F32 and len(dims) == 1:
                file.write(struct.pack("<f", 1) * dims[0])
            elif kind == F32:
                # Rows of different norms: a router that favors some experts.
                rows = array.array("f")
                for _ in range(dims[1]):
                    scale = 2 * dims[0] ** -0.5 * draw.lognormvariate(0, 0.6)
                    at = draw.randrange(len(normal) - dims[0])
                    rows.extend(scale * value for value in normal[at : at + dims[0]])
                file.write(rows.tobytes())
            else:
                spread = {"token_embd.weight": 1.0, "output.weight": 20 * dims[0] ** -0.5}.get(name, dims[0] ** -0.5)
                blocks = pool(kind, spread)
                half = len(blocks) // 2
                while left:
                    # No two pieces begin alike.
                    at = draw.randrange(half // BLOCK_BYTES[kind]) * BLOCK_BYTES[kind]
                    left -= file.write(blocks[at : at + min(left, half)])
            file.write(b"\0" * padding)
        bytes_ = file.tell()
        seconds = time.monotonic() - start
        what = "of Qwen3-30B-A3B's shapes" if shape is REAL else "tiny, since no more fits: no speed says anything"
        print(f"{layers} layers {what}, {bytes_ / 1e9:.2f} GB, written in {seconds:.1f} s", flush=True)
        # Otherwise the drive is still busy when it is measured.
        os.fsync(file.fileno())


# The driver


def register(path):
    """Says whether the driver locks the memory of a mapped file, how long that takes, and how fast copies from it are;
    beside it the same of other memory."""
    cuda = ctypes.CDLL("libcuda.so.1")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    errors = []

    def call(name, *arguments):
        code = getattr(cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            cuda.cuGetErrorName(code, ctypes.byref(text))
            errors.append(f"{name}: {(text.value or b'?').decode()}")
        return code == 0

    def need(name, *arguments):
        if not call(name, *arguments):
            sys.exit(errors[-1])

    device, context, stream, to = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
    need("cuInit", 0)
    need("cuDeviceGet", ctypes.byref(device), 0)
    need("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    need("cuCtxSetCurrent", context)
    need("cuStreamCreate", ctypes.byref(stream), 1)
    attributes = [("memory can be locked", 99), ("for reading only, too", 113), ("the GPU reads any memory", 88)]
    for name, number in attributes:
        value = ctypes.c_int()
        found = value.value if call("cuDeviceGetAttribute", ctypes.byref(value), number, device) else errors.pop()
        print(f"attribute {number}, {name}: {found}")
    size = min(os.path.getsize(path), GIB) // 4096 * 4096
    need("cuMemAlloc_v2", ctypes.byref(to), ctypes.c_size_t(size))

    def copy(start):
        """Returns GB/s of one copy to the GPU, after one to warm up."""
        for _ in range(2):
            begun = time.monotonic()
            need("cuMemcpyHtoDAsync_v2", to, ctypes.c_void_p(start), ctypes.c_size_t(size), stream)
            need("cuStreamSynchronize", stream)
        return size / (time.monotonic() - begun) / 1e9

    def measure(what, start):
        if start in (None, ctypes.c_void_p(-1).value):
            print(f"{what}: no memory")
            return
        unlocked = copy(start)
        # As the program: for all contexts; then that, and for reading only.
        for flags in (1, 1 | 8):
            begun = time.monotonic()
            if call("cuMemHostRegister_v2", ctypes.c_void_p(start), ctypes.c_size_t(size), flags):
                seconds = time.monotonic() - begun
                locked = copy(start)
                begun = time.monotonic()
                need("cuMemHostUnregister", ctypes.c_void_p(start))
                again = (time.monotonic() - begun) / size * GIB
                print(
                    f"{what}: locked with flags {flags} in {seconds / size * GIB:.3f} s per GiB, unlocked in "
                    f"{again:.3f}; copies {unlocked:.1f} GB/s before, {locked:.1f} locked"
                )
                return
            print(f"{what}: flags {flags}: {errors.pop()}")
        print(f"{what}: not locked; copies {unlocked:.1f} GB/s")

    read, write, shared, private, anonymous = 1, 2, 1, 2, 32
    with open(path, "rb") as file:
        mapped = libc.mmap(None, size, read, shared, file.fileno(), 0)
        measure("mapped file, shared, as the program maps it", mapped)
        own = libc.mmap(None, size, read, private, file.fileno(), 0)
        measure("mapped file, private", own)
    for what, advice in [("memory on huge pages", 14), ("memory on small pages", 15)]:
        start = libc.mmap(None, size, read | write, private | anonymous, -1, 0)
        if start not in (None, ctypes.c_void_p(-1).value):
            libc.madvise(start, size, advice)
            ctypes.memset(start, 1, size)
        measure(what, start)
    need("cuMemFree_v2", to)
    need("cuStreamDestroy_v2", stream)
    need("cuDevicePrimaryCtxRelease_v2", device)


# What steps printed


def read(path):
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def last_line(*paths):
    """Returns an error, or else the last line of the first text that has any."""
    for path in paths:
        lines = [line.strip() for line in read(path).splitlines() if line.strip()]
        errors = [line for line in lines if "error:" in line]
        if lines:
            return errors[0] if errors else lines[-1]
    return ""


def line_doctor(out):
    """The GPU and the compiler, and what is amiss."""
    checks = json.loads(read(out))["checks"]
    said = [c["found"] for c in checks if c["group"] == "gpu"]
    return "; ".join(said + [f"{c['status']}: {c['check']}" for c in checks if c["status"] != "ok"])


def line_selftest(out, error):
    """Counts of verdicts, the first one that is not well, and when the first check began, with all kernels compiled."""
    found = json.loads(read(out))
    said = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in found["summary"].items() if name != "cut_short")
    if found["summary"]["cut_short"]:
        said += ", cut short"
    wrong = [row for row in found["rows"] if row["verdict"] in ("missed", "failed")]
    if wrong:
        row = wrong[0]
        said += f"; first: {row['part']}, {row['what']}: {row['why'] or row['found']}"
    began = re.match(r"\s*([\d.]+) s", read(error))
    return said + (f"; kernels were ready after {began[1]} s" if began else "")


def line_sanitizer(out, log):
    """What the sanitizer found, and how many comparisons were made under it."""
    summary = re.findall(r"=+ (\w+ SUMMARY: .*)", read(log))
    try:
        kernels = len(json.loads(read(out))["checks"])
    except ValueError:
        kernels = "no"
    return f"{summary[-1] if summary else 'no summary'}; {kernels} comparisons"


def line_run(out, reference):
    """How many tokens are the CPU's, up to the first that is not."""
    found = json.loads(read(out))
    if out == reference:
        return f"{found['decode_tok_s']:.1f} tok/s"
    cpu = json.loads(read(reference))
    ours, theirs = found["output"], cpu["output"]
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    streamed = sum(layer.get("streamed", 0) for layer in found["layers"])
    said = f"{same} of {len(theirs)} tokens as on the CPU, {found['decode_tok_s']:.1f} tok/s"
    return said + (f", {streamed / max(found['decode_tokens'], 1):.1f} experts streamed per token" if streamed else "")


def line_solve(out, plan):
    found = json.loads(read(out))
    streaming = re.search(r"^streaming = .*experts = (\d+)", read(plan), re.MULTILINE)
    said = ", ".join(f"{tier['used_bytes'] / 1e6:.1f} MB on {tier['name']}" for tier in found["tiers"])
    return said + f"; streams {f'up to {streaming[1]} experts' if streaming else 'none'}"


def line_bench(out, solved):
    """Measured speeds beside predicted ones."""
    found, plan = json.loads(read(out)), json.loads(read(solved))
    measured, predicted = found["decode_tok_s"], found["predicted_decode_tok_s"]
    said = f"decode {measured:.1f} tok/s, predicted {predicted:.1f} ({100 * (measured / predicted - 1):+.0f} %)"
    said += f"; prompt {found['prompt_tok_s']:.0f}, predicted {plan['predicted_prompt_tok_s']:.0f}"
    streamed = found.get("streamed_per_token")
    return said + (f"; {streamed:.1f} experts streamed per token" if streamed else "")


def line_probe(_out, machine):
    """Rates of all tiers, and of the link where both sides read main memory."""
    said = []
    for tier in read(machine).split("[[tier]]")[1:]:
        name, rate = (
            re.search(r'^name = "(.*)"', tier, re.MULTILINE)[1],
            re.search(r"^read_gbps = (.*)", tier, re.MULTILINE)[1],
        )
        link = re.search(r"\bto_gbps = ([\d.]+)", tier)
        both = re.search(r"\bcontended_gbps = ([\d.]+), dram_contended_gbps = ([\d.]+)", tier)
        said.append(f"{name} {rate} GB/s" + (f", link {link[1]}" if link else ""))
        if both:
            said[-1] += f" ({both[1]} beside {both[2]} for the CPU)"
    return "; ".join(said)


def line_register(out):
    """What became of the mapped file."""
    lines = [line for line in read(out).splitlines() if line.startswith("mapped file, shared")]
    return lines[-1].removeprefix("mapped file, shared, as the program maps it: ") if lines else last_line(out)


def line(kind, error, out, *more):
    """Prints the line of a step that matters, or an error."""
    try:
        said = globals()[f"line_{kind}"](out, *more) if kind != "last" else last_line(out, error)
    except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
        said = last_line(error, out)
    print(said.replace("\t", " ")[:400])


def figures(*outs):
    """Prints what self-tests found wrong, and rates and speeds."""
    said = set()
    for out in outs:
        try:
            rows = json.loads(read(out))["rows"]
        except (ValueError, KeyError):
            continue
        short = [r for r in rows if r["part"] not in ("kernels", "golden values") and "products of" not in r["what"]]
        wrong = [r for r in rows if r["verdict"] in ("missed", "failed") and r not in short]
        rows = [r for r in wrong[:40] + short if (r["part"], r["what"]) not in said]
        said |= {(r["part"], r["what"]) for r in rows}
        for row in rows:
            found = row["why"] if row["found"] is None else f"{row['found']:.4g} {row['unit']}"
            target = "".join(f" ({k.replace('_', ' ')} {v:g})" for k, v in (row["target"] or {}).items())
            print(f"  {row['part']}, {row['what']}: {found}{target}, {row['verdict']}  {row['note']}"[:240].rstrip())


# The GPU's state


def excerpt(path):
    """Prints what of `nvidia-smi -q` speeds depend on, a line per value."""
    wanted = re.compile(
        r"^(Driver Version|CUDA Version|Product Name|Persistence Mode|MIG Mode/Current|Compute Mode"
        r"|PCI/GPU Link Info/(PCIe Generation|Link Widths)/|FB Memory Usage/(Total|Used|Free)|Clocks/"
        r"|Max Clocks/(SM|Memory)|Clocks (Event|Throttle) Reasons/|Temperature/GPU Current Temp"
        r"|GPU Power Readings/(Average|Instantaneous|Current) Power)"
    )
    above = []
    for text in read(path).splitlines():
        if not text.strip():
            continue
        depth = (len(text) - len(text.lstrip())) // 4
        name, _, value = (part.strip() for part in text.partition(" : "))
        if text.startswith("GPU 0"):
            print("GPU")
            above = []
            continue
        # Below a GPU, its own values are indented once.
        above = above[: max(depth - 1, 0)] + [name]
        full = "/".join(above)
        if value and wanted.match(full) and not (" Reasons/" in full and value == "Not Active"):
            print(f"  {full}: {value}")


def sampled(path):
    """Prints the extremes of the samples that were taken while steps ran."""
    rows = [row.split(", ") for row in read(path).splitlines()]
    if len(rows) < 2:
        return
    for name, column in zip(rows[0], zip(*(row for row in rows[1:] if len(row) == len(rows[0])))):
        numbers = [float(n[0]) for value in column if (n := re.findall(r"[\d.]+", value))]
        if name != "timestamp" and numbers:
            print(f"  {name}: {min(numbers):g} to {max(numbers):g} in {len(numbers)} samples")


def main():
    name, *arguments = sys.argv[1:]
    commands = (watched, nvrtc, slow_memory, model, register, line, figures, excerpt, sampled)
    sys.exit({command.__name__: command for command in commands}[name](*arguments))


main()
