"""Coloured words: escaped, on one scale for all texts, and readable without the colours."""

import pytest

from tokmask_peft.html import influence_words, label_legend, label_words, strength_of, strongest_words


def test_influences_are_tinted_by_their_size():
    html = influence_words(["a", "<b>", "c", "d"], [2.0, -1.0, 0.09, 0.0])
    assert '<span class="for" style="--w:0.46" title="+2.00">a</span>' in html
    assert '<span class="against" style="--w:0.28" title="-1.00">&lt;b&gt;</span>' in html
    assert "<span>c</span> <span>d</span>" in html


def test_without_influences_words_are_plain_but_the_word_in_question_is_framed():
    html = influence_words(["x", "<y>"], (), focus=1)
    assert html == "<span>x</span> <span><strong>&lt;y&gt;</strong></span>"
    assert "for" not in influence_words(["x"], [0.0])


def test_the_strongest_words_are_named():
    assert strongest_words(["a", "b", "c"], [0.2, -3.0, 0.05]) == [("b", -3.0), ("a", 0.2)]


def test_labels_keep_their_colour_and_are_in_the_legend():
    order = [f"l{number}" for number in range(9)] + ["<x>"]
    html = label_words(["uno", "<two>"], ["l1", "<x>"], order, [0.5, 1.0])
    assert '<span class="label hue-1" title="l1, 0.500">uno</span>' in html
    assert '<span class="label hue-1" title="&lt;x&gt;, 1.000">&lt;two&gt;</span>' in html
    legend = label_legend(order)
    assert legend.count("<li") == 10
    assert "<x>" not in legend


def test_noise_stays_pale_also_if_no_word_of_the_text_is_stronger():
    noise, strong = influence_words(["a", "b"], [0.05, -0.08]), influence_words(["a", "b"], [0.05, 6.0])
    assert noise == "<span>a</span> <span>b</span>"
    assert strong.startswith("<span>a</span> "), "a stronger word does not change the colour of another"


@pytest.mark.parametrize(("nats", "after"), [(0.0, 0.5), (0.4, 0.5987), (2.0, 0.8808), (-2.0, 0.1192), (50.0, 1.0)])
def test_strength_is_how_far_an_undecided_answer_moves(nats, after):
    assert 0.5 + strength_of(nats) / 2 == pytest.approx(after, abs=1e-4)


def test_a_word_that_cannot_be_masked_says_so_and_labels_stand_behind_their_words():
    html = influence_words(["a", "b"], [2.0, 0.0], unmasked=(1,), tags=("<x>", "y"))
    assert 'title="+2.00">a</span><span class="tag">&lt;x&gt;</span>' in html
    assert '<span title="cannot be masked">b</span><span class="tag">y</span>' in html
