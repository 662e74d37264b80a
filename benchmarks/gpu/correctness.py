"""Parts that check results on the GPU: against golden values, against the CPU, and against themselves."""

import torch

from benchmarks.gpu import goldens, kernels, loading, runs, steps
from benchmarks.gpu.checks import all_of
from benchmarks.gpu.parts import CORRECTNESS, Part

PARTS: tuple[Part, ...] = (
    Part(
        "goldens",
        CORRECTNESS,
        60,
        all_of(
            {
                "trajectories": goldens.trajectories,
                "full_size_goldens": goldens.full_size_goldens,
                "mfm_resnet50": goldens.mfm_resnet50,
            }
        ),
        covers=("optim/optimizers.py:make_optimizer",),
    ),
    Part(
        "vit and mvit on cpu and gpu",
        CORRECTNESS,
        60,
        all_of({name: goldens.against_cpu(name) for name in ("ViT-B", "MViTv2-S")}),
        covers=("models/pooling.py:_PoolTokens.backward", "models/pooling.py:_working_dtype"),
    ),
    Part(
        "steps",
        CORRECTNESS,
        90,
        all_of(
            {
                "quiet_steps": steps.quiet_steps,
                "loss_scaling": steps.loss_scaling,
                "moving_average": steps.moving_average,
            }
        ),
    ),
    Part("hog", CORRECTNESS, 40, all_of({"hog_bins": kernels.hog_bins})),
    Part(
        "triton pooling",
        CORRECTNESS,
        60,
        all_of(
            {
                "float32": kernels.triton_pooling(torch.float32),
                "bfloat16": kernels.triton_pooling(torch.bfloat16),
            }
        ),
        environment={"MASKFEAT_TRITON": "1"},
    ),
    Part(
        "resnet on cpu and gpu",
        CORRECTNESS,
        40,
        all_of(
            {
                "ResNet-50": goldens.against_cpu("ResNet-50"),
                "channels_last": goldens.channels_last,
            }
        ),
        covers=("models/resnet.py:ResNet.forward_tokens",),
    ),
    Part(
        "data and evaluation",
        CORRECTNESS,
        60,
        all_of(
            {
                "batches": loading.batches_on_the_device,
                "pinned_memory": loading.pinned_memory,
                "evaluation": loading.evaluation,
            }
        ),
    ),
    Part("killed and resumed", CORRECTNESS, 90, all_of({"resumed": runs.resumed})),
    Part("processes", CORRECTNESS, 90, all_of({"one_rank": runs.one_rank, "launched": runs.launched})),
    Part("compiled", CORRECTNESS, 90, all_of({"compiled": kernels.compiled})),
)
