"""The estimate beside a step that is really taken."""

from dataclasses import replace

import pytest
import torch
from measured import LABELS, make_recipe, measure_forward, measure_step, save_random, save_real
from tiny_models import build
from transformers import AutoConfig

from tokmask_peft.console import Decision
from tokmask_peft.errors import ModelError
from tokmask_peft.model.decisions import bitsandbytes_problem, choose_precision
from tokmask_peft.model.memory.estimate import estimate
from tokmask_peft.model.memory.step import LiveBytes, Setting, Shape, _Product
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig

needs_bitsandbytes = pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")
PADDED, PACKED, LARGE = Shape.padded(6, 16), Shape((3, 9, 16, 5, 7), packed=True), Shape.padded(12, 40)


def near(count, measured, tolerance):
    assert abs(count - measured) <= tolerance * measured, f"estimated {count:,}, measured {measured:,}"


def assert_near(recipe, config, shape, dtype=torch.float32, quantization="none", kept=0.02, most=0.02):
    """Assert that a step takes what is estimated; return the estimate, with an evaluation of a larger batch."""
    found = estimate(recipe, Setting(config, "cpu", quantization, dtype), shape, LARGE)
    saved, peak, static = measure_step(recipe, shape)
    if quantization != "int8":  # whose layers keep their input where autograd's hooks do not look
        near(found.activations, saved, kept)
    near(found.activations + found.workspace, peak, most)
    near(found.weights + found.embedding + found.adapter, static, 0.01)
    assert found.optimizer == 2 * found.adapter
    return found


def save_tiny(folder, family, task="sequence", dtype=torch.float32, **settings):
    """Save a tiny backbone with random weights; return its config."""
    model, tokenizer = build(family, task, **settings)
    save_random(model.base_model.config, tokenizer, folder, dtype)
    return AutoConfig.from_pretrained(folder, num_labels=len(LABELS))


QWEN, BERT = "Qwen2.5-0.5B", "bert-base-multilingual-cased"


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("name", "layers", "shape", "quantization", "precision", "adapter"),
    [
        (QWEN, 2, PADDED, "nf4", "bf16", {}),
        (QWEN, 2, PACKED, "nf4", "bf16 checkpointed", {}),
        (QWEN, 2, PADDED, "nf4", "fp32", {"layers": 1}),
        (BERT, 2, PADDED, "int8", "bf16", {}),
        (BERT, 6, PACKED, "none", "bf16", {"layers": 5}),
    ],
)
def test_real_shapes(name, layers, shape, quantization, precision, adapter, tmp_path):
    precision, *checkpointing = precision.split()
    config, dtype = save_real(name, layers, precision, tmp_path)
    model = {"quantization": quantization, "precision": precision, "gradient_checkpointing": bool(checkpointing)}
    recipe = make_recipe(tmp_path, model=model, adapter=adapter)
    found = assert_near(recipe, config, shape, dtype, quantization, kept=0.1 if checkpointing else 0.02)
    emulates = choose_precision(ModelConfig(backbone="x"), torch.device("cpu")).choice != "bf16"
    if quantization != "int8" and not (precision == "bf16" and emulates):  # with copies in fp32, which are not counted
        near(found.evaluation, measure_forward(recipe, LARGE), 0.02)


# the other families have the code of one of these
DIFFERENT = ("bert", "distilbert", "modernbert", "electra", "deberta-v3", "qwen2", "gemma3", "phi3", "gpt2")


@pytest.mark.parametrize(("family", "task"), [*((name, "sequence") for name in DIFFERENT), ("bert", "token")])
def test_every_architecture(family, task, tmp_path):
    depth = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    config = save_tiny(tmp_path, family, task, **{depth: 5})
    recipe = make_recipe(tmp_path, task, model={"quantization": "none", "precision": "fp32"})
    found = assert_near(recipe, config, PADDED, kept=0.1, most=0.1)
    near(found.evaluation, measure_forward(recipe, LARGE), 0.02)


@pytest.mark.parametrize(("family", "shape"), [("bert", PADDED), ("qwen2", PACKED)])
def test_fp16(family, shape, tmp_path, monkeypatch):
    fp16 = Decision("precision", "fp16", "on a CPU only here")
    monkeypatch.setattr("tokmask_peft.model.backbone.choose_precision", lambda *_: fp16)
    config = save_tiny(tmp_path, family, dtype=torch.float16)
    recipe = make_recipe(tmp_path, model={"quantization": "none", "precision": "fp16"})
    assert_near(recipe, config, shape, torch.float16, most=0.05)


@pytest.mark.parametrize("shape", [PADDED, PACKED])
def test_a_decoder_that_sees_both_ways(shape, tmp_path):
    config = save_tiny(tmp_path, "qwen2", num_key_value_heads=4)
    settings = {"quantization": "none", "precision": "fp32", "attention": "bidirectional"}
    recipe = make_recipe(tmp_path, model=settings)
    assert_near(recipe, config, shape, most=0.05)
    with pytest.raises(ModelError) as caught:
        estimate(recipe, Setting(build("bert")[0].config, "cpu", "none", torch.float32), shape, shape)
    assert caught.value.code == "attention"


CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("rows", "layers", "shape", "model"),
    [
        (20_000, 8, PADDED, {"precision": "fp32"}),  # more than all layers keep
        (20_000, 8, PACKED, {"precision": "bf16", **CHECKPOINTED}),
        # more than the peak with the three layers that are counted, less than that with sixteen
        (62_000, 16, Shape.padded(48, 32), {"precision": "fp32", **CHECKPOINTED}),
    ],
)
def test_a_trained_mask_row_takes_a_copy_of_the_embedding(rows, layers, shape, model, tmp_path):
    backbone, tokenizer = build("qwen2", num_hidden_layers=layers)
    config = backbone.base_model.config
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = rows, 0, None, None
    dtype = torch.bfloat16 if model["precision"] == "bf16" else torch.float32
    save_random(config, tokenizer, tmp_path, dtype)
    config = AutoConfig.from_pretrained(tmp_path, num_labels=len(LABELS))
    recipe = make_recipe(tmp_path, model={"quantization": "none", **model}, masking={"trainable_mask": True})
    found = assert_near(recipe, config, shape, dtype, kept=0.1, most=0.05)
    assert found.evaluation >= found.embedding


def changes(family="qwen2", device="cuda", layers=1, **sections):
    """Return an estimate of a tiny model with changes of its recipe."""
    model, _ = build(family, num_hidden_layers=layers)
    recipe = make_recipe("x", **sections)
    shape = Shape.padded(8, 32)
    return estimate(recipe, Setting(model.config, device, "none", torch.bfloat16), shape, Shape.padded(1, 8))


def test_what_each_change_saves():
    plain = changes(layers=5)
    checkpointed = changes(layers=5, model={"gradient_checkpointing": True})
    assert checkpointed.activations < plain.activations / 4
    assert checkpointed.tensors < plain.tensors
    upper = changes(layers=5, adapter={"layers": 2})
    assert upper.activations < 0.6 * plain.activations
    assert upper.optimizer < plain.optimizer
    rest = {"model": {"embedding": "offload"}, "training": {"gradient_accumulation": 4}}
    other = changes(layers=5, **rest)
    assert (other.embedding, other.host) == (0, plain.embedding)
    assert other.workspace == plain.workspace + plain.adapter


def test_on_a_cpu_the_host_is_the_device():
    plain, offload = (changes(device="cpu", model={"embedding": way}) for way in ("resident", "offload"))
    assert (offload.embedding, offload.host) == (plain.embedding, 0)
    assert offload.total == plain.total


def test_a_gpu_keeps_more_of_layer_norms_and_no_attention_weights():
    norms = {"adapter": {"dropout": 0.0}, "family": "bert"}
    assert changes(device="cuda", **norms).activations > changes(device="cpu", **norms).activations
    model, _ = build("bert", num_hidden_layers=2)
    short, long = Shape.padded(64, 8), Shape.padded(8, 64)
    recipe, setting = make_recipe("x"), Setting(model.config, "cuda", "none", torch.float32)
    kept = [estimate(recipe, setting, shape, Shape.padded(1, 8)).activations for shape in (short, long)]
    weights = 4 * 2 * model.config.num_attention_heads * 8 * 64 * 64
    assert kept[1] - kept[0] < weights / 2  # as many sub-tokens; what differs is the mask


@pytest.mark.parametrize(
    ("family", "dropout", "dtype", "checkpointing", "is_padded"),
    [
        ("bert", 0.0, torch.bfloat16, False, False),
        ("bert", 0.1, torch.bfloat16, False, True),
        ("bert", 0.1, torch.bfloat16, True, True),
        ("bert", 0.0, torch.float32, False, True),
        ("qwen2", 0.1, torch.bfloat16, False, True),
    ],
)
def test_a_gpu_pads_packed_texts_where_no_kernel_takes_rows(family, dropout, dtype, checkpointing, is_padded):
    model, _ = build(family, num_hidden_layers=2)
    recipe = make_recipe("x", model={"gradient_checkpointing": checkpointing})
    config = model.config
    setattr(config, "attention_probs_dropout_prob" if family == "bert" else "attention_dropout", dropout)

    def count(*lengths):
        shape = Shape(lengths, packed=True)
        return estimate(recipe, Setting(config, "cuda", "none", dtype), shape, Shape.padded(1, 8))

    even, uneven = count(16, 16, 16, 16), count(40, 8, 8, 8)
    if not is_padded:
        assert uneven == even
        return
    size = torch.empty(0, dtype=dtype).element_size()
    slots = 4 * 40 - 4 * 16
    tensors = 4 * size * slots * config.hidden_size  # query, key, value and output, which all have as many heads here
    assert uneven.total - even.total > 0.9 * tensors
    if not checkpointing:
        near(uneven.activations - even.activations, 2 * tensors, 0.2)  # of both layers


@pytest.mark.parametrize(("size", "room"), [(40, 64), (136, 192)])
def test_the_gradient_of_packed_attention_makes_room_for_128_more_sub_tokens_of_each_text(size, room):
    model, _ = build("llama", head_dim=size)
    recipe, setting = make_recipe("x"), Setting(model.config, "cuda", "none", torch.bfloat16)
    one, eight = (
        estimate(recipe, setting, Shape(lengths, packed=True), Shape.padded(1, 8)) for lengths in ((64,), (8,) * 8)
    )
    more = 7 * 128 * model.config.num_attention_heads * (room + 1) * 4
    near(eight.total - one.total, more, 0.001)
    without = replace(setting, rows=False)
    padded = [estimate(recipe, without, Shape(lengths, True), Shape.padded(1, 8)) for lengths in ((40, 8), (24, 24))]
    assert padded[0].activations > padded[1].activations  # padded to the longest, for lack of a kernel


def test_a_gpu_keeps_workspaces_for_products_and_a_hopper_larger_ones(monkeypatch):
    assert changes(device="cpu").cublas == 0
    laptop = changes()
    assert 16 * 2**20 < laptop.cublas < 17 * 2**20
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    hopper = changes()
    assert hopper.cublas == 64 * 2**20
    assert hopper.tensors - laptop.tensors == hopper.cublas - laptop.cublas


@needs_bitsandbytes
def test_int8_on_a_gpu_is_counted_as_the_computation_that_runs_there():
    from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState

    rows, inside, outside = 64, 200, 96
    kept, peaks = {}, {}
    for name in ("bitsandbytes", "int8", "int8 on a GPU"):
        x = torch.randn(rows, inside).clamp(-1, 1)
        x[:, [3, 100]] = 9.0  # one column in a hundred has outliers
        x.requires_grad_()
        with LiveBytes() as live:
            live.exclude(x)
            if name == "bitsandbytes":
                state = MatmulLtState()
                state.CB, state.SCB = torch.ones(outside, inside, dtype=torch.int8), torch.ones(outside)
                state.has_fp16_weights, state.threshold = False, 6.0
                start = live.now
                out = MatMul8bitLt.apply(x, state.CB, None, None, state)
            else:
                start = 0
                out = _Product.apply(x, outside, name)
            kept[name], peaks[name] = live.now - start, live.peak
    assert out.shape == (rows, outside)
    # besides the output: outliers and, of the real one, which columns they are in
    assert kept["bitsandbytes"] - kept["int8 on a GPU"] == 2 * 8
    assert kept["int8 on a GPU"] - kept["int8"] == 2 * rows * 4
    assert peaks["int8"] == 4 * outside * (inside + rows)
    assert peaks["int8 on a GPU"] >= rows * (inside + outside * (4 + 2 + 4))


def test_nothing_is_left_behind(load):
    backbone = load("bert")
    config = backbone.model.config
    before = config.to_dict()
    recipe = make_recipe("x", adapter=AdapterConfig(layers=1).model_dump())
    estimate(recipe, Setting(config, "cuda", "none", torch.bfloat16), PACKED, PADDED)
    assert config.to_dict() == before
    assert all(not parameter.is_meta for parameter in backbone.model.parameters())


def test_storages_are_counted_once_until_they_are_freed():
    before = torch.ones(100)
    with LiveBytes() as live:
        live.exclude(before)
        view = before[:50].view(2, 25)
        assert live.now == 0
        twice = view * 2
        assert live.now == 50 * 4
        also = twice.reshape(-1)
        del twice
        assert live.now == 50 * 4
        big = torch.empty(1000)
        del big, also
        assert live.now == 0
    assert live.peak == 50 * 4 + 4000
