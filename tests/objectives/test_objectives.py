"""MaskFeat and classification: what the loss looks at, what it does not, and what a step means."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from maskfeat.batch import Batch
from maskfeat.engine.trainer import Trainer
from maskfeat.masking import resize_mask
from maskfeat.models import attention, pooling
from maskfeat.models.layers import set_impl
from maskfeat.models.mvit import MViT
from maskfeat.models.vit import ViT
from maskfeat.objectives import hog
from maskfeat.objectives.classification import Classification
from maskfeat.objectives.maskfeat import MaskFeat, most_hidden_tokens
from maskfeat.objectives.mixup import Mixup


def vit(**changes: object) -> ViT:
    return ViT(**{"image_size": (64, 64), "patch": (16, 16), "width": 24, "depth": 2, "num_heads": 2, **changes})


def masked_batch(size: int = 3) -> Batch:
    hidden = torch.rand(size, 4, 4) > 0.5
    hidden[:, 0, 0] = True
    return Batch(torch.randn(size, 3, 64, 64), hidden=hidden, index=torch.arange(size))


def test_loss_is_the_mean_square_over_hidden_tokens() -> None:
    objective, batch = MaskFeat(vit(maskable=True)), masked_batch()
    prediction, target = objective.predict_hidden(batch)
    assert prediction.shape == target.shape == (int(batch.hidden.sum()), 108)
    assert objective.weight(batch) == batch.hidden.sum()
    out = objective(batch)
    torch.testing.assert_close(out.loss, (prediction - target).square().mean())
    assert not any(value.requires_grad for value in out.metrics.values())
    assert out.metrics["zero_predictor"].item() == pytest.approx(1 / 9, rel=1e-4)
    assert out.metrics["mean_hog_predictor"] < out.metrics["zero_predictor"]


def test_files_carry_the_kernels_of_the_published_layer() -> None:
    state = MaskFeat(vit(maskable=True)).released_state()
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    for name, kernel in (("weight_x", across), ("weight_y", across.T)):
        assert torch.equal(state[f"hogs.0.{name}"], kernel.expand(3, 1, 3, 3))


def test_target_is_of_the_unmasked_input_and_without_gradient() -> None:
    objective, batch = MaskFeat(vit(maskable=True)), masked_batch()
    batch.clip.requires_grad_(True)
    _, target = objective.predict_hidden(batch)
    assert not target.requires_grad and target.dtype == torch.float32
    everything = Batch(batch.clip, hidden=torch.ones_like(batch.hidden), index=batch.index)
    _, complete = objective.predict_hidden(everything)
    torch.testing.assert_close(complete[batch.hidden.flatten()], target)


def test_visible_pixels_get_gradient_hidden_ones_none() -> None:
    objective, batch = MaskFeat(vit(maskable=True)), masked_batch()
    batch.clip.requires_grad_(True)
    objective(batch).loss.backward()
    gradient = batch.clip.grad.reshape(3, 3, 4, 16, 4, 16).abs().sum(dim=(1, 3, 5))
    assert (gradient[batch.hidden] == 0).all()
    assert (gradient[~batch.hidden] > 0).all()


@pytest.mark.parametrize("video", [False, True])
def test_a_whole_objective_in_the_reference_form(video: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient in float64; nothing of the fast forms is called."""
    if video:
        backbone: MViT | ViT = MViT(
            clip_size=(4, 64, 64),
            width=16,
            depth=2,
            stride_q={0: (1, 1, 1), 1: (1, 2, 2)},
            stride_kv_adaptive=(1, 4, 4),
            maskable=True,
        )
        hidden = torch.rand(2, 2, 4, 4) > 0.5
    else:
        backbone, hidden = vit(maskable=True), torch.rand(2, 4, 4) > 0.5
    hidden[0].flatten()[0] = hidden[1].flatten()[1] = True
    pixels = torch.randint(-16, 17, (2, 3, *backbone.clip_size)) / 8  # sums are exact: both forms choose the same bins
    objective = MaskFeat(backbone, cell=4 if video else 8).double()
    batch = Batch(pixels.double(), hidden=hidden, index=torch.arange(2))
    found = []
    for impl in ("fast", "reference"):
        set_impl(objective, impl)
        if impl == "reference":
            monkeypatch.delattr(hog, "histograms")
            monkeypatch.delattr(attention, "fast_attention")
            monkeypatch.delattr(pooling, "_PoolTokens")
            monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
        objective.zero_grad()
        out = objective(batch)
        out.loss.backward()
        found.append([out.loss, *(p.grad for p in objective.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-7)  # targets are float32


def test_targets_under_a_window_are_those_of_the_reference_form() -> None:
    objective, batch = MaskFeat(vit(maskable=True), window=16), masked_batch()
    batch.clip = torch.randint(-16, 17, batch.clip.shape) / 8  # both forms choose the same bins
    found = []
    for impl in ("fast", "reference"):
        set_impl(objective, impl)
        found.append(objective.predict_hidden(batch)[1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    objective.window = 0
    assert not torch.allclose(objective.predict_hidden(batch)[1], found[1], atol=0.01)


def test_clips_use_every_second_frame_and_three_grids() -> None:
    backbone = MViT(
        clip_size=(8, 64, 64),
        width=16,
        depth=2,
        stride_q={0: (1, 1, 1), 1: (1, 2, 2)},
        stride_kv_adaptive=(1, 4, 4),
        maskable=True,
    )
    assert (backbone.stem_grid, backbone.grid) == ((4, 16, 16), (4, 8, 8))
    objective = MaskFeat(backbone, cell=4)
    clip = torch.randn(2, 3, 8, 64, 64)
    hidden = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    hidden[0, 1, 2, 3] = hidden[1, 0, 0, 0] = True
    batch = Batch(clip, hidden=hidden, index=torch.arange(2))
    _, target = objective.predict_hidden(batch)
    assert target.shape == (2 * 4, 108)
    odd = clip.clone()
    odd[:, :, 1::2] = 0
    torch.testing.assert_close(objective.target(odd), objective.target(clip))
    # The second hidden token of sample 0 is place (t, y, x) = (1, 4, 7) of the output grid.
    torch.testing.assert_close(target[1], objective.target(clip).reshape(2, 4, 8, 8, 108)[0, 1, 4, 7])


def test_mask_is_asked_for_by_its_key() -> None:
    with pytest.raises(ValueError, match="AUG.GEN_MASK_LOADER"):
        MaskFeat(vit(maskable=True))(Batch(torch.randn(1, 3, 64, 64)))
    with pytest.raises(ValueError, match="MASK.HOG_CELL"):
        MaskFeat(vit(maskable=True), cell=5)


def test_shuffled_targets_are_those_of_another_image_in_training_alone() -> None:
    objective, batch = MaskFeat(vit(maskable=True), shuffle=True), masked_batch(4)
    prediction, true = objective.predict_hidden(batch)
    hidden = batch.hidden.flatten(1)
    everything = objective.target(batch.clip)  # (4, 16, 108), of every token
    torch.testing.assert_close(true, everything[hidden])
    others = torch.stack([everything[row - 1] for row in range(4)])[hidden]  # at the places that are hidden here
    expected = [(prediction - target).square().mean() for target in (others, true)]
    assert not torch.isclose(*expected, rtol=1e-3)
    trained, evaluated = objective.train()(batch), objective.eval()(batch)
    torch.testing.assert_close(trained.loss, expected[0])
    torch.testing.assert_close(evaluated.loss, expected[1])
    torch.testing.assert_close(trained.metrics["zero_predictor"], others.square().mean())
    mean = others.mean(dim=0)
    torch.testing.assert_close(trained.metrics["mean_hog_predictor"], (others - mean).square().mean())
    plain = MaskFeat(objective.backbone)
    plain.pred_head = objective.pred_head
    torch.testing.assert_close(plain.train()(batch).loss, expected[1], msg="nothing is shuffled unasked")


def test_the_input_of_shuffled_targets_is_the_images_own() -> None:
    objective, batch = MaskFeat(vit(maskable=True), shuffle=True).train(), masked_batch(3)
    batch.clip.requires_grad_(True)
    objective(batch).loss.backward()
    gradient = batch.clip.grad.reshape(3, 3, 4, 16, 4, 16).abs().sum(dim=(1, 3, 5))
    assert (gradient[batch.hidden] == 0).all() and (gradient[~batch.hidden] > 0).all()


@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_nothing_hidden_teaches_nothing(precision: str) -> None:
    """Loss and gradients are zero and finite; a step changes weights by their decay alone."""
    objective = MaskFeat(vit(maskable=True)).train()
    clip = torch.randn(4, 3, 64, 64)
    batch = Batch(clip, hidden=torch.zeros(4, 4, 4, dtype=torch.bool), index=torch.arange(4), max_hidden=0)
    assert objective.weight(batch) == 0
    out = objective(batch)
    assert out.loss == 0 and all(value == 0 for value in out.metrics.values())
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in objective.named_parameters()}
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values()), gradients.keys()
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    groups = [
        {"params": [p for p in objective.parameters() if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in objective.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
    trainer = Trainer(objective, optimizer, lambda _: 0.01, clip_norm=1.0, precision=precision, micro_batch=3)
    for _ in range(3):
        trainer.train_step(batch)
        assert trainer.metrics.read()["skipped"] == 0
    for name, parameter in objective.named_parameters():
        decayed = before[name] * ((1 - 0.01 * 0.5) ** 3 if parameter.dim() > 1 else 1.0)
        torch.testing.assert_close(parameter.detach(), decayed, atol=1e-7, rtol=1e-5)
        assert parameter.dim() > 1 or torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("mean_pooling", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
def test_pooling(mean_pooling: bool, class_token: bool) -> None:
    objective = Classification(vit(class_token=class_token), num_classes=5, mean_pooling=mean_pooling).eval()
    clip = torch.randn(2, 3, 64, 64)
    tokens = objective.backbone.forward_tokens(clip)
    if mean_pooling:
        pooled = objective.norm(tokens.x[:, int(class_token) :].mean(dim=1))
    else:
        normed = objective.norm(tokens.x)
        pooled = normed[:, 0] if class_token else normed.mean(dim=1)
    probabilities = objective.predict(Batch(clip))
    torch.testing.assert_close(probabilities, objective.head.projection(pooled).softmax(dim=1))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2))


def test_hard_soft_and_mixed_targets() -> None:
    mixup = Mixup(alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, smoothing=0.1, num_classes=5)
    objective = Classification(vit(), num_classes=5, mixup=mixup)
    clip, hard = torch.randn(4, 3, 64, 64), torch.tensor([0, 3, 2, 4])
    soft = torch.nn.functional.one_hot(hard, 5).float()
    kept = clip.clone()
    assert objective(Batch(clip, label=hard)).metrics == {}, "no accuracy on mixed images"
    assert (clip == kept).all(), "mixing must not change the batch itself"
    prepared = objective.prepare(Batch(clip, label=hard))
    assert prepared.label.shape == (4, 5), "one draw for the batch, before it is cut into micro-batches"
    assert objective.prepare(prepared) is prepared
    by_soft = objective(Batch(clip, label=soft))
    assert by_soft.metrics == {}
    out = objective.eval()(Batch(clip, label=hard))
    torch.testing.assert_close(out.loss, by_soft.loss, msg="soft targets are never mixed")
    right = objective.predict(Batch(clip)).argmax(1) == hard
    assert out.metrics["top1"] == right.float().mean()


def test_labels_out_of_range_name_the_key() -> None:
    with pytest.raises(ValueError, match="MODEL.NUM_CLASSES"):
        Classification(vit(), num_classes=5)(Batch(torch.randn(2, 3, 64, 64), label=torch.tensor([0, 5])))
    with pytest.raises(ValueError, match="labels"):
        Classification(vit(), num_classes=5)(Batch(torch.randn(2, 3, 64, 64)))


def test_head_scale() -> None:
    torch.manual_seed(3)
    plain = Classification(vit(), num_classes=5)
    torch.manual_seed(3)
    scaled = Classification(vit(), num_classes=5, head_init_scale=0.001)
    torch.testing.assert_close(scaled.head.projection.weight, plain.head.projection.weight * 0.001)
    assert scaled.head.projection.bias.tolist() == pytest.approx([2e-5] * 5)


def mix(clip: Tensor, label: Tensor, seed: int, **changes: float) -> tuple[Tensor, Tensor]:
    np.random.seed(seed)
    options = {
        "alpha": 0.8,
        "cutmix_alpha": 1.0,
        "prob": 1.0,
        "switch_prob": 0.5,
        "smoothing": 0.0,
        **changes,
    }
    return Mixup(num_classes=4, **options)(clip, label)


@pytest.mark.parametrize("frames", [(), (3,)])
@pytest.mark.parametrize("size", [4, 5])
def test_mixup_partner_is_the_reversed_batch(size: int, frames: tuple[int, ...]) -> None:
    clip, label = torch.randn(size, 3, *frames, 16, 16), torch.arange(size) % 4
    for seed in range(5):
        mixed, target = mix(clip, label, seed, cutmix_alpha=0.0)
        one_hot = torch.nn.functional.one_hot(label, 4).float()
        # lambda is read off a row whose partner has another label; images and targets must agree on it.
        share = target[1, label[1]].item()
        torch.testing.assert_close(mixed, clip * share + clip.flip(0) * (1 - share), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(target, one_hot * share + one_hot.flip(0) * (1 - share))


@pytest.mark.parametrize("frames", [(), (3,)])
def test_cutmix_pastes_one_box_through_all_frames(frames: tuple[int, ...]) -> None:
    clip, label = torch.randn(4, 3, *frames, 16, 16), torch.tensor([0, 1, 2, 3])
    for seed in range(10):
        mixed, target = mix(clip, label, seed, alpha=0.0)
        pasted = mixed == clip.flip(0)
        same = mixed == clip
        assert (pasted | same).all()
        box = pasted.flatten(0, -3).all(dim=0)
        assert (pasted == box).all(), "the box is the same in every sample, channel and frame"
        share = 1 - box.float().mean().item()
        assert target[0, 0].item() == pytest.approx(share, abs=1e-6)
        rows, columns = box.any(1).sum(), box.any(0).sum()
        assert rows * columns == box.sum(), "it is a rectangle"


def test_mixup_smoothing_and_chances() -> None:
    clip, label = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    mixed, target = mix(clip, label, 0, prob=0.0, smoothing=0.1)
    assert (mixed == clip).all()
    assert target[0].tolist() == pytest.approx([0.925, 0.025, 0.025, 0.025])
    cut = 0
    for seed in range(60):
        mixed, _ = mix(clip, label, seed, switch_prob=0.5)
        cut += bool(((mixed == clip) | (mixed == clip.flip(0))).all())
    assert 15 < cut < 45
    with pytest.raises(ValueError, match="MIXUP.ALPHA"):
        mix(clip, label, 0, alpha=0.0, cutmix_alpha=0.0)


def test_smoothing_over_the_others_then_mixing() -> None:
    clip, label = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    _, target = mix(clip, label, 0, prob=0.0, smoothing=0.1, smooth_others=True)
    assert target[1].tolist() == pytest.approx([0.1 / 3, 0.9, 0.1 / 3, 0.1 / 3])
    _, mixed = mix(clip, label, 0, cutmix_alpha=0.0, smoothing=0.1, smooth_others=True)
    _, share = mix(clip, label, 0, cutmix_alpha=0.0)
    lam = share[0, 0]
    torch.testing.assert_close(mixed, lam * target + (1 - lam) * target.flip(0))


def test_binary_cross_entropy_by_the_definition() -> None:
    objective = Classification(vit(), num_classes=5, binary=True).eval()
    clip, hard = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 2])
    soft = torch.rand(3, 5)
    with torch.no_grad():
        chance = torch.sigmoid(objective.logits(clip).double())
    for label, target in ((hard, torch.nn.functional.one_hot(hard, 5).double()), (soft, soft.double())):
        expected = -(target * chance.log() + (1 - target) * (1 - chance).log()).mean()
        assert objective(Batch(clip, label=label)).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective(Batch(clip, label=hard)).metrics.keys() == {"top1"}


def test_mixup_and_cutmix_draw_from_their_own_beta() -> None:
    """Beta(1000, 1000) lies at a half, Beta(0.001, 0.001) at 0 or 1."""
    clip, label = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])

    def shares(**changes: float) -> list[float]:
        return [mix(clip, label, seed, **changes)[1][0, 0].item() for seed in range(20)]

    assert all(abs(s - 0.5) < 0.1 for s in shares(alpha=1000.0, cutmix_alpha=0.001, switch_prob=0.0))
    assert all(min(s, 1 - s) < 0.1 for s in shares(alpha=0.001, cutmix_alpha=1000.0, switch_prob=0.0))
    # The box of half the area is cut off at the border of the image; with a Beta at 0 and 1 it is nothing or all of it.
    assert all(0.4 < s < 0.95 for s in shares(alpha=0.001, cutmix_alpha=1000.0, switch_prob=1.0))
    assert sum(s == 1.0 for s in shares(alpha=1000.0, cutmix_alpha=0.001, switch_prob=1.0)) > 5


@pytest.mark.parametrize(
    ("cells", "tokens"),
    [
        ((14, 14), (14, 14)),
        ((7, 7), (14, 14)),
        ((8, 7, 7), (8, 14, 14)),
        ((4, 3, 3), (8, 7, 7)),
        ((8, 14, 14), (8, 7, 7)),
        ((5,), (7,)),
    ],
)
def test_most_hidden_tokens_holds_every_mask(cells: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """The count that is used on devices, where a mask is not counted: never below what a mask hides."""
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 5, math.prod(cells) // 2, math.prod(cells)):
        if count > math.prod(cells):
            continue
        most = most_hidden_tokens(count, cells, tokens)
        assert most <= math.prod(tokens) and (most % 16 == 0 or most == math.prod(tokens))
        seen = []
        for _ in range(20):
            mask = np.zeros(math.prod(cells), dtype=bool)
            mask[rng.permutation(mask.size)[:count]] = True
            seen.append(int(resize_mask(torch.from_numpy(mask.reshape(1, *cells)), tokens).sum()))
        assert most >= max(seen)
        assert most < max(seen) + 16 or any(t % c for t, c in zip(tokens, cells, strict=True)) or tokens < cells


def test_smoothing_over_the_others_where_there_are_none() -> None:
    clip, label = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    mixup = Mixup(0.8, 0.0, prob=0.0, switch_prob=0.0, smoothing=0.1, num_classes=1, smooth_others=True)
    assert mixup(clip, label)[1].tolist() == [[1.0], [1.0]]
