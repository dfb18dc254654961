"""The two readers of numbers: every form of a value, and no other value."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fuchsia_pl.envs.rewards import last_boxed, parse_number, read_number, same_number, unwrapped
from fuchsia_pl.envs.rewards.wrappers import last_sentences

# Forms of a number, which replaces `{}`. The first six are bare: the strict reader accepts them too.
BARE = ("{}", " {} ", "+{}", "${}", "€{}", "{}%")
FORMS = (
    *BARE,
    "£{}",
    r"\${}",
    "US${}",
    "{}$",
    "{}€",
    "{} €",
    "{} dollars",
    "{} USD",
    "{} percent",
    r"{}\%",
    r"\boxed{{{}}}",
    r"$\boxed{{{}}}$",
    r"\boxed{{\${}}}",
    "${}$",
    "$${}$$",
    r"\({}\)",
    r"\[ {} \]",
    r"\text{{{}}}",
    r"{}\text{{ km}}",
    r"{}~\mathrm{{kg}}",
    "**{}**",
    "**{}.**",
    "**{}** .",
    "_{}_",
    "`{}`",
    "= {}",
    "#### {}",
    "{} km/h",
    "{} miles per hour",
    "{} square feet",
    "{}°",
    r"{}^\circ",
)
GROUP_MARKS = (",", " ", "\u202f", "\u00a0", "{,}", r",\!", r"\,")


def grouped(number: int, mark: str) -> str:
    return f"{number:,}".replace(",", mark)


def spellings(value: Fraction) -> list[str]:
    """The digits of a value that is 0 or more: a whole number with groups, a decimal, a fraction."""
    if value.denominator == 1:
        whole = int(value)
        return [
            str(whole),
            f"{whole}.00",
            f"{whole}e0",
            rf"{whole} \times 10^{{0}}",
            *(grouped(whole, mark) for mark in GROUP_MARKS),
        ]
    whole, part = divmod(value, 1)
    fractions = [f"{value.numerator}/{value.denominator}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]
    mixed = [f"{whole} {part}", rf"{whole}\frac{{{part.numerator}}}{{{part.denominator}}}"] if whole else []
    return [*fractions, *mixed]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    st.one_of(
        st.integers(0, 10**12).map(Fraction),
        st.fractions(0, 100, max_denominator=99),
    ),
    st.one_of(st.integers(-(10**6), 10**6).map(Fraction), st.fractions(-5, 5, max_denominator=20)),
)
@example(Fraction(1072), Fraction(1, 2))
@example(Fraction(3, 2), Fraction(-3))
def test_every_form_of_a_value_is_that_value_and_never_another(value, other):
    for digits in spellings(value):
        for form in FORMS:
            written = form.format(digits)
            amount = read_number(written)
            assert amount is not None, written
            assert amount.value == value, written
            if other != value:
                assert not same_number(written, amount._replace(value=other), "lenient"), written
    for digits in spellings(value):
        for negative in (f"-{digits}", f"\u2212{digits}", f"-${digits}", f"$-{digits}$", rf"\boxed{{-{digits}}}"):
            assert read_number(negative).value == -value, negative


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet="0123456789.,-+$%/ \\{}*_=#eE^boxed€\u2212\u0663", max_size=30))
def test_no_text_is_an_error_and_the_readers_never_disagree(text):
    strict, lenient = parse_number(text), read_number(text)
    if strict is not None and lenient is not None:
        assert lenient.value == strict, text


@pytest.mark.parametrize("digits", ["1072", "1,072", "1072.00"])
def test_the_strict_reader_takes_bare_numbers_alone(digits):
    assert [parse_number(form.format(digits)) for form in FORMS] == [1072 if form in BARE else None for form in FORMS]


@pytest.mark.parametrize(
    ("gold", "value", "unit"),
    [
        (r"\$36", 36, "$"),
        (r"\$18.90", Fraction(189, 10), "$"),
        (r"\$32,\!348", 32348, "$"),
        ("1 1/2", Fraction(3, 2), ""),
        ("50 km/h", 50, "km/hour"),
        ("1e-07", Fraction(1, 10**7), ""),
        (r"-\frac{3}{4}", Fraction(-3, 4), ""),
        (r"\frac{-3}{4}", Fraction(-3, 4), ""),
        ("$15 per hour", 15, "$/hour"),
        ("-.5", Fraction(-1, 2), ""),
    ],
)
def test_golds_as_sets_of_problems_write_them(gold, value, unit):
    assert read_number(gold) == (value, unit)


@pytest.mark.parametrize(
    "text",
    [
        *("", "-", ".", "$", "%", "=", "####", "\\boxed{}", "\\boxed{72", "--72", "+-72", "-$-72"),
        *(
            "72 or 73",
            "72, 73",
            "about 72",
            "x = 72",
            "not 72",
            "72 clips",
            "7 2",
            "1  072",
            "(72)",
            "70 + 2",
            "72\n73",
        ),
        *(
            "72 thousand",
            "72k",
            "72 dozen",
            "$72 million",
            "72 m",
            "72 cents",
            "72 squared",
            "72^2",
            "72\u00b2",
            "72!",
            "72...",
        ),
        *("144/2", "72/1", "1 100/300", "10,72", "0,072", "1,0722", "1,07", "1.072,00", "1.2.3", "12:30", "2024-01-05"),
        *("0x48", "nan", "inf", "1_000", "1e301", "e5", "\u0667\u0662", "\uff17\uff12", "\u00bd", "72\x00"),
        *("9" * 61, "(" * 10_000, "1072" * 300_000, "\\boxed{" * 1000, "9**9**9", "\\text{" * 30),
    ],
)
def test_what_is_no_number_or_no_single_one_is_not_read(text):
    assert read_number(text) is None


def test_units_must_agree_where_both_have_one():
    speed, bare = read_number("50 km/h"), read_number("50")
    answers = ["50", "50 km/h", "50 kilometers per hour", "50 m/s", "50%", "$50"]
    assert [same_number(answer, speed, "lenient") for answer in answers] == [True, True, True, False, False, False]
    assert all(same_number(answer, bare, "lenient") for answer in answers)
    assert [same_number(answer, speed, "strict") for answer in answers] == [True, False, False, False, True, True]


def test_a_pound_of_money_and_one_of_weight_are_two_units():
    answers = ["72", "£72", "GBP 72", "72 lb", "72 lbs", "72 pounds", "$72"]
    expected = {
        "£72": [True, True, True, False, False, True, False],
        "72 lb": [True, False, False, True, True, True, False],
        "72 pounds": [True, True, True, True, True, True, False],
    }
    for gold, same in expected.items():
        assert [same_number(answer, read_number(gold), "lenient") for answer in answers] == same
    assert read_number("£72 lb") is None
    assert read_number("£72 pounds") == (72, "£")
    assert same_number("72 pounds per hour", read_number("£72 per hour"), "lenient")
    assert not same_number("72 lb per hour", read_number("£72 per hour"), "lenient")


@pytest.mark.parametrize(
    "text",
    [
        '"72"',
        "'72'",
        "\u201c72\u201d",
        "\u201872\u2019",
        '**"72"**.',
        "\u200b72",
        "\ufeff 72",
        "72\u200b",
        "\\boxed{\u200b72}",
        " \u2060$72$",
    ],
)
def test_quotes_and_invisible_marks_around_a_number_are_no_part_of_it(text):
    assert read_number(text) == (72, "")


@pytest.mark.parametrize("text", ['"72', '72"', "7\u200b2", '"7" "2"', '""', "\u200b"])
def test_what_is_not_around_the_whole_number_is_left(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} or \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{x \boxed{3}}", r"x \boxed{3}"),
        # the last one is not complete
        (r"\boxed{1}, no, \boxed{2", None),
        (r"\boxed{1}, no, \boxed", None),
        (r"\boxed{x \boxed{3}", None),
        (r"\boxed{\}", None),
        ("3", None),
        ("\\boxed{" * 20_000, None),
    ],
)
def test_the_last_box_counts_where_it_is_complete(text, inside):
    assert last_boxed(text) == inside


def test_wrappers_are_taken_off_only_where_they_stand_around_the_whole():
    assert unwrapped(r" **$\boxed{x}$.** ") == "x"
    assert unwrapped("#### = x") == "x"
    for text in (r"\boxed{1} \boxed{2}", "2 ** 3", r"$1\$", "1...", "**", "$"):
        assert unwrapped(text) == text


def test_the_last_sentences():
    text = "A sentence. Another one!\nThe value is 3.5"
    assert last_sentences(text, 100) == text
    assert last_sentences(text, 30) == "The value is 3.5"
    assert last_sentences(text, 36) == "Another one!\nThe value is 3.5"
    assert last_sentences("x" * 50, 30) == "x" * 50
