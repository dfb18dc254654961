import itertools
from collections import Counter
from fractions import Fraction

import pytest

from fuchsia_pl.evaluation.passes import majority_correct, pass_at_k, pass_sizes


@pytest.mark.parametrize("number", range(1, 9))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_correct_sample(number):
    for num_correct in range(number + 1):
        samples = [True] * num_correct + [False] * (number - num_correct)
        for k in range(1, number + 1):
            subsets = list(itertools.combinations(samples, k))
            expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert pass_at_k(number, num_correct, k) == pytest.approx(float(expected), abs=1e-15)


def test_pass_at_k_in_closed_form():
    for number, right in [(10, 3), (64, 1), (200, 150)]:
        assert pass_at_k(number, right, 1) == pytest.approx(right / number)
        # One try of two is right, less both.
        both = right / number * (right - 1) / (number - 1)
        assert pass_at_k(number, right, 2) == pytest.approx(2 * right / number - both)
        assert pass_at_k(number, right, number) == 1.0
    product = 1.0
    for tries in range(100):  # Chen et al. 2021 compute 1 - the product of 1 - k / i
        product *= (190 - tries) / (200 - tries)
    assert pass_at_k(200, 10, 100) == pytest.approx(1 - product)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_enough_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs 1 to 4 tries"):
        pass_at_k(4, 2, k)


def test_sizes_are_powers_of_two_and_all_samples():
    assert [pass_sizes(number) for number in (1, 2, 3, 4, 5, 8, 9)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 5],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 9],
    ]


@pytest.mark.parametrize("number", range(1, 6))
def test_majority_is_the_mean_over_all_orders_if_the_first_of_the_most_frequent_answers_wins(number):
    """Brute force over all answers of some samples, and over all orders; which sample states the answer does not matter."""
    right = {"a"}
    for answers in itertools.combinations_with_replacement(["a", "b", "c", None], number):
        wins = []
        for order in itertools.permutations(answers):
            votes = Counter(answer for answer in order if answer is not None)
            wins.append(votes.most_common(1)[0][0] in right if votes else False)
        expected = Fraction(sum(wins), len(wins))
        correct = [answer in right for answer in answers]
        assert majority_correct(answers, correct) == pytest.approx(float(expected), abs=1e-15)


def test_majority_by_hand():
    assert majority_correct(["7", "8", "8"], [True, False, False]) == 0.0
    assert majority_correct(["7", "7", "8", "8", "9"], [True, True, False, False, False]) == 0.5
    assert majority_correct([None, None], [True, True]) == 0.0
    # The same answer, and one of its samples is not correct, by its form.
    assert majority_correct(["7", "7", "8"], [True, False, False]) == 0.5
