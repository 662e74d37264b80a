"""Make the synthetic data sets: `python tools/make_synthetic.py --images DIR --clips DIR`.

Small by default. At the size of ImageNet and Kinetics, to measure reading speed:

    python tools/make_synthetic.py --images DIR --size 400x500 --per-class 128
    python tools/make_synthetic.py --clips DIR --size 256x340 --frames 300 --per-class 10
"""

import argparse
import logging

from maskfeat.demos.synthetic import make_clips, make_images


def height_by_width(text: str) -> tuple[int, int]:
    """'96x128' -> (96, 128)."""
    height, _, width = text.partition("x")
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", metavar="DIR", help="write images here: 8 shapes, train/ and val/")
    parser.add_argument("--clips", metavar="DIR", help="write clips here: 6 motions, train, val and test.csv")
    parser.add_argument("--size", metavar="HxW", type=height_by_width, help="96x96 images, 96x128 clips")
    parser.add_argument("--per-class", type=int, help="training samples of a class: 75 images, 40 clips")
    parser.add_argument("--val-per-class", type=int, help="held-out ones a split: 25 images, 10 clips")
    parser.add_argument("--frames", type=int, default=32, help="frames of a clip (default %(default)s)")
    parser.add_argument("--fps", type=int, default=30, help="frames a second (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same pixels (default %(default)s)")
    parser.add_argument("--difficulty", type=float, default=0.1, help="0 to 1 (default %(default)s)")
    args = parser.parse_args()
    if not (args.images or args.clips):
        parser.error("give --images DIR, --clips DIR or both")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    common = {"seed": args.seed, "difficulty": args.difficulty}
    if args.size:
        common["size"] = args.size
    held_out = args.val_per_class
    try:
        if args.images:
            counts = {"train_per_class": args.per_class, "val_per_class": held_out}
            make_images(args.images, **common, **{k: v for k, v in counts.items() if v is not None})
        if args.clips:
            counts = {
                "train_per_class": args.per_class,
                "val_per_class": held_out,
                "test_per_class": held_out,
            }
            counts = {k: v for k, v in counts.items() if v is not None}
            make_clips(args.clips, num_frames=args.frames, fps=args.fps, **common, **counts)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
