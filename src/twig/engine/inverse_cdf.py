"""From probabilities and uniform numbers to tokens: the inverse of the cumulative distribution.

Knows nothing of models or of where the numbers come from. Legend: B numbers, N rows, V vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def invert(
    probabilities: Float[Tensor, "N V"], uniform: Float[Tensor, " B"], row: Int[Tensor, " B"] | None = None
) -> Int[Tensor, " B"]:
    """Returns the token at which a cumulative distribution first exceeds `uniform`.

    It is never one of probability 0. `row` [B] has the row of `probabilities` that each number belongs to
    (None: they are one to one).

    The last sum stands for 1, so rounding in a large vocabulary cannot fall off the end.
    """
    if probabilities.device.type != "cpu":
        return invert_in_blocks(probabilities if row is None else probabilities[row], uniform)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1] if row is None else cumulative[row, -1]
    below = torch.minimum(uniform * total, total * (1 - torch.finfo(total.dtype).eps))
    if row is None:
        tokens = torch.searchsorted(cumulative, below[:, None], right=True)[:, 0]
    else:
        numbers = row.bincount(minlength=len(cumulative))
        order = row.argsort(stable=True)  # each row's numbers become one row of a table
        at = torch.arange(len(row)) - (numbers.cumsum(0) - numbers)[row[order]]
        table = below.new_zeros(len(cumulative), int(numbers.max()))
        table[row[order], at] = below[order]
        tokens = torch.empty_like(row)
        tokens[order] = torch.searchsorted(cumulative, table, right=True)[row[order], at]
    # If nothing is a number the search ends behind the last token; `completions` refuses such rows.
    return tokens.clamp(max=cumulative.shape[1] - 1)


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
