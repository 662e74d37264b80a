"""Every rule between keys: the recipe with one thing wrong is refused, and the message names the key."""

import math
import re

import pytest

from maskfeat.config import load_config
from maskfeat.config.defaults import INERT_KEYS
from maskfeat.config.schema import schema
from tests.config.helpers import MFM_PT, MFM_VIT_PT, MVIT_FT, MVIT_PT, R50_FT, VIT_FT, VIT_PT

RULES = schema().rules
STEPS = ["SOLVER.LR_POLICY", "steps_with_relative_lrs", "SOLVER.LRS", "[1, 0.1]"]

KEPT = [
    "DATA_LOADER.RESIDENT", "True", "AUG.AA_TYPE", "", "AUG.COLOR_JITTER", "None", "AUG.RE_PROB", "0.0",
    "AUG.INTERPOLATION", "bilinear",
]  # fmt: skip
KEPT_PT = [*KEPT, "AUG.ENABLE", "False"]

WRONG = [
    # recipe, overrides, every word that the message must hold
    (VIT_FT, ["TRAIN.BATCH_SIZE", "510"], ["TRAIN.BATCH_SIZE", "NUM_GPUS", "510", "8"]),
    (MVIT_FT, ["TEST.BATCH_SIZE", "63"], ["TEST.BATCH_SIZE", "NUM_GPUS", "63", "8"]),
    (VIT_FT, ["TRAIN.CHECKPOINT_FORMAT", "sharded"], ["TRAIN.CHECKPOINT_FORMAT", "gathered", "TRAIN.PARALLEL"]),
    (VIT_FT, ["TRAIN.PARALLEL", "fsdp", "SOLVER.OPTIMIZING_METHOD", "sgd"],
     ["SOLVER.OPTIMIZING_METHOD", "adamw", "TRAIN.PARALLEL", "'sgd'"]),
    (VIT_PT, ["TRAIN.KEEP_BEST", "True"], ["TRAIN.KEEP_BEST", "nothing is validated", "TRAIN.EVAL_PERIOD"]),
    (VIT_FT, ["TRAIN.KEEP_BEST", "True", "TRAIN.EVAL_PERIOD", "0"], ["TRAIN.KEEP_BEST", "TRAIN.EVAL_PERIOD is 0"]),
    (VIT_FT, ["SOLVER.OPTIMIZING_METHOD", "sgd", "SOLVER.MOMENTUM", "0"], ["SOLVER.NESTEROV", "SOLVER.MOMENTUM"]),
    (VIT_FT, ["SOLVER.OPTIMIZING_METHOD", "sgd", "SOLVER.DAMPENING", "0.1"], ["SOLVER.NESTEROV", "True, 0.9 and 0.1"]),
    (VIT_FT, ["MIXUP.ALPHA", "0", "MIXUP.CUTMIX_ALPHA", "0"], ["MIXUP.ALPHA", "MIXUP.CUTMIX_ALPHA", "MIXUP.ENABLE"]),
    (VIT_FT, ["TRAIN.PARALLEL", "fsdp", "TRAIN.EMA", "0.99"], ["TRAIN.EMA", "TRAIN.PARALLEL", "0.99"]),
    (VIT_FT, ["SHARD_ID", "1"], ["SHARD_ID", "NUM_SHARDS", "1"]),
    (VIT_FT, ["NUM_GPUS", "-1"], ["NUM_GPUS", "-1"]),
    (VIT_FT, ["TRAIN.MICRO_BATCH_SIZE", "-1"], ["TRAIN.MICRO_BATCH_SIZE", "-1"]),
    (VIT_FT, ["DATA.MAX_BAD_FRACTION", "1.5"], ["DATA.MAX_BAD_FRACTION", "1.5", "0 and 1"]),
    (VIT_FT, ["TRAIN.DATASET", "cifar"], ["TRAIN.DATASET", "imagenet, kinetics", "cifar"]),
    (VIT_FT, ["TRAIN.DATASET", "kinetics"], ["DATA.NUM_FRAMES", "MVIT.PATCH_2D"]),
    (VIT_FT, ["DATA.NUM_FRAMES", "2"], ["DATA.NUM_FRAMES", "imagenet"]),
    (MVIT_FT, ["DATA.NUM_FRAMES", "1"], ["DATA.NUM_FRAMES", "kinetics"]),
    (MVIT_FT, ["DATA.NUM_FRAMES", "15"], ["DATA.NUM_FRAMES", "MVIT.PATCH_STRIDE", "15"]),
    (MVIT_FT, ["TEST.DATASET", "imagenet"], ["TRAIN.DATASET", "TEST.DATASET"]),
    (MVIT_FT, ["DATA.TRAIN_JITTER_SCALES_RELATIVE", "[]", "DATA.TRAIN_JITTER_SCALES", "[200, 256]"],
     ["DATA.TRAIN_JITTER_SCALES", "DATA.TRAIN_CROP_SIZE"]),
    (VIT_FT, ["DATA.TRAIN_CROP_SIZE", "220"], ["DATA.TRAIN_CROP_SIZE", "MVIT.PATCH_STRIDE", "220"]),
    (VIT_FT, ["DATA.TEST_CROP_SIZE", "220"], ["DATA.TEST_CROP_SIZE", "MVIT.PATCH_STRIDE"]),
    (VIT_FT, ["MVIT.PATCH_2D", "False"], ["MVIT.PATCH_KERNEL", "MVIT.PATCH_STRIDE", "MVIT.PATCH_2D"]),
    (MVIT_FT, ["MVIT.PATCH_KERNEL", "[7, 7]"], ["MVIT.PATCH_KERNEL", "3 numbers", "MVIT.PATCH_2D"]),
    (VIT_FT, ["MVIT.SEP_POS_EMBED", "True"], ["MVIT.SEP_POS_EMBED must be False for images", "given True"]),
    (MVIT_PT, ["MVIT.PATCH_PADDING", "[2, 3, 3]"], ["MVIT.PATCH_PADDING [2, 3, 3]", "[9, 56, 56]"]),
    (MVIT_PT, ["MVIT.PATCH_KERNEL", "[5, 7, 7]"], ["MVIT.PATCH_KERNEL [5, 7, 7]", "[7, 56, 56]"]),
    (MVIT_PT, ["AUG.MASK_WINDOW_SIZE", "[8, 1, 1]"], ["8 x 1 x 1", "nothing would be hidden", "MASK_WINDOW_SIZE"]),
    (MVIT_PT, ["AUG.MASK_RATIO", "0.001"], ["AUG.MASK_RATIO 0.001 of 392 patches hides none"]),
    (MVIT_PT, ["AUG.MASK_RATIO", "0.05", "AUG.MASK_FRAMES", "True"], ["AUG.MASK_RATIO 0.05 of 8 frames hides none"]),
    (MVIT_PT, ["AUG.MASK_RATIO", "0.01", "AUG.MASK_TUBE", "True"], ["AUG.MASK_RATIO 0.01 of 49 patches hides none"]),
    (MVIT_FT, ["MVIT.DEPTH", "4"], ["MVIT.DIM_MUL", "MVIT.HEAD_MUL", "MVIT.POOL_Q_STRIDE", "MVIT.DEPTH 4"]),
    (MVIT_PT, ["MVIT.DEPTH", "15"], ["MVIT.POOL_Q_STRIDE", "block 15", "MVIT.DEPTH 15"]),
    (MVIT_FT, ["MVIT.DIM_MUL", "[[0, 2.0]]"], ["MVIT.DIM_MUL", "block 0"]),
    (MVIT_FT, ["MVIT.DIM_MUL", "[[1, 2.0, 3]]"], ["MVIT.DIM_MUL", "[block, factor"]),
    (MVIT_FT, ["MVIT.HEAD_MUL", "[[1.5, 2]]"], ["MVIT.HEAD_MUL", "[block, factor"]),
    (MVIT_FT, ["MVIT.POOL_Q_STRIDE", "[[1, 2, 2]]"], ["MVIT.POOL_Q_STRIDE", "[block, t, h, w]"]),
    (MVIT_FT, ["MVIT.POOL_Q_STRIDE", "[[1, 1, 0, 2]]"], ["MVIT.POOL_Q_STRIDE", "at least 1"]),
    (MVIT_FT, ["MVIT.POOL_Q_STRIDE", "[[1, 0, 2, 2]]"], ["MVIT.POOL_Q_STRIDE", "at least 1"]),
    (MVIT_FT, ["MVIT.POOL_KV_STRIDE", "[[16, 1, 8, 8]]"], ["MVIT.POOL_KV_STRIDE", "MVIT.DEPTH"]),
    (MVIT_FT, ["MVIT.POOL_KV_STRIDE", "[[0, 1, 8, 8]]"], ["MVIT.POOL_KV_STRIDE", "POOL_KV_STRIDE_ADAPTIVE"]),
    (VIT_FT, ["MVIT.NUM_HEADS", "7"], ["MVIT.EMBED_DIM", "MVIT.NUM_HEADS", "768", "7"]),
    (MVIT_FT, ["MVIT.HEAD_MUL", "[[3, 5]]"], ["block 3", "384", "5", "MVIT.HEAD_MUL"]),
    (MVIT_FT, ["MVIT.DIM_MUL", "[[3, 1.01]]"], ["block 3", "MVIT.DIM_MUL"]),
    (R50_FT, ["BN.USE_PRECISE_STATS", "True"], ["BN.USE_PRECISE_STATS True", "'resnet'", "only value is False"]),
    (R50_FT, ["BN.WEIGHT_DECAY", "0.0"], ["BN.WEIGHT_DECAY must be 0.0", "SOLVER.ZERO_WD_1D_PARAM False"]),
    (VIT_PT, ["AUG.MAX_MASK_PATCHES_PER_BLOCK", "8"], ["AUG.MAX_MASK_PATCHES_PER_BLOCK must be at least 15, "]),
    (R50_FT, ["RESNET.ZERO_INIT_FINAL_CONV", "True"], ["RESNET.ZERO_INIT_FINAL_CONV True", "only value is False"]),
    (R50_FT, ["RESNET.SPATIAL_STRIDES", "[[1], [1], [2], [2]]"], ["RESNET.SPATIAL_STRIDES", "[[1], [2], [2], [2]]"]),
    (VIT_FT, ["DATA.MEAN", "[123.675, 116.28, 103.53]"], ["DATA.MEAN", "between 0 and 1", "divided by 255"]),
    (VIT_FT, ["DATA.STD", "[58.4, 57.1, 57.4]"], ["DATA.STD", "between 0.01 and 1", "divided by 255"]),
    (MVIT_FT, ["DATA.STD", "[0.2, 0.2, 0.0]"], ["DATA.STD", "between 0.01 and 1", "0.0]"]),
    (VIT_FT, ["SOLVER.MAX_EPOCH", "10"], ["SOLVER.WARMUP_EPOCHS", "SOLVER.MAX_EPOCH", "20", "10"]),
    (VIT_FT, ["SOLVER.MAX_EPOCH", "20"], ["SOLVER.WARMUP_EPOCHS", "SOLVER.MAX_EPOCH"]),
    (VIT_FT, ["SOLVER.COSINE_END_LR", "1"], ["SOLVER.COSINE_END_LR", "SOLVER.BASE_LR"]),
    (VIT_FT, ["SOLVER.WARMUP_START_LR", "0.01"],
     ["SOLVER.WARMUP_START_LR must be at most SOLVER.BASE_LR", "given 0.01"]),
    (VIT_FT, ["SOLVER.CLIP_GRAD_VAL", "1", "SOLVER.CLIP_GRAD_L2NORM", "5"],
     ["SOLVER.CLIP_GRAD_VAL or SOLVER.CLIP_GRAD_L2NORM must be None", "1 and 5"]),
    (VIT_FT, ["OUTPUT_DIR", "s3://bucket/run"], ["OUTPUT_DIR must be a path in a file system", "'s3://bucket/run'"]),
    (VIT_FT, ["TEST.SAVE_RESULTS_PATH", "s3://r.json"], ["TEST.SAVE_RESULTS_PATH must be a path in a file system"]),
    (VIT_FT, [*STEPS, "SOLVER.STEPS", "[0]"], ["SOLVER.STEPS", "SOLVER.LRS"]),
    (VIT_FT, [*STEPS, "SOLVER.STEPS", "[5, 9]"], ["SOLVER.STEPS", "start at 0"]),
    (VIT_FT, [*STEPS, "SOLVER.STEPS", "[0, 0]"], ["SOLVER.STEPS", "ascend"]),
    (VIT_PT, ["MODEL.ARCH", "resnet"], ["MaskMViT", "'mvit' or 'maskmvit'", "resnet", "MFM"]),
    (MFM_PT, ["MODEL.MODEL_NAME", "MaskMViT"], ["MaskMViT", "'mvit' or 'maskmvit'", "resnet", "MFM"]),
    (VIT_FT, ["MODEL.ARCH", "resnet"], ["MODEL.MODEL_NAME 'MViT'", "'mvit' or 'maskmvit'", "'ResNet'"]),
    (R50_FT, ["MODEL.ARCH", "mvit"], ["MODEL.MODEL_NAME 'ResNet'", "supports MODEL.ARCH 'resnet'", "'MViT'"]),
    (MFM_PT, ["TRAIN.DATASET", "kinetics"], ["MFM", "supports images", "TRAIN.DATASET imagenet", "kinetics"]),
    (MVIT_PT, ["MODEL.MODEL_NAME", "MFM"], ["MFM", "supports images", "TRAIN.DATASET imagenet", "MaskMViT"]),
    (R50_FT, ["TEST.DATASET", "kinetics"], ["ResNet", "supports images", "TEST.DATASET imagenet", "'MViT'"]),
    (MFM_PT, ["DATA.TRAIN_CROP_SIZE", "240"], ["DATA.TRAIN_CROP_SIZE", "multiple of 32", "240"]),
    (MFM_VIT_PT, ["DATA.TRAIN_CROP_SIZE", "230"], ["DATA.TRAIN_CROP_SIZE", "MVIT.PATCH_STRIDE", "230"]),
    (MFM_PT, ["MFM.RADIUS", "113"], ["MFM.RADIUS", "DATA.TRAIN_CROP_SIZE", "113"]),
    (MFM_PT, ["MFM.LOW_PASS_PROB", "1.5"], ["MFM.LOW_PASS_PROB", "1.5", "0 and 1"]),
    (MFM_PT, ["MFM.EPS", "0"], ["MFM.EPS", "above 0"]),
    (MFM_PT, ["MODEL.LOSS_FUNC", "multi_mse"], ["MODEL.LOSS_FUNC", "frequency", "multi_mse"]),
    (MFM_PT, ["AUG.GEN_MASK_LOADER", "False"], ["AUG.GEN_MASK_LOADER", "MFM"]),
    (MFM_PT, ["MASK.ENABLE", "True"], ["MASK.ENABLE", "MFM"]),
    (MFM_PT, ["MIXUP.ENABLE", "True"], ["MIXUP.ENABLE", "MFM"]),
    (MFM_PT, ["TEST.ENABLE", "True"], ["TEST.ENABLE", "MFM"]),
    (R50_FT, ["MODEL.ACT_CHECKPOINT", "True"], ["MODEL.ACT_CHECKPOINT", "resnet"]),
    (R50_FT, ["MODEL.LOSS_FUNC", "frequency"], ["MODEL.LOSS_FUNC", "bce_logit", "frequency"]),
    (R50_FT, ["DATA.TEST_SHORT_SIDE", "200"], ["DATA.TEST_SHORT_SIDE", "DATA.TEST_CROP_SIZE", "224", "200"]),
    (MVIT_FT, ["DATA.TEST_SHORT_SIDE", "256"], ["DATA.TEST_SHORT_SIDE", "clips", "256"]),
    (R50_FT, ["AUG.REPEATS", "2", "AUG.ENABLE", "False"], ["AUG.REPEATS", "AUG.ENABLE", "2"]),
    (R50_FT, ["AUG.REPEATS", "2", "AUG.NUM_SAMPLE", "3"], ["AUG.REPEATS", "AUG.NUM_SAMPLE", "2 and 3"]),
    (R50_FT, ["AUG.INTERPOLATION", "lanczos"], ["AUG.INTERPOLATION", "AUG.AA_TYPE", "lanczos"]),
    (R50_FT, ["AUG.AA_TYPE", "ra_6"], ["AUG.AA_TYPE", "ra_6_10", "'ra_6'"]),
    (R50_FT, ["TRAIN.EMA", "1.0"], ["TRAIN.EMA", "below 1"]),
    (VIT_FT, ["MODEL.LOSS_FUNC", "cross_entropy"], ["MODEL.LOSS_FUNC", "MIXUP.ENABLE", "soft_cross_entropy"]),
    (VIT_FT, ["MODEL.LOSS_FUNC", "multi_mse"], ["MODEL.LOSS_FUNC", "MODEL.MODEL_NAME", "multi_mse"]),
    (VIT_FT, ["MASK.ENABLE", "True"], ["MASK.ENABLE", "MODEL.MODEL_NAME"]),
    (VIT_FT, ["MASK.PRED_HOG", "True"], ["MASK.PRED_HOG", "MODEL.MODEL_NAME"]),
    (VIT_FT, ["AUG.GEN_MASK_LOADER", "True"], ["AUG.GEN_MASK_LOADER", "MODEL.MODEL_NAME"]),
    (VIT_PT, ["MODEL.MODEL_NAME", "MViT"],
     ["MASK.ENABLE", "MASK.PRED_HOG", "AUG.GEN_MASK_LOADER", "MODEL.LOSS_FUNC"]),
    (VIT_FT, ["MODEL.MODEL_NAME", "MaskMViT"],
     ["MASK.ENABLE", "MASK.PRED_HOG", "AUG.GEN_MASK_LOADER", "MODEL.LOSS_FUNC", "MIXUP.ENABLE"]),
    (VIT_PT, ["MASK.ENABLE", "False"], ["MASK.ENABLE", "MaskMViT"]),
    (VIT_PT, ["MASK.PRED_HOG", "False"], ["MASK.PRED_HOG", "MaskMViT"]),
    (VIT_PT, ["AUG.GEN_MASK_LOADER", "False"], ["AUG.GEN_MASK_LOADER", "MaskMViT"]),
    (VIT_PT, ["MODEL.LOSS_FUNC", "cross_entropy"], ["MODEL.LOSS_FUNC", "multi_mse", "cross_entropy"]),
    (VIT_PT, ["MIXUP.ENABLE", "True"], ["MIXUP.ENABLE", "MaskMViT"]),
    (VIT_PT, ["TEST.ENABLE", "True"], ["TEST.ENABLE", "MaskMViT"]),
    (MVIT_FT, KEPT, ["DATA_LOADER.RESIDENT keeps images", "False for clips", "DATA.NUM_FRAMES", "given True"]),
    (VIT_FT, [*KEPT, "AUG.AA_TYPE", "ra_6_10"], ["AUG.AA_TYPE must be ''", "DATA_LOADER.RESIDENT", "'ra_6_10'"]),
    (VIT_FT, [*KEPT, "AUG.COLOR_JITTER", "0.4"], ["AUG.COLOR_JITTER must be None", "DATA_LOADER.RESIDENT", "0.4"]),
    (VIT_FT, [*KEPT, "AUG.RE_PROB", "0.25"], ["AUG.RE_PROB must be 0.0", "DATA_LOADER.RESIDENT", "0.25"]),
    (VIT_FT, [*KEPT, "AUG.NUM_SAMPLE", "2"], ["AUG.NUM_SAMPLE must be 1", "DATA_LOADER.RESIDENT", "given 2"]),
    (VIT_FT, [*KEPT, "AUG.REPEATS", "3"], ["AUG.REPEATS must be 1", "DATA_LOADER.RESIDENT", "given 3"]),
    (VIT_FT, [*KEPT, "AUG.INTERPOLATION", "bicubic"],
     ["AUG.INTERPOLATION must be 'bilinear'", "DATA_LOADER.RESIDENT", "'bicubic'"]),
    (VIT_PT, [*KEPT_PT, "AUG.INTERPOLATION", "nearest"],
     ["AUG.INTERPOLATION must be 'bilinear'", "DATA_LOADER.RESIDENT", "'nearest'"]),
    (VIT_FT, ["DATA_LOADER.RESIDENT", "1"], ["DATA_LOADER.RESIDENT", "1"]),
    (VIT_PT, ["AUG.MASK_RATIO", "-0.1"], ["AUG.MASK_RATIO", "between 0 and 1", "-0.1"]),
    (VIT_PT, ["MASK.SHUFFLE_TARGETS", "True", "AUG.REPEATS", "2"], ["MASK.SHUFFLE_TARGETS", "AUG.REPEATS", "2"]),
    (VIT_PT, ["MASK.SHUFFLE_TARGETS", "True", "TRAIN.MICRO_BATCH_SIZE", "1"],
     ["MASK.SHUFFLE_TARGETS", "two samples", "TRAIN.MICRO_BATCH_SIZE 1"]),
    (VIT_PT, ["MASK.SHUFFLE_TARGETS", "True", "TRAIN.BATCH_SIZE", "8", "NUM_GPUS", "8"],
     ["MASK.SHUFFLE_TARGETS", "TRAIN.BATCH_SIZE 8", "NUM_GPUS 8"]),
    (VIT_PT, ["MASK.SHUFFLE_TARGETS", "True", "TRAIN.BATCH_SIZE", "14", "NUM_GPUS", "2", "TRAIN.MICRO_BATCH_SIZE", "3"],
     ["MASK.SHUFFLE_TARGETS", "TRAIN.BATCH_SIZE 14", "TRAIN.MICRO_BATCH_SIZE 3"]),
    (VIT_PT, ["AUG.MASK_RATIO", "1.0"], ["AUG.MASK_RATIO", "below 1"]),
    (VIT_PT, ["MVIT.DEPTH", "6"], ["MASK.PRETRAIN_DEPTH", "MVIT.DEPTH", "[5]", "[11]"]),
    (VIT_PT, ["MASK.PRETRAIN_DEPTH", "[5, 11]"], ["MASK.PRETRAIN_DEPTH", "MVIT.DEPTH"]),
    (MVIT_PT, ["AUG.MASK_TUBE", "True", "AUG.MASK_FRAMES", "True"], ["AUG.MASK_TUBE", "AUG.MASK_FRAMES"]),
    (VIT_PT, ["MASK.HOG_CELL", "5"], ["MASK.HOG_CELL", "16 pixels", "5"]),
    (MVIT_PT, ["DATA.TRAIN_CROP_SIZE", "72"], ["DATA.TRAIN_CROP_SIZE", "72", "16 pixels"]),
    (MVIT_PT, ["MVIT.POOL_Q_STRIDE", "[[1, 2, 2, 2], [3, 1, 2, 2]]"], ["MVIT.POOL_Q_STRIDE", "time"]),
    (MVIT_PT, ["AUG.MASK_WINDOW_SIZE", "[8, 5, 5]"], ["AUG.MASK_WINDOW_SIZE", "[8, 56, 56]", "[8, 5, 5]"]),
    (MVIT_PT, ["AUG.MASK_WINDOW_SIZE", "[8, 8, 8]"], ["AUG.MASK_WINDOW_SIZE", "[8, 14, 14]"]),
    (MVIT_PT, ["DATA.TRAIN_CROP_SIZE", "64"], ["AUG.MASK_WINDOW_SIZE", "DATA.TRAIN_CROP_SIZE", "[8, 4, 4]"]),
    (MVIT_PT, ["DATA.NUM_FRAMES", "8"], ["AUG.MASK_WINDOW_SIZE", "DATA.NUM_FRAMES"]),
    (MVIT_PT, ["AUG.MASK_WINDOW_SIZE", "[7, 7]"], ["AUG.MASK_WINDOW_SIZE", "3 numbers"]),
    (VIT_FT, ["AUG.AA_TYPE", "original"], ["AUG.AA_TYPE", "original"]),
    (VIT_FT, ["DATA.INPUT_CHANNEL_NUM", "[3, 3]"], ["DATA.INPUT_CHANNEL_NUM", "[3, 3]"]),
    (VIT_FT, ["DATA.PATH_LABEL_SEPARATOR", ""], ["DATA.PATH_LABEL_SEPARATOR"]),
    (VIT_FT, ["OUTPUT_DIR", ""], ["OUTPUT_DIR"]),
    (VIT_FT, ["TASK", "../x"], ["TASK", "../x"]),
    (VIT_PT, ["DATA.TRAIN_JITTER_SCALES_RELATIVE", "[1.0, 0.5]"], ["SCALES_RELATIVE", "low"]),
    (VIT_FT, ["MVIT.DEPTH", "1000000000"], ["MVIT.DEPTH"]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "opts", "words"), WRONG, ids=lambda v: "-".join(v[:2]) if isinstance(v, list) else "")
def test_wrong_combinations(path, opts, words):
    load_config(path)
    with pytest.raises(ValueError) as caught:
        load_config(path, opts)
    for word in words:
        assert word in str(caught.value)


UNSUPPORTED = [
    ("MASK.MAE_ON", "True"),
    ("MASK.MAE_RND_MASK", "True"),
    ("MASK.PER_FRAME_MASKING", "True"),
    ("MASK.HEAD_TYPE", "separate_xformer"),
    ("MASK.SCALE_INIT_BY_DEPTH", "True"),
    ("DATA.COLOR_RND_GRAYSCALE", "0.2"),
    ("DATA.DUMMY_LOAD", "True"),
    ("DATA.ENSEMBLE_METHOD", "max"),
    ("DATA.IN22K_TRAINVAL", "True"),
    ("DATA.IN22k_VAL_IN1K", "in1k"),
    ("DATA.INV_UNIFORM_SAMPLE", "True"),
    ("DATA.LOADER_CHUNK_SIZE", "100"),
    ("DATA.REVERSE_INPUT_CHANNEL", "True"),
    ("DATA.SKIP_ROWS", "1"),
    ("DATA.SSL_COLOR_JITTER", "True"),
    ("DATA.SSL_MOCOV2_AUG", "True"),
    ("DATA.TIME_DIFF_PROB", "0.5"),
    ("DATA.FORMAT", "zip"),
    ("LOG.TRACKERS", "['csv', 'neptune']"),
    ("DATA.TRAIN_CROP_NUM_SPATIAL", "2"),
    ("DATA.TRAIN_CROP_NUM_TEMPORAL", "4"),
    ("DATA.TRAIN_JITTER_FPS", "0.5"),
    ("DATA.TRAIN_JITTER_MOTION_SHIFT", "True"),
    ("DETECTION.ENABLE", "True"),
    ("MODEL.DETACH_FINAL_FC", "True"),
    ("MODEL.FP16_ALLREDUCE", "True"),
    ("MODEL.FROZEN_BN", "True"),
    ("MULTIGRID.LONG_CYCLE", "True"),
    ("MULTIGRID.SHORT_CYCLE", "True"),
    ("TRAIN.CHECKPOINT_IN_INIT", "True"),
    ("MVIT.MODE", "max"),
    ("MVIT.NORM", "batchnorm"),
    ("MVIT.INIT", "xavier"),
    ("MVIT.LAYER_SCALE_INIT_VALUE", "1e-5"),
    ("MVIT.DIM_MUL_IN_ATT", "True"),
    ("MVIT.SEPARATE_QKV", "True"),
    ("MVIT.POOL_FIRST", "True"),
    ("MVIT.NORM_STEM", "True"),
    ("MVIT.REV.ENABLE", "True"),
    ("MVIT.USE_FIXED_SINCOS_POS", "True"),
    ("TRAIN.PARALLEL", "fsdp1"),
    ("TRAIN.CHECKPOINT_FORMAT", "dcp"),
    ("TRAIN.CHECKPOINT_TYPE", "caffe2"),
    ("TEST.CHECKPOINT_TYPE", "caffe2"),
    ("SOLVER.LARS_ON", "True"),
    ("SOLVER.OPTIMIZING_METHOD", "adam"),
    ("SOLVER.LR_POLICY", "exp"),
    ("RESNET.DEPTH", "26"),
    ("MFM.INVERSE", "imaginary"),
    ("MFM.TARGET_CHANNELS", "2"),
    ("DATA.TEST_INTERPOLATION", "box"),
    ("MODEL.ARCH", "slowfast"),
    ("MODEL.MODEL_NAME", "SlowFast"),
    ("MODEL.HEAD_ACT", "sigmoid"),
    ("MODEL.LOSS_FUNC", "bce"),
    ("DATA.DECODING_BACKEND", "decord"),
    ("DATA_LOADER.IMAGE_BACKEND", "turbo"),
    ("AUG.INTERPOLATION", "sharp"),
    ("AUG.RE_MODE", "grey"),
    ("AUG.RE_SPLIT", "True"),
    ("TEST.NUM_SPATIAL_CROPS", "2"),
    ("DIST_BACKEND", "mpi"),
]


@pytest.mark.parametrize(("key", "given"), UNSUPPORTED)
def test_unsupported_values(key, given):
    with pytest.raises(ValueError, match=f"{key} .*{re.escape(given)}|{key} 1e-05"):
        load_config(VIT_FT, [key, given])


def test_every_choice_is_tested():
    assert {key for key, _ in UNSUPPORTED} == set(RULES.choices)


# Keys of PySlowFast that are not read here and change no result of the models that are here; what INERT_SECTIONS holds
# belongs to other models and tools altogether.
HARMLESS = {
    "DATA.CROP_SIZE",  # of no model
    "DATA.DECODING_SHORT_SIZE",  # read nowhere there, either
    "DATA.LOADER_CHUNK_OVERALL_SIZE",  # of DATA.LOADER_CHUNK_SIZE
    "DATA.PATH_TO_PRELOAD_IMDB",  # of another data set
    "DATA.SSL_*",  # how strong what SSL_COLOR_JITTER and SSL_MOCOV2_AUG switch on is
    "DATA.TRAIN_PCA_EIGVAL",
    "DATA.TRAIN_PCA_EIGVEC",  # of other data sets
    "DATA_LOADER.ENABLE_MULTI_THREAD_DECODE",  # speed
    "MASK.DECODER_*",
    "MASK.DEC_KV_KERNEL",
    "MASK.DEC_KV_STRIDE",
    "MASK.NORM_PRED_PIXEL",
    "MASK.TIME_STRIDE_LOSS",  # of MASK.MAE_ON and other MASK.HEAD_TYPE, which are refused
    "MODEL.DROPCONNECT_RATE",  # of convolutions: refused for MODEL.ARCH resnet
    "MODEL.FC_INIT_STD",  # of heads of other models
    "MODEL.MULTI_PATHWAY_ARCH",
    "MODEL.SINGLE_PATHWAY_ARCH",  # lists of names
    "RESNET.INPLACE_RELU",  # memory
    "RESNET.NUM_BLOCK_TEMP_KERNEL",  # of clips
    "RESNET.NUM_GROUPS",
    "RESNET.SPATIAL_*",
    "RESNET.STRIDE_1X1",
    "RESNET.TRANS_FUNC",  # follows from RESNET.DEPTH
    "RESNET.WIDTH_PER_GROUP",
    "RESNET.ZERO_INIT_FINAL_CONV",  # refused for MODEL.ARCH resnet, like those above
    "SOLVER.STEP_SIZE",
    "SOLVER.WARMUP_FACTOR",  # of schedules that are refused
    "TENSORBOARD.CATEGORIES_PATH",
    "TENSORBOARD.CLASS_NAMES_PATH",
    "TENSORBOARD.PREDICTIONS_PATH",  # pictures
    "TRAIN.KILL_LOSS_EXPLOSION_FACTOR",  # when a run is given up
}


def test_a_key_without_effect_changes_no_result_or_has_one_value():
    assert {key for key in INERT_KEYS if key not in RULES.choices} == HARMLESS


# Numbers without a range: how they are checked instead.
OTHERWISE = {
    "DATA.INPUT_CHANNEL_NUM": "only [3]",
    "SOLVER.GAMMA": "without effect",
    "MASK.PRETRAIN_DEPTH": "only [MVIT.DEPTH - 1]",
    "MVIT.DIM_MUL": "block below MVIT.DEPTH, factor at most 100",
    "MVIT.HEAD_MUL": "the same",
    "MVIT.POOL_Q_STRIDE": "block below MVIT.DEPTH, strides at most 1024",
    "MVIT.POOL_KV_STRIDE": "the same",
}


def test_every_number_has_two_bounds():
    numbers = {key for key, kind in RULES.kinds.items() if re.search("int|float|number", kind)}
    assert {key for key in numbers - set(RULES.choices) if key not in RULES.ranges} == set(OTHERWISE)
    assert all(math.isfinite(bound) for key in numbers & set(RULES.ranges) for bound in RULES.ranges[key][:2])


LISTS = {
    "DATA.STD": "[{0}, {0}, {0}]",
    "DATA.MEAN": "[{0}, {0}, {0}]",
    "AUG.MASK_WINDOW_SIZE": "[8, 7, {0}]",
    "SOLVER.BETAS": "(0.9, {0})",
}


@pytest.mark.parametrize("number", [-1, 10**10])
@pytest.mark.parametrize("key", RULES.ranges)
def test_every_range_refuses(key, number):
    """Both are outside of every range."""
    pair = {"DATA.TRAIN_JITTER": "[{0}, {0}]", "MVIT.POOL_KV": "[1, 1, {0}]", "MVIT.PATCH_": "[1, {0}]"}
    shape = LISTS.get(key) or next((s for p, s in pair.items() if key.startswith(p)), "{0}")
    if key in ("SOLVER.STEPS", "SOLVER.LRS", "TEST.NUM_TEMPORAL_CLIPS"):
        shape = "[{0}]"
    with pytest.raises(ValueError) as caught:
        load_config(VIT_FT, [key, shape.format(number)])
    assert f"{key} must be {RULES.ranges[key].words}" in str(caught.value)


@pytest.mark.parametrize("key", RULES.lengths)
def test_every_length_refuses(key):
    with pytest.raises(ValueError, match=f"{key} must have"):
        load_config(VIT_FT, [key, "(1, 1, 1, 1)" if key != "SOLVER.BETAS" else "(0.5,)"])


ADAPTIVE = "[[0, 1, 8, 8], [1, 1, 4, 4], [2, 1, 4, 4], [3, 1, 2, 2]]"  # what PySlowFast writes beside [1, 8, 8]
FOUR_BLOCKS = ["MVIT.DEPTH", "4", "MVIT.DIM_MUL", "[[1, 2.0]]", "MVIT.HEAD_MUL", "[[1, 2]]", "MVIT.POOL_Q_STRIDE",
               "[[1, 1, 2, 2], [3, 1, 2, 2]]", "MVIT.POOL_KV_STRIDE_ADAPTIVE", "[1, 8, 8]"]  # fmt: skip

ALLOWED = [
    (MVIT_FT, [*FOUR_BLOCKS, "MVIT.POOL_KV_STRIDE", ADAPTIVE]),
    (VIT_FT, ["DATA.MEAN", "[0, 0, 0]", "DATA.STD", "[1, 1, 1]"]),
    (VIT_FT, ["BN.USE_PRECISE_STATS", "True"]),
    (VIT_FT, ["DATA.TIME_DIFF_PROB", "0", "DATA.IN22k_VAL_IN1K", "", "DATA.ENSEMBLE_METHOD", "sum"]),
    (VIT_FT, ["TRAIN.BATCH_SIZE", "1", "NUM_GPUS", "0"]),
    (VIT_FT, ["TRAIN.BATCH_SIZE", "1", "NUM_GPUS", "1"]),
    (VIT_FT, ["TEST.BATCH_SIZE", "3"]),
    (VIT_FT, ["TRAIN.ENABLE", "False", "TRAIN.BATCH_SIZE", "3"]),
    (VIT_FT, ["TRAIN.DATASET", "ImageNet", "TEST.DATASET", "IMAGENET", "TEST.ENABLE", "True"]),
    (VIT_FT, ["SOLVER.WARMUP_EPOCHS", "0"]),
    (VIT_PT, ["TRAIN.PARALLEL", "fsdp", "TRAIN.CHECKPOINT_FORMAT", "sharded", "TRAIN.MIXED_PRECISION", "fp16"]),
    (R50_FT, ["TRAIN.PARALLEL", "fsdp", "NUM_GPUS", "1", "SOLVER.OPTIMIZING_METHOD", "adamw"]),
    (VIT_FT, ["TRAIN.ENABLE", "False", "TRAIN.CHECKPOINT_FORMAT", "sharded"]),
    (VIT_FT, ["SOLVER.WARMUP_EPOCHS", "0.5", "SOLVER.MAX_EPOCH", "1"]),
    (VIT_FT, ["MIXUP.ENABLE", "False", "MODEL.LOSS_FUNC", "cross_entropy"]),
    (VIT_FT, ["MIXUP.ENABLE", "False"]),
    (VIT_FT, ["AUG.ENABLE", "False"]),
    (VIT_FT, KEPT),
    (VIT_FT, [*KEPT, "AUG.COLOR_JITTER", "0.0"]),
    (VIT_FT, [*KEPT_PT, "AUG.AA_TYPE", "ra_6_10", "AUG.COLOR_JITTER", "0.4", "AUG.RE_PROB", "0.25"]),
    (VIT_FT, ["DATA_LOADER.RESIDENT", "True", "TRAIN.ENABLE", "False", "TEST.ENABLE", "True"]),
    (VIT_PT, [*KEPT, "AUG.ENABLE", "True"]),
    (MFM_PT, [*KEPT, "AUG.ENABLE", "True"]),
    (R50_FT, KEPT_PT),
    (VIT_PT, ["AUG.MASK_RATIO", "0.0"]),
    (VIT_PT, ["MASK.SHUFFLE_TARGETS", "True"]),
    (
        VIT_PT,
        ["MASK.SHUFFLE_TARGETS", "True", "TRAIN.BATCH_SIZE", "16", "NUM_GPUS", "2", "TRAIN.MICRO_BATCH_SIZE", "3"],
    ),
    (VIT_PT, ["TRAIN.MICRO_BATCH_SIZE", "1"]),
    (VIT_FT, [*STEPS, "SOLVER.STEPS", "[0, 30]"]),
    (VIT_FT, ["NUM_SHARDS", "4", "SHARD_ID", "3"]),
    (VIT_FT, ["DATA.PATH_TO_DATA_DIR", "/no/such/folder"]),
    (VIT_PT, ["MVIT.DEPTH", "2", "MASK.PRETRAIN_DEPTH", "[1]", "DATA.TRAIN_CROP_SIZE", "64"]),
    (VIT_PT, ["MASK.HOG_CELL", "4", "MASK.HOG_BINS", "6", "MASK.HOG_GAUSSIAN_WINDOW", "16"]),
    (MVIT_PT, ["AUG.MASK_TUBE", "True"]),
    (MVIT_PT, ["AUG.MASK_WINDOW_SIZE", "[4, 14, 14]"]),
    (MVIT_PT, ["AUG.MASK_WINDOW_SIZE", "[8, 28, 28]"]),
    (MVIT_PT, ["DATA.TRAIN_CROP_SIZE", "112", "DATA.TEST_CROP_SIZE", "112"]),
    (VIT_FT, ["MODEL.LOSS_FUNC", "bce_logit", "AUG.AA_TYPE", "ra_9_31", "AUG.REPEATS", "3", "TRAIN.EMA", "0.9999"]),
    (R50_FT, ["DATA.TRAIN_CROP_SIZE", "161", "DATA.TEST_CROP_SIZE", "235"]),
    (R50_FT, ["MIXUP.ENABLE", "False", "MODEL.LOSS_FUNC", "cross_entropy"]),
    (R50_FT, ["RESNET.SPATIAL_STRIDES", "[[1], [2], [2], [2]]", "RESNET.SPATIAL_DILATIONS", "[[1], [1], [1], [1]]"]),
    (R50_FT, ["RESNET.NUM_GROUPS", "1", "RESNET.WIDTH_PER_GROUP", "64", "RESNET.STRIDE_1X1", "False"]),
    (MFM_VIT_PT, ["MODEL.ARCH", "maskmvit"]),
    (MFM_PT, ["DATA.TRAIN_CROP_SIZE", "64", "MFM.RADIUS", "32"]),
    (MVIT_FT, ["TEST.NUM_SPATIAL_CROPS", "3", "TEST.NUM_TEMPORAL_CLIPS", "[]"]),
]


@pytest.mark.parametrize(("path", "opts"), ALLOWED, ids=lambda v: "-".join(v[:2]) if isinstance(v, list) else "")
def test_right_combinations(path, opts):
    load_config(path, opts)


def test_all_problems_at_once():
    with pytest.raises(ValueError, match="the config has 2 problems") as caught:
        load_config(VIT_FT, ["DATA.TEST_CROP_SIZE", "220", "SHARD_ID", "9"])
    assert len(str(caught.value).splitlines()) == 3
