"""A packed batch is its texts run alone: logits, adapter gradients, masked positions; and what goes wrong otherwise."""

import itertools

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny_models import TEXTS, build, encode, encoder_decoders, families, more_families, seen_ids
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorWithPadding

from tokmask_peft.data.batches import PackedCollator, padded_collator
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.errors import ModelError
from tokmask_peft.examples import Example, Pair
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model import packed
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.model.families import FAMILIES, Family
from tokmask_peft.model.layers import LINEAR, average_words
from tokmask_peft.model.packed import choose_batching, enable_padding_free
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig, Recipe

SUPPORTED = [*families, *(name for name in more_families if name != "deberta-v3")]
TOKENS = ["bert", "xlm-r", "qwen2", "modernbert", "electra", "phi3", "smollm3", "gpt2"]  # the others share their code
CASES = [*((family, "sequence") for family in SUPPORTED), *((family, "token") for family in TOKENS)]
MASKING = TokenMaskConfig(p=0.4, unit="span", span_length=2)
needs_bitsandbytes = pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")


def away_from_zero(model):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model.train()


def adapted(model, task="sequence"):
    """Put LoRA on a model, away from its zero start, and set it to training."""
    kind = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}[task]
    heads = [name for name, _ in model.named_children() if name in ("score", "classifier", "pre_classifier", "head")]
    torch.manual_seed(0)
    lora = LoraConfig(task_type=kind, r=2, target_modules="all-linear", modules_to_save=heads)
    return away_from_zero(get_peft_model(model, lora))


def prepared(family, **settings):
    model, _ = build(family, **settings)
    enable_padding_free(model)
    return model


def pack(ids, task="sequence"):
    return PackedCollator(task)([{"input_ids": text} for text in ids])


def texts_of(tokenizer):
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def gradients(model, logits):
    """Return every gradient of a loss that weighs each logit differently."""
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    wanted = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad((weights * logits).sum(), list(wanted.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}


def alone(model, ids):
    """Run each text by itself, without padding; logits of [texts, classes] or [1, total, classes]."""
    logits = [model(input_ids=torch.as_tensor(text).unsqueeze(0)).logits for text in ids]
    return torch.cat(logits, dim=0 if logits[0].dim() == 2 else 1)


def assert_same(logits, model, expected_logits, expected_model):
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
    found, expected = gradients(model, logits), gradients(expected_model, expected_logits)
    assert found.keys() == expected.keys()
    assert sum("lora_" in name for name in found) >= 16
    # Rounding is that of the whole backward pass: a small gradient, left when larger ones cancel, has its share.
    usual = torch.stack([gradient.norm() for gradient in expected.values()]).square().mean().sqrt()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        error = (found[name] - gradient).norm()
        assert error < 1e-5 * usual, f"{name}: {error / usual} of a usual gradient"
        assert error < 5e-5 * gradient.norm(), f"{name}: {error / gradient.norm()} of its own"


@pytest.mark.parametrize(("family", "task"), CASES)
def test_masked_logits_and_gradients_are_those_of_the_texts_alone(family, task):
    model, tokenizer = build(family, task=task)
    reference = adapted(build(family, task=task)[0], task)
    enable_padding_free(model)
    model = adapted(model, task)
    ids = texts_of(tokenizer)
    with TokenMasker.attach(reference, tokenizer, MASKING) as masker, seen_ids(reference.get_base_model()) as seen:
        reference(**encode(tokenizer))
        spare_row = reference.get_base_model().get_input_embeddings().weight.detach().clone()
        mask_id = masker.mask_token.id
    masked = [row[: len(text)] for row, text in zip(seen[0], ids, strict=True)]
    assert sum(int((row == mask_id).sum()) for row in masked) > 10
    with torch.no_grad():
        reference.get_base_model().get_input_embeddings().weight.copy_(spare_row)
    with TokenMasker.attach(model, tokenizer, MASKING) as masker, seen_ids(model.get_base_model()) as seen:
        logits = model(**pack(ids)).logits
        assert torch.equal(seen[0][0, : sum(map(len, ids))], torch.cat(masked))
        assert logits.shape == ((len(ids), 3) if task == "sequence" else (1, sum(map(len, ids)), 3))
        assert_same(logits, model, alone(reference, masked), reference)


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen2"])
def test_the_mean_of_a_word_is_that_of_its_sub_tokens_alone(family):
    model, tokenizer = build(family, task="token")
    reference = adapted(build(family, task="token")[0], "token")
    examples = [Example(tuple(text.split()), ("a",) * len(text.split()), "x") for text in TEXTS]
    rows = [*Encoder(tokenizer, "token", 64, "mean").cut(examples, ("a", "b")).dataset]
    enable_padding_free(model)
    average_words(model, "mean")
    model = adapted(model, "token")
    for collate in (PackedCollator("token"), padded_collator("token", tokenizer)):
        expected = []
        for row in rows:
            logits = reference(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            numbers = torch.tensor(row["words"])
            of_words = [number for number, label in zip(numbers, row["labels"], strict=True) if label == 0]
            expected += [logits[numbers == number].mean(0) for number in of_words]
        batch = collate([{name: part for name, part in row.items() if name != "length"} for row in rows])
        labels = batch.pop("labels")
        assert_same(model(**batch).logits[labels == 0], model, torch.stack(expected), reference)
    assert model(input_ids=batch["input_ids"]).logits.shape == (*batch["input_ids"].shape, 3), "words may be missing"


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "task"), [*((name, "sequence") for name in TOKENS), ("bert", "token"), ("qwen2", "token")]
)
def test_prediction_without_an_adapter_in_rows_of_few_shapes(family, task):
    """oneDNN keeps a kernel per shape: without rounding a run on real text held twice the memory."""
    model, tokenizer = build(family, task=task, max_position_embeddings=24)
    longest = (texts_of(tokenizer)[0] * 3)[:18]
    ids, batch = [longest[:length] for length in (3, 9, 1, 18, 6)], encode(tokenizer, ["ok", "la neta"])
    expected, first, padded = alone(model, ids), alone(model, ids[:1]), model(**batch).logits
    for _ in range(2):
        enable_padding_free(model)
    torch.testing.assert_close(model(**pack(ids)).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(**pack(ids[:1])).logits, first, atol=1e-5, rtol=0)
    assert torch.equal(model(**batch).logits, padded), "padded batches go through as before"
    shapes = set()
    linear = next(module for module in model.base_model.modules() if isinstance(module, LINEAR))
    linear.register_forward_hook(lambda _, args, out: shapes.add(out.shape[1]))
    for texts in range(1, 8):  # of 18 to 126 sub-tokens in all, filled up with texts no longer than 18
        logits = model(**pack([longest] * texts, task)).logits
        assert logits.shape[:-1] == ((texts,) if task == "sequence" else (1, 18 * texts))
    assert shapes == {24, 40, 56, 128}


@pytest.mark.parametrize(
    ("family", "quantization", "pooler"),
    [
        *(pytest.param(name, "nf4", True, marks=needs_bitsandbytes) for name in ("bert", "qwen2", "llama")),
        ("bert", "none", False),  # a new one is trained
    ],
)
def test_backbones_and_adapters_as_a_run_makes_them(family, quantization, pooler, tmp_path):
    body, tokenizer = build(family, hidden_size=64, intermediate_size=64)
    if not pooler:
        body.base_model.pooler = None
    body.base_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(backbone=str(tmp_path), quantization=quantization, precision="fp32")
    made = []
    for in_a_row in (True, False):
        torch.manual_seed(0)
        backbone = load_backbone(config, "sequence", ("a", "b", "c"), torch.device("cpu"))
        if in_a_row:
            enable_padding_free(backbone.model)
        made.append(away_from_zero(add_adapter(backbone, AdapterConfig(r=2, dropout=0.0), "sequence")[0]))
    assert pooler or "bert.pooler.dense" in backbone.new_modules
    # Fixed ids: with some of TEXTS' NF4's rounding alone takes 2e-5.
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 140, (length,), generator=draw).tolist() for length in (3, 9, 1, 14, 6, 11)]
    assert_same(made[0](**pack(ids)).logits, made[0], alone(made[1], ids), made[1])


@pytest.mark.parametrize(
    ("family", "wrap"),
    [("bert", "ddp"), *((family, how) for family in ("bert", "qwen2") for how in ("reentrant", "checkpointed"))],
)
def test_gradient_checkpointing_and_ddp(family, wrap, tmp_path):
    ids = texts_of(build(family)[1])
    plain, model = (adapted(prepared(family)) for _ in range(2))
    called = model
    if wrap == "ddp":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        called = DistributedDataParallel(model)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": wrap == "reentrant"})
    if wrap == "reentrant":
        model.enable_input_require_grads()
    try:
        for one in (called, plain):
            one(**pack(ids)).logits.square().sum().backward()
    finally:
        if wrap == "ddp":
            torch.distributed.destroy_process_group()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad, msg=name)


_QWEN = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
WINDOWS = {  # settings of the model with windows, and without
    "mistral": ({"sliding_window": 4}, {"sliding_window": None}),
    "phi3": ({"sliding_window": 4}, {"sliding_window": None}),
    "qwen2": (_QWEN, {"use_sliding_window": False}),
    "qwen3": (_QWEN, {"use_sliding_window": False}),
    "smollm3": ({**_ALTERNATING, "sliding_window": 4, "use_sliding_window": True}, {}),
    "gemma3": ({**_ALTERNATING, "sliding_window": 4}, {**_ALTERNATING, "sliding_window": 64}),
    "gemma3, both ways": (
        {**_ALTERNATING, "sliding_window": 4, "use_bidirectional_attention": True},
        {**_ALTERNATING, "sliding_window": 64, "use_bidirectional_attention": True},
    ),
    "modernbert": ({**_ALTERNATING, "local_attention": 4}, {**_ALTERNATING, "local_attention": 128}),
}


@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
@pytest.mark.parametrize("family", WINDOWS)
def test_a_sliding_window_shorter_than_the_texts(family, padded):
    settings, wide = WINDOWS[family]
    family = family.partition(",")[0]
    reference, tokenizer = build(family, **settings)
    ids = texts_of(tokenizer)
    without = alone(build(family, **wide)[0], ids)
    model, reference = adapted(prepared(family, **settings)), adapted(reference)
    expected = reference(**encode(tokenizer)).logits if padded else alone(reference, ids)
    assert (expected - without).abs().max() > 0.01
    assert_same(model(**pack(ids)).logits, model, expected, reference)


@torch.no_grad()
def test_the_mean_that_a_config_asks_for():
    model, tokenizer = build("modernbert", classifier_pooling="mean")
    ids = texts_of(tokenizer)
    expected = alone(model, ids)
    enable_padding_free(model)
    torch.testing.assert_close(model(**pack(ids)).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["xlm-r", "llama", "qwen2"])
def test_padding_tokens_inside_a_text_and_at_its_end(family):
    """Llama and Qwen pool before them, XLM-R does not count them as positions."""
    model, tokenizer = build(family)
    pad = tokenizer.pad_token_id
    ids = [[*text[:3], pad, *text[3:], pad] for text in texts_of(tokenizer)]
    with torch.no_grad():
        torch.testing.assert_close(prepared(family)(**pack(ids)).logits, alone(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_bf16_autocast(family):
    model, tokenizer = build(family)
    ours, padded = adapted(prepared(family)), adapted(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = ours(**pack(texts_of(tokenizer))).logits, padded(**encode(tokenizer)).logits
    torch.testing.assert_close(logits.float(), expected.float(), atol=0.1, rtol=0.05)
    found, theirs = (gradients(model, out) for model, out in ((ours, logits), (padded, expected)))
    for name, gradient in theirs.items():
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_labels_give_the_loss(task):
    model, tokenizer = build("bert", task=task)
    ids = texts_of(tokenizer)
    labels = [i % 3 if task == "sequence" else [-100, *([1] * (len(text) - 2)), -100] for i, text in enumerate(ids)]
    batch = PackedCollator(task)([{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)])
    enable_padding_free(model)
    output = model(**batch)
    logits, wanted = output.logits.reshape(-1, 3), batch["labels"].reshape(-1)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, wanted))


def varlen_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """What torch documents `varlen_attn` to do."""
    assert query.shape == key.shape == value.shape
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert (cu_seq_q.dtype, max_q, max_k) == (torch.int32, int(cu_seq_q.diff().max()), max_q)
    left, right = window_size
    outputs = []
    for start, end in itertools.pairwise(cu_seq_q):
        parts = [tensor[start:end].transpose(0, 1) for tensor in (query, key, value)]
        seen = torch.ones(end - start, end - start, dtype=torch.bool)
        seen = seen if left < 0 else seen.triu(-left)
        seen = seen if right < 0 else seen.tril(right)
        found = torch.nn.functional.scaled_dot_product_attention(*parts, seen, scale=scale)
        outputs.append(found.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("kernel", ["varlen", "one bucket"])
@pytest.mark.parametrize("family", ["bert", "qwen2", "mistral", "modernbert"])
def test_the_kernels_of_a_gpu(family, kernel, monkeypatch):
    """Run on a CPU what a GPU would run: a kernel for packed rows, or all texts padded to the longest."""

    def in_rows(rows, packing, causal, window, dropout, scaling, kernel):
        return packed._varlen_attention(varlen_by_hand, rows, packing, causal, window, scaling)

    if kernel == "varlen":
        monkeypatch.setattr(packed, "attend_in_buckets", in_rows)
    else:
        monkeypatch.setattr(packed, "_buckets", lambda lengths: [(None, max(lengths), True)])
    settings = WINDOWS[family][0] if family in ("mistral", "modernbert") else {}
    reference, tokenizer = build(family, **settings)
    model, reference = adapted(prepared(family, **settings)), adapted(reference)
    ids = texts_of(tokenizer)
    assert_same(model(**pack(ids)).logits, model, alone(reference, ids), reference)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_trap_packed_by_transformers_texts_are_mixed(family):
    model, tokenizer = build(family, task="token")
    ids = texts_of(tokenizer)
    positions = torch.cat([torch.arange(len(text)) for text in ids]).unsqueeze(0)
    expected, native = alone(model, ids), {"input_ids": pack(ids)["input_ids"], "position_ids": positions}
    wrong = [{}, {"use_cache": False, "attention_mask": torch.ones_like(positions)}]
    if family == "bert":  # sdpa ignores cu_seq_lens in silence
        bounds = pack(ids)["cu_seqlens"]
        wrong = [{}, {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}]
    else:
        torch.testing.assert_close(model(**native, use_cache=False).logits, expected, atol=1e-5, rtol=0)
    for options in wrong:
        assert (model(**native, **options).logits - expected).abs().max() > 0.1
    enable_padding_free(model)
    torch.testing.assert_close(model(**pack(ids)).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("deberta-v3", {}, "DebertaV2ForSequenceClassification has no padding-free forward: its attention"),
        *((name, {}, "has no padding-free forward: ") for name in encoder_decoders),
        ("bert", {"is_decoder": True}, "decoder"),
        ("bert", {"attn_implementation": "eager"}, "eager"),
    ],
)
def test_other_backbones_fall_back_and_say_why(family, settings, why):
    model, _ = build(family, **settings)
    decision = choose_batching("padding_free", model)
    assert (decision.what, decision.choice) == ("batching", "padded")
    assert why in decision.reason
    with pytest.raises(ModelError, match="use padded") as caught:
        enable_padding_free(model)
    assert caught.value.code == "not-packable"
    assert all(choose_batching(wanted, model).choice == wanted for wanted in ("grouped", "padded"))


def test_what_a_recipe_asks_for_may_need_padded_batches():
    def chosen(family, masking="{}", training="{}", **settings):
        data = "{builtin: true, task: sequence, max_length: 60}"
        text = f"name: a\nmodel: {{backbone: b}}\ndata: {data}\nmasking: {masking}\ntraining: {training}\n"
        return choose_batching(
            "padding_free", build(family, **settings)[0], Recipe.model_validate(yaml.safe_load(text))
        )

    assert "NEFTune" in (noisy := chosen("bert", training="{neftune_alpha: 5}")).reason
    assert noisy.choice == "padded"
    drop = "{p: 0.1, replace: drop}"
    assert "windows of 8" in (narrow := chosen("mistral", drop, sliding_window=8)).reason
    assert narrow.choice == "padded"
    assert chosen("modernbert", drop, local_attention=32).choice == "padded"
    # a window that no text fills, one that is off, no masking, masks that stay
    assert chosen("mistral", drop, sliding_window=60).choice == "padding_free"
    assert chosen("qwen2", drop, sliding_window=8, use_sliding_window=False).choice == "padding_free"
    assert chosen("mistral", sliding_window=8).choice == "padding_free"
    assert chosen("mistral", "{p: 0.1}", sliding_window=8).choice == "padding_free"


def test_a_family_can_be_added_from_outside(monkeypatch):
    decoder = FAMILIES["Llama"]
    monkeypatch.delitem(FAMILIES, "Llama")
    assert choose_batching("padding_free", build("llama")[0]).choice == "padded"
    monkeypatch.setitem(FAMILIES, "Llama", Family(decoder.head, causal=True))
    reference, tokenizer = build("llama")
    ids = texts_of(tokenizer)
    model, reference = adapted(prepared("llama")), adapted(reference)
    assert_same(model(**pack(ids)).logits, model, alone(reference, ids), reference)


@pytest.mark.parametrize("replace", ["token", "drop"])
@pytest.mark.parametrize("family", ["bert", "xlm-r", "distilbert", "qwen2", "llama"])
def test_pairs_with_token_types_are_the_same_packed_and_padded(family, replace):
    """BERT's second text has another segment; nothing that separates the texts is masked."""
    pairs = [Pair(first, second) for first, second in zip(TEXTS, [*TEXTS[3:], "ok", "ok", TEXTS[1]], strict=True)]
    model, tokenizer = build(family)
    reference, typed = adapted(build(family)[0]), family == "bert"
    if typed:
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    enable_padding_free(model)
    model = adapted(model)
    examples = [Example(pair, "a", f"x:{number}") for number, pair in enumerate(pairs)]
    rows = list(Encoder(tokenizer, "sequence", 60).cut(examples, ("a",)).dataset.remove_columns(["length", "labels"]))
    padded = DataCollatorWithPadding(tokenizer)(rows)
    assert {0, 1} == {*padded["token_type_ids"].flatten().tolist()} if typed else "token_type_ids" not in padded
    masking = TokenMaskConfig(p=0.5, replace=replace)
    with TokenMasker.attach(reference, tokenizer, masking) as masker, seen_ids(reference.get_base_model()) as seen:
        expected = reference(**padded).logits
        if replace == "token":
            special = torch.isin(padded["input_ids"], torch.tensor(tokenizer.all_special_ids))
            changed = seen[0] != padded["input_ids"]
            assert not (changed & special).any()
            second = torch.zeros_like(special)
            for row, (first, _) in zip(second, pairs, strict=True):
                row[len(tokenizer(first)["input_ids"]) :] = True
            assert all(part.any() for part in (changed & second, changed & ~second))
        counted = masker.observed_rate
    with TokenMasker.attach(model, tokenizer, masking) as masker:
        logits = model(**PackedCollator("sequence")(rows)).logits
        assert masker.observed_rate == counted > 0.2
    assert_same(logits, model, expected, reference)
