"""The attentive probe: against attention written out, and on what the mean of tokens does not show."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import stored

from maskfeat.analysis.probes.attentive import AttentiveHead, attentive_probe
from maskfeat.analysis.probes.linear import linear_probe
from maskfeat.analysis.probes.split import held_out
from maskfeat.analysis.probes.sweep import Plan

CPU = torch.device("cpu")


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (48, 1), (200, 2), (130, 2), (195, 3), (199, 1)])
def test_it_is_attention_of_one_query(width: int, heads: int) -> None:
    """PyTorch's attention gets every key and value; its keys have a bias, which must change nothing."""
    torch.manual_seed(0)
    head, x = AttentiveHead(width, 5), torch.randn(3, 7, width)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert head.heads == heads
    weight = torch.cat([head.to_query.weight, head.to_key.weight, head.to_value.weight])
    bias = torch.cat([head.to_query.bias, torch.randn(width), head.to_value.bias])
    query = head.query.expand(1, 3, -1)
    keys = x.transpose(0, 1)
    attended, _ = F.multi_head_attention_forward(
        query, keys, keys, width, heads, weight, bias, None, None, False, 0.0, head.project.weight, head.project.bias
    )
    pooled = head.query + attended[0]
    pooled = pooled + head.mlp(head.norm(pooled))
    torch.testing.assert_close(head(x), head.linear(head.last_norm(pooled)), atol=1e-4, rtol=1e-4)


def marked(number: int, seed: int, tokens: int = 12, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of which one carries a mark (its first feature is large) and the class (its second one has the sign).

    The second features of the others have signs of their own, drawn so that their sum over all tokens is 0: the mean
    of the tokens says nothing.
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(2, size=number)
    x = rng.normal(scale=0.3, size=(number, 1, tokens, width))
    signs = np.tile([1.0, -1.0], tokens // 2)
    for row in range(number):
        order = rng.permutation(signs)
        x[row, 0, :, 1] = 3 * order
        x[row, 0, rng.choice(np.flatnonzero(order == 2 * label[row] - 1)), 0] = 4.0
    return x, label


@pytest.mark.slow
def test_it_finds_the_token_that_tells() -> None:
    train, test = stored(*marked(400, 0)), stored(*marked(300, 1))
    held = held_out(train.label, 0)
    plan = Plan(epochs=1, least_steps=250, batch=64, optimizer="adamw")
    found = attentive_probe(train, test, 2, held, 0, CPU, lrs=(1e-3, 5e-3), weight_decays=(0.01,), plan=plan)
    assert (found.scores.argmax(dim=1).numpy() == test.label).mean() > 0.97
    pooled = [stored(given.x.mean(axis=2)[:, 0], given.label) for given in (train, test)]
    columns = {"all": torch.arange(16)}
    mean = linear_probe(*pooled, columns, 2, held, 0, CPU, plan=plan._replace(optimizer="sgd", epochs=1))
    assert (mean.scores.argmax(dim=1).numpy() == test.label).mean() < 0.6


@pytest.mark.slow
def test_scores_of_views_are_averaged_and_the_seed_decides() -> None:
    train, (first, label), (second, _) = stored(*marked(60, 0)), marked(20, 1), marked(20, 2)
    plan = Plan(epochs=1, least_steps=20, batch=32, optimizer="adamw")

    def scores(x: np.ndarray, seed: int = 0) -> torch.Tensor:
        held = held_out(train.label, 0)
        return attentive_probe(train, stored(x, label), 2, held, seed, CPU, (3e-3,), (0.01,), plan).scores

    alone = [scores(first), scores(second)]
    torch.testing.assert_close(scores(np.concatenate([first, second], axis=1)), (alone[0] + alone[1]) / 2)
    assert torch.equal(scores(first), alone[0]) and not torch.equal(scores(first, 1), alone[0])
    assert alone[0].sum(dim=1).tolist() == pytest.approx([1.0] * 20) and math.isfinite(float(alone[0].sum()))
