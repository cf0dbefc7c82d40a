"""Which token stands for a masked one."""

import pytest
import torch
from tiny_models import real_tokenizer, tiny_tokenizer

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.embedding import find_mask_token, prepare_mask_row
from tokmask_peft.masking.replacement import MaskToken, choose_mask_token, used_rows


@pytest.mark.parametrize(
    ("name", "rows", "kind", "token_id", "reason"),
    [
        ("bert-base-multilingual-cased", 119547, "mask", 103, "[MASK]"),
        ("Qwen2.5-0.5B", 151936, "spare", 151935, "rows 151665 to 151935"),
        ("TinyLlama-1.1B-Chat-v1.0", 32000, "unk", 0, "<unk>"),
    ],
)
def test_real_tokenizers(name, rows, kind, token_id, reason):
    chosen = choose_mask_token(real_tokenizer(name), rows)
    assert (chosen.kind, chosen.id) == (kind, token_id)
    assert reason in chosen.reason


def test_auto_takes_the_own_mask_token_then_unk_then_a_spare_row():
    assert choose_mask_token(tiny_tokenizer("wordpiece"), 200).kind == "mask"
    bytelevel, metaspace = tiny_tokenizer("bytelevel"), tiny_tokenizer("metaspace")
    assert choose_mask_token(bytelevel, 348) == MaskToken(347, "spare", choose_mask_token(bytelevel, 348).reason)
    assert choose_mask_token(metaspace, len(metaspace)).kind == "unk"
    assert choose_mask_token(metaspace, len(metaspace) + 1).kind == "unk"


def rows_with(norms):
    """Return an embedding of rows of norm about 1, and of the given norms."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(348, 32)
    embedding.weight.data /= embedding.weight.data.norm(dim=1, keepdim=True)
    for row, norm in norms.items():
        embedding.weight.data[row] *= norm
    return embedding


def test_auto_passes_over_a_row_that_was_never_trained():
    tokenizer = tiny_tokenizer("wordpiece")
    mask, unk = tokenizer.mask_token_id, tokenizer.unk_token_id
    assert find_mask_token(rows_with({}), tokenizer).id == mask
    chosen = find_mask_token(rows_with({mask: 0.2}), tokenizer)
    assert (chosen.kind, chosen.id) == ("unk", unk)
    assert "norm 0.200; the median of all rows is 1.000" in chosen.reason
    assert find_mask_token(rows_with({mask: 0.2}), tokenizer, "mask").id == mask
    assert find_mask_token(rows_with({mask: 0.2}), tokenizer, trained=True).id == mask
    assert find_mask_token(rows_with({mask: 0.2, unk: 0.1}), tokenizer).kind == "spare"
    full = rows_with({mask: 0.2, unk: 0.1})
    full.weight = torch.nn.Parameter(full.weight[: len(tokenizer)].detach())
    last_resort = find_mask_token(full, tokenizer)
    assert last_resort.id == mask
    assert "trainable_mask" in last_resort.reason


def test_a_trained_row_starts_typical_if_it_was_never_trained():
    tokenizer, usual, untrained = tiny_tokenizer("wordpiece"), rows_with({}), rows_with({4: 0.2})
    token = MaskToken(4, "mask", "")
    assert prepare_mask_row(usual, token, tokenizer, trained=True) is None
    assert prepare_mask_row(untrained, token, tokenizer) is None
    assert prepare_mask_row(untrained, token, tokenizer, trained=True).norm().item() == pytest.approx(0.2, abs=1e-4)
    assert untrained.weight[4].norm().item() == pytest.approx(1.0, abs=1e-4)


def test_no_token_is_an_error_that_asks_for_an_id_and_never_id_0():
    bytelevel = tiny_tokenizer("bytelevel")
    with pytest.raises(MaskTokenError, match="to a token id") as refused:
        choose_mask_token(bytelevel, len(bytelevel))
    assert refused.value.code == "no-mask-token"
    assert len(refused.value.fields["problems"]) == 3


@pytest.mark.parametrize("role", ["pad", "eos"])
def test_unk_that_is_pad_or_eos_too_is_refused(role):
    tokenizer = tiny_tokenizer("metaspace")
    setattr(tokenizer, f"{role}_token", tokenizer.unk_token)
    with pytest.raises(MaskTokenError, match=f"'<unk>' is also its {role} token"):
        choose_mask_token(tokenizer, len(tokenizer))


def test_a_mask_token_that_the_embedding_lacks_is_not_taken():
    tokenizer = tiny_tokenizer("bytelevel")
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    assert choose_mask_token(tokenizer, 348).kind == "mask"
    with pytest.raises(MaskTokenError) as refused:
        choose_mask_token(tokenizer, 332)
    assert refused.value.code == "no-mask-token"


def test_explicit_choices():
    tokenizer = tiny_tokenizer("wordpiece")
    assert choose_mask_token(tokenizer, 160, "unk").id == tokenizer.unk_token_id
    assert choose_mask_token(tokenizer, 160, "spare").id == 159
    assert choose_mask_token(tokenizer, 160, 155).kind == "spare"
    assert choose_mask_token(tokenizer, 160, 20).kind == "id"
    assert choose_mask_token(tokenizer, 160, tokenizer.mask_token_id).kind == "id"
    for rows, wanted, code in (
        (160, tokenizer.pad_token_id, "mask-token-special"),
        (160, tokenizer.sep_token_id, "mask-token-special"),
        (160, 160, "mask-token-outside"),
        (len(tokenizer), "spare", "no-mask-token"),
    ):
        with pytest.raises(MaskTokenError) as refused:
            choose_mask_token(tokenizer, rows, wanted)
        assert refused.value.code == code


def test_vocabulary_with_gaps_leaves_no_row_that_a_token_uses():
    tokenizer = tiny_tokenizer("wordpiece")
    vocabulary = {f"t{i}": i for i in range(400)}
    tokenizer.get_vocab = lambda: vocabulary
    assert len(tokenizer) == 150
    assert used_rows(tokenizer) == 400
    with pytest.raises(MaskTokenError, match="uses all 400 rows"):
        choose_mask_token(tokenizer, 400, "spare")


class Rows:
    """A tokenizer that uses this many rows."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def get_vocab(self):
        return {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spare_row_has_the_mean_direction_and_the_median_norm_of_the_rows_in_use(dtype):
    embedding = torch.nn.Embedding(20_000, 8, dtype=dtype)  # more rows than one chunk
    before = embedding.weight.detach().clone()
    original = prepare_mask_row(embedding, MaskToken(19_999, "spare", ""), Rows(19_000))
    used = before[:19_000].double()
    expected = used.mean(0) * used.norm(dim=1).median() / used.mean(0).norm()
    # One rounding of the result: summed in bf16 the mean would be off by a multiple of itself.
    torch.testing.assert_close(embedding.weight[19_999].double(), expected, rtol=2**-7, atol=1e-3)
    assert torch.equal(original, before[19_999])
    assert torch.equal(embedding.weight[:19_999], before[:19_999])


def test_spare_row_of_a_sharded_matrix_is_refused():
    embedding = torch.nn.Embedding(348, 8)
    embedding.weight = torch.nn.Parameter(torch.zeros(0))
    with pytest.raises(MaskTokenError, match="before the model is sharded") as refused:
        prepare_mask_row(embedding, MaskToken(340, "spare", ""), Rows(332))
    assert refused.value.code == "mask-row-sharded"
