"""Lay out CIFAR-10 as folders: `python tools/prepare_cifar10.py SOURCE DIR`.

SOURCE is the official binary archive (cifar-10-binary.tar.gz), or a folder with it, or a folder with train.zip and
test.zip (train/<class>/<image>). DIR gets all/ and tenth/, each with train/ and val/: tenth/ has one in ten labelled
training images, both have all test images as val/.
"""

import argparse
import logging

from maskfeat.demos.cifar10 import prepare


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SOURCE", help="archive or folder")
    parser.add_argument("output", metavar="DIR", help="folder to write")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        prepare(args.source, args.output)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
