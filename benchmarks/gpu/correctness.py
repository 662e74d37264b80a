"""Parts that check results on the GPU: against golden values, against the CPU, and against themselves."""

import torch

from benchmarks.gpu import goldens, kernels, loading, runs, steps, trained
from benchmarks.gpu.checks import all_of
from benchmarks.gpu.parts import CORRECTNESS, Part

_GOLDENS = Part(
    "goldens",
    CORRECTNESS,
    75,
    all_of(
        {
            "trajectories": goldens.trajectories,
            "mfm_resnet50": goldens.mfm_resnet50,
            "full_size_goldens": goldens.full_size_goldens,
        }
    ),
    covers=("optim/optimizers.py:make_optimizer",),
)
_TRANSFORMERS = Part(
    "transformers on CPU and GPU",
    CORRECTNESS,
    60,
    all_of({name: goldens.against_cpu(name) for name in ("ViT-B", "MViTv2-S")}),
    covers=(
        "models/pooling.py:_PoolTokens.backward",
        "models/pooling.py:_forward",
        "models/pooling.py:_working_dtype",
    ),
)
_STEPS = Part(
    "steps",
    CORRECTNESS,
    60,
    all_of(
        {
            "quiet_steps": steps.quiet_steps,
            "loss_scaling": steps.loss_scaling,
            "moving_average": steps.moving_average,
            "memory": steps.memory,
            "named": steps.named,
        }
    ),
    covers=("engine/provenance.py:machine",),
)
_HOG = Part("HOG", CORRECTNESS, 30, all_of({"hog_bins": kernels.hog_bins}))
_TRITON = Part(
    "Triton pooling",
    CORRECTNESS,
    200,  # most of it to compile
    all_of({"bfloat16": kernels.triton_pooling(torch.bfloat16), "float32": kernels.triton_pooling(torch.float32)}),
    covers=(
        "models/pooling.py:_kernels_for",
        "models/pooling.py:_triton_kernels",
        "models/pooling_kernels.py",
        "models/pooling_triton.py",
    ),
    environment={"MASKFEAT_TRITON": "1"},
)
_RESNET = Part(
    "ResNet on CPU and GPU",
    CORRECTNESS,
    40,
    all_of({"ResNet-50": goldens.against_cpu("ResNet-50"), "channels_last": goldens.channels_last}),
    covers=("models/resnet.py:ResNet.forward_tokens",),
)
_DATA = Part(
    "data and evaluation",
    CORRECTNESS,
    40,
    all_of(
        {
            "batches": loading.batches_on_the_device,
            "pinned_memory": loading.pinned_memory,
            "evaluation": loading.evaluation,
        }
    ),
    covers=("data/collate.py:PackedBatch.pin_memory", "data/loader.py:Loader.__init__"),
)
_TRAINED = Part(
    "trained networks",
    CORRECTNESS,
    40,
    all_of({"features": trained.features, "extracted": trained.extracted, "exports": trained.exports}),
    covers=("analysis/command.py:load", "analysis/inputs.py:input_loader", "analysis/model.py:chosen_device"),
)
_RESUMED = Part(
    "killed and resumed",
    CORRECTNESS,
    75,
    all_of({"resumed": runs.resumed, "dry_run": runs.dry_run}),
    covers=(
        "distributed/launch.py:check_devices",
        "distributed/world.py:choose_device",
        "engine/dry_run.py:DryRun._check_memory",
        "engine/dry_run.py:DryRun._time",
        "engine/progress.py:ProgressMeter.write",
        "engine/setup.py:_announce",
    ),
)
_ONE_RANK = Part("NCCL, DDP and FSDP2 with one rank", CORRECTNESS, 40, all_of({"one_rank": runs.one_rank}))
_LAUNCHED = Part(
    "launched",
    CORRECTNESS,
    60,
    all_of({"launched": runs.launched}),
    covers=("config/defaults.py:_run", "config/ranges.py", "distributed/collectives.py:init_process_group"),
)
_COMPILED = Part("compiled", CORRECTNESS, 90, all_of({"compiled": kernels.compiled}))

PARTS: tuple[Part, ...] = (
    _GOLDENS,
    _TRANSFORMERS,
    _STEPS,
    _HOG,
    _RESNET,
    _DATA,
    _TRAINED,
    _RESUMED,
    _ONE_RANK,
    _LAUNCHED,
    _COMPILED,
)
LAST: tuple[Part, ...] = (_TRITON,)
"""Takes the longest, and no run uses it unless asked to."""
