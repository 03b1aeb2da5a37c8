"""Which response tokens of rows to forget are masked, where the time t does not decide it alone.

A position is masked where its noise is smaller than t, so whatever is to be masked is said by noise and t. With two
words and an end token, of which the model generates "London" for the prompt:

    response     born   London  <end>       t     noise
    random       .71    .05     .32         .4    as drawn; special tokens get 1 if they are to stay visible
    content      x      x                   1     0 0 1
    generated           x                   1/2   1 0 1
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ForgetMasks:
    """Masks of the rows to forget of a data set.

    Args:
        kind: "random", where t and noise decide, of all tokens but special ones; "content", all tokens but special
            ones; or "generated", those of them that the model generates for the prompt too. A row without such a
            token is masked as by "content".
        special_ids: tokens that are in no text. They are masked in responses without any other token alone.
        generated: of each row, the ids that the model generates for its prompt.
    """

    kind: str
    special_ids: tuple[int, ...]
    generated: tuple[tuple[int, ...], ...] = ()

    def apply(self, rows: Tensor, ids: Tensor, response: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return what a batch of B rows is masked by.

        Args:
            rows: `[B]`, the rows' numbers.
            ids, response: `[B, L]`, the tokens, and 1 on the response.
            t, noise: `[B]` and `[B, L]`, as drawn.

        Returns:
            `maskable`, bool `[B, L]`, the positions that may be masked, which are what losses count as the response;
            `t` and `noise`. Where t is not drawn, it is the masked share of these positions.
        """
        response = response.bool()
        content = response & ~torch.isin(ids, torch.tensor(self.special_ids))
        content = torch.where(content.any(dim=1, keepdim=True), content, response)
        if self.kind == "random":
            return {"maskable": content, "t": t, "noise": torch.where(content, noise, 1.0)}
        masked = content
        if self.kind == "generated":
            own = torch.stack(
                [
                    torch.isin(one, torch.tensor(self.generated[row]))
                    for one, row in zip(ids, rows.tolist(), strict=True)
                ]
            )
            masked = torch.where((own & content).any(dim=1, keepdim=True), own & content, content)
        t = (masked.sum(dim=1) / content.sum(dim=1)).to(t.dtype)
        return {"maskable": content, "t": t, "noise": (~masked).to(noise.dtype)}

    def count_bare(self, responses: list[list[int]]) -> int:
        """How many rows have no token that was generated, and are masked as by "content"."""
        special = {*self.special_ids}
        pairs = zip(responses, self.generated, strict=True)
        return sum(({*response} - special).isdisjoint(own) for response, own in pairs)
