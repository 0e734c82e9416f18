"""The baseline that 03 is compared with: logistic regression on words."""
import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from running.text import texts_of, words


def bags(items: list[dict], column: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> for every word of an item its column, 0 if it has none, and 1; of a pair, 1 for the words
    on the left and -1 for those on the right: (N, longest) each."""
    columns, signs = [], []
    for item in items:
        sides = [words(text) for text in texts_of(item)]
        found = [column.get(word, 0) for side in sides for word in side]
        columns.append(torch.tensor(found, dtype=torch.long))
        signs.append(torch.ones(len(columns[-1])))
        signs[-1][len(sides[0]):] = -1
    return pad_sequence(columns, batch_first=True), pad_sequence(signs, batch_first=True)


def bag_of_words(train: list[dict], test: list[dict], epochs: int = 12, l2: float = 3.0):
    """Logistic regression on word counts, by Adam -> log-odds of happy (N,), or that the left of a
    pair is the happier, from the difference of its counts. A word's log-odds have a normal prior of
    variance 1 / l2, without which few labels overfit."""
    seen = (word for item in train for text in texts_of(item) for word in words(text))
    column = {word: i for i, word in enumerate(dict.fromkeys(seen), 1)}
    columns, signs = bags(train, column)
    target = torch.tensor([item["target"] for item in train])
    weight = torch.tensor([item["weight"] for item in train])
    odds = torch.nn.EmbeddingBag(len(column) + 1, 1, mode="sum", padding_idx=0)
    torch.nn.init.zeros_(odds.weight)
    bias = torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([odds.weight, bias], lr=0.01)
    g = torch.Generator().manual_seed(0)
    epochs = max(epochs, 400 // math.ceil(len(train) / 1024))  # at least 400 steps
    steps = [b for _ in range(epochs) for b in torch.randperm(len(train), generator=g).split(1024)]
    for step, b in enumerate(steps):
        logit = odds(columns[b], per_sample_weights=signs[b])[:, 0] + bias
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / len(steps))
        adam.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logit, target[b], weight[b] / weight.mean())
        (loss + l2 / 2 / len(train) * odds.weight.square().sum()).backward()
        adam.step()
    columns, signs = bags(test, column)
    with torch.no_grad():
        return (odds(columns, per_sample_weights=signs)[:, 0] + bias).numpy()
