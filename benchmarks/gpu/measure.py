"""What the product has never shown on CUDA, in parts, each with its own process and time limit.

    bash measure.sh                 all parts, 9 minutes at most (LIMIT=seconds)
    bash measure.sh attention cli   some of them
    DRY=1 bash measure.sh           on a CPU, with tiny layers: tries the code, its figures mean nothing

Results go to $OUT/results.json after every step of every part, so that a cut-off loses nothing; output to $OUT/log.txt.
Reads TOKMASK_TOKENIZERS (configs and tokenizers), TOKMASK_DATA if set (real tweets; else the built-in corpus).
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

START = float(os.environ.setdefault("GPU_START", str(time.time())))
LIMIT = float(os.environ.get("LIMIT", "525"))
DRY = os.environ.get("DRY") == "1"
OUT = Path(os.environ.get("OUT", "gpu-out"))
WORK = Path(os.environ.get("GPU_WORK", str(Path(tempfile.gettempdir()) / "gpu-work")))
REPO = Path(os.environ.get("REPO", "."))
ONLY = os.environ.get("ONLY", "")  # of the trainings of a part, those whose names match
DEVICE = "cpu" if DRY else "cuda"
SLOWER = 10 if DRY else 1
PARTS = {  # name: seconds at most, in the order of their worth
    "env": 60, "attention": 60, "parity": 75, "tests": 150, "cli": 170, "stock": 110, "memory_cap": 70,
    "minilm": 60, "bench": 170, "compile": 70, "bench7b": 150,
}  # fmt: skip
BACKBONES = {"qwen": "Qwen2.5-0.5B", "tinyllama": "TinyLlama-1.1B", "mbert": "bert-base-multilingual-cased"}


def left() -> float:
    return LIMIT - (time.time() - START)


class Record:
    """A part's own file, rewritten at every `put`; the driver joins them into results.json."""

    def __init__(self, part: str) -> None:
        self.path, self.found = WORK / f"{part}.json", {}

    def put(self, key: str, value: object) -> None:
        self.found[key] = value
        self.path.write_text(json.dumps(self.found, indent=1, default=str))
        print(f"[{time.time() - START:5.0f}s] {key}: {json.dumps(value, default=str)[:600]}", flush=True)

    def attempt(self, key: str, work) -> None:
        """Put what `work` returns, or its error; never stop."""
        try:
            self.put(key, work())
        except BaseException as error:  # noqa: BLE001 - a report of what went wrong is the point
            lines = traceback.format_exc().strip().splitlines()
            self.put(key, {"error": f"{type(error).__name__}: {error}"[:1500], "where": lines[-8:]})
            if isinstance(error, KeyboardInterrupt):
                raise


# ---------------------------------------------------------------- driver


def joined(status: dict) -> None:
    content = {"status": status, "wall": round(time.time() - START, 1), "dry": DRY}
    for part in ["prepare", *PARTS]:
        path = WORK / f"{part}.json"
        if path.is_file():
            try:
                content[part] = json.loads(path.read_text())
            except ValueError:
                content[part] = {"error": "half-written"}
    partial = OUT / "results.tmp"
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(OUT / "results.json")


def launch(part: str, log) -> subprocess.Popen:
    laptop = {} if part in ("stock", "bench", "bench7b") else {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}  # as RTX 30 and 40 are
    return subprocess.Popen(
        [sys.executable, __file__, "--part", part], env={**os.environ, **laptop}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen, seconds: float, status: dict, part: str) -> None:
    import signal

    began = time.time()
    while process.poll() is None and time.time() - began < seconds:
        time.sleep(0.5)
        joined(status)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status[part] = f"cut off after {seconds:.0f} s"
    else:
        status[part] = f"exit {process.returncode}, {time.time() - began:.0f} s"
    joined(status)


def drive(parts: list[str]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    status: dict[str, str] = {}
    with (OUT / "log.txt").open("a", buffering=1) as log:
        preparing = launch("prepare", log)  # random backbones on the CPU and the disk, while small parts use the GPU
        for part in parts:
            allowed = min(PARTS[part] * SLOWER, left() - 8)
            if allowed < 12:
                status[part] = "no time left"
                continue
            if part in ("cli", "stock", "memory_cap") and preparing is not None:
                finish(preparing, min(120.0 * SLOWER, left()), status, "prepare")
                preparing = None
                allowed = min(PARTS[part] * SLOWER, left() - 8)
            print(f"== {part} ({allowed:.0f} s at most, {left():.0f} left)", file=log)
            finish(launch(part, log), allowed, status, part)
        if preparing is not None:
            finish(preparing, max(left(), 1), status, "prepare")
    joined(status)
    print(json.dumps(status, indent=1))


# ---------------------------------------------------------------- what parts share


def sync() -> None:
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def fresh_peak() -> None:
    import torch

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int]:
    import torch

    if DEVICE != "cuda":
        return {"allocated": 0, "reserved": 0}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def smi() -> int | None:
    """MiB in use on the card, by nvidia-smi."""
    try:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()[0])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def recipe_file(name: str, task: str) -> Path:
    """A recipe of a shipped backbone on real tweets where they are, else on the built-in posts."""
    data = Path(os.environ["TOKMASK_DATA"]) if os.environ.get("TOKMASK_DATA") else None
    base = {"qwen": "qwen2.5-0.5b", "tinyllama": "tinyllama-1.1b", "mbert": "mbert", "minilm": "minilm"}[name]
    lines = [f"base: {REPO.resolve()}/recipes/_backbones/{base}.yaml", f"name: {name}-{task}", "data:", f"  task: {task}"]
    if data is not None and task == "sequence":
        lines += [f"  path: {data}/mesent_mar_eng_sentiment", "  validation: 0.03", "  test: test"]
    elif data is not None:
        lines += [f"  path: {data}/lince_lid_spaeng", "  validation: 0.01", "  test: validation"]
        lines += ['  label_map: {lang1: lang1, lang2: lang2, "*": other}']
    else:
        lines += ["  builtin: true", "  validation: validation", "  test: test"]
    lines += ["  max_length: 128"]
    path = WORK / f"{name}-{task}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def backbone_folder(name: str) -> Path:
    return WORK / "backbones" / name


def command_line(arguments: list[str]) -> tuple[int, float]:
    """Run the product's own command line in this process; return its exit code and the seconds."""
    from tokmask_peft.cli import main

    began, before = time.time(), sys.argv
    sys.argv = ["tokmask", *arguments]
    print("$ tokmask", *arguments, flush=True)
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    return code, round(time.time() - began, 1)


class Watch:
    """Looks at trainings from inside: memory by phase, the largest shapes, and real sub-tokens by step."""

    def __init__(self) -> None:
        import torch
        from tokmask_peft.training import evaluate, train as fit
        from tokmask_peft.training.trainer import OrderedEvalTrainer
        from transformers import Trainer

        self.clear()
        watch = self

        def loaded(original):
            def wrapped(*args, **kwargs):
                fresh_peak()
                backbone = original(*args, **kwargs)
                watch.phases["loading"] = peak()
                if DEVICE == "cuda":
                    watch.phases["after_loading"] = torch.cuda.memory_allocated()
                fresh_peak()
                return backbone

            return wrapped

        for module in (fit, evaluate):
            module.load_backbone = loaded(module.load_backbone)

        def step(original):
            def wrapped(self, model, inputs, *args, **kwargs):
                sync()
                watch.times.append(time.perf_counter())
                mask = inputs.get("attention_mask")
                watch.tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
                if "cu_seqlens" in inputs:
                    lengths, packed = inputs["cu_seqlens"].diff().tolist(), True
                else:
                    lengths, packed = [inputs["input_ids"].shape[1]] * inputs["input_ids"].shape[0], False
                if sum(lengths) > sum(watch.largest["lengths"]):
                    watch.largest = {"lengths": lengths, "packed": packed}
                return original(self, model, inputs, *args, **kwargs)

            return wrapped

        Trainer.training_step = step(Trainer.training_step)

        def evaluation(original):
            def wrapped(self, *args, **kwargs):
                watch.phase("training")
                found = original(self, *args, **kwargs)
                watch.phase("evaluation")
                return found

            return wrapped

        OrderedEvalTrainer.evaluation_loop = evaluation(OrderedEvalTrainer.evaluation_loop)

        def prediction(original):
            def wrapped(self, model, inputs, *args, **kwargs):
                shape = list(inputs["input_ids"].shape)
                if shape[0] * shape[1] > watch.evaluated[0] * watch.evaluated[1]:
                    watch.evaluated = shape
                return original(self, model, inputs, *args, **kwargs)

            return wrapped

        Trainer.prediction_step = prediction(Trainer.prediction_step)

    def clear(self) -> None:
        self.phases, self.times, self.tokens = {}, [], []
        self.largest, self.evaluated = {"lengths": [], "packed": False}, [0, 0]

    def phase(self, name: str) -> None:
        now = peak()
        before = self.phases.get(name, {"allocated": 0, "reserved": 0})
        self.phases[name] = {key: max(now[key], before[key]) for key in now}
        fresh_peak()

    def speed(self, skip: int = 6) -> dict:
        if len(self.times) < skip + 3:
            return {"steps": len(self.times)}
        spans = [b - a for a, b in zip(self.times, self.times[1:])]
        good = sorted(spans[skip:])
        kept = [(t, s) for t, s in zip(self.tokens[skip:-1], spans[skip:]) if s < 5 * good[len(good) // 2]]  # no evals
        seconds = sum(s for _, s in kept)
        return {
            "micro_batches": len(self.times),
            "real_tokens_per_second": round(sum(t for t, _ in kept) / seconds, 1),
            "median_seconds": good[len(good) // 2],
            "mean_tokens": round(sum(t for t, _ in kept) / len(kept), 1),
        }


def short_train(record: Record, watch: Watch, label: str, recipe: Path, folder: Path, *overrides: str) -> None:
    """`tokmask train` for a few steps, watched."""

    def run() -> dict:
        import torch

        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
        watch.clear()
        name = label.replace(" ", "-")
        code, seconds = command_line(
            ["train", str(recipe), f"name={name}", f"model.backbone_path={folder}", "training.baseline=false", *overrides]
        )
        watch.phase("after")
        found = {
            "exit": code, "seconds": seconds, "base": base, "phases": watch.phases, "largest": watch.largest,
            "evaluated": watch.evaluated, "speed": watch.speed(), "overrides": list(overrides),
        }  # fmt: skip
        result = Path("runs") / name / "result.json"
        if result.is_file():
            told = json.loads(result.read_text())
            found["decisions"] = {one["what"]: [one["choice"], one["reason"]] for one in told["decisions"]}
            found["told_speed"] = told["speed"]
            found["validation"] = told["validation"]["f1_macro"]
            log = Path("runs") / name / "log.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            found["losses"] = [line["loss"] for line in lines if "loss" in line]
            found["gradient_norms"] = [line["grad_norm"] for line in lines if "grad_norm" in line]
        return found

    record.attempt(label, run)


# ---------------------------------------------------------------- parts


def part_prepare() -> None:
    """Random backbones of real shapes in bf16, as checkpoints on the disk."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    record = Record("prepare")
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    for name in ("qwen", "tinyllama", "mbert"):

        def make(name=name) -> dict:
            began = time.time()
            folders = {"qwen": "Qwen2.5-0.5B", "tinyllama": "TinyLlama-1.1B-Chat-v1.0", "mbert": BACKBONES["mbert"]}
            source = Path(os.environ["TOKMASK_TOKENIZERS"]) / folders[name]
            config = AutoConfig.from_pretrained(source)
            if DRY:
                small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
                for key, value in small.items():
                    setattr(config, key, value)
                if getattr(config, "num_key_value_heads", None):
                    config.num_key_value_heads = 2
                    config.head_dim = 16
                if getattr(config, "layer_types", None):
                    config.layer_types = config.layer_types[:2]
            torch.manual_seed(0)
            auto = AutoModel if name == "mbert" else AutoModelForCausalLM
            with torch.device("cpu" if DRY else "cuda"):  # the drawing of 1.1e9 weights takes a CPU half a minute
                model = auto.from_config(config, dtype=torch.bfloat16)
            model.to("cpu").save_pretrained(backbone_folder(name))
            AutoTokenizer.from_pretrained(source).save_pretrained(backbone_folder(name))
            size = sum(weight.numel() for weight in model.parameters())
            return {"seconds": round(time.time() - began, 1), "weights": size}

        record.attempt(name, make)


def part_env() -> None:
    record = Record("env")
    record.put("smi_before", smi())

    def versions() -> dict:
        import platform

        import torch
        from tokmask_peft.training.environment import versions as told

        found = {"told": told(), "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
        if DEVICE == "cuda":
            free, total = torch.cuda.mem_get_info()
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
                "total": total, "free": free, "sms": properties.multi_processor_count,
                "arch_list": torch.cuda.get_arch_list(), "flash_built": torch.backends.cuda.is_flash_attention_available(),
                "cudnn_sdp": torch.backends.cuda.cudnn_sdp_enabled(), "smi_with_context": smi(),
            }  # fmt: skip
        return found

    record.attempt("versions", versions)

    def workspaces() -> dict:
        """Bytes that cuBLAS keeps in torch's allocator, which max_memory_allocated counts and the estimate does not."""
        import torch

        if DEVICE != "cuda":
            return {}
        found = {"before": torch.cuda.memory_allocated()}
        for dtype in (torch.bfloat16, torch.float32):
            a = torch.randn(512, 512, device="cuda", dtype=dtype, requires_grad=True)
            (a @ a).sum().backward()
            torch.nn.functional.linear(a, a, a[0]).sum().backward()
            del a
            sync()
            found[str(dtype)] = torch.cuda.memory_allocated()
        found["smi"], found["reserved"] = smi(), torch.cuda.memory_reserved()
        return found

    record.attempt("workspaces", workspaces)

    def decisions() -> dict:
        import torch
        from tokmask_peft.model import packed as packed_attention
        from tokmask_peft.model.decisions import bitsandbytes_problem, choose_precision, choose_quantization
        from tokmask_peft.recipe.schema import ModelConfig

        device, config = torch.device(DEVICE), ModelConfig(backbone="x")
        found = {
            "bitsandbytes_problem": bitsandbytes_problem(device.type),
            "precision": vars_of(choose_precision(config, device)), "quantization": vars_of(choose_quantization(config, device)),
        }  # fmt: skip
        if DEVICE == "cuda":
            found["varlen_kernel"] = str(packed_attention._varlen_kernel())
        return found

    record.attempt("decisions", decisions)

    def rates() -> dict:
        import torch

        sys.path.insert(0, str(REPO / "benchmarks"))
        from device_meter import clock, matrix_rate

        device = torch.device(DEVICE)
        found = {"bf16_tflops": matrix_rate(device) / 1e12}
        size = 2**30 if DEVICE == "cuda" else 2**20
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        target.copy_(source)
        began = clock(device)
        for _ in range(10):
            target.copy_(source)
        found["copy_tb_s"] = 20 * size / (clock(device) - began) / 1e12
        return found

    record.attempt("rates", rates)


def vars_of(one) -> dict:
    from dataclasses import asdict

    return asdict(one)


def part_attention() -> None:
    """Packed attention by the kernel and by the fallback, beside fp64 on the CPU: values and gradients."""
    import torch
    from tokmask_peft.model import packed as packed_attention
    from tokmask_peft.model.packed import Packing

    record = Record("attention")

    class Layer(torch.nn.Module):
        is_causal = False

    def reference(q, k, v, lengths, causal, window):
        outs, start = [], 0
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        for n in lengths:
            a, b, c = (t[0, :, start : start + n] for t in (q, k, v))
            scores = a @ b.transpose(-1, -2) * q.shape[-1] ** -0.5
            at = torch.arange(n)
            keep = torch.ones(n, n, dtype=torch.bool)
            if causal:
                keep = at[:, None] >= at[None]
            if window is not None:
                keep &= at[:, None] - at[None] < window
            outs.append((scores.masked_fill(~keep, float("-inf")).softmax(-1) @ c).transpose(0, 1))
            start += n
        return torch.cat(outs).unsqueeze(0)

    def off(one, other):
        return float((one.double().cpu() - other).norm() / other.norm())

    cases = {
        "bert 12x64": (12, 12, 64, False, None), "minilm 12x32": (12, 12, 32, False, None),
        "qwen 14/2x64": (14, 2, 64, True, None), "tinyllama 32/4x64": (32, 4, 64, True, None),
        "qwen7b 28/4x128": (28, 4, 128, True, None), "mistral window 8": (8, 2, 128, True, 8), "head 8": (4, 4, 8, False, None),
    }  # fmt: skip
    for name, (heads, kv, size, causal, window) in cases.items():
        for lengths in ([1, 17, 64, 3, 128], [31] * 32):

            def compare(heads=heads, kv=kv, size=size, causal=causal, window=window, lengths=lengths) -> dict:
                torch.manual_seed(len(lengths))
                total = sum(lengths)
                made = [torch.randn(1, h, total, size, dtype=torch.float64) for h in (heads, kv, kv)]
                low = [t.to(torch.bfloat16) for t in made]
                exact = [t.double().requires_grad_() for t in low]
                ahead = torch.randn(1, total, heads, size, dtype=torch.float64).to(torch.bfloat16)
                wanted = reference(*exact, lengths, causal, window)
                wanted.backward(ahead.double())
                bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
                layer, found = Layer(), {}
                layer.is_causal = causal
                kernel = packed_attention._varlen_kernel if DEVICE == "cuda" else (lambda: None)
                for how, chosen in (("kernel", kernel), ("fallback", lambda: None)):
                    here = [t.to(DEVICE).clone().requires_grad_() for t in low]
                    before, packed_attention._varlen_kernel = packed_attention._varlen_kernel, chosen
                    try:
                        out, _ = packed_attention.packed_attention(
                            layer, *here, None, sliding_window=window, packing=Packing.make(bounds, total, max(lengths))
                        )
                    finally:
                        packed_attention._varlen_kernel = before
                    out.backward(ahead.to(DEVICE))
                    found[how] = [round(off(out.detach(), wanted.detach()), 5)]
                    found[how] += [round(off(one.grad, other.grad), 5) for one, other in zip(here, exact)]
                return found

            record.attempt(f"{name}, {len(lengths)} texts", compare)


def part_parity() -> None:
    """The same short trainings in several ways, and on the CPU: first and last losses, and what moves from run to run."""
    import torch

    sys.path.insert(0, str(REPO / "tests"))
    from tiny_models import TEXTS, build
    from tokmask_peft.data.batches import PackedCollator
    from tokmask_peft.recipe import TokenMaskConfig
    from tokmask_peft.masking.masker import TokenMasker
    from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
    from tokmask_peft.model.decisions import enable_checkpointing
    from tokmask_peft.model.backbone import load_backbone
    from tokmask_peft.model.packed import enable_padding_free
    from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig
    from tokmask_peft.training.losses import ClassificationLoss
    from tokmask_peft.training.trainer import collator

    record = Record("parity")

    def train(family, device, quantization="none", precision="fp32", packed=False, embedding="resident", again=False,
              p=0.1, unit="token", steps=8, task="sequence"):  # fmt: skip
        folder = Path(tempfile.mkdtemp(dir=WORK))
        shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
        body, tokenizer = build(family, **{k: v for k, v in shape.items() if family != "bert" or k != "head_dim"})
        body.base_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = ModelConfig(backbone=str(folder), quantization=quantization, precision=precision, embedding=embedding)
        torch.manual_seed(0)
        place = torch.device(device)
        backbone = load_backbone(config, task, ("a", "b", "c"), place)
        torch.manual_seed(0)
        head = [m for n, m in backbone.model.named_modules() if n in backbone.new_modules]
        for module in head:  # drawn on the device: make it the same everywhere
            for weight in module.parameters():
                weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).mul(0.1).to(weight)
        if packed:
            enable_padding_free(backbone.model)
        model, _ = add_adapter(backbone, AdapterConfig(r=8), task)
        lower = [weight for name, weight in model.named_parameters() if "lora_A" in name]  # an offloaded embedding is none
        for number, weight in enumerate(lower):
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)).mul(0.1).to(weight)
        model.to(place).train()
        if again:
            enable_checkpointing(model)
        rows = [{"input_ids": tokenizer(text)["input_ids"], "labels": number % 3} for number, text in enumerate(TEXTS)]
        if task == "token":
            rows = [{**row, "labels": [n % 3 for n in range(len(row["input_ids"]))]} for row in rows]
        batch = (PackedCollator(task) if packed else collator(tokenizer, task))(rows)
        batch = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        labels = batch.pop("labels")
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer, losses, bf16 = torch.optim.AdamW(trained, lr=5e-3), [], precision == "bf16"
        masker = TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=p, unit=unit, seed=3)) if p is not None else None
        for _ in range(steps):
            with inputs_as_they_come(model, bf16), torch.autocast(place.type, torch.bfloat16, enabled=bf16):
                loss = ClassificationLoss()(model(**batch), labels)
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        rate = masker.observed_rate if masker else None
        weights = torch.cat([weight.detach().flatten().float().cpu() for weight in trained])
        return [round(float(x), 6) for x in losses], weights, rate

    def versus(one, other):
        (a, u, _), (b, v, _) = one, other
        return {"losses": [a[0], b[0], a[-1], b[-1]], "largest_loss_gap": max(abs(x - y) for x, y in zip(a, b)),
                "weights": float((u - v).norm() / v.norm()), "bit_equal": bool(torch.equal(u, v))}  # fmt: skip

    bf16 = {"precision": "bf16"}
    for family in ("bert", "qwen2", "mistral"):
        pairs = {
            "gpu and cpu, fp32": (dict(device=DEVICE), dict(device="cpu")),
            "gpu and cpu, fp32, packed, spans": (dict(device=DEVICE, packed=True, unit="span"), dict(device="cpu", packed=True, unit="span")),
            "gpu packed and padded, bf16": (dict(device=DEVICE, packed=True, **bf16), dict(device=DEVICE, **bf16)),
            "gpu packed and padded, bf16, words labelled": (dict(device=DEVICE, packed=True, task="token", **bf16), dict(device=DEVICE, task="token", **bf16)),
            "gpu bf16 packed twice": (dict(device=DEVICE, packed=True, **bf16), dict(device=DEVICE, packed=True, **bf16)),
            "gpu bf16 padded twice": (dict(device=DEVICE, **bf16), dict(device=DEVICE, **bf16)),
            "gpu p=0 and no masker, bf16 packed": (dict(device=DEVICE, packed=True, p=0.0, **bf16), dict(device=DEVICE, packed=True, p=None, **bf16)),
            "gpu p=0 and no masker, fp32 padded": (dict(device=DEVICE, p=0.0), dict(device=DEVICE, p=None)),
            "gpu offload and resident, fp32": (dict(device=DEVICE, embedding="offload"), dict(device=DEVICE)),
            "gpu checkpointed or not, bf16 packed": (dict(device=DEVICE, packed=True, again=True, **bf16), dict(device=DEVICE, packed=True, **bf16)),
            "nf4 gpu and cpu, bf16": (dict(device=DEVICE, quantization="nf4", **bf16), dict(device="cpu", quantization="nf4", **bf16)),
            "nf4 gpu and cpu, fp32 (as on a T4)": (dict(device=DEVICE, quantization="nf4"), dict(device="cpu", quantization="nf4")),
            "int8 gpu and none, bf16": (dict(device=DEVICE, quantization="int8", **bf16), dict(device=DEVICE, **bf16)),
        }  # fmt: skip
        for name, (one, other) in pairs.items():
            record.attempt(f"{family}: {name}", lambda o=one, t=other, f=family: versus(train(f, **o), train(f, **t)))


def part_tests() -> None:
    """The repository's own tests of a GPU, side by side, since most of their time is the CPU's."""
    record = Record("tests")
    report = WORK / "junit.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider",
               f"--junitxml={report}", "--timeout", "120", "-n", "2" if DRY else "6", "--dist", "worksteal"]  # fmt: skip
    code = subprocess.run(command, cwd=REPO).returncode
    record.put("exit", code)
    if report.is_file():
        import xml.etree.ElementTree as tree

        found = {}
        for case in tree.parse(report).getroot().iter("testcase"):
            problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            told = "passed" if problem is None else f"{problem.tag}: {(problem.get('message') or '')[:400]}"
            found[f"{case.get('classname')}::{case.get('name')}"] = [told, float(case.get("time") or 0)]
        record.put("tests", found)


def part_cli() -> None:
    """`tokmask estimate`, `train`, `evaluate` and `predict` as a user types them, on random weights of real shapes."""
    record, watch = Record("cli"), Watch()
    os.chdir(tempfile.mkdtemp(dir=WORK))
    steps = "training.max_steps=4" if DRY else "training.max_steps=24"
    few = ["training.epochs=1", "training.eval_batch_size=64", "training.logging_steps=1"]
    auto = [] if not DRY else ["model.precision=bf16"]
    plans = [
        ("qwen", "sequence", "nf4 packed", ["model.quantization=nf4"]),
        ("tinyllama", "token", "nf4 packed", ["model.quantization=nf4"]),
        ("qwen", "token", "nf4 padded checkpointed", ["model.quantization=nf4", "training.batching=padded", "model.gradient_checkpointing=true"]),
        ("tinyllama", "sequence", "nf4 padded", ["model.quantization=nf4", "training.batching=padded"]),
        ("qwen", "sequence", "nf4 packed offload", ["model.quantization=nf4", "model.embedding=offload"]),
        ("qwen", "sequence", "nf4 packed 8bit embedding", ["model.quantization=nf4", "model.embedding=8bit"]),
        ("mbert", "token", "auto", []),
        ("qwen", "sequence", "nf4 fp32 as on a T4", ["model.quantization=nf4", "model.precision=fp32"]),
        ("mbert", "sequence", "int8", ["model.quantization=int8"]),
        ("qwen", "sequence", "bf16 unquantized", ["model.quantization=none"]),
        ("qwen", "sequence", "nf4 trained mask row", ["model.quantization=nf4", "masking.trainable_mask=true"]),
        ("qwen", "sequence", "nf4 lora dropout, budget", ["model.quantization=nf4", "adapter.dropout=0.05", "training.tokens_per_batch=1024"]),
    ]  # fmt: skip
    for backbone, task, label, overrides in plans:
        name = f"{backbone} {task} {label}"
        if not re.search(ONLY, name):
            continue
        untested = [] if label == "nf4 packed" else ["data.test=null"]  # evaluations of whole test sets take too long
        settings = [steps, *few, *auto, *untested, *overrides]
        short_train(record, watch, name, recipe_file(backbone, task), backbone_folder(backbone), *settings)
        if label == "nf4 packed":
            run = f"runs/{name.replace(' ', '-')}"
            record.attempt(f"{name}: evaluate", lambda r=run: command_line(["evaluate", r, "--json"]))
            words = ["me encanta this phone", "qué mal servicio", "ok"]
            record.attempt(f"{name}: predict", lambda r=run: command_line(["predict", r, *words]))
            record.attempt(f"{name}: predict on the cpu", lambda r=run: command_line(["predict", r, *words, "--device", "cpu"]))
        if label == "nf4 packed" and backbone == "qwen":
            record.attempt(
                f"{name}: estimate",
                lambda: command_line(["estimate", str(recipe_file("qwen", "sequence")), f"model.backbone_path={backbone_folder('qwen')}"]),
            )  # fmt: skip


def part_stock() -> None:
    """A Trainer with PEFT's preparation, as its guides have it, beside `tokmask train` with its three batchings."""
    import torch

    record, watch = Record("stock"), Watch()
    os.chdir(tempfile.mkdtemp(dir=WORK))
    steps = 8 if DRY else 40
    few = ["training.epochs=1", "training.eval_batch_size=64", "training.batch_size=32", "training.gradient_accumulation=1", "data.test=null",
           f"training.max_steps={steps}", "model.quantization=nf4", *(["model.precision=bf16"] if DRY else [])]  # fmt: skip

    def stock(backbone: str, longest: bool, checkpointing: bool, dropout: float) -> dict:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import (AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig,
                                  DataCollatorWithPadding, Trainer, TrainingArguments)  # fmt: skip

        from tokmask_peft.data.corpus import load_corpus
        from tokmask_peft.data.encoding import encode
        from tokmask_peft.recipe.schema import Recipe

        watch.clear()
        recipe = Recipe.load(recipe_file(backbone, "sequence"))
        corpus = load_corpus(recipe.data.expanded(), 0)
        tokenizer = AutoTokenizer.from_pretrained(backbone_folder(backbone))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        rows = encode(corpus.train, tokenizer, "sequence", corpus.labels, 128).dataset.select_columns(["input_ids", "labels"])
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["score"])  # fmt: skip
        fresh_peak()
        model = AutoModelForSequenceClassification.from_pretrained(
            backbone_folder(backbone), num_labels=len(corpus.labels), quantization_config=bits, dtype=torch.bfloat16,
            device_map={"": DEVICE},
        )  # fmt: skip
        model.config.pad_token_id, model.config.use_cache = tokenizer.pad_token_id, False
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing,
                                                gradient_checkpointing_kwargs={"use_reentrant": False})  # fmt: skip
        lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
        model = get_peft_model(model, lora)
        arguments = TrainingArguments(
            output_dir="stock", max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-4, bf16=True,
            logging_steps=20, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=DRY, dataloader_pin_memory=not DRY,
        )  # fmt: skip
        padding = {"padding": "max_length", "max_length": 128} if longest else {"padding": True}
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer,
                          data_collator=DataCollatorWithPadding(tokenizer, **padding))  # fmt: skip
        began = time.time()
        trainer.train()
        return {"speed": watch.speed(), "peak": peak(), "seconds": round(time.time() - began, 1)}

    for backbone in ("qwen", "tinyllama"):
        for batching in ("padding_free", "grouped", "padded"):
            if re.search(ONLY, f"{backbone} {batching}"):
                short_train(record, watch, f"{backbone} {batching}", recipe_file(backbone, "sequence"), backbone_folder(backbone),
                            *few, f"training.batching={batching}")  # fmt: skip
        for label, settings in {"padded to 128, checkpointed": (True, True, 0.05), "padded, checkpointed": (False, True, 0.05),
                                "padded": (False, False, 0.0)}.items():  # fmt: skip
            if re.search(ONLY, f"{backbone} stock {label}"):
                record.attempt(f"{backbone} stock {label}", lambda b=backbone, s=settings: stock(b, *s))
                gc.collect()


def part_memory_cap() -> None:
    """A small card on a large one: the allocator is capped, and the product is told that there is no more."""
    import torch

    record, watch = Record("memory_cap"), Watch()
    os.chdir(tempfile.mkdtemp(dir=WORK))
    if DEVICE == "cuda":
        total = torch.cuda.mem_get_info()[1]
        original = torch.cuda.mem_get_info

        def capped(gib: float) -> None:
            torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 / total, 1.0))
            torch.cuda.mem_get_info = lambda device=None: (
                max(int(gib * 2**30) - torch.cuda.memory_reserved(), 0), int(gib * 2**30))  # fmt: skip
    else:
        original, capped = None, lambda gib: None  # noqa: E731
    few = ["training.epochs=1", "training.eval_batch_size=32", "model.quantization=nf4", "training.batching=padded",
           "training.logging_steps=1", "data.test=null", f"training.max_steps={2 if DRY else 6}", *(["model.precision=bf16"] if DRY else [])]  # fmt: skip
    recipe, folder = recipe_file("tinyllama", "sequence"), backbone_folder("tinyllama")
    size = 16 if DRY else 256
    big = [f"training.batch_size={size}", "training.gradient_accumulation=1"]
    capped(4.0)
    short_train(record, watch, "4 GiB checkpointing auto", recipe, folder, *few, *big)
    short_train(record, watch, "4 GiB no checkpointing, runs out", recipe, folder, *few, *big, "model.gradient_checkpointing=false")
    short_train(record, watch, "4 GiB no checkpointing, auto_batch", recipe, folder, *few, *big, "model.gradient_checkpointing=false", "training.auto_batch=true")
    capped(2.0)
    short_train(record, watch, "2 GiB auto", recipe, folder, *few)
    capped(0.8)
    short_train(record, watch, "0.8 GiB, runs out while loading", recipe, folder, *few)
    if original is not None:
        torch.cuda.mem_get_info = original


def part_minilm() -> None:
    """The one real encoder that can be carried: a score that a CPU has, too (quickstart: .946 macro-F1)."""
    record, watch = Record("minilm"), Watch()
    os.chdir(tempfile.mkdtemp(dir=WORK))
    folder = os.environ.get("MINILM")
    if not folder or not Path(folder).is_dir():
        record.put("skipped", "MINILM names no folder")
        return
    steps = ["training.max_steps=4"] if DRY else []
    path = Path("q.yaml")
    path.write_text(f"base: {REPO.resolve()}/recipes/quickstart.yaml\nname: q\n")
    short_train(record, watch, "quickstart", path, Path(folder), *steps)
    record.attempt("explain", lambda: command_line(["explain", "runs/quickstart", "me encanta this phone"]))
    record.attempt("predict", lambda: command_line(["predict", "runs/quickstart", "me encanta this phone"]))
    record.attempt("predict, cpu", lambda: command_line(["predict", "runs/quickstart", "me encanta this phone", "--device", "cpu"]))


def bench(part: str, names: list[str], *options: str) -> None:
    record = Record(part)
    for name in names:
        command = [sys.executable, "benchmarks/gpu.py", "--only", name, *options]
        command += ["--device", "cpu", "--smoke"] if DRY else []
        began = time.time()
        code = subprocess.run(command, cwd=REPO).returncode
        record.put(f"{name}: exit", [code, round(time.time() - began, 1)])
        written = REPO / "benchmarks/results/gpu.json"
        if written.is_file() and not DRY:
            record.put(name, json.loads(written.read_text()))
            written.unlink()


def part_bench() -> None:
    bench("bench", ["Qwen2.5-0.5B", "TinyLlama-1.1B"], "--rounds", "2", "--steps", "6")


def part_bench7b() -> None:
    bench("bench7b", ["Qwen2.5-7B"], "--rounds", "2", "--steps", "4")


def part_compile() -> None:
    """A compiled model with a masker: one graph, the pattern of the eager one, and steps that differ."""
    import torch

    sys.path.insert(0, str(REPO / "tests"))
    from tiny_models import build, encode
    from tokmask_peft.recipe import TokenMaskConfig
    from tokmask_peft.masking.masker import TokenMasker

    record = Record("compile")
    for mode in ("default", "reduce-overhead"):

        def run(mode=mode) -> dict:
            seen = []
            for compiled in (False, True):
                torch.compiler.reset()
                model, tokenizer = build("qwen2")
                model.to(DEVICE).train()
                batch = {name: value.to(DEVICE) for name, value in encode(tokenizer).items()}
                called = torch.compile(model, mode=mode) if compiled else model
                losses = []
                with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.3, seed=1)) as masker:
                    for _ in range(4):
                        if compiled and mode == "reduce-overhead":
                            torch.compiler.cudagraph_mark_step_begin()
                        losses.append(float(called(**batch).logits.float().square().mean()))
                    rate = masker.observed_rate
                seen.append((losses, rate, masker.step))
            return {"eager": seen[0], "compiled": seen[1], "gap": max(abs(a - b) for a, b in zip(seen[0][0], seen[1][0]))}

        record.attempt(mode, run)


if __name__ == "__main__":
    if "--part" in sys.argv:
        WORK.mkdir(parents=True, exist_ok=True)
        chosen = sys.argv[sys.argv.index("--part") + 1]
        if chosen != "tests":
            from tokmask_peft.console import quiet_libraries

            quiet_libraries()
        globals()[f"part_{chosen}"]()
    else:
        drive([name for name in sys.argv[1:] if name in PARTS] or list(PARTS))
