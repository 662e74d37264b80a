"""The keys of the config that belong to no single objective, backbone or data set, with their defaults.

One flat list of sections, read from top to bottom. Other keys are declared beside what they configure, in the function
that its spec names as `keys` (see `maskfeat.registry`): MVIT in models/mvit_config.py, RESNET in models/resnet.py,
MASK in objectives/maskfeat.py, MFM in objectives/mfm.py, MIXUP in objectives/classification.py.

Names and defaults are PySlowFast's, so that YAML files written for it mean the same here. Three of its
defaults name models that this project does not have (MODEL.ARCH, MODEL.MODEL_NAME, DATA.INPUT_CHANNEL_NUM):
ours name MViT. A key marked "ours" is not in PySlowFast. `KINDS` gives the type of keys whose default does not show
it.
"""

from yacs.config import CfgNode


def shared_defaults() -> CfgNode:
    """Return a fresh config that holds the keys of this file, not frozen."""
    cfg = CfgNode()
    _run(cfg)
    _train(cfg)
    _test(cfg)
    _data(cfg)
    _aug(cfg)
    _model(cfg)
    _solver(cfg)
    return cfg


def _run(cfg: CfgNode) -> None:
    cfg.PLUGINS = []  # ours: modules, by dotted name, that register further objectives, backbones and data sets
    cfg.TASK = ""  # name of the run, prefix of checkpoint names: [TASK_]checkpoint_epoch_00010.pyth
    cfg.OUTPUT_DIR = "."  # folder for checkpoints, logs and the saved config
    cfg.RNG_SEED = 1  # random seed
    cfg.NUM_GPUS = 1  # GPUs (processes) per machine; 0 = one process on the CPU
    cfg.NUM_SHARDS = 1  # number of machines
    cfg.SHARD_ID = 0  # index of this machine, 0 .. NUM_SHARDS - 1
    cfg.DIST_BACKEND = "nccl"  # backend of torch.distributed: "nccl" (GPUs) | "gloo" (CPU)
    cfg.HANG_MINUTES = 20.0  # ours: minutes without progress after which a run of several processes ends; 0 = never
    cfg.LOG_PERIOD = 10  # iterations between two progress lines
    cfg.LOG_MODEL_INFO = True  # log a table of the backbone's parameters, multiply-adds and activations at the start

    cfg.LOG = CfgNode()
    cfg.LOG.TRACKERS = []  # ours: where metrics go as well; "tensorboard" does what TENSORBOARD.ENABLE does
    cfg.LOG.REPORT = True  # ours: write OUTPUT_DIR/report.html when the run ends, see `maskfeat report`

    cfg.DATA_LOADER = CfgNode()
    cfg.DATA_LOADER.NUM_WORKERS = 8  # data workers per process; 0 = load in the training process
    cfg.DATA_LOADER.PIN_MEMORY = True  # page-locked batches: faster copies to a GPU
    # ours: "pil" | "simplejpeg" (JPEG decoding by that package, resizing by PyTorch; faster, slightly other pixels)
    cfg.DATA_LOADER.IMAGE_BACKEND = "pil"
    # ours: decode small images of one size once and keep them on the device, with cropping and masking there
    cfg.DATA_LOADER.RESIDENT = False

    cfg.TENSORBOARD = CfgNode()
    cfg.TENSORBOARD.ENABLE = True  # write event files (off in PySlowFast)
    cfg.TENSORBOARD.LOG_DIR = "tensorboard"  # folder below OUTPUT_DIR; files are in its sub-folder TASK

    cfg.VIS = CfgNode()
    # ours: epochs between two pictures of predictions in pre-training beside what is true, in OUTPUT_DIR/pictures and
    # TensorBoard, of the same validation samples each time (training samples where nothing is validated); also after
    # the first and the last epoch; 0 = none
    cfg.VIS.PERIOD = 0
    cfg.VIS.SAMPLES = 4  # ours: samples in such a picture


def _train(cfg: CfgNode) -> None:
    cfg.TRAIN = CfgNode()
    cfg.TRAIN.ENABLE = True  # train; False = test only
    cfg.TRAIN.DATASET = "kinetics"  # "imagenet" | "kinetics", or one of PLUGINS
    cfg.TRAIN.BATCH_SIZE = 64  # samples per optimizer step and machine, split over its GPUs
    cfg.TRAIN.MICRO_BATCH_SIZE = 0  # ours: samples per process and forward pass (accumulating gradients); 0 = all
    cfg.TRAIN.MIXED_PRECISION = False  # False ("off") | True ("fp16") | "bf16" | "fp16"
    # ours: multiply float32 matrices in TF32 (10 bits of mantissa instead of 23: relative errors of 1e-3), in training
    # and testing; convolutions do in any case, PyTorch's default
    cfg.TRAIN.TF32 = False
    # ours: let cuDNN choose the fastest algorithm of each convolution by trying them; runs then differ in the last
    # bits, also a resumed from an uninterrupted one. Not with torch.use_deterministic_algorithms
    cfg.TRAIN.CUDNN_BENCHMARK = False
    # ours: torch.compile for each block and the HOG targets; needs a C++ compiler on a CPU, and a C compiler on a GPU
    cfg.TRAIN.COMPILE = False
    cfg.TRAIN.PARALLEL = "ddp"  # ours: "ddp" (a full replica per process) | "fsdp" (sharded, FSDP2; adamw only)
    cfg.TRAIN.EMA = 0.0  # ours: decay per step of an exponential moving average of the weights; 0 = none
    # ours: consecutive skipped steps (loss or gradient not finite) that stop the run; fp16 may begin with 16 of them
    cfg.TRAIN.MAX_SKIPPED_STEPS = 20
    cfg.TRAIN.EVAL_PERIOD = 10  # epochs between two validations; 0 = never
    cfg.TRAIN.CHECKPOINT_PERIOD = 10  # epochs between two checkpoints
    cfg.TRAIN.CHECKPOINT_MINUTES = 30.0  # ours: minutes from one checkpoint to the next within an epoch; 0 = none
    cfg.TRAIN.KEEP_CHECKPOINTS = 0  # ours: how many to keep; 0 = all of ends of epochs, others while among the newest 2
    # ours: keep the checkpoint of the best validation (mAP or top-1; the loss of pre-training) as [TASK_]best.pyth
    cfg.TRAIN.KEEP_BEST = False
    cfg.TRAIN.CHECKPOINT_FORMAT = "gathered"  # ours: "gathered" (one file) | "sharded" (a folder, one shard a process)
    cfg.TRAIN.AUTO_RESUME = True  # resume from the newest checkpoint in OUTPUT_DIR
    # weights to load before training: path, http(s) address or a torchvision name; "" in fine-tuning: the newest
    # pre-training checkpoint in OUTPUT_DIR, if there is one
    cfg.TRAIN.CHECKPOINT_FILE_PATH = ""
    cfg.TRAIN.CHECKPOINT_TYPE = "pytorch"  # only "pytorch"
    # 2-D patch kernels in a 3-D model: False = at the centre frame | "average" = spread evenly over all frames
    cfg.TRAIN.CHECKPOINT_INFLATE = False
    cfg.TRAIN.CHECKPOINT_EPOCH_RESET = False  # load weights only and start at epoch 0 with a new optimizer
    cfg.TRAIN.CHECKPOINT_AVERAGE = False  # ours: load the averaged weights of the file (TRAIN.EMA)
    cfg.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN = ()  # strings to remove from the parameter names of the file
    # ours: glob patterns of parameters that may be missing in the file or left over; in tests left over only
    cfg.TRAIN.CHECKPOINT_ALLOW = []


def _test(cfg: CfgNode) -> None:
    cfg.TEST = CfgNode()
    cfg.TEST.ENABLE = True  # test after training, or alone
    cfg.TEST.DATASET = "kinetics"  # "imagenet" | "kinetics", or one of PLUGINS
    cfg.TEST.BATCH_SIZE = 8  # views per step and machine, split over its GPUs
    # ours: of validation and test, as TRAIN.MIXED_PRECISION is of training; False: in float32, as published
    cfg.TEST.MIXED_PRECISION = False
    # weights to test; "" = the newest in OUTPUT_DIR (published accuracies may be those of the best epoch, which
    # TRAIN.KEEP_BEST keeps), or else TRAIN.CHECKPOINT_FILE_PATH, with a warning
    cfg.TEST.CHECKPOINT_FILE_PATH = ""
    cfg.TEST.CHECKPOINT_TYPE = "pytorch"  # only "pytorch"
    cfg.TEST.NUM_ENSEMBLE_VIEWS = 10  # clips per video, evenly spaced
    cfg.TEST.NUM_TEMPORAL_CLIPS = []  # numbers of clips per video to test in turn; [] = TEST.NUM_ENSEMBLE_VIEWS
    cfg.TEST.NUM_SPATIAL_CROPS = 3  # spatial crops per clip: 1 (centre) | 3
    # JSON file of predictions in OUTPUT_DIR; the number of views is added to its name, and another suffix than .json
    # replaced; "" = test_results.json
    cfg.TEST.SAVE_RESULTS_PATH = ""


def _data(cfg: CfgNode) -> None:
    cfg.DATA = CfgNode()
    # holds train/, val/ and maybe test/, or train.csv, val.csv and test.csv; in pre-training any folder of images or
    # videos, or a list
    cfg.DATA.PATH_TO_DATA_DIR = ""
    # ours: several folders or lists to pre-train on instead: [[path, weight], ...]. An epoch has as many samples as all
    # together; weights are the shares of each in it
    cfg.DATA.SOURCES = []
    # ours: how the samples lie there: "auto" (as the files show) | "folder" (each in a file, of folders or a list) |
    # "tar" | "parquet" (many in a file, read in place)
    cfg.DATA.FORMAT = "auto"
    cfg.DATA.PATH_PREFIX = ""  # folder that the paths in a list of samples are relative to
    cfg.DATA.PATH_LABEL_SEPARATOR = " "  # between path and label in a line of the list; \t = a tab
    # ours: file with the names of the classes of lists, one a line, in the order of their labels; "" = classes.txt
    # beside the lists, where there is one
    cfg.DATA.CLASS_NAMES = ""
    # lists give each sample one or more labels, separated by commas: a sigmoid per class, mAP in evaluation
    cfg.DATA.MULTI_LABEL = False
    cfg.DATA.MEAN = [0.45, 0.45, 0.45]  # per colour channel, of pixels in [0, 1]
    cfg.DATA.STD = [0.225, 0.225, 0.225]  # the same
    cfg.DATA.NUM_FRAMES = 8  # frames per clip; 1 for images
    cfg.DATA.SAMPLING_RATE = 8  # distance between two sampled frames, in frames at DATA.TARGET_FPS
    cfg.DATA.TARGET_FPS = 30  # frame rate that DATA.SAMPLING_RATE refers to
    # ours: a clip is one frame from each of DATA.NUM_FRAMES equal segments of the video, a random one in training and
    # the central one otherwise; DATA.SAMPLING_RATE has no effect
    cfg.DATA.SEGMENT_SAMPLING = False
    cfg.DATA.USE_OFFSET_SAMPLING = False  # test clips start a whole number of frames apart
    # "pyav" and "torchvision" (the built-in PyAV decoder) | "torchcodec" (the same frames by that package)
    cfg.DATA.DECODING_BACKEND = "torchvision"
    # ours: decode frames at the short side DATA.TRAIN_JITTER_SCALES[0], by averaging areas, before crops, augmentation
    # and targets (as published) | False = at the file's own size, which is another recipe where files are not of that
    # size
    cfg.DATA.DECODER_SCALE = True
    cfg.DATA.INPUT_CHANNEL_NUM = [3]  # only [3]: one pathway of colour images
    cfg.DATA.TRAIN_CROP_SIZE = 224  # side of the training crop in pixels
    cfg.DATA.TEST_CROP_SIZE = 256  # side of the test crop in pixels
    cfg.DATA.IN_VAL_CROP_RATIO = 0.875  # images in evaluation: crop size over their short side before the crop
    cfg.DATA.TEST_SHORT_SIDE = 0  # ours: that short side in pixels; 0 = DATA.TEST_CROP_SIZE / DATA.IN_VAL_CROP_RATIO
    cfg.DATA.TEST_INTERPOLATION = "bicubic"  # ours: resizing of images in evaluation
    cfg.DATA.TRAIN_JITTER_SCALES = [256, 320]  # range of the short side in pixels; see also DECODER_SCALE
    cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE = []  # [low, high]: area of a crop relative to the image
    cfg.DATA.TRAIN_JITTER_ASPECT_RELATIVE = []  # [low, high]: width / height of such a crop
    cfg.DATA.RANDOM_FLIP = True  # horizontal flip with probability 0.5
    # ours: fraction of unreadable samples above which the run stops; 0 = none; else at least 3 may be (of fewer than 6
    # samples, half), and never all
    cfg.DATA.MAX_BAD_FRACTION = 0.01


def _aug(cfg: CfgNode) -> None:
    cfg.AUG = CfgNode()
    # use RandAugment, colour jitter, random erasing and copies; masks and INTERPOLATION do not need it
    cfg.AUG.ENABLE = False
    cfg.AUG.NUM_SAMPLE = 1  # differently augmented copies of each sample in a batch
    # ours: repeated augmentation: copies of a sample within the same batch size; an epoch shows 1 / REPEATS of the data
    cfg.AUG.REPEATS = 1
    cfg.AUG.COLOR_JITTER = 0.4  # strength of colour jitter of images; used where AUG.AA_TYPE is ""
    cfg.AUG.AA_TYPE = "rand-m9-mstd0.5-inc1"  # timm's RandAugment policy, or torchvision's ("ra_6_10"), or ""
    cfg.AUG.INTERPOLATION = "bicubic"  # of RandAugment and image crops
    cfg.AUG.RE_PROB = 0.25  # random erasing: probability, 0 .. 1
    cfg.AUG.RE_MODE = "pixel"  # fill: "pixel" (noise per pixel) | "rand" (one colour) | "const" (zero)
    cfg.AUG.RE_COUNT = 1  # largest number of erased boxes
    cfg.AUG.RE_SPLIT = False  # only False
    cfg.AUG.GEN_MASK_LOADER = False  # draw masks in the data workers (needed for MaskFeat)
    cfg.AUG.MASK_TUBE = False  # video masks: the same patches in every frame ...
    cfg.AUG.MASK_FRAMES = False  # ... or whole frames; neither = cubes
    cfg.AUG.MASK_WINDOW_SIZE = [8, 7, 7]  # (t, h, w) grid on which video masks are drawn
    cfg.AUG.MASK_RATIO = 0.0  # share of patches hidden, 0 .. 1; at 0 nothing is learned (a control)
    cfg.AUG.MAX_MASK_PATCHES_PER_BLOCK = None  # patches of a block, or of a cube in one frame, at most; None = no limit


def _model(cfg: CfgNode) -> None:
    cfg.MODEL = CfgNode()
    # "mvit", "maskmvit": ViT or MViTv2, as MVIT says | "resnet": see RESNET | one of PLUGINS
    cfg.MODEL.ARCH = "mvit"
    # "MViT", "ResNet" and, on any backbone, "Classification" classify; "MaskMViT" is pre-trained by masked feature
    # prediction, "MFM" by masked frequencies
    cfg.MODEL.MODEL_NAME = "MViT"
    cfg.MODEL.NUM_CLASSES = 400  # outputs of the classifier
    # "cross_entropy" | "soft_cross_entropy" | "bce_logit"; in pre-training "multi_mse" (MaskMViT), "frequency" (MFM)
    cfg.MODEL.LOSS_FUNC = "cross_entropy"
    cfg.MODEL.DROPOUT_RATE = 0.5  # dropout before the classifier
    cfg.MODEL.HEAD_ACT = "softmax"  # only "softmax", in evaluation
    # activation checkpointing: True = whole blocks (least memory, a third more time) | "light" = norms, activations
    # and pooling only (PySlowFast has no "light") | False
    cfg.MODEL.ACT_CHECKPOINT = False


def _solver(cfg: CfgNode) -> None:
    cfg.SOLVER = CfgNode()
    cfg.SOLVER.OPTIMIZING_METHOD = "sgd"  # "sgd" | "adamw"
    cfg.SOLVER.BASE_LR = 0.1  # learning rate after warm-up
    cfg.SOLVER.BASE_LR_SCALE_NUM_SHARDS = False  # multiply base, warm-up start and end learning rate by NUM_SHARDS
    cfg.SOLVER.LR_POLICY = "cosine"  # "cosine" | "steps_with_relative_lrs"
    cfg.SOLVER.LR_PER_EPOCH = False  # ours: change the learning rate between epochs only
    cfg.SOLVER.COSINE_END_LR = 0.0  # learning rate at the end of the cosine
    cfg.SOLVER.COSINE_AFTER_WARMUP = False  # start the cosine at the end of warm-up instead of epoch 0
    cfg.SOLVER.STEPS = []  # epochs at which the factors of SOLVER.LRS begin; the first is 0
    cfg.SOLVER.LRS = []  # factors on SOLVER.BASE_LR, one for each of SOLVER.STEPS
    cfg.SOLVER.GAMMA = 0.1  # accepted, without effect
    cfg.SOLVER.MAX_EPOCH = 300  # epochs of training
    cfg.SOLVER.WARMUP_EPOCHS = 0.0  # epochs of linear warm-up
    cfg.SOLVER.WARMUP_START_LR = 0.01  # learning rate at the start of warm-up
    # ours: warm up to SOLVER.BASE_LR and not to what the policy gives there, which is 1.1 % less after 20 of 300 epochs
    # of a cosine from epoch 0 (MFM's paper)
    cfg.SOLVER.WARMUP_TO_BASE_LR = False
    cfg.SOLVER.MOMENTUM = 0.9  # of sgd
    cfg.SOLVER.DAMPENING = 0.0  # of sgd
    cfg.SOLVER.NESTEROV = True  # of sgd
    cfg.SOLVER.BETAS = (0.9, 0.999)  # of adamw
    cfg.SOLVER.WEIGHT_DECAY = 1e-4  # of weights; see also ZERO_WD_1D_PARAM
    cfg.SOLVER.ZERO_WD_1D_PARAM = False  # no weight decay on biases and one-dimensional parameters
    cfg.SOLVER.LAYER_DECAY = 1.0  # layer-wise learning rate decay: factor per block towards the input; 1 = none
    cfg.SOLVER.CLIP_GRAD_VAL = None  # clip every gradient value to this; None = no clipping
    cfg.SOLVER.CLIP_GRAD_L2NORM = None  # clip the L2 norm of the gradient; None = no clipping


# The type of keys whose default does not show it. The others have the type of their default. In a "path", ~ and
# $VARIABLE are expanded.
KINDS: dict[str, str] = {
    "PLUGINS": "list[str]",
    "LOG.TRACKERS": "list[str]",
    "OUTPUT_DIR": "path",
    "TENSORBOARD.LOG_DIR": "path",
    "TRAIN.CHECKPOINT_FILE_PATH": "path",
    "TEST.CHECKPOINT_FILE_PATH": "path",
    "TEST.SAVE_RESULTS_PATH": "path",
    "DATA.PATH_TO_DATA_DIR": "path",
    "DATA.SOURCES": "list[source]",
    "DATA.PATH_PREFIX": "path",
    "DATA.CLASS_NAMES": "path",
    "TRAIN.MIXED_PRECISION": "precision",
    "TEST.MIXED_PRECISION": "precision",
    "TRAIN.CHECKPOINT_INFLATE": "inflation",
    "MODEL.ACT_CHECKPOINT": "recomputation",
    "TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN": "list[str]",
    "TRAIN.CHECKPOINT_ALLOW": "list[str]",
    "TEST.NUM_TEMPORAL_CLIPS": "list[int]",
    "DATA.MEAN": "list[float]",
    "DATA.STD": "list[float]",
    "DATA.INPUT_CHANNEL_NUM": "list[int]",
    "DATA.TRAIN_JITTER_SCALES": "list[int]",
    "DATA.TRAIN_JITTER_SCALES_RELATIVE": "list[float]",
    "DATA.TRAIN_JITTER_ASPECT_RELATIVE": "list[float]",
    "AUG.COLOR_JITTER": "float or None",
    "AUG.MASK_WINDOW_SIZE": "list[int]",
    "AUG.MAX_MASK_PATCHES_PER_BLOCK": "int or None",
    "SOLVER.STEPS": "list[number]",
    "SOLVER.LRS": "list[float]",
    "SOLVER.BETAS": "list[float]",
    "SOLVER.CLIP_GRAD_VAL": "float or None",
    "SOLVER.CLIP_GRAD_L2NORM": "float or None",
}

# Sections of PySlowFast's other models and tools: any key in them is accepted, kept, and has no effect.
INERT_SECTIONS = (
    "ASSEMBLE",
    "AVA",
    "BENCHMARK",
    "BN",
    "CONTRASTIVE",
    "DEMO",
    "DETECTION",
    "MULTIGRID",
    "NONLOCAL",
    "SLOWFAST",
    "SSL",
    "VIS_MASK",
    "X3D",
    "MVIT.REV",
    "TENSORBOARD.CONFUSION_MATRIX",
    "TENSORBOARD.HISTOGRAM",
    "TENSORBOARD.MODEL_VIS",
    "TENSORBOARD.WRONG_PRED_VIS",
)

# Single keys of that kind, and families of keys (ending in *).
INERT_KEYS = (
    "DATA.COLOR_RND_GRAYSCALE",
    "DATA.CROP_SIZE",
    "DATA.DECODING_SHORT_SIZE",
    "DATA.DUMMY_LOAD",
    "DATA.ENSEMBLE_METHOD",
    "DATA.IN22K_TRAINVAL",
    "DATA.IN22k_VAL_IN1K",
    "DATA.INV_UNIFORM_SAMPLE",
    "DATA.LOADER_CHUNK_OVERALL_SIZE",
    "DATA.LOADER_CHUNK_SIZE",
    "DATA.PATH_TO_PRELOAD_IMDB",
    "DATA.REVERSE_INPUT_CHANNEL",
    "DATA.SKIP_ROWS",
    "DATA.SSL_*",
    "DATA.TIME_DIFF_PROB",
    "DATA.TRAIN_CROP_NUM_SPATIAL",
    "DATA.TRAIN_CROP_NUM_TEMPORAL",
    "DATA.TRAIN_JITTER_FPS",
    "DATA.TRAIN_JITTER_MOTION_SHIFT",
    "DATA.TRAIN_PCA_EIGVAL",
    "DATA.TRAIN_PCA_EIGVEC",
    "DATA_LOADER.ENABLE_MULTI_THREAD_DECODE",
    "MASK.DECODER_*",
    "MASK.DEC_KV_KERNEL",
    "MASK.DEC_KV_STRIDE",
    "MASK.NORM_PRED_PIXEL",
    "MASK.SCALE_INIT_BY_DEPTH",
    "MASK.TIME_STRIDE_LOSS",
    "MODEL.DETACH_FINAL_FC",
    "MODEL.DROPCONNECT_RATE",
    "MODEL.FC_INIT_STD",
    "MODEL.FP16_ALLREDUCE",
    "MODEL.FROZEN_BN",
    "MODEL.MULTI_PATHWAY_ARCH",
    "MODEL.SINGLE_PATHWAY_ARCH",
    "MVIT.USE_FIXED_SINCOS_POS",
    "RESNET.INPLACE_RELU",
    "RESNET.NUM_BLOCK_TEMP_KERNEL",
    "RESNET.NUM_GROUPS",
    "RESNET.SPATIAL_*",
    "RESNET.STRIDE_1X1",
    "RESNET.TRANS_FUNC",
    "RESNET.WIDTH_PER_GROUP",
    "RESNET.ZERO_INIT_FINAL_CONV",
    "SOLVER.LARS_ON",
    "SOLVER.STEP_SIZE",
    "SOLVER.WARMUP_FACTOR",
    "TENSORBOARD.CATEGORIES_PATH",
    "TENSORBOARD.CLASS_NAMES_PATH",
    "TENSORBOARD.PREDICTIONS_PATH",
    "TRAIN.CHECKPOINT_IN_INIT",
    "TRAIN.KILL_LOSS_EXPLOSION_FACTOR",
)
