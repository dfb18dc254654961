"""The prompt of an item, which all siblings share."""

from dataclasses import dataclass

from fuchsia_pl.types import Item, Message, Rollout


@dataclass(frozen=True)
class Prompt:
    """The conversation of an item before the policy's first turn. It is made once per item and phase; all siblings use it.

    Attributes:
        item: The dataset row.
        index: Position of the row in its split.
        messages: The conversation that the policy continues.
        token_ids: Token ids of the conversation, up to and including the header of the policy's turn.
        text: Text of `token_ids`, special tokens included.

    >>> prompt = Prompt({"a": 3, "b": 4}, 0, ({"role": "user", "content": "3 plus 4?"},), (11, 12), "user: 3 plus 4?")
    >>> rollout = prompt.rollout(sibling=1, temperature=0.7, step=5)
    >>> rollout.token_ids, rollout.prompt, rollout.messages[0] is prompt.messages[0]
    ([11, 12], 'user: 3 plus 4?', False)
    """

    item: Item
    index: int
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    text: str

    def rollout(self, sibling: int, temperature: float, step: int | None) -> Rollout:
        """Starts a rollout. Its messages are copies, so that user code cannot change those of a sibling.

        Args:
            sibling: Position in its group.
            temperature: Sampling temperature.
            step: The optimizer step it is sampled for, None on a held-out split.
        """
        messages = [dict(message) for message in self.messages]
        rollout = Rollout(self.item, self.index, sibling, temperature, self.text, step, messages)
        rollout.start(list(self.token_ids))
        return rollout
