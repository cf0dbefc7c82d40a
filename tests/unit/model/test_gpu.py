"""What is decided on GPUs that are not here: their abilities are put in place of this machine's."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build
from torch._subclasses.fake_tensor import FakeTensorMode

import tokmask_peft
from tokmask_peft.errors import ModelError, RunError
from tokmask_peft.inference import classifier
from tokmask_peft.model import decisions, packed
from tokmask_peft.recipe.schema import ModelConfig
from tokmask_peft.training import environment

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
NOT_BUILT = "USE_FLASH_ATTENTION was not enabled for build."


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that puts a GPU in place: its capability, and the precisions that a product fails in."""
    cached = (decisions.kernels_problem, decisions.gpu_problem, decisions.rows_problem, decisions.flash_problem)
    for function in cached:
        function.cache_clear()
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def put(capability, fails=(), said=NO_KERNEL):
        def product(device, dtype):
            if dtype in fails:
                raise RuntimeError(said)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(decisions, "_product", product)

    yield put
    for function in cached:
        function.cache_clear()


EVERY = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "fails", "choice", "reason"),
    [
        ((8, 6), (), "bf16", "Some GPU computes in bf16"),
        ((12, 0), (), "bf16", "computes in bf16"),
        ((7, 5), (), "fp16", "Some GPU has no bf16; it computes in fp16"),
        ((7, 0), (), "fp16", "computes in fp16"),
        ((6, 1), (), "fp32", "no fast fp16"),
        ((8, 6), (torch.bfloat16,), "fp16", "bf16 does not run on Some GPU (CUDA error"),
        ((7, 5), (torch.float16,), "fp32", "fp16 does not run"),
    ],
)
def test_the_precision_is_one_that_the_gpu_has_and_that_runs(gpu, capability, fails, choice, reason):
    gpu(capability, fails)
    found = decisions.choose_precision(ModelConfig(backbone="x"), GPU)
    assert found.choice == choice
    assert reason in found.reason


def test_a_gpu_without_kernels_leaves_the_work_to_the_cpu_and_says_what_to_install(gpu, monkeypatch):
    gpu((6, 1), EVERY)
    problem = decisions.gpu_problem()
    assert "compute capability 6.1" in problem
    assert "whl/cu126" in problem
    assert classifier._device(None) == CPU
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    with pytest.raises(ModelError, match="cu126") as caught:
        classifier._device("cuda:0")
    assert caught.value.code == "device-unavailable"
    asked = []
    monkeypatch.setattr(environment, "PartialState", lambda cpu: asked.append(cpu))
    environment.processes()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    environment.processes()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="ACCELERATE_USE_CPU") as caught:
        environment.processes()
    assert caught.value.code == "gpu-unusable"
    assert asked == [True, True]


def test_a_gpu_that_is_full_or_newer_than_the_driver_is_not_called_old(gpu):
    gpu((8, 6), EVERY, "CUDA out of memory")
    assert decisions.gpu_problem() is None
    decisions.gpu_problem.cache_clear()
    decisions.kernels_problem.cache_clear()
    gpu((12, 0), EVERY)
    assert "update the NVIDIA driver" in decisions.gpu_problem()


def nvidia_smi(monkeypatch, answer):
    def run(command, **_):
        assert command[0] == "nvidia-smi"
        if answer is None:
            raise FileNotFoundError
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("smi", "built_for", "hidden", "said"),
    [
        ("NVIDIA GeForce RTX 3060\n", None, None, "built without CUDA"),
        ("NVIDIA GeForce RTX 3060\n", "13.0", None, "update the NVIDIA driver"),
        ("NVIDIA GeForce RTX 3060\n", None, "", None),
        ("NVIDIA GeForce RTX 3060\n", None, "-1", None),
        (None, None, None, None),
        ("\n", None, None, None),
    ],
)
def test_a_gpu_that_this_torch_cannot_use_is_named(gpu, monkeypatch, smi, built_for, hidden, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    nvidia_smi(monkeypatch, smi)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = decisions.gpu_problem()
    if said is None:
        assert found is None
    else:
        assert said in found
        assert "RTX 3060" in found
        assert "pip install" in found


def test_the_reason_for_the_cpu_is_in_the_decisions(gpu, monkeypatch, load):
    monkeypatch.setattr(torch.version, "cuda", None)
    nvidia_smi(monkeypatch, "NVIDIA GeForce RTX 3060\n")
    made = load("bert").decisions
    assert "RTX 3060" in next(one.reason for one in made if one.what == "device")


@pytest.mark.parametrize("said", [NOT_BUILT, "This flash attention build only supports head_dim divisible by 8"])
def test_a_kernel_for_packed_rows_that_fails_is_not_used_and_the_table_says_why(gpu, monkeypatch, said):
    gpu((8, 6))

    def fails(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(decisions, "rows_kernel", lambda: fails)
    model, _ = build("qwen2")
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: None)
    decision = packed.choose_batching("padding_free", model, device=GPU, dtype=torch.bfloat16)
    assert decision.choice == "padding_free"
    assert said in decision.reason
    assert decisions.rows_problem(GPU, torch.float32, 64) == "there is no kernel for packed rows in fp32"
    on_cpu = packed.choose_batching("padding_free", model, device=CPU, dtype=torch.bfloat16)
    assert on_cpu.reason == "a batch is one row, with attention per text"


def test_a_kernel_may_first_be_tried_within_a_checkpointed_layer(gpu, monkeypatch):
    """Accelerate's `cuda` is not the `cuda:0` of a tensor, so that what was tried before training is tried again."""
    kept, computed = [], []

    def kernel(query, *_, **__):
        computed.append((query @ query.transpose(-1, -2)).dtype)
        return query * query

    monkeypatch.setattr(decisions, "rows_kernel", lambda: kernel)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(1) or tensor, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert decisions.rows_problem(CPU, torch.float16, 8) is None
    assert computed == [torch.float16]
    assert kept == []


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("size", [24, 26])
def test_odd_heads_are_padded_for_the_kernels_of_a_gpu(monkeypatch, size, kernel):
    seen = []

    def record(query, *_, scale=None, **__):
        seen.append((query.shape[-1], scale))
        return query

    monkeypatch.setattr(packed, "rows_problem", lambda *_: None if kernel else NOT_BUILT)
    monkeypatch.setattr(packed, "rows_kernel", lambda: record)
    monkeypatch.setattr(packed.F, "scaled_dot_product_attention", record)
    with FakeTensorMode(), torch.no_grad():
        bounds = torch.empty(3, dtype=torch.int32, device="cuda")
        row, places = (torch.empty(*shape, dtype=torch.int64, device="cuda") for shape in ((1, 8), (8,)))
        packing = packed.Packing(bounds, 4, row, row, ((2, 4, None),), places, places)
        rows = [torch.empty(1, 8, 2, size, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(3)]
        found, _ = packed.packed_attention(SimpleNamespace(is_causal=True), *rows, None, packing=packing)
    assert found.shape == (1, 8, 2, size)
    assert seen == [(24, None) if size == 24 else (32, 26**-0.5)]


@pytest.mark.parametrize(("problem", "masked"), [(None, False), (NOT_BUILT, True)])
@pytest.mark.parametrize("causal", [True, False])
def test_groups_of_heads_get_a_mask_where_only_the_slow_kernel_would_take_them(monkeypatch, problem, masked, causal):
    given = []
    monkeypatch.setattr(packed, "flash_problem", lambda *_: problem)
    monkeypatch.setattr(
        packed, "sdpa_attention_forward", lambda module, query, key, value, mask, **_: given.append(mask)
    )
    layer = SimpleNamespace(is_causal=causal)
    with FakeTensorMode(), torch.no_grad():
        query, key = (torch.empty(2, heads, 4, 8, dtype=torch.float16, device="cuda") for heads in (4, 2))
        packed.packed_attention(layer, query, key, key, None)
        packed.packed_attention(layer, query, query, query, None)  # no groups
        assert [mask is not None for mask in given] == [masked, False]
        if masked:
            assert given[0].dtype == torch.bool
            assert given[0].shape == (4, 4)
    packed.packed_attention(layer, torch.ones(2, 4, 4, 8), torch.ones(2, 2, 4, 8), torch.ones(2, 2, 4, 8), None)
    assert given[-1] is None


def test_models_with_groups_of_heads_take_that_path_on_a_gpu_without_flash_attention(monkeypatch):
    monkeypatch.setattr(packed, "flash_problem", lambda *_: NOT_BUILT)
    for family, device, expected in (
        ("qwen2", GPU, packed.NAME),
        ("qwen2", CPU, "sdpa"),
        ("bert", GPU, "sdpa"),
        ("distilbert", GPU, "sdpa"),
    ):
        model, _ = build(family)
        packed.expand_heads_if_needed(model, device, torch.float16)
        assert model.config._attn_implementation == expected


def test_random_states_are_kept_of_named_devices_only():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(tokmask_peft.__file__).parent.rglob("*.py"))
    assert len(re.findall(r"fork_rng\(", source)) >= 4
    # without a list torch keeps the states of all GPUs, and warns if there are several
    assert "fork_rng()" not in source
