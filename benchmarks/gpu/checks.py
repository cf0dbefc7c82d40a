"""Parts of the GPU measurement that check kernels and short trainings of tiny models, and the tests that need a GPU."""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from instruments import DEVICE, DRY, ON_GPU, REPO, WORK, Record, bf16_rate, clock, smi
from tiny_models import TEXTS, build, encode
from torch import Tensor
from workload import Stepper, padded_collator

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model import packed as packing
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import (
    bitsandbytes_problem,
    choose_precision,
    choose_quantization,
    enable_checkpointing,
    flash_problem,
    gpu_problem,
    rows_problem,
)
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig
from tokmask_peft.training.environment import versions


def part_env() -> None:
    """Record versions, what the card can do, what is decided on it, and its rates."""
    record = Record("env")
    record.put("smi_before", smi())
    record.attempt("versions", _versions)
    record.attempt("workspaces", _workspaces)
    record.attempt("decisions", _decisions)
    record.attempt("rates", _rates)


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"reported": versions(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found["python"] = platform.python_version()
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        found |= {
            "name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
            "total": total, "free": free, "sms": torch.cuda.get_device_properties(0).multi_processor_count,
            "arch_list": torch.cuda.get_arch_list(), "flash_built": torch.backends.cuda.is_flash_attention_available(),
            "cudnn_sdp": torch.backends.cuda.cudnn_sdp_enabled(), "smi_with_context": smi(),
        }  # fmt: skip
    return found


def _decisions() -> dict[str, Any]:
    config = ModelConfig(backbone="x")
    return {
        "bitsandbytes_problem": bitsandbytes_problem(DEVICE.type),
        "precision": asdict(choose_precision(config, DEVICE)),
        "quantization": asdict(choose_quantization(config, DEVICE)),
        "gpu_problem": gpu_problem(),
        "rows_problem": rows_problem(DEVICE, torch.bfloat16, 64) if ON_GPU else None,
        "flash_problem": flash_problem(DEVICE, torch.bfloat16, 64) if ON_GPU else None,
    }


def _workspaces() -> dict[str, Any]:
    """Return the bytes that cuBLAS keeps in torch's allocator, which the estimate does not count."""
    if not ON_GPU:
        return {}
    found: dict[str, Any] = {"before": torch.cuda.memory_allocated()}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(512, 512, device="cuda", dtype=dtype, requires_grad=True)
        (a @ a).sum().backward()
        torch.nn.functional.linear(a, a, a[0]).sum().backward()
        del a
        clock()
        found[str(dtype)] = torch.cuda.memory_allocated()
    return {**found, "smi": smi(), "reserved": torch.cuda.memory_reserved()}


def _rates() -> dict[str, float]:
    source = torch.empty(2**30 if ON_GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    target = source.clone()
    start = clock()
    for _ in range(10):
        target.copy_(source)
    copied = 20 * source.numel() / (clock() - start)
    return {"bf16_tflops": bf16_rate() / 1e12, "copy_tb_s": copied / 1e12}


def part_attention() -> None:
    """Compare packed attention by the kernel and by the fallback with fp64 on the CPU: values and gradients."""
    record = Record("attention")
    cases = {  # heads, key heads, size, causal, window
        "bert 12x64": (12, 12, 64, False, None), "minilm 12x32": (12, 12, 32, False, None),
        "qwen 14/2x64": (14, 2, 64, True, None), "tinyllama 32/4x64": (32, 4, 64, True, None),
        "qwen7b 28/4x128": (28, 4, 128, True, None), "mistral window 8": (8, 2, 128, True, 8),
        "head 8": (4, 4, 8, False, None), "tinybert 12x26": (12, 12, 26, False, None),
    }  # fmt: skip
    for name, case in cases.items():
        for lengths in ([1, 17, 64, 3, 128], [31] * 32):
            record.attempt(f"{name}, {len(lengths)} texts", lambda c=case, n=lengths: _attention(n, *c))


def _attention(
    lengths: list[int], heads: int, key_heads: int, size: int, causal: bool, window: int | None
) -> dict[str, list[float]]:
    """Return the relative errors of the output and of the gradients of query, key and value."""
    torch.manual_seed(len(lengths))
    total = sum(lengths)
    made = [torch.randn(1, h, total, size, dtype=torch.float64) for h in (heads, key_heads, key_heads)]
    low = [tensor.to(torch.bfloat16) for tensor in made]
    exact = [tensor.double().requires_grad_() for tensor in low]
    ahead = torch.randn(1, total, heads, size, dtype=torch.float64).to(torch.bfloat16)
    texts = []
    for rows in zip(*(tensor.split(lengths, dim=2) for tensor in exact), strict=True):
        at = torch.arange(rows[0].shape[2])
        keep = (at[:, None] >= at) & (at[:, None] - at < (window or total)) if causal else None
        texts.append(F.scaled_dot_product_attention(*rows, attn_mask=keep, enable_gqa=True).transpose(1, 2))
    wanted = torch.cat(texts, dim=1)
    wanted.backward(ahead.double())
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    places = packing.Packing.make(bounds, total, max(lengths))
    layer: Any = SimpleNamespace(is_causal=causal)
    found = {}
    for name in ("kernel", "fallback"):
        here = [tensor.to(DEVICE).clone().requires_grad_() for tensor in low]
        problem = rows_problem if name == "kernel" and ON_GPU else (lambda *_: "not asked for")
        with mock.patch.object(packing, "rows_problem", problem):
            out = packing.packed_attention(layer, *here, None, sliding_window=window, packing=places)[0]
        out.backward(ahead.to(DEVICE))
        pairs = [(out, wanted), *((one.grad, other.grad) for one, other in zip(here, exact, strict=True))]
        found[name] = [round(_error(one, other), 5) for one, other in pairs]
    return found


def _error(one: Any, other: Any) -> float:
    return float((one.detach().double().cpu() - other.detach()).norm() / other.detach().norm())


def part_parity() -> None:
    """Train the same few steps in several settings and on the CPU: the gaps between losses and between weights."""
    record, gpu, bf16 = Record("parity"), {"device": DEVICE}, {"device": DEVICE, "precision": "bf16"}
    cpu, packed, nf4 = {"device": torch.device("cpu")}, {**bf16, "packed": True}, {"quantization": "nf4"}
    spans = {"packed": True, "unit": "span"}
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "gpu and cpu, fp32": (gpu, cpu),
        "gpu and cpu, fp32, packed, spans": ({**gpu, **spans}, {**cpu, **spans}),
        "gpu packed and padded, bf16": (packed, bf16),
        "gpu packed and padded, bf16, words labelled": ({**packed, "task": "token"}, {**bf16, "task": "token"}),
        "gpu bf16 packed twice": (packed, packed),
        "gpu bf16 padded twice": (bf16, bf16),
        "gpu p=0 and no masker, bf16 packed": ({**packed, "p": 0.0}, {**packed, "p": None}),
        "gpu p=0 and no masker, fp32 padded": ({**gpu, "p": 0.0}, {**gpu, "p": None}),
        "gpu offload and resident, fp32": ({**gpu, "embedding": "offload"}, gpu),
        "gpu checkpointed or not, bf16 packed": ({**packed, "checkpointed": True}, packed),
        "nf4 gpu and cpu, bf16": ({**bf16, **nf4}, {**bf16, **nf4, **cpu}),
        "nf4 gpu and cpu, fp32": ({**gpu, **nf4}, {**cpu, **nf4}),
        "int8 gpu and none, bf16": ({**bf16, "quantization": "int8"}, bf16),
    }
    if ON_GPU:
        pairs["gpu fp16 packed and fp32 (as on a T4)"] = ({**packed, "precision": "fp16"}, {**gpu, "packed": True})
    for family in ("bert", "qwen2", "mistral"):
        for name, (one, other) in pairs.items():
            record.attempt(
                f"{family}: {name}", lambda o=one, t=other, f=family: _gaps(_trained(f, **o), _trained(f, **t))
            )


def _gaps(one: tuple[list[float], Tensor], other: tuple[list[float], Tensor]) -> dict[str, Any]:
    (a, u), (b, v) = one, other
    gap = max(abs(x - y) for x, y in zip(a, b, strict=True))
    weights = float((u - v).norm() / v.norm())
    return {"losses": [a[0], b[0], a[-1], b[-1]], "largest_loss_gap": gap, "weights": weights,
            "bit_equal": bool(torch.equal(u, v))}  # fmt: skip


def _trained(
    family: str, *, device: torch.device, quantization: str = "none", precision: str = "fp32", packed: bool = False,
    embedding: str = "resident", checkpointed: bool = False, p: float | None = 0.1, unit: str = "token",
    task: str = "sequence",
) -> tuple[list[float], Tensor]:  # fmt: skip
    """Return the losses of 8 steps and the trained weights."""
    folder = Path(tempfile.mkdtemp(dir=WORK))
    head_size = {} if family == "bert" else {"head_dim": 32}
    body, tokenizer = build(family, hidden_size=128, intermediate_size=256, **head_size)
    body.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config: Any = {"quantization": quantization, "precision": precision, "embedding": embedding}
    backbone = load_backbone(ModelConfig(backbone=str(folder), **config), task, ("a", "b", "c"), device)
    heads = [module for name, module in backbone.model.named_modules() if name in backbone.new_modules]
    _draw_again((1, weight) for head in heads for weight in head.parameters())
    if packed:
        packing.enable_padding_free(backbone.model)
    model, _ = add_adapter(backbone, AdapterConfig(r=8), task)
    _draw_again(enumerate(weight for name, weight in model.named_parameters() if "lora_A" in name))
    model.to(device).train()
    if checkpointed:
        enable_checkpointing(model)
    rows: list[dict[str, Any]] = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    for number, row in enumerate(rows):
        row["labels"] = [n % 3 for n in range(len(row["input_ids"]))] if task == "token" else number % 3
    batch = (PackedCollator(task) if packed else padded_collator(tokenizer, task))(rows)
    stepper = Stepper(model, precision == "bf16", True, device, rate=5e-3, fp16=precision == "fp16")
    if p is not None:
        TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=p, unit=unit, seed=3))
    losses = [round(float(stepper.step(batch)), 6) for _ in range(8)]
    return losses, torch.cat([weight.detach().flatten().float().cpu() for weight in stepper.trained])


def _draw_again(weights: Iterable[tuple[int, Any]]) -> None:
    """Draw weights by their seeds on the CPU, so that they are the same on every device."""
    for seed, weight in weights:
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        weight.data = drawn.mul(0.1).to(weight)


def part_tests() -> None:
    """Run the tests that need a GPU, several at once, since most of their time is the CPU's."""
    record, report = Record("tests"), WORK / "junit.xml"
    options = ["-q", "-rA", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}", "--timeout", "120"]
    options += ["-n", "2" if DRY else "6", "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", "tests/gpu", *options]
    record.put("exit", subprocess.run(command, cwd=REPO).returncode)
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase") if report.is_file() else ():
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if problem is None else f"{problem.tag}: {(problem.get('message') or '')[:400]}"
        found[f"{case.get('classname')}::{case.get('name')}"] = [outcome, float(case.get("time") or 0)]
    record.put("tests", found)


def part_compile() -> None:
    """Compile a model with a masker: one graph, the pattern of the eager model, and steps that differ."""
    record = Record("compile")
    for mode in ("default", "reduce-overhead"):
        record.attempt(mode, lambda mode=mode: _compiled(mode))


def _compiled(mode: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("eager", "compiled"):
        torch.compiler.reset()
        model, tokenizer = build("qwen2")
        model.to(DEVICE).train()
        batch = {key: value.to(DEVICE) for key, value in encode(tokenizer).items()}
        called: Any = torch.compile(model, mode=mode) if name == "compiled" else model
        losses = []
        with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.3, seed=1)) as masker:
            for _ in range(4):
                if name == "compiled" and mode == "reduce-overhead":
                    torch.compiler.cudagraph_mark_step_begin()
                losses.append(float(called(**batch).logits.float().square().mean()))
            found[name] = (losses, masker.observed_rate, masker.step)
    gaps = [abs(one - other) for one, other in zip(found["eager"][0], found["compiled"][0], strict=True)]
    return {**found, "gap": max(gaps)}


PARTS = {"env": part_env, "attention": part_attention, "parity": part_parity, "tests": part_tests,
         "compile": part_compile}  # fmt: skip
