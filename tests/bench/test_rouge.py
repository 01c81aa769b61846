from __future__ import annotations

import pytest

from edgeft.bench.rouge import rouge_l, words


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [  # "police killed the gunman" and its paraphrases: Lin 2004, section 3.1
        ("police kill the gunman", "police killed the gunman", 75.0),
        ("the gunman kill police", "police killed the gunman", 50.0),
        ("Police, killed: THE gunman!", "police killed the gunman", 100.0),
        ("police", "police killed the gunman", 40.0),
        ("", "police killed the gunman", 0.0),
        ("...", "!", 100.0),
    ],
)
def test_the_longest_common_words_in_order_count(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)
    assert rouge_l(reference, answer) == pytest.approx(score)


def test_words_are_found_in_any_script() -> None:
    assert words("Can't wait 3.5 days, Gr\u00fc\u00dfe!") == ["can't", "wait", "3.5", "days", "gr\u00fcsse"]
    assert words("\u6211\u7684\u8ba2\u5355\u3002") == list("\u6211\u7684\u8ba2\u5355")  # Chinese: a word per character
    russian = ["\u0433\u0434\u0435", "\u0437\u0430\u043a\u0430\u0437"]
    assert words(" ".join(russian) + "?") == russian
    assert words("e\u0301t\u00e9") == words("\u00e9t\u00e9")  # composed or not
