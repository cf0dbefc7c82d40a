"""Coloured words: escaped, relative to the strongest, and readable without the colours."""

from tokmask_peft.inference.display import influence_words, label_legend, label_words, strengths, strongest_words


def test_influences_are_relative_to_the_strongest():
    html = influence_words(["a", "<b>", "c", "d"], [2.0, -1.0, 0.01, 0.0])
    assert '<span class="for" style="--w:0.60" title="+2.00">a</span>' in html
    assert '<span class="against" style="--w:0.30" title="-1.00">&lt;b&gt;</span>' in html
    assert "<span>c</span> <span>d</span>" in html


def test_without_influences_words_are_plain_but_the_word_in_question_is_framed():
    html = influence_words(["x", "<y>"], (), focus=1)
    assert html == "<span>x</span> <span><strong>&lt;y&gt;</strong></span>"
    assert "for" not in influence_words(["x"], [0.0])


def test_the_strongest_words_are_named():
    assert strongest_words(["a", "b", "c"], [0.1, -3.0, 0.0]) == [("b", -3.0), ("a", 0.1)]


def test_labels_keep_their_colour_and_are_in_the_legend():
    order = [f"l{number}" for number in range(9)] + ["<x>"]
    html = label_words(["uno", "<two>"], ["l1", "<x>"], order, [0.5, 1.0])
    assert '<span class="label hue-1" title="l1, 0.500">uno</span>' in html
    assert '<span class="label hue-1" title="&lt;x&gt;, 1.000">&lt;two&gt;</span>' in html
    legend = label_legend(order)
    assert legend.count("<li") == 10
    assert "<x>" not in legend


def test_colours_are_relative_to_the_strongest_word_but_noise_stays_pale():
    assert strengths([0.5, 3.0, -4.0])[2] == -1.0
    assert strengths([1.0, -0.2], full=2.0) == [0.5, -0.1]
    assert strengths([1.0, -0.2]) == [1.0, -0.2]
    assert strengths([0.0]) == [0.0]
    assert strengths([], full=2.0) == []


def test_a_word_that_cannot_be_masked_says_so_and_labels_stand_behind_their_words():
    html = influence_words(["a", "b"], [2.0, 0.0], unmasked=(1,), tags=("<x>", "y"))
    assert 'title="+2.00">a</span><span class="tag">&lt;x&gt;</span>' in html
    assert '<span title="cannot be masked">b</span><span class="tag">y</span>' in html
