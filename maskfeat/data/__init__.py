"""Data sets of images and videos: decoding, augmentation and loading. Does not import models or objectives."""
