"""From probabilities and uniform numbers to tokens: the inverse of the cumulative distribution.

Knows nothing of models or of where the numbers come from. Legend: B rows, V vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def invert(probabilities: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Returns the token at which the cumulative distribution first exceeds `uniform`.

    It is never one of probability 0.

    The last sum stands for 1, so rounding in a large vocabulary cannot fall off the end.
    """
    if probabilities.is_cuda:
        return invert_in_blocks(probabilities, uniform)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    below = torch.minimum(uniform * total, total * (1 - torch.finfo(total.dtype).eps))
    # If nothing is a number the search ends behind the last token; `completions` refuses such rows.
    return torch.searchsorted(cumulative, below[:, None], right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)


def invert_in_blocks(probabilities: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Returns the token at which the cumulative distribution first exceeds `uniform`.

    It is never one of probability 0.

    In two levels, blocks and the tokens of one block: on a GPU the running sum of a long row is slow.
    """
    rows, vocabulary = probabilities.shape
    if rows == 1:
        # NOTE: CUDA adds up a single row in another way, by which a running sum may rise where nothing is
        # added: a token of probability 0 would be drawn.
        return invert_in_blocks(probabilities.expand(2, -1), uniform.expand(2))[:1]
    width = max(int(vocabulary**0.5), 1)
    blocks = -(-vocabulary // width)
    padded = torch.nn.functional.pad(probabilities, (0, blocks * width - vocabulary))
    padded = padded.view(rows, blocks, width)
    ends = padded.sum(-1).cumsum(-1)
    total = ends[:, -1]
    almost = 1 - torch.finfo(total.dtype).eps
    below = torch.minimum(uniform * total, total * almost)[:, None]
    block = torch.searchsorted(ends, below, right=True).clamp(max=blocks - 1)
    before = torch.where(block > 0, ends.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inner = padded.gather(1, block[:, :, None].expand(-1, -1, width))[:, 0].cumsum(-1)
    rest = torch.minimum(below - before, inner[:, -1:] * almost)
    token = block * width + torch.searchsorted(inner, rest, right=True).clamp(max=width - 1)
    return token[:, 0].clamp(max=vocabulary - 1)
