import pytest
import torch

from fuchsia_pl.policy.logprobs import OutputHead, chunked_logprobs, fastest_chunk_tokens


def make_case(num_positions: int, vocabulary: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_positions, 8, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, 8, generator=generator, dtype=dtype)
    labels = torch.randint(vocabulary, (num_positions,), generator=generator)
    temperatures = torch.rand(num_positions, generator=generator).double() + 0.5
    return hidden, weight, labels, temperatures


@pytest.mark.parametrize("num_positions", [1, 7, 10])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 10, 64])
def test_chunks_change_neither_value_nor_gradient(num_positions, chunk_tokens):
    hidden, weight, labels, temperatures = make_case(num_positions, vocabulary=13, dtype=torch.float32)
    naive_hidden = hidden.clone().requires_grad_()
    logits = naive_hidden @ weight.T / temperatures.float().unsqueeze(1)
    naive = torch.log_softmax(logits, dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
    weights = torch.linspace(-1, 1, num_positions)
    (naive * weights).sum().backward()
    hidden.requires_grad_()
    chunked = chunked_logprobs(OutputHead(weight), hidden, labels, temperatures.float(), chunk_tokens)[0]
    (chunked * weights).sum().backward()
    torch.testing.assert_close(chunked, naive)
    torch.testing.assert_close(hidden.grad, naive_hidden.grad)


def test_two_tokens_by_hand_at_temperature_two():
    # logits (2 ln 3, 0) at temperature 2 are (ln 3, 0): probabilities 3/4 and 1/4
    hidden = torch.tensor([[2 * torch.log(torch.tensor(3.0))]]).repeat(2, 1)
    head = OutputHead(torch.tensor([[1.0], [0.0]]))
    logprobs = chunked_logprobs(head, hidden, torch.tensor([0, 1]), torch.full((2,), 2.0), chunk_tokens=1)[0]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.75, 0.25]))


def test_bias_scale_and_cap_by_hand():
    # (1 * 2 + 1) * 0.5 = 1.5, capped 2 tanh(0.75) = 1.27029790
    head = OutputHead(torch.tensor([[2.0]]), torch.tensor([1.0]), scale=0.5, softcap=2.0)
    torch.testing.assert_close(head.logits(torch.tensor([[1.0]])), torch.tensor([[1.2702979]]))


def test_no_position_is_empty_but_reaches_the_parameters():
    hidden = torch.zeros(0, 8, requires_grad=True)
    logprobs = chunked_logprobs(OutputHead(torch.zeros(5, 8)), hidden, torch.zeros(0).long(), torch.zeros(0), 4)[0]
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize(
    ("scale", "softcap", "with_bias"), [(1.0, None, False), (0.5, None, True), (1.0, 2.0, False), (3.0, 1.5, True)]
)
def test_the_gradients_of_logprob_and_entropy_are_those_of_their_definitions(scale, softcap, with_bias):
    """Against autograd through log_softmax and -sum p ln p, in float64, by hidden states, weight and bias."""
    hidden, weight, labels, temperatures = make_case(9, vocabulary=13)
    bias = torch.linspace(-1, 1, 13).double() if with_bias else None
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64)
    for of_logprobs, of_entropies in ((weights, None), (None, weights.flip(0)), (weights, weights.flip(0) + 0.3)):
        gradients = []
        for ours in (True, False):
            leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
            if ours:
                head = OutputHead(*leaves[1:], scale=scale, softcap=softcap)
                logprobs, entropies = chunked_logprobs(head, leaves[0], labels, temperatures, chunk_tokens=4)
            else:
                logits = scale * torch.nn.functional.linear(leaves[0], *leaves[1:])
                logits = softcap * torch.tanh(logits / softcap) if softcap else logits
                log_p = torch.log_softmax(logits / temperatures.unsqueeze(1), dim=1)
                logprobs = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
                entropies = -(log_p.exp() * log_p).sum(dim=1)
            parts = [(logprobs, of_logprobs), (entropies, of_entropies)]
            sum((part.double() * factor).sum() for part, factor in parts if factor is not None).backward()
            gradients.append([leaf.grad for leaf in leaves])
        # ours are in float32
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
        assert max(gradient.abs().max() for gradient in gradients[1]) > 0.01


def test_memory_does_not_grow_with_the_number_of_tokens(forkserver):
    """With 150,000 words, the logits of 2,048 tokens are 1.2 GB in float32. A separate process measures its own peak."""
    peaks = [peak_gb(forkserver, num_tokens) for num_tokens in (128, 2048)]
    assert peaks[1] - peaks[0] < 0.15


def peak_gb(forkserver, num_tokens: int) -> float:
    program = f"""
import resource, torch
from fuchsia_pl.policy.logprobs import OutputHead, chunked_logprobs, fastest_chunk_tokens
head = OutputHead(torch.randn(150_000, 16, dtype=torch.bfloat16))
hidden = torch.randn({num_tokens}, 16, dtype=torch.bfloat16).requires_grad_()
labels, temperatures = torch.arange({num_tokens}), torch.ones({num_tokens})
chunked_logprobs(head, hidden, labels, temperatures, fastest_chunk_tokens(head))[0].sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    done = forkserver.run("-c", program, timeout_s=120)
    assert done.returncode == 0, done.printed
    return float(done.printed.splitlines()[-1])


def test_chunks_of_a_large_vocabulary_are_smaller():
    small, large = (fastest_chunk_tokens(OutputHead(torch.zeros(size, 2))) for size in (49_152, 152_064))
    assert (small, large) == (170, 55)  # 32 MB of float32


def test_bfloat16_softmax_is_float32():
    # The logits are those of bfloat16; the softmax over them must add no error of that size.
    hidden, weight, labels, _ = make_case(64, vocabulary=1000)
    hidden, weight = (4 * hidden).bfloat16(), weight.bfloat16()
    logprobs = chunked_logprobs(OutputHead(weight), hidden, labels, torch.ones(64), chunk_tokens=16)[0]
    exact = torch.log_softmax(torch.nn.functional.linear(hidden, weight).double(), dim=1)
    exact = exact.gather(1, labels.unsqueeze(1)).squeeze(1)
    assert (logprobs.double() - exact).abs().max() < 1e-4


def test_the_logits_of_all_positions_never_exist_together():
    hidden, weight, labels, temperatures = make_case(40, vocabulary=500, dtype=torch.float32)
    hidden.requires_grad_()
    largest = 0

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (500,):
                largest = max(largest, out.numel())
            return out

    with Largest():
        chunked_logprobs(OutputHead(weight), hidden, labels, temperatures.float(), chunk_tokens=8)[0].sum().backward()
    assert largest == 8 * 500
