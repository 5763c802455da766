"""A corpus as blocks of equally many tokens: the training examples of language models that read on across lines."""

from typing import Any

import numpy as np
from datasets import Dataset

# Lines that are tokenized at a time.
_BATCH_SIZE = 1000


def text_blocks(dataset: Dataset, tokenizer: Any, column: str, block_size: int, name: str) -> Dataset:
    """Join all texts and cut them into blocks of tokens, as transformers' `run_clm.py` does. The last rest is dropped.

    A row of what is returned is a block, and scores are of blocks.

    Args:
        dataset: Lines of text; empty ones add nothing.
        tokenizer: The tokenizer.
        column: The column of the text.
        block_size: Tokens in a block.
        name: What error messages call the dataset.

    Returns:
        Columns `column` (the block's text, for human readers), `input_ids` and `attention_mask`.

    Raises:
        ValueError: There are not enough tokens for one block.

    Example:
        >>> text_blocks(Dataset.from_dict({"text": ["a b c", "", "d e"]}), tokenizer, "text", 2, "train")["text"][:]
        ... # doctest: +SKIP
        ['a b', 'c d']
    """
    parts = [np.zeros(0, dtype=np.int64)]
    for batch in dataset.select_columns([column]).iter(_BATCH_SIZE):
        # Texts longer than the model takes are no fault here, and nothing to warn of.
        parts += [np.asarray(ids, dtype=np.int64) for ids in tokenizer(batch[column], verbose=False)["input_ids"]]
    tokens = np.concatenate(parts)
    num_blocks = len(tokens) // block_size
    if num_blocks == 0:
        raise ValueError(
            f"The {name} dataset has {len(tokens)} tokens in {column!r}, too few for a block of {block_size}: choose "
            "a smaller --block_size."
        )
    blocks = tokens[: num_blocks * block_size].reshape(num_blocks, block_size)
    return Dataset.from_dict(
        {
            column: tokenizer.batch_decode(blocks),
            "input_ids": blocks.tolist(),
            "attention_mask": np.ones_like(blocks).tolist(),
        }
    )
